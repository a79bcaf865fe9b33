import numpy as np
import pytest
import rldd_tools
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd import align, chunks, recover
from ltdd_scale.methods.rldd.method import RLDD
from ltdd_scale.methods.rldd.settings import Calibrate, Initialize, Recover
from ltdd_scale.models import registry
from ltdd_scale.runtime import signals, tensors
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.runtime.signals import Preempted
from ltdd_scale.stage import Facts, function, settings_of

SHAPES = st.integers(1, 60), st.integers(1, 30), st.integers(1, 100), st.integers(0, 20)


@given(*SHAPES)
def test_chunks_hold_every_image_once(num_classes, ipc, batch_size, chunk_classes):
    work = chunks.chunks(num_classes, ipc, batch_size, chunk_classes)
    held = [(c, i) for chunk in work for c in chunk.classes for i in range(chunk.first, chunk.last)]
    assert sorted(held) == [(c, i) for c in range(num_classes) for i in range(ipc)]
    assert all(len(chunk.labels) <= batch_size for chunk in work)
    assert [c.number for c in work] == list(range(len(work)))


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


def network(norm="batch", width=6):
    def build():
        return registry.TwoHeads(registry.backbone("convnet3", width, norm, 8), 3, 0)

    return registry.seeded(build, "test").eval().requires_grad_(False)


def noise(n=6):
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8).clamp(-1, 1)


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
            values.append([float(t) for t in alignment.terms])
    assert len(values[0]) == 3 and np.isclose(values[1][0], 10 * values[0][0])
    assert np.allclose(values[1][1:], values[0][1:])


def chunk_result(images, settings, resume=None, saved=None, teacher=None):
    n, t = len(images), settings.iterations
    generator = np.random.default_rng(0)
    windows = np.tile(np.float32([0, 0, 1, 1]), (t, n, 1))
    windows[:, :, 2:] = 0.8
    windows[:, :, :2] = generator.random((t, n, 2)) * 0.2
    mirrored = torch.from_numpy(generator.random((t, n)) < 0.5)
    labels = torch.zeros(n, dtype=torch.long)
    batch = recover.Batch(images, labels, torch.from_numpy(windows), mirrored)
    model = network()
    low, high = torch.full((1, 3, 1, 1), -1.0), torch.full((1, 3, 1, 1), 1.0)
    objective = recover.Objective(
        model, teacher, low, high, settings, 8, any_size=False, ranks=rldd_tools.ALONE
    )
    losses = []

    def tick(done, state):
        if saved is not None and done == 7:
            saved.update(tensors.snapshot(state()))

    with aligned(model, settings) as alignment:
        real = alignment.loss
        alignment.loss = lambda: losses.append(real()) or losses[-1]
        out = recover.recover_chunk(objective, batch, alignment, tick, resume)
    return out, [float(v.detach()) for v in losses]


def test_recovery_lowers_the_loss_stays_in_range_and_resumes_to_the_bit():
    images, settings = noise(), Recover(iterations=20, lr=0.05)
    saved: dict = {}
    whole, losses = chunk_result(images, settings, saved=saved)
    assert losses[-1] < 0.96 * losses[0]
    assert float(whole.abs().max()) <= 1 and not torch.equal(whole, images)
    resumed, rest = chunk_result(images, settings, resume=saved)
    assert len(rest) == 13 and torch.equal(resumed, whole)


def test_stages_of_other_resolutions_and_what_is_mixed_in_again():
    """Three stages; a state from the middle of the second resumes to the bit; a residual of 1
    forgets all but the last stage."""
    images = noise()
    settings = Recover(iterations=18, lr=0.05, resolutions=[6, 8, 10], residual=0.5)
    assert recover.stages(settings, 8) == {0: 6, 6: 8, 12: 10}
    saved: dict = {}
    whole, _ = chunk_result(images, settings, saved=saved)
    assert whole.shape == images.shape and saved["images"].shape == (6, 3, 8, 8)
    resumed, rest = chunk_result(images, settings, resume=saved)
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


RECOVER = Recover(batch_size=8, chunk_classes=5, iterations=6, lr=0.05)


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


def test_parts_in_any_order_give_the_bytes_of_the_whole(store, tmp_path):
    for k in (2, 0, 1):
        assert rldd_tools.run("recover", configured(), store, out=tmp_path, part=(k, 3)) == {}
        assert not list(tmp_path.glob("0*"))
    assert len(list(tmp_path.glob("chunk-*.npy"))) == 6
    facts = rldd_tools.run("recover", configured(), store, out=tmp_path)
    assert facts == {"chunks": 6, "images": 30}
    assert files(tmp_path) == files(store / "recover")


def test_two_ranks_share_the_chunks(store, tmp_path, monkeypatch):
    """One rank after the other, since neither reads what the other writes before the barrier."""
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)
    second = Ranks(1, 2, torch.device("cpu"), None)
    rldd_tools.run("recover", configured(), store, ranks=second, out=tmp_path, part=(0, 1))
    assert [p.name for p in sorted(tmp_path.glob("chunk-*.npy"))] == [
        f"chunk-{k:05d}.npy" for k in (1, 3, 5)
    ]
    rldd_tools.run("recover", configured(), store, out=tmp_path)
    assert files(tmp_path) == files(store / "recover")


def test_a_signal_in_the_middle_of_a_chunk_loses_nothing(store, tmp_path, monkeypatch):
    begun = []
    updates = recover.Progress.update

    def update(self, done, note=""):
        updates(self, done, note)
        if done == 10:  # iteration 4 of 6 of the second chunk
            monkeypatch.setattr(signals, "_requested", 15)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(recover.Progress, "update", update)
        with pytest.raises(Preempted):
            rldd_tools.run("recover", configured(), store, out=tmp_path)
    monkeypatch.setattr(signals, "_requested", None)
    assert [p.name for p in tmp_path.glob("chunk-*.npy")] == ["chunk-00000.npy"]
    assert [p.name for p in tmp_path.glob("chunk-00001/*")] == ["step-000000000004.pt"]
    loads = Checkpoints.load

    def load(self):
        begun.append(loads(self))
        return begun[-1]

    monkeypatch.setattr(Checkpoints, "load", load)
    rldd_tools.run("recover", configured(), store, out=tmp_path)
    assert [found and found[0] for found in begun] == [4, None, None, None, None]
    assert files(tmp_path) == files(store / "recover")


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
    material = recover.load(settings_of(stage, config), context, split)
    kinds = [type(layer) for layer in material.layers.values()]
    assert kinds == [nn.BatchNorm2d] * 3 + [nn.Conv2d] * 2


def test_costs_grow_with_the_work():
    facts = Facts((50, 20, 5))

    def costs(config):
        return {
            s.name: function(s.cost)(settings_of(s, config), facts) for s in RLDD.stages(config)
        }

    plain = costs(rldd_tools.config())
    twice = costs(rldd_tools.config(recover=Recover(iterations=400)))
    assert twice["recover"].flops == 2 * plain["recover"].flops > 0
    assert plain["recover"].disk == plain["initialize"].disk == 9 * 3 * 8 * 8
    off = costs(
        rldd_tools.config(
            calibrate=Calibrate(fair=False),
            initialize=Initialize(select="random"),
            recover=Recover(teacher_ce=0.0),
        )
    )
    assert off["calibrate"].flops == off["initialize"].flops == 0
    assert all(0 < off[name].memory < plain[name].memory for name in plain)
    # One pass a layer, up to that layer: (3 + 1) / 2 passes of 75 images.
    once = costs(rldd_tools.config(calibrate=Calibrate(recalibrate=False)))
    assert plain["calibrate"].flops == 2 * once["calibrate"].flops
