import numpy as np
import pytest
import rldd_tools
import torch
from torch import nn

from ltdd_scale.data import distilled
from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.errors import UserError
from ltdd_scale.methods.matching.real import open_real
from ltdd_scale.methods.rldd import chunks, matched, recover
from ltdd_scale.methods.rldd.method import RLDD
from ltdd_scale.methods.rldd.settings import Calibrate, Initialize, Recover
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.runtime.signals import Preempted
from ltdd_scale.stage import Facts, function, settings_of

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
        for n in (600, 1200)
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


def test_where_observer_and_teacher_are_one_network_one_pass_serves_both(
    store, tmp_path, monkeypatch
):
    """One training, and calibration left the observer's buffers alone."""
    shared = tmp_path / "store"
    shared.mkdir()
    for name in ("shard", "observer", "initialize"):
        (shared / name).symlink_to(store / name)
    (shared / "teacher").symlink_to(store / "observer")
    alone = Calibrate(conv_inputs=True, recalibrate=False)
    config = configured().model_copy(update={"calibrate": alone})
    rldd_tools.run("calibrate", config, shared)
    passes, real = [], frozen.forward
    monkeypatch.setattr(
        frozen, "forward", lambda net, *given: passes.append(type(net)) or real(net, *given)
    )
    rldd_tools.run("recover", config, shared)
    once = passes.count(registry.TwoHeads)  # matching has networks of its own
    monkeypatch.setattr(frozen, "same", lambda *given: False)
    rldd_tools.run("recover", config, shared, out=tmp_path / "apart")
    assert passes.count(registry.TwoHeads) == 3 * once > 0
    for c in range(10):
        one, two = (
            Distilled(f, 10).load(c).astype(int) for f in (shared / "recover", tmp_path / "apart")
        )
        assert np.abs(one - two).max() <= 1, "sums of gradients in another order"


def test_a_calibrated_observer_is_another_network_than_the_teacher(store):
    ranks = rldd_tools.ALONE
    paths = (store / "observer" / "weights.pt", store / "calibrate" / "observer.pt")
    trained, calibrated = (frozen.load(path, ranks) for path in paths)
    assert frozen.same(trained, frozen.load(paths[0], ranks))
    assert not frozen.same(trained, calibrated)
