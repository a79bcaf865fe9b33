import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from one_stage import one_stage

from ltdd_scale.data import sharding, shards, sources
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import open_images, prepare
from ltdd_scale.data.settings import Data, Location
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories import classifier, cost, descent, stage, train
from ltdd_scale.experts.trajectories.descent import direction, gsam
from ltdd_scale.experts.trajectories.kept import HELD, Form, Kept, Snapshots
from ltdd_scale.experts.trajectories.orders import ClassAware, Shuffled, Uniform
from ltdd_scale.experts.trajectories.settings import (
    Classifier,
    Descent,
    Trajectories,
    Trajectory,
    without_effect,
)
from ltdd_scale.models.flat import Flat
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Division, Facts, settings_of

ALONE = Ranks(0, 1, torch.device("cpu"), None)
SIZE = 8
SMALL = {"width": 8, "steps": 10, "every": 2, "batch_size": 12, "lr": 0.05}
HEAD = {"steps": 6, "every": 2, "batch_size": 12, "lr": 0.5, "images_per_class": 2}
FAULTS = str(Path(__file__).parent / "faults")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As every rank works: with more threads the last bits may be others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    data = Data(source="digits", max_per_class=20, imbalance_factor=10, test_per_class=5)
    sharding.write(folder, "digits", sources.open_source(data), data, workers=1)
    return folder


def config(classifiers=(), seed=0, **changes):
    return SimpleNamespace(
        trajectories=Trajectories(**{**SMALL, **changes}),
        classifiers=Classifier(**{**HEAD, **dict(classifiers)}),
        seed=seed,
        data=Data(resolution=SIZE, mirror=False),
    )


def expert_settings(expert=0, **changes):
    made = config(**changes)
    return settings_of(stage.experts(made)[expert], made)


def classifier_settings(**changes):
    made = config(classifiers=changes)
    return settings_of(stage.classifiers(made)[0], made)


def context(shard: Path, out: Path, seconds=60.0, **inputs) -> Context:
    out.mkdir(exist_ok=True)
    place = {"ranks": ALONE, "out": out, "inputs": {"shard": shard, **inputs}, "owner": "me"}
    return Context(**place, checkpoint_seconds=seconds, quiet=True, workers=0, location=Location())


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What is sealed: as the store, without hidden files and folders."""
    found = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return {p.name: p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(shard, tmp_path_factory) -> Path:
    """The folder of an expert of the small settings."""
    out = tmp_path_factory.mktemp("whole")
    train.run(expert_settings(), context(shard, out))
    return out


# --- which images a step sees ---------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_the_uniform_stream_is_epoch_after_epoch_and_pure(num, size, step):
    order = Uniform(num, size, 3, "a")
    stream = np.concatenate([order.batch(k) for k in range(-(-3 * num // size) + 1)])
    for epoch in range(3):
        assert sorted(stream[epoch * num : (epoch + 1) * num]) == list(range(num))
    fresh = Uniform(num, size, 3, "a").batch(step)
    assert np.array_equal(fresh, order.batch(step)) and len(fresh) == size
    if num > 8:
        assert not np.array_equal(stream[:num], stream[num : 2 * num])
        assert not np.array_equal(
            Uniform(num, num, 4, "a").batch(0), Uniform(num, num, 3, "a").batch(0)
        )


def test_the_class_aware_stream_is_balanced_and_pure():
    labels = np.repeat([0, 1, 3, 4], [30, 7, 3, 1])  # class 2 has no images
    order = ClassAware(labels, 10, 3, 0, "b")
    batches = [order.batch(k) for k in range(12)]
    stream = np.concatenate(batches)  # 120 images: 10 rounds of 4 classes with 3 images
    turns = labels[stream].reshape(-1, 3)
    assert (turns == turns[:, :1]).all()
    rounds = turns[:, 0].reshape(10, 4)
    assert all(sorted(r) == [0, 1, 3, 4] for r in rounds) and len({tuple(r) for r in rounds}) > 3
    for c, n in ((0, 30), (1, 7), (3, 3), (4, 1)):
        mine = stream[labels[stream] == c]
        assert len(mine) == 30
        for start in range(0, 30 - n + 1, n):  # one permutation of the class after the other
            assert len(set(mine[start : start + n])) == n
    for k in (11, 0, 7):
        assert np.array_equal(ClassAware(labels, 10, 3, 0, "b").batch(k), batches[k])
    other = np.concatenate([ClassAware(labels, 10, 3, 1, "b").batch(k) for k in range(12)])
    assert not np.array_equal(other, stream)


def test_a_shuffled_stream_can_be_looked_at_anywhere():
    stream = Shuffled(5, "c")
    all_at_once = stream.at(np.arange(30))
    assert all(stream.at(np.asarray([k]))[0] == all_at_once[k] for k in (29, 0, 14, 15, 3))


# --- a step ---------------------------------------------------------------------------------------


def test_gsam_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator)
    theta = torch.randn(6, generator=generator)

    def loss(at):
        return (matrix @ at).sin().sum() + at.pow(4).sum()

    def grad(at):
        return torch.func.grad(loss)(at)

    own = Descent(optimizer="gsam", rho=0.3, alpha=0.7)
    value, found = direction(own, theta, loss)
    g = grad(theta)
    g_p = grad(theta + 0.3 * g / g.norm())
    cosine = g @ g_p / (g.norm() * g_p.norm())
    parallel = g.norm() * cosine * g_p / g_p.norm()
    across = g - parallel
    assert abs(across @ g_p) < 1e-3 * g_p.norm() and across.norm() > 0.05 * g.norm()
    assert torch.allclose(found, g_p - 0.7 * across, rtol=1e-4, atol=1e-5)
    assert value == loss(theta)
    plain = direction(Descent(optimizer="sgd"), theta, loss)[1]
    assert torch.equal(plain, g)
    assert torch.allclose(gsam(g, g_p, 0.0), g_p)


def test_steps_are_those_of_torch():
    own = Descent(lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    ours, gradients = torch.randn(5, generator=generator), torch.randn(4, 5, generator=generator)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    velocity = torch.zeros(5)
    for gradient in gradients:
        ours, velocity = descent.advance(own, ours, velocity, gradient)
        theirs.grad = gradient
        optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


# --- an expert ------------------------------------------------------------------------------------


def test_the_first_step_is_the_one_that_the_settings_say(shard, tmp_path):
    made = expert_settings(expert=2, steps=1, every=1, dsa="", seed=5)
    train.run(made, context(shard, tmp_path / "t"))
    kept, split = Kept(tmp_path / "t"), shards.ShardSplit(shard, "train")
    flat = Flat("convnet3", 8, "instance", SIZE, 10)
    start = flat.initial(5, "trajectory", 2, "weights")
    images = open_images(split, made.images, torch.device("cpu"), 0)
    batch = Uniform(len(split), 12, 5, "trajectory", 2).batch(0)
    (x,) = images.stream([(batch, None)], ViewSpec(SIZE))
    x, y = prepare(split, torch.device("cpu"))(x), torch.from_numpy(split.labels[batch])
    gradient = torch.func.grad(lambda theta: F.cross_entropy(flat.logits(theta, x), y))(start)
    assert torch.equal(kept.vector(0), start) and kept.count == 2
    assert torch.allclose(kept.vector(1), start - 0.05 * gradient, atol=1e-6)
    assert not torch.allclose(kept.vector(1), start, atol=1e-4)
    assert torch.equal(kept.last(), kept.vector(1))


@pytest.mark.parametrize("optimizer", ["sgd", "gsam"])
def test_snapshots_are_the_weights_of_their_step(shard, tmp_path, optimizer):
    changes = {"optimizer": optimizer, "momentum": 0.5, "rho": 0.5}
    train.run(expert_settings(**changes), context(shard, tmp_path / "t"))
    kept = Kept(tmp_path / "t")
    assert (kept.count, kept.every) == (6, 2)
    for k in (1, 3, 5):
        out = tmp_path / f"t{k}"
        train.run(expert_settings(steps=2 * k, **changes), context(shard, out))
        assert torch.equal(Kept(out).last(), kept.vector(k))
    rows = torch.stack([kept.vector(k) for k in range(6)])
    assert len({tuple(row[:50].tolist()) for row in rows}) == 6, "each is a copy of its own"
    assert torch.equal(kept.last(), rows[5]) and rows.dtype == torch.float32


def test_more_snapshots_than_are_held_at_once(shard, tmp_path):
    steps = 2 * HELD + 3
    train.run(expert_settings(steps=steps, every=1), context(shard, tmp_path / "t"))
    kept = Kept(tmp_path / "t")
    assert kept.count == steps + 1 and torch.equal(kept.vector(steps), kept.last())
    rows = np.load(tmp_path / "t" / "snapshots.npy")
    assert len(np.unique(rows, axis=0)) == steps + 1
    assert np.array_equal(rows[HELD], kept.vector(HELD).numpy())


def test_experts_and_seeds_differ_and_nothing_else_counts(shard, whole, tmp_path):
    for name, changes in (("other", {"expert": 1}), ("seed", {"seed": 1})):
        train.run(expert_settings(**changes), context(shard, tmp_path / name))
        for k in (0, 3):
            assert not torch.equal(Kept(tmp_path / name).vector(k), Kept(whole).vector(k))
    torch.manual_seed(77)  # nobody's business
    train.run(expert_settings(experts=3), context(shard, tmp_path / "more"))
    assert bytes_of(tmp_path / "more") == bytes_of(whole)
    names = {"snapshots.npy", "last.npy", "trajectory.json", "log.jsonl"}
    assert set(bytes_of(whole)) == names


def test_what_is_kept_is_the_start_of_the_way_and_its_end(shard, whole, tmp_path):
    train.run(expert_settings(keep=2), context(shard, tmp_path / "t"))
    some, every = Kept(tmp_path / "t"), Kept(whole)
    assert some.count == 3 and every.count == 6
    assert all(torch.equal(some.vector(k), every.vector(k)) for k in range(3))
    assert torch.equal(some.last(), every.last())
    with pytest.raises(UserError, match=r"snapshot 3 is wanted, and 0 to 2 were kept: raise tra"):
        some.vector(3)


def test_bfloat16_rounds_what_is_kept_and_not_the_training(shard, whole, tmp_path):
    train.run(expert_settings(stored="bfloat16"), context(shard, tmp_path / "t"))
    half, full = Kept(tmp_path / "t"), Kept(whole)
    for k in range(6):
        assert torch.equal(half.vector(k), full.vector(k).bfloat16().float())
    assert torch.equal(half.last(), full.last())
    sizes = [(folder / "snapshots.npy").stat().st_size for folder in (tmp_path / "t", whole)]
    assert sizes[1] - sizes[0] == 6 * half.size * 2
    assert np.load(tmp_path / "t" / "snapshots.npy", mmap_mode="r").dtype == np.uint16
    assert "bits of bfloat16" in (tmp_path / "t" / "trajectory.json").read_text()


def test_an_expert_learns(shard, tmp_path):
    made = expert_settings(steps=150, every=30, batch_size=32, lr=0.1, momentum=0.9, width=16)
    facts = train.run(made, context(shard, tmp_path / "t"))
    assert facts["loss"] < 1.5 and facts["accuracy"] > 60 and facts["snapshots"] == 6, facts
    assert "% of the training images" in facts["note"]
    lines = (tmp_path / "t" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 50 and f'"step": 150, "loss": {facts["loss"]}' in lines[-1]


def test_a_loss_that_is_not_finite_ends_in_one_line(shard, tmp_path):
    with pytest.raises(UserError) as told:
        train.run(expert_settings(lr=1e30, expert=3), context(shard, tmp_path / "t"))
    said = str(told.value)
    assert "\n" not in said and said.startswith("trajectory 3: the loss is ")
    assert "between steps" in said and "lower trajectories.lr (it is 1e+30)" in said
    with pytest.raises(
        UserError, match=r"trajectory 0: the loss is nan between steps 0 and 1; low"
    ):
        # The last step's loss is finite, and the weights are not.
        train.run(expert_settings(lr=1e300, steps=1, every=1), context(shard, tmp_path / "last"))


# --- cut and resumed ------------------------------------------------------------------------------


class Cut(Exception):
    pass


def cut_at(monkeypatch, call: int) -> None:
    """The `call`-th step from now does not come to its end."""
    real, calls = descent.advance, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Cut
        return real(*arguments)

    monkeypatch.setattr(descent, "advance", failing)


def cut(call: int, work) -> None:
    """`work` dies in a step. What its thread writes is written, as nobody waits for it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, call)
        work()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


CUTS = {"trajectory": range(1, 11), "classifier": range(1, 7)}


@pytest.mark.parametrize("kind", CUTS)
def test_cut_at_any_step_it_ends_in_the_same_bytes(shard, whole, tmp_path, kind):
    """With a checkpoint after every step; now and then without any."""
    changes = {"momentum": 0.9, "max_norm": 0.5}
    if kind == "classifier":
        made, run, inputs = classifier_settings(**changes), classifier.run, {"trajectory": whole}
    else:
        made, run, inputs = expert_settings(momentum=0.9), train.run, {}
    facts = run(made, context(shard, tmp_path / "calm", **inputs))
    for step in CUTS[kind]:
        seconds, out = 60.0 if step in (1, 5) else 0.0, tmp_path / f"cut-{step}"
        cut(step, lambda: run(made, context(shard, out, seconds, **inputs)))  # noqa: B023
        with pytest.MonkeyPatch.context() as patch:
            if not seconds:  # steps that are done are not done again
                cut_at(patch, CUTS[kind][-1] - step + 2)
            assert run(made, context(shard, out, **inputs)) == facts
        assert bytes_of(out) == bytes_of(tmp_path / "calm"), step


def test_what_was_written_after_the_checkpoint_or_torn_is_cut_off(tmp_path):
    form = Form(count=4, size=3, every=1)
    with Snapshots(tmp_path, form) as kept:
        kept.begin()
        for k in range(3):
            kept.add(torch.full((3,), float(k)))
        kept.save()
    path = tmp_path / "snapshots.npy"
    path.write_bytes(path.read_bytes() + b"torn")
    assert not Snapshots(tmp_path, form).resume(4) and not Snapshots(tmp_path / "x", form).resume(0)
    assert not Snapshots(tmp_path, Form(count=5, size=3, every=1)).resume(1)
    with Snapshots(tmp_path, form) as kept:
        assert kept.resume(2)
        kept.add(torch.full((3,), 7.0))
        kept.add(torch.full((3,), 8.0))
        kept.finish(torch.full((3,), 9.0))
    assert np.load(path).tolist() == [[0.0] * 3, [1.0] * 3, [7.0] * 3, [8.0] * 3]
    assert Kept(tmp_path).last().tolist() == [9.0] * 3


def test_without_its_snapshots_a_checkpoint_does_not_count(shard, whole, tmp_path):
    cut(8, lambda: train.run(expert_settings(), context(shard, tmp_path / "t", 0.0)))
    (tmp_path / "t" / "snapshots.npy").unlink()
    cut(4, lambda: train.run(expert_settings(), context(shard, tmp_path / "t", 0.0)))
    assert {p.stem[-1] for p in tmp_path.glob("t/checkpoints/step-*.pt")} == {"2", "3"}
    train.run(expert_settings(), context(shard, tmp_path / "t"))
    assert bytes_of(tmp_path / "t") == bytes_of(whole)


TINY = """
method: mtt
data: {source: digits, resolution: 8, mirror: false, max_per_class: 20, imbalance_factor: 10, test_per_class: 5}
trajectories: {width: 8, steps: 10, every: 2, batch_size: 12, lr: 0.05, experts: 1}
runtime: {workers: 0, checkpoint_seconds: 0}
"""


@pytest.mark.slow
def test_killed_between_any_two_writes_it_ends_in_the_same_bytes(shard, whole, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    faults = ("fsync:snapshots:3", "replace:step-:4", "fsync:step-:2", "replace:last:1")
    for number, fault in enumerate(faults):
        mark = tmp_path / f"killed-{number}"
        env = {"PYTHONPATH": FAULTS, "LTDD_FAULT": f"{fault}:KILL:me", "LTDD_FAULT_RANK": "0"}
        env["LTDD_FAULT_MARK"] = str(mark)
        out, inputs = tmp_path / "t", {"shard": shard}
        done = one_stage("trajectory/000", path, out, inputs=inputs, env=env)
        assert mark.exists() and done.returncode == 137, done.stderr
    done = one_stage("trajectory/000", path, out, inputs=inputs)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    (out / "facts.json").unlink()
    assert bytes_of(out) == bytes_of(whole)


def test_a_full_disk_is_one_line(shard, tmp_path):
    """``/dev/full`` is a device on which nothing has room."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "snapshots.npy").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"snapshots\.npy: no space left on the device; free some"):
        train.run(expert_settings(), context(shard, tmp_path / "t"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_on_the_way_loses_nothing(shard, whole, tmp_path):
    out = tmp_path / "t"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "none", out], check=True)
    try:
        with pytest.raises(UserError, match="no space left on the device") as told:
            train.run(expert_settings(), context(shard, out, 0.0))
        assert "\n" not in str(told.value)
        done = max(int(p.stem.split("-")[1]) for p in out.glob("checkpoints/step-*.pt"))
        assert 0 < done < 10
        subprocess.run(["mount", "-o", "remount,size=16m", out], check=True)
        train.run(expert_settings(), context(shard, out))
        assert bytes_of(out) == bytes_of(whole)
    finally:
        subprocess.run(["umount", "-l", out], check=True)


# --- classifiers ----------------------------------------------------------------------------------


def test_a_classifier_starts_where_the_expert_ended_and_moves_the_head_alone(
    shard, whole, tmp_path
):
    before = bytes_of(whole)
    made = classifier_settings(steps=1, every=1)
    made_from = context(shard, tmp_path / "c", trajectory=whole)
    classifier.run(made, made_from)
    kept, flat = Kept(tmp_path / "c"), Flat("convnet3", 8, "instance", SIZE, 10)
    theta = Kept(whole).last()
    assert kept.size == flat.head.stop - flat.head.start
    assert torch.equal(kept.vector(0), theta[flat.head])
    split = shards.ShardSplit(shard, "train")
    order = ClassAware(split.labels, 12, 2, 0, "classifier", 0)
    shown = train.batches(made, made.network, order, split, made_from, (0, "classifier", 0))
    x, y = next(shown.steps(0, 1))
    head = torch.nn.Linear(flat.model.fc.in_features, 10)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(theta[flat.head], head.parameters())
    F.cross_entropy(head(flat.features(theta, x)), y).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in head.parameters()])
    assert torch.allclose(kept.vector(1), theta[flat.head] - 0.5 * gradient, atol=1e-6)
    assert bytes_of(whole) == before


def test_a_classifier_on_balanced_batches_forgets_the_head_classes(shard, tmp_path):
    """A sanity check of the whole: the mean over classes rises."""
    own = {"steps": 60, "every": 30, "lr": 0.1, "batch_size": 32, "width": 16}
    biased = train.run(expert_settings(**own), context(shard, tmp_path / "t"))
    made = classifier_settings(steps=100, every=50, lr=0.1, batch_size=40)
    made = settings_of(
        stage.classifiers(made_ := config({"steps": 100, "every": 50, "lr": 0.1}, **own))[0], made_
    )
    facts = classifier.run(made, context(shard, tmp_path / "c", trajectory=tmp_path / "t"))
    assert facts["balanced"] > biased["balanced"] + 5, (biased, facts)
    assert Kept(tmp_path / "c").count == 3


def test_max_norm_holds_after_every_step(shard, whole, tmp_path):
    limits = {"free": 0.0, "held": 0.6}
    norms = {}
    for name, most in limits.items():
        made = classifier_settings(max_norm=most, every=1)
        classifier.run(made, context(shard, tmp_path / name, trajectory=whole))
        kept = Kept(tmp_path / name)
        rows = torch.stack([kept.vector(k) for k in range(1, kept.count)])
        norms[name] = rows[:, :-10].view(len(rows), 10, -1).norm(dim=2)
    assert norms["held"].max() <= 0.6 + 1e-6 < norms["free"].max()
    assert torch.isclose(norms["held"], torch.tensor(0.6)).any(), "a limit that is met"
    head = torch.arange(1.0, 9.0)  # 2 classes, 3 features, 2 biases
    classifier.max_norm(head, 2, 5.0)
    assert torch.allclose(head[:3], torch.arange(1.0, 4.0))  # short enough
    assert torch.allclose(head[3:6], 5 * F.normalize(torch.arange(4.0, 7.0), dim=0))
    assert head[6:].tolist() == [7.0, 8.0]


def test_a_classifier_of_another_network_is_refused(shard, whole, tmp_path):
    made = config({}, width=4)
    (other,) = (settings_of(stage.classifiers(made)[0], made),)
    with pytest.raises(UserError, match="this expert is of another network"):
        classifier.run(other, context(shard, tmp_path / "c", trajectory=whole))


# --- reading --------------------------------------------------------------------------------------


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, content in bytes_of(folder).items():
        (to / name).write_bytes(content)
    return to


def one_line(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as told:
        Kept(folder)
    assert "\n" not in str(told.value)
    for word in (str(folder), *words):
        assert word in str(told.value), told.value


def test_what_cannot_be_read_is_told_in_one_line(whole, tmp_path):
    one_line(tmp_path / "none", "no trajectory there")
    cure = "and run the same command again"
    for name in ("snapshots.npy", "last.npy"):
        hurt = copy(whole, tmp_path / f"missing-{name}")
        (hurt / name).unlink()
        one_line(hurt, name, "is missing", cure)
        hurt = copy(whole, tmp_path / f"short-{name}")
        (hurt / name).write_bytes((hurt / name).read_bytes()[:-4])
        one_line(hurt, name, "cut off", cure)
        for content in (b"", b"no array at all, but some bytes"):
            (hurt / name).write_bytes(content)
            one_line(hurt, name, cure)
    hurt = copy(whole, tmp_path / "shape")
    np.save(hurt / "last.npy", np.zeros(7, np.float32))
    one_line(hurt, "it holds float32 [7], not float32 [")
    hurt = copy(whole, tmp_path / "type")
    np.save(hurt / "snapshots.npy", np.load(whole / "snapshots.npy").astype(np.float64))
    one_line(hurt, "it holds float64")
    hurt = copy(whole, tmp_path / "record")
    (hurt / "trajectory.json").write_text("[]")
    one_line(hurt, "no record of a trajectory", cure)
    (hurt / "trajectory.json").write_text("{")
    one_line(hurt, "is damaged")
    with pytest.raises(UserError, match="snapshot -1 is wanted, and 0 to 5 were kept"):
        Kept(whole).vector(-1)


# --- records --------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused():
    train.check(expert_settings())
    classifier.check(classifier_settings())
    for changes, words in (
        ({"net": "resnet32"}, "trajectories.net: resnet32 with norm=instance has BatchNorm"),
        ({"dsa": "crop_blur"}, "'blur' is none of"),
        ({"every": 11}, r"trajectories\.every=11: there is no snapshot"),
        ({"keep": 6}, "trajectories.keep=6, but 10 steps make 5 snapshots"),
        ({"net": "convnet4"}, "convnet4 needs images of at least 16 pixels"),
    ):
        with pytest.raises(UserError, match=words):
            train.check(expert_settings(**changes))
    with pytest.raises(UserError, match=r"classifiers\.every=9: there is no snapshot"):
        classifier.check(classifier_settings(every=9))


def test_an_expert_is_a_unit_whose_folder_does_not_know_how_many_there_are():
    few, many = config(experts=2), config(experts=5)
    a, b = stage.experts(few), stage.experts(many)
    assert [s.name for s in a] == ["trajectory/000", "trajectory/001"] and b[:2] == a
    assert settings_of(a[1], few).hashed() == settings_of(b[1], many).hashed()
    assert settings_of(a[0], few).hashed() != settings_of(a[1], few).hashed()
    assert all(s.division is Division.UNITS and s.job == "trajectories" for s in b)
    heads = stage.classifiers(many)
    assert [s.inputs["trajectory"] for s in heads] == [s.name for s in b]
    assert {s.job for s in heads} == {"classifiers"}
    assert set(Trajectory.model_fields) == set(Trajectories.model_fields) - {"experts"}


def test_options_without_effect_are_told():
    assert without_effect(config()) == []
    said = without_effect(config({"alpha": 0.1}, rho=0.5))
    assert said == [
        "trajectories.rho has no effect with trajectories.optimizer=sgd",
        "classifiers.alpha has no effect with classifiers.optimizer=sgd",
    ]
    assert without_effect(config(optimizer="gsam", rho=0.5)) == []


def test_the_cost_says_what_is_written(shard, whole, tmp_path):
    facts = Facts((20,) * 10)
    found = cost.trajectory(expert_settings(), facts)
    size = Kept(whole).size
    written = sum(len(content) for name, content in bytes_of(whole).items() if "npy" in name)
    assert written < found.disk < written + 30 * size
    assert cost.trajectory(expert_settings(keep=2), facts).disk == found.disk - 3 * 4 * size
    halved = cost.trajectory(expert_settings(stored="bfloat16"), facts)
    assert halved.disk == found.disk - 6 * 2 * size
    double = cost.trajectory(expert_settings(optimizer="gsam"), facts)
    assert double.flops == 2 * found.flops > 0
    head = cost.classifier(classifier_settings(), facts)
    assert 0 < head.flops < found.flops and 0 < head.disk < found.disk and head.memory > 0
