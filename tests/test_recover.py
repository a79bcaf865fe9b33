import numpy as np
import pytest
import rldd_tools
import torch

from ltdd_scale.data import siamese
from ltdd_scale.methods.matching import features
from ltdd_scale.methods.matching.real import Pixels
from ltdd_scale.methods.rldd import align, guard, matched, recover, sides
from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models import registry
from ltdd_scale.runtime import tensors
from ltdd_scale.runtime.ranks import rng


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (2, 8, 16, 16)])
def test_channel_moments_and_their_gradient(shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 0.5).requires_grad_()
    a, b = torch.rand(shape[1]), torch.rand(shape[1])
    same, mean, var = align.ChannelMoments.apply(x)
    c = torch.randn(shape)
    ref_var, ref_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.allclose(mean, ref_mean, atol=1e-6) and torch.allclose(var, ref_var, rtol=1e-5)
    (ours,) = torch.autograd.grad((mean * a + var * b).sum() + (same * c).sum(), x)
    (reference,) = torch.autograd.grad((ref_mean * a + ref_var * b).sum() + (x * c).sum(), x)
    assert torch.allclose(ours, reference, atol=1e-7)


def network(norm="batch", width=6, size=8):
    def build():
        return registry.TwoHeads(registry.backbone("convnet3", width, norm, size), 3, 0)

    return registry.seeded(build, "test").eval().requires_grad_(False)


def noise(n=6, size=8):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size).clamp(-1, 1)


def aligned(model, settings, goal=0.3):
    layers = registry.norm_layers(model)
    targets = {
        n: [(1.0, torch.full((m.num_features,), goal), torch.ones(m.num_features))]
        for n, m in layers.items()
    }
    return align.Alignment(layers, targets, settings)


def test_the_average_is_right_from_its_first_step_and_its_gradient_is_the_batchs():
    model, x = network(), noise().requires_grad_()
    with aligned(model, Recover(ema=0.0)) as plain:
        model(x)
        loss = plain.loss()
    first_layer = next(iter(registry.norm_layers(model)))
    seen = []
    layer = dict(model.named_modules())[first_layer]
    layer.register_forward_pre_hook(lambda _, i: seen.append(i[0].mean((0, 2, 3)).detach()))
    with aligned(model, Recover(ema=0.8)) as averaged:
        model(x)
        first = averaged.loss()
        assert torch.equal(first, loss), "an average that starts at 0 would give another value"
        ours, reference = (torch.autograd.grad(v, x)[0] for v in (first, loss))
        assert torch.allclose(ours, reference)
        model(x.detach() + 1)
        averaged.loss()
        mixed = 0.8 * seen[0] + 0.2 * seen[1]
        assert torch.allclose(averaged.average[first_layer][0], mixed, atol=1e-6)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


def test_first_layer_weight_and_terms():
    model, values = network(), []
    for weight in (1.0, 10.0):
        with aligned(model, Recover(ema=0.0, first_layer=weight)) as alignment:
            model(noise())
            values.append(alignment.terms()[:, 0].tolist())
    assert len(values[0]) == 3 and np.isclose(values[1][0], 10 * values[0][0])
    assert np.allclose(values[1][1:], values[0][1:])


def chunk_result(images, settings, resume=None, saved=None, teacher=None, labels=None, term=None):
    n, t = len(images), settings.iterations
    generator = np.random.default_rng(0)
    windows = np.tile(np.float32([0, 0, 1, 1]), (t, n, 1))
    windows[:, :, 2:] = 0.8
    windows[:, :, :2] = generator.random((t, n, 2)) * 0.2
    mirrored = torch.from_numpy(generator.random((t, n)) < 0.5)
    labels = torch.zeros(n, dtype=torch.long) if labels is None else labels
    batch = recover.Batch(images, labels, torch.from_numpy(windows), mirrored, term)
    size = images.shape[-1]
    model = network(size=size)
    low, high = torch.full((1, 3, 1, 1), -1.0), torch.full((1, 3, 1, 1), 1.0)
    objective = recover.Objective(
        model, teacher, low, high, settings, size, any_size=False, ranks=rldd_tools.ALONE
    )
    losses, watch = [], objective.watch(batch)

    def tick(done, state):
        if saved is not None:
            saved[done] = tensors.snapshot(state())

    with aligned(model, settings) as alignment:
        real = alignment.loss
        alignment.loss = lambda: losses.append(real()) or losses[-1]
        out = recover.recover_chunk(objective, batch, alignment, tick, resume, watch)
    if watch is not None and saved is not None:
        saved["stopped"] = watch.stopped
    return out, [float(v.detach()) for v in losses]


def matching_term(real, counts, number=0, **changes):
    """Of classes with `counts` real images: uint8 [N, 3, R, R]."""
    settings = Recover(**{"matching": 1.0, "matching_width": 5, "matching_real": 4, **changes})
    half = torch.full((1, 3, 1, 1), 0.5)
    strategy = siamese.choices(siamese.ALL)
    source = matched.Source(None, Pixels(half, half), settings, 0, strategy, rldd_tools.ALONE)
    return matched.Matched(source, number, real, counts)


def real_images(counts, size=8):
    generator = np.random.default_rng(3)
    shape = (sum(counts), 3, size, size)
    return torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("batch_size", [4, 9, 100])
def test_the_matching_term_is_dms_formula(batch_size):
    """A mean over classes and features: class by class and image by image, whatever number of
    classes is seen at a time."""
    counts = [6, 4, 2]
    real = real_images(counts)
    term = matching_term(real, counts, number=7, batch_size=batch_size)
    for t in (0, 5):
        images = noise(9).requires_grad_()
        shape = ("convnet3", 5, "instance", 8)
        net = features.network(shape, rldd_tools.ALONE, 0, "recover net", 7, t)
        draw = siamese.draw(rng(0, "recover dsa", 7, t), siamese.choices(siamese.ALL), 8)
        drawn = term.draw(t)

        def alone(x, net=net, draw=draw):
            return net(siamese.apply(x[None], draw))[0]

        total = torch.zeros(())
        for c, at in enumerate(drawn):
            theirs = [alone((real[i].float() / 255 - 0.5) / 0.5) for i in at]
            ours = [alone(x) for x in images[3 * c : 3 * c + 3]]
            total = total + ((sum(theirs) / 4 - sum(ours) / 3) ** 2).mean() / 3
        loss = term.loss(images, t)
        assert torch.allclose(loss, total, rtol=1e-4)
        found, expected = (torch.autograd.grad(v, images)[0] for v in (loss, total))
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_real_images_of_an_iteration_are_drawn_by_key_and_small_classes_repeat():
    counts = [6, 4, 2]
    term, other = (matching_term(real_images(counts), counts, number=n) for n in (7, 8))
    drawn = term.draw(3)
    assert np.array_equal(drawn, term.draw(3))
    assert not np.array_equal(drawn, term.draw(4)) and not np.array_equal(drawn, other.draw(3))
    for at, first, n in zip(drawn, (0, 6, 10), counts, strict=True):
        assert len(at) == 4 and set(at) <= set(range(first, first + n))
        assert set(np.unique(at, return_counts=True)[1]) == {4 // min(n, 4)}
    images = noise(9)
    assert torch.equal(term.loss(images, 3), term.loss(images, 3))
    assert not torch.equal(term.loss(images, 3), other.loss(images, 3))


def test_with_the_matching_term_images_come_closer_to_real_ones():
    """Under networks that recovery has not seen."""
    counts, settings = [20, 20], Recover(iterations=30, lr=0.1, alignment=0.0, teacher_ce=0.0)
    real = real_images(counts, 16)
    real[:20, :, ::2] //= 8  # lines
    real[20:, :, :, ::2] //= 8  # columns
    term = matching_term(real, counts, matching_real=10, matching_width=8)
    images = noise(size=16)
    moved, _ = chunk_result(images, settings, term=term)
    before, after = (
        np.mean([float(term.loss(x, t)) for t in range(100, 120)]) for x in (images, moved)
    )
    assert after < 0.85 * before


def test_the_teachers_term_is_weighted_by_what_it_thinks_of_the_initial_images():
    teacher, images, labels = network("instance", 8), noise(), torch.tensor([0, 1, 2, 2, 1, 0])
    teacher.fc_cb.weight.mul_(30)
    trust = guard.confidence(teacher, images, labels, rldd_tools.ALONE)
    expected = teacher(images).softmax(1)[range(6), labels]
    assert torch.allclose(trust, expected) and trust.min() < 0.2 and trust.max() > 0.5
    settings = Recover(teacher_ce=2.0, alignment=0.0, guard="sure")
    bound = torch.ones(1, 3, 1, 1)
    made_of = (-bound, bound, settings, 8, False, rldd_tools.ALONE)
    objective = recover.Objective(network(), teacher, *made_of)
    batch = recover.Batch(images, labels, None, None)
    assert torch.equal(objective.trust(batch), trust)
    with aligned(objective.observer, settings) as alignment:
        loss = objective.loss(images + 0.1, labels, alignment, trust)
    each = -teacher(images + 0.1).log_softmax(1)[range(6), labels]
    assert torch.allclose(loss, 2.0 * sum(w * ce for w, ce in zip(trust, each, strict=True)) / 6)
    unsure, usual = (
        recover.Objective(network(), teacher, -bound, bound, of, 8, False, rldd_tools.ALONE)
        for of in (Recover(guard="unsure"), Recover())
    )
    # What it knows well stays as it is.
    assert torch.equal(unsure.trust(batch), (1 - trust).square())
    assert usual.trust(batch) is None


def test_images_go_back_until_both_networks_know_them_again():
    """A network whose class 1 wants bright images, one whose class 1 wants the red channel alone:
    on the way from dark to grey the second sees no more of its class."""

    class Sees(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = torch.tensor(weights)

        def forward(self, x):
            logit = (x.mean((2, 3)) * self.weights).sum(1)
            return torch.stack([torch.zeros_like(logit), logit], 1)

    bright, red = Sees([1.0, 1.0, 1.0]), Sees([1.0, -0.5, -1.5])
    images = torch.zeros(3, 3, 2, 2)
    recovered = images.clone()
    recovered[0] += 1.0  # brighter, and no redder: a little less of its class for the second
    recovered[1, 0] += 1.0  # red: more of it for both
    recovered[2] -= 1.0  # darker: less of it for the first at once
    labels = torch.ones(3, dtype=torch.int64)

    def settled(networks, share):
        shown = (networks, images, recovered, labels, share, rldd_tools.ALONE)
        found = guard.settled(*shown)
        way = (found - images).abs().amax((1, 2, 3)) / (recovered - images).abs().amax((1, 2, 3))
        assert torch.equal(found, torch.lerp(images, recovered, way[:, None, None, None]))
        return way.tolist()

    assert settled([bright, red], 1e-6) == [1.0, 1.0, 1.0]
    assert settled([bright], 1.0) == [1.0, 1.0, 0.0]
    assert settled([bright, red], 1.0) == [0.0, 1.0, 0.0]
    # σ(−α) ≥ .75 σ(0) for α ≤ .51; σ(−3α) for α ≤ .17
    assert settled([red], 0.75) == [0.5, 1.0, 1.0] and settled([bright], 0.75) == [1.0, 1.0, 0.0]


def test_checks_are_ten_and_the_last_is_at_the_end():
    assert guard.checks(200) == set(range(20, 201, 20))
    assert guard.checks(4) == {1, 2, 3, 4} and max(guard.checks(75)) == 75
    assert len(guard.checks(75)) == 10 and not guard.checks(0) - {0}


@pytest.mark.parametrize("resolutions", [[], [8, 10]])
def test_a_chunk_that_the_teacher_no_longer_knows_stops_at_the_last_good_images(resolutions):
    """What the checks should see is computed from the states of a run that does not stop."""
    teacher, images = network("instance", 8), noise(12)
    teacher.fc_cb.bias.sub_(teacher(images).mean(0))  # it prefers no class
    labels = teacher(images).argmax(1)
    given = {"iterations": 40, "lr": 0.02, "teacher_ce": 0.0, "resolutions": resolutions}
    states: dict = {}
    whole, _ = chunk_result(images, Recover(**given, stop=1.0), None, states, teacher, labels)
    assert states["stopped"] is None and len(states) == 41
    free, _ = chunk_result(images, Recover(**given), labels=labels)
    assert torch.equal(whole, free), "who only watches changes nothing"
    shown = {t: sides.resized(states[t]["images"], 8) for t in range(4, 41, 4)}
    agreed = {t: int((teacher(x).argmax(1) == labels).sum()) for t, x in shown.items()}
    bad = next(t for t, n in agreed.items() if n < 12 - 0.4 * 12)
    assert 8 <= bad <= 36, agreed
    saved: dict = {}
    stopping = Recover(**given, stop=0.4)
    kept, losses = chunk_result(images, stopping, None, saved, teacher, labels)
    assert saved["stopped"] == bad and len(losses) == bad
    assert torch.equal(kept, shown[bad - 4])
    for t in (bad - 4, bad - 1):  # what was kept is in the state
        again, rest = chunk_result(images, stopping, saved[t], None, teacher, labels)
        assert len(rest) == bad - t and torch.equal(again, kept)
    at_once, losses = chunk_result(images, Recover(**given, stop=1e-9), None, {}, teacher, labels)
    first = next(t for t, n in agreed.items() if n < 12)
    assert len(losses) == first
    assert torch.equal(at_once, shown[first - 4] if first > 4 else images)


@pytest.mark.parametrize("matching", [0.0, 20.0])
def test_recovery_lowers_the_loss_stays_in_range_and_resumes_to_the_bit(matching):
    images, settings = noise(), Recover(iterations=20, lr=0.05, matching=matching)
    term = matching_term(real_images([9, 3]), [9, 3], matching=matching) if matching else None
    saved: dict = {}
    whole, losses = chunk_result(images, settings, saved=saved, term=term)
    assert losses[-1] < 0.96 * losses[0]
    assert float(whole.abs().max()) <= 1 and not torch.equal(whole, images)
    resumed, rest = chunk_result(images, settings, resume=saved[7], term=term)
    assert len(rest) == 13 and torch.equal(resumed, whole)
    without, _ = chunk_result(images, settings)
    assert torch.equal(without, whole) == (not matching)


def test_stages_of_other_resolutions_and_what_is_mixed_in_again():
    """Three stages; a state from the middle of the second resumes to the bit; a residual of 1
    forgets all but the last stage."""
    images = noise()
    settings = Recover(iterations=18, lr=0.05, resolutions=[6, 8, 10], residual=0.5)
    assert sides.stages(settings, 8) == {0: 6, 6: 8, 12: 10}
    saved: dict = {}
    whole, _ = chunk_result(images, settings, saved=saved)
    assert whole.shape == images.shape and saved[7]["images"].shape == (6, 3, 8, 8)
    resumed, rest = chunk_result(images, settings, resume=saved[7])
    assert len(rest) == 11 and torch.equal(resumed, whole)
    staged = Recover(iterations=18, lr=0.05, resolutions=[8, 8, 8], residual=1.0)
    near, _ = chunk_result(images, staged)
    far, _ = chunk_result(images, Recover(iterations=18, lr=0.05))
    assert float((near - images).abs().mean()) < float((far - images).abs().mean())


def test_the_teachers_term_keeps_images_in_their_class():
    """With it the teacher is surer of the class after recovery than before; alignment alone knows
    nothing of the teacher."""
    teacher, images = network("instance", 8), noise()
    teacher.fc_cb.weight.mul_(30)  # an untrained network is sure of nothing

    def sure(x):
        return float(teacher(x).log_softmax(1)[:, 0].mean().detach())

    settings = Recover(iterations=40, lr=0.05, teacher_ce=1.0, alignment=0.0)
    guided, _ = chunk_result(images, settings, teacher=teacher)
    alone, _ = chunk_result(images, Recover(iterations=40, lr=0.05, alignment=0.01))
    gains = sure(guided) - sure(images), sure(alone) - sure(images)
    assert gains[0] > 0.2 and gains[0] > 2 * gains[1], gains


def test_targets_read_only_the_chunks_classes():
    """Rows of other classes are NaN: had they been read, the class-wise targets would be too."""
    moments = torch.tensor([[4.0, 8.0, 20.0], [2.0, 6.0, 20.0]], dtype=torch.float64)
    poisoned = torch.cat([moments, torch.full((1, 3), float("nan"), dtype=torch.float64)])

    def targets(statistics, labels, classwise):
        device = torch.device("cpu")
        labels = np.asarray(labels)
        found = align.alignment_targets(statistics, ["x"], labels, classwise, "mixture", device)
        return found["x"]

    both = targets({"fair": True, "moments": {"x": moments}}, [0, 0, 1], 0.5)
    assert [w for w, _, _ in both] == [0.5, 0.5]
    assert torch.allclose(both[0][1], torch.tensor([2.5]))
    assert torch.allclose(both[1][1], torch.tensor([7 / 3]))
    ((weight, mean, _),) = targets({"fair": True, "moments": {"x": poisoned}}, [0, 1], 1.0)
    assert weight == 1.0 and torch.allclose(mean, torch.tensor([2.5]))
    running = {"x": (torch.ones(1), torch.ones(1))}
    ((weight, mean, _),) = targets({"fair": False, "running": running}, [0], 0.5)
    assert weight == 1.0 and float(mean) == 1.0
