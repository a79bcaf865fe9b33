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


def drawn_both_ways(kind, size, n):
    whole = siamese.draw(rng(3, kind), (kind,), size)
    return whole, siamese.draw_each(rng(3, kind), (kind,), size, n)


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_agrees_with_finite_differences(kind, way):
    drawn = drawn_both_ways(kind, 12, 2)[way]
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


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_gets_its_own_parameters_and_no_others(kind):
    drawn = siamese.draw_each(rng(5, kind), (kind,), 12, 6)
    assert drawn == siamese.draw_each(rng(5, kind), (kind,), 12, 6)
    assert drawn.kind == kind and len(set(drawn.values)) > 1 and hash(drawn)
    x = images(6)
    changed = siamese.apply(x, drawn)
    for k, values in enumerate(drawn.values):
        alone = siamese.apply(x[k : k + 1], Draw(kind, values))
        assert torch.allclose(changed[k : k + 1], alone, atol=1e-6)
    with pytest.raises(ValueError, match="a draw for 6 images, and there are 5"):
        siamese.apply(x[:5], drawn)


def test_every_kind_is_drawn_for_each_too_and_one_a_batch():
    strategy = siamese.choices(siamese.ALL)
    draws = [siamese.draw_each(rng(0, "dsa", t), strategy, 12, 3) for t in range(60)]
    assert {d.kind for d in draws} == set(KINDS) and all(len(d.values) == 3 for d in draws)
    assert siamese.draw_each(rng(0), (), 8, 3) == Draw("none")
    x = images()
    assert siamese.apply(x, Draw("none")) is x


def test_draws_are_those_of_always():
    """Sets were made with these numbers."""
    known = {
        "color": (-0.3009493634779773, 0.1095469332096104, 0.7677014312176126),
        "crop": (-0.125, -0.09375),
        "cutout": (0.09375, 0.1875),
        "flip": (1.0,),
        "scale": (0.9063185667247416, 0.8534169377550953),
        "rotate": (-9.028480904339318,),
    }
    for kind, values in known.items():
        assert siamese.draw(rng(7, "known"), (kind,), 32) == Draw(kind, values)


def sheared(x, slope, width):
    """The matrix form of a shear, in double precision."""
    height, source = x.shape[2:]
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    to = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    at = to[None, :] + slope * y[:, None] + (source - 1) / 2
    pixels = torch.arange(source, dtype=torch.float64)
    matrices = (1 - (pixels - at[:, :, None]).abs()).clamp(min=0)
    return torch.einsum("hvw,nchw->nchv", matrices, x)


@pytest.mark.parametrize("size", [8, 9, 32])
def test_a_rotation_and_its_gradient_are_those_of_the_matrices(size):
    degrees = np.array([15.0, -3.0, 0.0, -14.2, 44.0])
    x = images(5, size).requires_grad_()
    weights = images(5, size, seed=2)
    exact = []
    for k, angle in enumerate(np.radians(degrees)):
        slope, one = np.tan(angle / 2), x[k : k + 1].double()
        wide = size + 2 * int(np.ceil(abs(slope) * size / 2))
        one = sheared(one, -slope, wide).transpose(2, 3)
        exact.append(sheared(sheared(one, np.sin(angle), size).transpose(2, 3), -slope, size))
    exact, ours = torch.cat(exact), siamese.rotate(x, degrees)
    assert torch.allclose(ours.double(), exact, atol=1e-5)
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, exact)]
    assert torch.allclose(*grads, atol=1e-5) and grads[0].abs().sum() > 0
    whole = torch.cat([siamese.rotate(x[k : k + 1], d) for k, d in enumerate(degrees)])
    assert torch.allclose(ours, whole, atol=1e-6)


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
