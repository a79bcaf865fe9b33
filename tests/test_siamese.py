import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from ltdd_scale.data import siamese
from ltdd_scale.data.siamese import KINDS, Draw
from ltdd_scale.errors import UserError
from ltdd_scale.runtime.ranks import rng

NOTHING = {
    "color": (0.0, 1.0, 1.0),
    "crop": (0.0, 0.0),
    "cutout": (-1.0, -1.0),
    "flip": (0.0,),
    "scale": (1.0, 1.0),
    "rotate": (0.0,),
}


def images(n=3, size=12, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def smooth(size=32):
    """Images without sharp edges, so that interpolation is not what is compared."""
    at = torch.linspace(-3, 3, size)
    waves = [
        torch.sin(at[:, None] * a + at[None, :] * b + a) for a, b in ((1, 0.5), (0.3, 1), (2, 1))
    ]
    return torch.stack(waves)[None]


@pytest.mark.parametrize("kind", KINDS)
def test_identity_parameters_give_the_image(kind):
    x = images()
    assert torch.allclose(siamese.apply(x, Draw(kind, NOTHING[kind])), x, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_agrees_with_finite_differences(kind):
    drawn = siamese.draw(rng(3, kind), (kind,), 12)
    x, direction = images(2), images(2, seed=1)
    weights = images(2, seed=2)

    def value(at):
        return (siamese.apply(at, drawn) * weights).sum()

    x.requires_grad_()
    (grad,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        difference = (value(x + 0.5 * direction) - value(x - 0.5 * direction)).double()
    assert grad.abs().sum() > 0
    assert torch.isclose((grad * direction).sum().double(), difference, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10_000), st.sampled_from([8, 12, 32]))
def test_a_draw_depends_on_its_generator_alone_and_keeps_its_limits(seed, size):
    strategy = siamese.choices(siamese.ALL)
    one = siamese.draw(rng(seed, "dsa", 7), strategy, size)
    assert one == siamese.draw(rng(seed, "dsa", 7), strategy, size)
    low, high = {
        "color": ([-0.5, 0, 0.5], [0.5, 2, 1.5]),
        "crop": ([-1 / 8 - 0.5 / size] * 2, [1 / 8 + 0.5 / size] * 2),
        "cutout": ([0, 0], [1, 1]),
        "flip": ([0], [1]),
        "scale": ([1 / 1.2] * 2, [1.2] * 2),
        "rotate": ([-15], [15]),
    }[one.kind]
    assert np.all(np.asarray(one.values) >= low) and np.all(np.asarray(one.values) <= high)


def test_every_kind_is_drawn_and_a_draw_is_the_same_for_every_image():
    strategy = siamese.choices(siamese.ALL)
    draws = [siamese.draw(rng(0, "dsa", t), strategy, 12) for t in range(60)]
    assert {d.kind for d in draws} == set(KINDS)
    x = images(4)
    for one in draws:
        whole = siamese.apply(x, one)
        assert whole.shape == x.shape
        for k in range(4):
            assert torch.allclose(siamese.apply(x[k : k + 1], one), whole[k : k + 1], atol=1e-6)


def test_strategies():
    assert siamese.choices("") == () and siamese.draw(rng(0), (), 8) == Draw("none")
    assert siamese.choices("crop_flip", mirror=False) == ("crop",)
    with pytest.raises(UserError, match="'blur' is none of color"):
        siamese.choices("crop_blur")


@pytest.mark.parametrize("degrees", [0.0, 15.0, -7.5])
def test_rotation_is_torchvisions(degrees):
    x = smooth()
    ours = siamese.rotate(x, degrees)
    theirs = tvf.rotate(x, degrees, InterpolationMode.BILINEAR)
    inside = (slice(None), slice(None), slice(7, 25), slice(7, 25))
    assert torch.allclose(ours[inside], theirs[inside], atol=0.03)
    covered = tvf.rotate(torch.ones_like(x), degrees, InterpolationMode.BILINEAR)
    assert (siamese.rotate(torch.ones_like(x), degrees) - covered).abs().mean() < 0.02


def test_shift_cutout_flip_and_colours_are_what_they_say():
    x = images(size=8)
    moved = siamese.apply(x, Draw("crop", (1 / 8, 0.0)))
    assert torch.allclose(moved[:, :, :-1], x[:, :, 1:], atol=1e-6) and not moved[:, :, -1].any()
    cut = siamese.apply(x, Draw("cutout", (0.5, 0.5)))
    assert not cut[:, :, 2:6, 2:6].any() and torch.equal(cut[:, :, :2], x[:, :, :2])
    assert torch.equal(siamese.apply(x, Draw("flip", (1.0,))), x.flip(3))
    grey = siamese.apply(x, Draw("color", (0.25, 0.0, 1.0)))
    assert torch.allclose(grey[:, 0], x.mean(1) + 0.25, atol=1e-6)
    flat = siamese.apply(x, Draw("color", (0.0, 1.0, 0.5)))
    assert torch.allclose(flat.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-6)
    assert torch.allclose(flat.std(), x.std() / 2, rtol=0.1)
    large = siamese.apply(smooth(), Draw("scale", (0.85, 0.85)))
    small = siamese.apply(smooth(), Draw("scale", (1.2, 1.2)))
    assert large[0, :, 0, 0].abs().sum() > 0 and not small[0, :, 0, 0].any()
