import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ltdd_scale import recover
from ltdd_scale.config import Recover
from ltdd_scale.models import registry
from ltdd_scale.runtime.ranks import Ranks


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 100), st.integers(0, 20))
def test_chunks_hold_every_image_once(num_classes, ipc, batch_size, chunk_classes):
    work = recover.chunks(num_classes, ipc, batch_size, chunk_classes)
    held = [(c, i) for chunk in work for c in chunk.classes for i in range(chunk.first, chunk.last)]
    assert sorted(held) == [(c, i) for c in range(num_classes) for i in range(ipc)]
    assert all(len(chunk.labels) <= max(batch_size, 1) for chunk in work) and [
        c.number for c in work
    ] == list(range(len(work)))


def test_a_chunk_mixes_head_and_tail():
    chunk = recover.chunks(1000, 10, 100)[0]
    assert len(chunk.classes) == 100 and chunk.classes[0] == 0 and chunk.classes[-1] == 990


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (2, 8, 16, 16)])
def test_channel_moments_and_their_gradient(shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 0.5).requires_grad_()
    a, b = torch.rand(shape[1]), torch.rand(shape[1])
    same, mean, var = recover.ChannelMoments.apply(x)
    c = torch.randn(shape)
    ref_var, ref_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.allclose(mean, ref_mean, atol=1e-6) and torch.allclose(var, ref_var, rtol=1e-5)
    (ours,) = torch.autograd.grad((mean * a + var * b).sum() + (same * c).sum(), x)
    (reference,) = torch.autograd.grad((ref_mean * a + ref_var * b).sum() + (x * c).sum(), x)
    assert torch.allclose(ours, reference, atol=1e-7)


def observer():
    torch.manual_seed(0)
    return (
        registry.TwoHeads(registry.backbone("convnet3", 6, "batch", 8), 3, 0)
        .eval()
        .requires_grad_(False)
    )


def aligned(model, settings, goal=0.3):
    layers = registry.norm_layers(model)
    targets = {
        n: [(1.0, torch.full((m.num_features,), goal), torch.ones(m.num_features))]
        for n, m in layers.items()
    }
    return recover.Alignment(layers, targets, settings)


def test_the_average_is_right_from_its_first_step_and_its_gradient_is_the_batchs():
    model, x = observer(), torch.randn(5, 3, 8, 8, requires_grad=True)
    plain, averaged = aligned(model, Recover(ema=0.0)), None
    model(x)
    loss = plain.loss()
    plain.close()
    averaged = aligned(model, Recover(ema=0.8))
    model(x)
    first = averaged.loss()
    assert torch.equal(first, loss), "an average that starts at 0 would give another value"
    assert torch.allclose(torch.autograd.grad(first, x)[0], torch.autograd.grad(loss, x)[0])
    name = next(iter(registry.norm_layers(model)))
    before = averaged.average[name][0].clone()
    model(x.detach() + 1)
    averaged.loss()
    now = torch.randn(0)
    inputs = []
    handle = dict(model.named_modules())[name].register_forward_pre_hook(
        lambda _, i: inputs.append(i[0])
    )
    model(x.detach() + 1)
    handle.remove()
    now = inputs[0].mean((0, 2, 3))
    averaged.terms = []
    averaged.close()
    assert not torch.allclose(before, now, atol=1e-4)


def test_first_layer_weight_and_terms():
    model, x = observer(), torch.randn(4, 3, 8, 8)
    values = []
    for weight in (1.0, 10.0):
        alignment = aligned(model, Recover(ema=0.0, first_layer=weight))
        model(x)
        terms = [float(t) for t in alignment.terms]
        alignment.close()
        values.append(terms)
    assert (
        len(values[0]) == 3
        and np.isclose(values[1][0], 10 * values[0][0])
        and np.allclose(values[1][1:], values[0][1:])
    )


def chunk_result(images, settings, resume=None, saved=None, teacher=None):
    model = observer()
    alignment = aligned(model, settings)
    n, t = len(images), settings.iterations
    generator = np.random.default_rng(0)
    windows = np.tile(np.float32([0, 0, 1, 1]), (t, n, 1))
    windows[:, :, 2:] = 0.8
    windows[:, :, :2] = generator.random((t, n, 2)) * 0.2
    views = (torch.from_numpy(windows), torch.from_numpy(generator.random((t, n)) < 0.5))
    low, high = torch.full((1, 3, 1, 1), -1.0), torch.full((1, 3, 1, 1), 1.0)
    losses = []
    real = alignment.loss
    alignment.loss = lambda: losses.append(real()) or losses[-1]

    def tick(done, state):
        if saved is not None and done == 7:
            saved.update(
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state().items()}
            )
            saved["optimizer"] = {
                "state": {0: {k: v.clone() for k, v in saved["optimizer"]["state"][0].items()}},
                "param_groups": saved["optimizer"]["param_groups"],
            }

    out = recover.recover_chunk(
        images,
        torch.zeros(n, dtype=torch.long),
        model,
        teacher,
        alignment,
        low,
        high,
        settings,
        views,
        8,
        Ranks(0, 1, torch.device("cpu"), None),
        False,
        tick,
        resume,
    )
    alignment.close()
    return out, [float(v.detach()) for v in losses]


def test_recovery_lowers_the_loss_stays_in_range_and_resumes_to_the_bit():
    images = torch.randn(6, 3, 8, 8).clamp(-1, 1)
    settings = Recover(iterations=20, lr=0.05)
    saved: dict = {}
    whole, losses = chunk_result(images, settings, saved=saved)
    assert (
        losses[-1] < 0.96 * losses[0]
        and float(whole.abs().max()) <= 1
        and not torch.equal(whole, images)
    )
    resumed, rest = chunk_result(images, settings, resume=saved)
    assert len(rest) == 13 and torch.equal(resumed, whole)


def test_stages_of_other_resolutions_and_what_is_mixed_in_again():
    """Three stages; a state from the middle of the second resumes to the bit; a residual of 1 forgets all but the last stage."""
    images = torch.randn(6, 3, 8, 8).clamp(-1, 1)
    settings = Recover(iterations=18, lr=0.05, resolutions=[6, 8, 10], residual=0.5)
    assert recover.stages(settings, 8) == {0: 6, 6: 8, 12: 10}
    saved: dict = {}
    whole, _ = chunk_result(images, settings, saved=saved)
    assert whole.shape == images.shape and saved["images"].shape == (6, 3, 8, 8)
    resumed, rest = chunk_result(images, settings, resume=saved)
    assert len(rest) == 11 and torch.equal(resumed, whole)
    near, _ = chunk_result(
        images, Recover(iterations=18, lr=0.05, resolutions=[8, 8, 8], residual=1.0)
    )
    far, _ = chunk_result(images, Recover(iterations=18, lr=0.05))
    assert float((near - images).abs().mean()) < float((far - images).abs().mean())


def test_the_teachers_term_keeps_images_in_their_class():
    """With it the teacher is surer of the class after recovery than before; alignment alone knows nothing of the teacher."""
    teacher = (
        registry.seeded(
            lambda: registry.TwoHeads(registry.backbone("convnet3", 8, "instance", 8), 3, 0),
            "teacher",
        )
        .eval()
        .requires_grad_(False)
    )
    images = torch.randn(6, 3, 8, 8).clamp(-1, 1)
    sure = lambda x: float(teacher(x).softmax(1)[:, 0].mean().detach())  # noqa: E731
    guided, _ = chunk_result(
        images, Recover(iterations=40, lr=0.05, teacher_ce=1.0, alignment=0.0), teacher=teacher
    )
    alone, _ = chunk_result(images, Recover(iterations=40, lr=0.05, alignment=0.01))
    assert sure(guided) > sure(images) > sure(alone), (sure(guided), sure(images), sure(alone))


def test_targets_read_only_the_chunks_classes():
    """Rows of other classes are NaN: had they been read, the class-wise targets would be too."""
    moments = torch.tensor([[4.0, 8.0, 20.0], [2.0, 6.0, 20.0]], dtype=torch.float64)
    poisoned = torch.cat([moments, torch.full((1, 3), float("nan"), dtype=torch.float64)])
    layers = ["x"]
    both = recover.alignment_targets(
        {"fair": True, "moments": {"x": moments}},
        layers,
        np.asarray([0, 0, 1]),
        0.5,
        "mixture",
        "cpu",
    )["x"]
    assert (
        [w for w, _, _ in both] == [0.5, 0.5]
        and torch.allclose(both[0][1], torch.tensor([2.5]))
        and torch.allclose(both[1][1], torch.tensor([7 / 3]))
    )
    only = recover.alignment_targets(
        {"fair": True, "moments": {"x": poisoned}},
        layers,
        np.asarray([0, 1]),
        1.0,
        "mixture",
        "cpu",
    )["x"]
    assert len(only) == 1 and torch.allclose(only[0][1], torch.tensor([2.5]))
    off = recover.alignment_targets(
        {"fair": False, "running": {"x": (torch.ones(1), torch.ones(1))}},
        layers,
        np.asarray([0]),
        0.5,
        "mixture",
        "cpu",
    )["x"]
    assert off[0][0] == 1.0 and float(off[0][1]) == 1.0


def test_conv_inputs_can_be_aligned_too():
    model = observer()
    assert len(registry.conv_layers(model)) == 2 and all(
        isinstance(m, nn.Conv2d) for m in registry.conv_layers(model).values()
    )
