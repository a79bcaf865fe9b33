import numpy as np
import pytest
import rldd_tools
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ltdd_scale.data import distilled, siamese
from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.errors import UserError
from ltdd_scale.methods.matching import features
from ltdd_scale.methods.matching.real import Pixels, open_real
from ltdd_scale.methods.rldd import align, chunks, guard, matched, recover, sides
from ltdd_scale.methods.rldd.method import RLDD
from ltdd_scale.methods.rldd.settings import Calibrate, Initialize, Recover
from ltdd_scale.models import registry
from ltdd_scale.runtime import signals, tensors
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.runtime.signals import Preempted
from ltdd_scale.stage import Facts, function, settings_of

SHAPES = st.integers(1, 60), st.integers(1, 30), st.integers(1, 100), st.integers(0, 20)


@given(*SHAPES)
def test_chunks_hold_every_image_once(num_classes, ipc, batch_size, chunk_classes):
    work = chunks.chunks(num_classes, ipc, batch_size, chunk_classes)
    groups, each = chunks.groups(num_classes, ipc, batch_size, chunk_classes)
    assert [c.classes for c in work[::each]] == [tuple(g) for g in groups]
    assert len(work) == len(groups) * each
    held = [(c, i) for chunk in work for c in chunk.classes for i in range(chunk.first, chunk.last)]
    assert sorted(held) == [(c, i) for c in range(num_classes) for i in range(ipc)]
    assert all(len(chunk.labels) <= batch_size for chunk in work)
    assert [c.number for c in work] == list(range(len(work)))


@given(*SHAPES)
def test_a_class_has_about_as_many_images_in_each_chunk(
    num_classes, ipc, batch_size, chunk_classes
):
    work = chunks.chunks(num_classes, ipc, batch_size, chunk_classes)
    of_first = [chunk.last - chunk.first for chunk in work if 0 in chunk.classes]
    fit = max(1, batch_size // len(work[0].classes))
    assert len(of_first) == -(-ipc // fit), "no more chunks than are needed"
    assert max(of_first) - min(of_first) < len(of_first), "each chunk lacks one image at most"


def test_one_image_is_not_left_over():
    """121 classes in groups of 11, nine images of which fit a chunk of 100."""
    sizes = {chunk.last - chunk.first for chunk in chunks.chunks(121, 10, 100, 12)}
    assert sizes == {5}


def test_a_chunk_mixes_head_and_tail():
    chunk = chunks.chunks(1000, 10, 100)[0]
    assert len(chunk.classes) == 100 and chunk.classes[0] == 0 and chunk.classes[-1] == 990


@given(*SHAPES, st.integers(2, 70))
def test_the_hint_gives_every_rank_a_chunk(num_classes, ipc, batch_size, chunk_classes, world):
    def pieces(size):
        own = Recover(batch_size=size, chunk_classes=chunk_classes)
        of = rldd_tools.config(ipc=ipc, recover=own)
        stage = next(s for s in RLDD.stages(of) if s.kind == "recover")
        settings = settings_of(stage, of)
        return function(stage.pieces)(settings, facts), settings

    facts = Facts((1,) * num_classes)
    found, settings = pieces(batch_size)
    assert found == len(chunks.chunks(num_classes, ipc, batch_size, chunk_classes))
    if found >= world:
        return
    hint = chunks.more_pieces(settings, facts, world)
    if hint:
        assert hint.startswith("smaller chunks with --set recover.batch_size=")
        assert pieces(int(hint.rpartition("=")[2]))[0] >= world
    else:
        assert pieces(1)[0] < world


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


RECOVER = Recover(batch_size=8, chunk_classes=5, iterations=6, lr=0.05, settle=0.0)
MORE = {
    "matching": 20.0,
    "matching_width": 4,
    "matching_real": 5,
    "guard": "sure",
    "settle": 0.9,
    "stop": 1.0,
}
ways = pytest.mark.parametrize("changes", [{}, MORE], ids=["plain", "more"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """All that recovery reads, from untrained experts."""
    folder, config = tmp_path_factory.mktemp("store"), configured()
    rldd_tools.run("shard", config, folder)
    rldd_tools.expert(folder / "observer", "observer", "convnet3", "batch")
    rldd_tools.expert(folder / "teacher", "teacher", "convnet3", "instance")
    rldd_tools.run("calibrate", config, folder)
    rldd_tools.run("initialize", config, folder)
    rldd_tools.run("recover", config, folder)
    return folder


@pytest.fixture(scope="module")
def recovered(store):
    """Where the set recovered with some changes of the settings lies."""

    def of(changes):
        if not changes:
            return store / "recover"
        out = store / "more"
        if not out.exists():
            rldd_tools.run("recover", configured(**changes), store, out=out)
        return out

    return of


def configured(**changes):
    settings = RECOVER.model_copy(update=changes)
    calibrate, initialize = Calibrate(conv_inputs=True), Initialize(crops=2)
    return rldd_tools.config(recover=settings, calibrate=calibrate, initialize=initialize)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_a_recovered_set_is_whole_and_has_the_initial_images_provenance(store):
    recovered, initial = (Distilled(store / name, 10) for name in ("recover", "initialize"))
    assert set(files(store / "recover")) == {
        f"{c:05d}.{end}" for c in range(10) for end in ("npy", "json")
    }
    for c in range(10):
        assert recovered.load(c).shape == initial.load(c).shape == (3, 3, 8, 8)
        assert not np.array_equal(recovered.load(c), initial.load(c))
        assert recovered.provenance(c) == initial.provenance(c)


@ways
def test_parts_in_any_order_give_the_bytes_of_the_whole(store, recovered, changes, tmp_path):
    for k in (2, 0, 1):
        assert (
            rldd_tools.run("recover", configured(**changes), store, out=tmp_path, part=(k, 3)) == {}
        )
        assert not list(tmp_path.glob("0*"))
    assert len(list(tmp_path.glob("chunk-*.npy"))) == 6
    facts = rldd_tools.run("recover", configured(**changes), store, out=tmp_path)
    assert facts == {"chunks": 6, "images": 30, **({"chunks stopped": 0} if changes else {})}
    assert files(tmp_path) == files(recovered(changes))


@ways
def test_two_ranks_share_the_chunks(store, recovered, changes, tmp_path, monkeypatch):
    """One rank after the other, since neither reads what the other writes before the barrier."""
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)
    second = Ranks(1, 2, torch.device("cpu"), None)
    rldd_tools.run("recover", configured(**changes), store, ranks=second, out=tmp_path, part=(0, 1))
    assert [p.name for p in sorted(tmp_path.glob("chunk-*.npy"))] == [
        f"chunk-{k:05d}.npy" for k in (1, 3, 5)
    ]
    rldd_tools.run("recover", configured(**changes), store, out=tmp_path)
    assert files(tmp_path) == files(recovered(changes))


@ways
def test_a_signal_in_the_middle_of_a_chunk_loses_nothing(
    store, recovered, changes, tmp_path, monkeypatch
):
    begun = []
    updates = recover.Progress.update

    def update(self, done, note=""):
        updates(self, done, note)
        if done == 10:  # iteration 4 of 6 of the second chunk
            monkeypatch.setattr(signals, "_requested", 15)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(recover.Progress, "update", update)
        with pytest.raises(Preempted):
            rldd_tools.run("recover", configured(**changes), store, out=tmp_path)
    monkeypatch.setattr(signals, "_requested", None)
    assert [p.name for p in tmp_path.glob("chunk-*.npy")] == ["chunk-00000.npy"]
    assert [p.name for p in tmp_path.glob("chunk-00001/*")] == ["step-000000000004.pt"]
    loads = Checkpoints.load

    def load(self):
        begun.append(loads(self))
        return begun[-1]

    monkeypatch.setattr(Checkpoints, "load", load)
    rldd_tools.run("recover", configured(**changes), store, out=tmp_path)
    assert [found and found[0] for found in begun] == [4, None, None, None, None]
    assert files(tmp_path) == files(recovered(changes))


def test_each_addition_changes_the_images(store, recovered, tmp_path):
    alone = {"matching": {n: v for n, v in MORE.items() if n.startswith("matching")}}
    alone["guard"], alone["settle"] = {"guard": "sure"}, {"settle": 1.0}
    seen = [files(recovered({}))]
    for name, changes in alone.items():
        rldd_tools.run("recover", configured(**changes), store, out=tmp_path / name)
        seen.append(files(tmp_path / name))
    seen.append({n: b for n, b in files(recovered(MORE)).items() if n != recover.STOPS})
    assert all(set(s) == set(seen[0]) for s in seen)
    assert len({tuple(sorted(s.items())) for s in seen}) == 5


def test_how_many_chunks_stopped_is_told_whoever_did_them(store, tmp_path, monkeypatch):
    """The teacher's opinion of noise changes soon. What is told is on the disk before the chunks'
    files are gone, so that a restart between the two tells the same."""
    config = configured(teacher_ce=0.0, lr=0.5, stop=1e-9)
    facts = rldd_tools.run("recover", config, store, out=tmp_path / "one")
    assert 0 < facts["chunks stopped"] <= 6
    for k in range(2):
        assert rldd_tools.run("recover", config, store, out=tmp_path / "two", part=(k, 2)) == {}
    unlink = recover.Path.unlink

    def failing(self, missing_ok=False):
        unlink(self, missing_ok)
        if self.name == "chunk-00003.npy":
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(recover.Path, "unlink", failing)
        with pytest.raises(KeyboardInterrupt):
            rldd_tools.run("recover", config, store, out=tmp_path / "two")
    assert rldd_tools.run("recover", config, store, out=tmp_path / "two") == facts
    assert files(tmp_path / "one") == files(tmp_path / "two")
    stops = distilled.files.read_json(tmp_path / "two" / recover.STOPS)
    assert len(stops) == facts["chunks stopped"] and set(stops.values()) <= set(range(1, 7))
    names = {f"{c:05d}.{end}" for c in range(10) for end in ("npy", "json")}
    assert set(files(tmp_path / "two")) == {*names, recover.STOPS}


def test_of_a_large_class_some_images_are_held(store):
    config = configured()
    context = Context(rldd_tools.ALONE, store, {"shard": store / "shard"}, "by hand", workers=0)
    split = ShardSplit(store / "shard", "train")
    _, real = open_real(3, 0, config.data, context)
    held, counts = real.some((7, 0), 5, 0, "held")
    assert counts == [min(5, split.counts[7]), 5] and len(held) == sum(counts)
    whole = [square(split.image(int(i)), 8) for i in np.flatnonzero(split.labels == 0)]
    pixels = [np.asarray(image).transpose(2, 0, 1).tobytes() for image in whole]
    places = [pixels.index(x.numpy().tobytes()) for x in held[counts[0] :]]
    assert places == sorted(set(places)) and len(places) < split.counts[0]
    assert torch.equal(real.some((0,), 5, 0, "held")[0], held[counts[0] :])
    assert not torch.equal(real.some((0,), 5, 1, "held")[0], held[counts[0] :])
    assert real.some((0,), 100, 0, "held")[1] == [split.counts[0]]


def test_real_images_that_many_chunks_look_at_are_decoded_once(store):
    """Held where they fit, and the same to the byte."""
    config = configured()
    context = Context(rldd_tools.ALONE, store, {"shard": store / "shard"}, "by hand", workers=0)
    number = len(ShardSplit(store / "shard", "train"))
    found = {}
    for name, looks, memory_gb in (
        ("seldom", number, 4.0),
        ("often", number + 1, 4.0),
        ("too large", number + 1, 0.0),
    ):
        seen = config.data.model_copy(update={"memory_gb": memory_gb})
        _, real = open_real(3, 0, seen, context, lambda counts, n=looks: n)
        assert isinstance(real.images, MemoryImages) == (name == "often")
        found[name] = real.some((7, 0), 5, 0, "held")[0]
    assert torch.equal(found["seldom"], found["often"])
    chunk = chunks.Chunk(0, tuple(range(10)), 0, 1)
    settings = recover_settings()
    for mine, held in (([chunk], False), ([chunk, chunk], True)):
        opened = matched.source(settings, context, mine).real.images
        assert isinstance(opened, MemoryImages) == held


def test_no_iterations_keep_the_initial_images(store, tmp_path):
    rldd_tools.run("recover", configured(iterations=0), store, out=tmp_path)
    assert files(tmp_path) == files(store / "initialize")


def test_conv_inputs_are_aligned_too(store):
    """All convolutions but the first, whose input is the image itself."""
    config = configured()
    stage = next(s for s in RLDD.stages(config) if s.name == "recover")
    inputs = {role: store / source for role, source in stage.inputs.items()}
    context = Context(rldd_tools.ALONE, store, inputs, "by hand")
    split = ShardSplit(store / "shard", "train")
    material = recover.load(settings_of(stage, config), context, split, [])
    kinds = [type(layer) for layer in material.layers.values()]
    assert kinds == [nn.BatchNorm2d] * 3 + [nn.Conv2d] * 2


def test_costs_grow_with_the_work():
    facts = Facts((50, 20, 5))

    def costs(config):
        return {
            s.name: function(s.cost)(settings_of(s, config), facts) for s in RLDD.stages(config)
        }

    plain = costs(rldd_tools.config())
    same, twice = (
        costs(rldd_tools.config(recover=Recover(settle=0.0, iterations=n)))["recover"].flops
        for n in (200, 400)
    )
    assert twice == 2 * same and 0 < same < plain["recover"].flops < 1.03 * same
    assert plain["recover"].disk == plain["initialize"].disk == 9 * 3 * 8 * 8
    off = costs(
        rldd_tools.config(
            calibrate=Calibrate(fair=False),
            initialize=Initialize(select="random"),
            recover=Recover(teacher_ce=0.0, settle=0.0),
        )
    )
    assert off["calibrate"].flops == off["initialize"].flops == 0
    assert all(0 < off[name].memory < plain[name].memory for name in plain)
    # One pass a layer, up to that layer: (3 + 1) / 2 passes of 75 images.
    once = costs(rldd_tools.config(calibrate=Calibrate(recalibrate=False)))
    assert plain["calibrate"].flops == 2 * once["calibrate"].flops
    less = costs(rldd_tools.config(recover=Recover(matching=0.0)))["recover"]
    assert less.flops < plain["recover"].flops and less.activations < plain["recover"].activations
    assert less.memory < plain["recover"].memory and less.disk == plain["recover"].disk
    few, many = (
        function("ltdd_scale.methods.rldd.cost:recover")(settings, Facts((n, 7000, 5)))
        for settings in [recover_settings(memory_gb=0)]
        for n in (1000, 100_000)
    )
    assert few == many, "real images that are held and looked at do not grow with the set"
    unguarded, watched = (
        function("ltdd_scale.methods.rldd.cost:recover")(
            recover_settings(teacher_ce=0.0, settle=0.0, stop=stop), facts
        )
        for stop in (0.0, 0.1)
    )
    assert unguarded.flops < watched.flops < plain["recover"].flops
    assert unguarded.activations == watched.activations


def recover_settings(memory_gb=4.0, **changes):
    config = rldd_tools.config(recover=Recover(**changes))
    data = config.data.model_copy(update={"memory_gb": memory_gb})
    config = config.model_copy(update={"data": data})
    return settings_of(next(s for s in RLDD.stages(config) if s.name == "recover"), config)


def test_who_watches_or_guards_needs_the_teacher():
    def needs(**changes):
        config = rldd_tools.config(
            initialize=Initialize(select="random"), recover=Recover(**changes)
        )
        stage = next(s for s in RLDD.stages(config) if s.name == "recover")
        return "teacher" in stage.inputs, "teacher" in RLDD.experts(config)

    off = {"teacher_ce": 0.0, "settle": 0.0}
    assert needs(**off) == needs(**off, matching=1.0) == (False, False)
    assert needs() == (True, True)
    assert needs(iterations=0) == (False, False)
    for name in off:
        assert needs(**{**off, "stop": 0.1}) == needs(**{**off, name: 0.5}) == (True, True)


def test_settings_without_effect_are_told():
    def warnings(**changes):
        return RLDD.check(rldd_tools.config(recover=Recover(**changes)))

    assert warnings() == warnings(**{**MORE, "stop": 0.1}) == []
    assert warnings(teacher_ce=0, stop=0.1) == []
    assert warnings(iterations=0, settle=0.5) == [
        "recover.settle has no effect with recover.iterations=0"
    ]
    (never,) = warnings(stop=1.0)
    assert "recover.stop=1 never stops" in never
    assert warnings(teacher_ce=0, guard="sure") == [
        "recover.guard has no effect with recover.teacher_ce=0"
    ]
    assert warnings(matching=0, matching_width=64, matching_real=3) == [
        f"recover.{name} has no effect with recover.matching=0"
        for name in ("matching_width", "matching_real")
    ]
    assert warnings(teacher_ce=0, alignment=0, matching=1.0) == []
    assert warnings(teacher_ce=0, alignment=0.5, matching=1.0) == []
    (scaled,) = warnings(teacher_ce=0, alignment=0.5, matching=0)
    assert "recover.alignment scales the whole loss" in scaled
    with pytest.raises(UserError, match=r"recover\.matching: all are 0"):
        warnings(teacher_ce=0, alignment=0, matching=0)


def test_the_random_network_must_be_able_to_take_the_images():
    def check(size, **changes):
        config = rldd_tools.config(size, recover=Recover(**changes))
        stage = next(s for s in RLDD.stages(config) if s.name == "recover")
        function(stage.check)(settings_of(stage, config))

    check(8)
    check(4, matching=0.0)
    words = r"recover\.matching: convnet3 needs images of at least 8 pixels.*recover\.matching=0"
    with pytest.raises(UserError, match=words):
        check(4)
