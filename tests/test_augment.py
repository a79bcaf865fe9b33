from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from ltdd_scale.data import augment
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.runtime.ranks import rng


def crop(images, window, size, mirrored=False):
    n = len(images)
    return augment.crop_resize(
        images, torch.tensor([window] * n, dtype=torch.float32), torch.full((n,), mirrored), size
    )


def test_the_whole_image_at_its_size_is_itself_and_mirrors():
    x = torch.rand(2, 3, 9, 9)
    assert torch.allclose(crop(x, [0, 0, 1, 1], 9), x, atol=1e-6)
    assert torch.allclose(crop(x, [0, 0, 1, 1], 9, True), x.flip(3), atol=1e-6)


@pytest.mark.parametrize("size", [7, 16, 40])
def test_windows_are_resampled_as_pillow_does(size):
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    x = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None].float()
    box = (4, 2, 20, 14)  # left, upper, right, lower
    ours = crop(x, [2 / 20, 4 / 24, 12 / 20, 16 / 24], size)[0]
    planes = [
        Image.fromarray(picture[:, :, c].astype(np.float32), "F")
        .crop(box)
        .resize((size, size), Image.Resampling.BILINEAR)
        for c in range(3)
    ]
    theirs = torch.from_numpy(np.stack([np.asarray(p) for p in planes]))
    inner = slice(
        2, -2
    )  # at the border ours sees the pixels beyond the window, a crop before the resize does not
    assert torch.allclose(
        ours[:, inner, inner], theirs[:, inner, inner], atol=0.02 if size > 16 else 4
    )


def test_a_shift_leaves_zeros():
    x = torch.ones(1, 1, 8, 8)
    out = crop(x, [2 / 8, -3 / 8, 1, 1], 8)[0, 0]
    assert (
        torch.allclose(out[:6, 3:], torch.ones(6, 5))
        and float(out[6:].abs().max()) < 1e-6
        and float(out[:, :3].abs().max()) < 1e-6
    )


def test_the_gradient_is_the_adjoint():
    x = torch.rand(2, 3, 6, 6, requires_grad=True)
    windows, mirrored = (
        torch.tensor([[0.1, 0.2, 0.7, 0.6], [0.0, 0.0, 0.5, 0.9]]),
        torch.tensor([True, False]),
    )
    y = augment.crop_resize(x, windows, mirrored, 5)
    g = torch.rand_like(y)
    (back,) = torch.autograd.grad(y, x, g)
    v = torch.rand_like(x)
    assert torch.allclose(
        (augment.crop_resize(v, windows, mirrored, 5) * g).sum(), (v * back).sum(), rtol=1e-5
    )


@given(
    st.integers(1, 50),
    st.integers(4, 300),
    st.integers(4, 300),
    st.floats(0.01, 1.0),
    st.integers(0, 1000),
)
def test_crop_windows_lie_in_the_image(n, width, height, low, seed):
    views = ViewSpec(8, (low, 1.0)).draw(rng(seed), np.tile([width, height], (n, 1)))
    top, left, h, w = views.windows.T
    assert (views.windows >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= 1 + 1e-5).all() and (left + w <= 1 + 1e-5).all()


def test_crop_areas_and_shapes_are_random_resized_crops():
    """The same law as torchvision's, by their means over many draws."""
    torch.manual_seed(0)
    crops = v2.RandomResizedCrop(8, (0.2, 1.0))
    drawn = [crops.make_params([torch.empty(3, 400, 600)]) for _ in range(5000)]
    theirs = np.asarray([(d["height"], d["width"]) for d in drawn]) / [400, 600]
    ours = ViewSpec(8, (0.2, 1.0)).draw(rng(0), np.tile([600, 400], (5000, 1))).windows[:, 2:]
    assert np.allclose(ours.mean(0), theirs.mean(0), atol=0.01) and np.allclose(
        ours.std(0), theirs.std(0), atol=0.01
    )


@pytest.mark.parametrize("op", range(augment.NUM_OPS))
def test_every_operation_gives_images(op):
    x = torch.rand(3, 3, 16, 16)
    views = Views(
        np.tile(np.float32([0, 0, 1, 1]), (3, 1)),
        np.zeros(3, bool),
        np.full((3, 1), op),
        np.asarray([[True], [False], [True]]),
    )
    y = augment.apply(x, views, ViewSpec(16, randaugment=1))
    assert y.shape == x.shape and float(y.min()) >= 0 and float(y.max()) <= 1
    assert torch.allclose(y, x, atol=1e-5) == (op == 0)
    alone = augment.apply(x[1:2], views[1:2], ViewSpec(16, randaugment=1))
    assert torch.allclose(alone[0], y[1], atol=1e-5), "a view does not depend on its batch"


@pytest.mark.parametrize("size", [2, 8, 33])
@pytest.mark.parametrize("sign", [False, True])
def test_what_is_made_without_torchvision_is_torchvisions_to_the_bit(size, sign):
    """Moves by the pixels' numbers, and sharpness with a kernel of its own."""
    x, s = torch.rand(5, 3, size, size), -1.0 if sign else 1.0
    angle = s * float(np.degrees(np.arctan(0.3 * 0.3)))
    shift = int(s * 0.3 * 150 / 331 * size)
    affine = partial(v2.functional.affine, x, 0.0, scale=1.0)
    shear = partial(affine, translate=[0, 0], center=[0.0, 0.0])
    theirs = {
        1: shear(shear=[angle, 0.0]),
        2: shear(shear=[0.0, angle]),
        3: affine(translate=[shift, 0], shear=[0.0, 0.0]),
        4: affine(translate=[0, shift], shear=[0.0, 0.0]),
        5: v2.functional.rotate(x, s * 9),
        9: v2.functional.adjust_sharpness(x, 1 + s * 0.9 * 0.3),
    }
    for op, expected in theirs.items():
        assert torch.equal(augment._apply_op(x, op, sign, 9), expected)
        assert size == 2 or not torch.equal(expected, x)


def test_operations_of_a_batch_are_those_of_its_images():
    """Whatever stands beside an image, and in whatever order."""
    x, spec = torch.rand(30, 3, 8, 8), ViewSpec(8, randaugment=3)
    views = spec.draw(rng(0), np.full((30, 2), 8))
    together = augment.apply_ops(x, views, spec)
    for i in range(30):
        alone = x[i : i + 1]
        for op, sign in zip(views.ops[i], views.signs[i], strict=True):
            alone = augment._apply_op(alone, int(op), bool(sign), 9)
            alone = alone.clamp(0, 1) if op else alone
        assert torch.allclose(together[i], alone[0], atol=1e-6)


@given(st.integers(1, 40), st.integers(4, 64), st.integers(0, 100))
def test_cutmix_shares_are_the_areas(n, size, seed):
    boxes, lam = augment.cutmix_boxes(rng(seed), n, size)
    mixed = augment.paste(torch.zeros(n, 1, size, size), torch.ones(n, 1, size, size), boxes)
    assert np.allclose(1 - mixed.mean((1, 2, 3)).numpy(), lam, atol=1e-5)


def test_whole_images_are_centre_squares():
    sizes = np.array([[500, 375], [360, 640], [64, 64], [333, 500]])
    views = ViewSpec(32, (1.0, 1.0)).draw(np.random.default_rng(0), sizes)
    boxes = augment.pixel_boxes(views.windows, sizes)
    assert (boxes == augment.centre_boxes(sizes)).all()
    assert views.windows[2].tolist() == [0, 0, 1, 1]
