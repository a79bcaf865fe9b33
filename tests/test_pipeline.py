"""World-size invariance of training, resume after SIGKILL, sharing: with real processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    TINY,
    clean_environment,
    cli,
    digests,
    image_folder,
    process,
    said_plainly,
)

pytestmark = pytest.mark.slow
FAULTS = str(Path(__file__).parent / "faults")


def same_work(store: Path, calm: Path) -> None:
    """The pieces of work of a tiny run (and what was copied with them) have the bytes of the
    undisturbed one, whose store other tests use for other work too."""
    ours, theirs = digests(store), digests(calm)
    assert len(ours) >= 10, sorted(ours)
    for key in ours:
        assert ours[key] == theirs[key], key


def with_experts(run: Path, store: Path) -> None:
    for stage in ("shard", "experts"):
        shutil.copytree(run.parent / "store" / stage, store / stage)


def started(*arguments, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "ltdd_scale", *map(str, arguments)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=clean_environment(), **{**quiet, **kwargs})


def test_training_on_two_ranks_follows_one(finished, tmp_path):
    """The same sample order and draws; InstanceNorm has no batch statistics, so only the order of
    additions differs."""
    config, _ = finished
    logs = []
    for nproc in (2, 1):
        store = tmp_path / f"store{nproc}"
        where = ("--out", tmp_path / f"r{nproc}", "--store", store, "--nproc", nproc)
        done = cli("train", "teacher", config, *where, "--set", "teacher.contrast=0")
        assert done.returncode == 0, done.stderr
        logs.append(json.loads(next((store / "experts").glob("*/log.json")).read_text()))
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), (a, b)


def test_torchrun_does_the_same(finished, tmp_path):
    config, run = finished
    with_experts(run, tmp_path / "store")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-m", *launcher, "-m", "ltdd_scale", "run", str(config)]
    env = clean_environment({"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
    out = ("--out", str(tmp_path / "r"))
    done = subprocess.run(
        [*command, *out], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    same_work(tmp_path / "store", run.parent / "store")
    assert (tmp_path / "r" / "report.html").exists()
    assert (tmp_path / "r" / "results.json").read_text() == (run / "results.json").read_text()


WAYS = [
    [
        "calibrate.conv_inputs=true",
        "calibrate.variance=within",
        "recover.ce=0.5",
        "recover.classwise=1",
        "relabel.labels=single",
        "evaluate.optimizer=sgd",
        "evaluate.schedule=steps",
    ],
    [
        "relabel.adjust=true",
        "relabel.labels=online",
        "evaluate.randaugment=2",
        "evaluate.cutmix=false",
        "evaluate.ema=0",
        "evaluate.full_epochs=2",
        "evaluate.plain=expert",
    ],
    [
        "relabel.adjust=true",
        "relabel.labels=stored",
        "recover.ema=0",
        "recover.iterations=3",
        "calibrate.fair=false",
        "evaluate.split=val",
        "evaluate.plain=none",
    ],
    [
        "relabel.labels=hard",
        "recover.iterations=0",
        "initialize.select=random",
        "evaluate.nets=[convnet3,resnet32]",
        "data.memory_gb=0",
        "calibrate.lead=2",
        "runtime.workers=1",
    ],
    ["evaluate.matrix=true", "evaluate.epochs=1", "relabel.labels=single", "relabel.epochs=1"],
]


@pytest.mark.parametrize("sets", WAYS)
def test_every_way_through_the_settings(finished, tmp_path, sets):
    config, run = finished
    store = tmp_path / "store"
    with_experts(run, store)
    where = ("--out", tmp_path / "r", "--store", store, "--nproc", 1)
    done = cli("run", config, *where, "--set", *sets)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert all(0 <= row["top1"] <= 100 and 0 <= row["balanced"] <= 100 for row in results["rows"])
    plain = results["summary"].get("plain", [])
    assert len(plain) == (0 if "evaluate.plain=none" in sets else 2)
    if "evaluate.matrix=true" in sets:
        cells = {(row["set"], row["labels"]) for row in results["matrix"]}
        assert len(cells) == 12 and "label matrix" in (tmp_path / "r" / "report.html").read_text()
    images = tmp_path / "r" / "distilled" / "images"
    fit = cli("fit", images.parent, "--epochs", 1, "--test", images)
    assert fit.returncode == 0, fit.stderr


def test_killed_at_random_times_ends_in_the_same_bytes(finished, tmp_path, tiny):
    chance, killed = random.Random(20), 0
    where = ("--out", tmp_path / "run", "--nproc", 1, "--set", "runtime.checkpoint_seconds=0")
    for _ in range(6):
        running = started("run", tiny, *where, start_new_session=True)
        time.sleep(chance.uniform(2.0, 4.0))
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            killed += 1
        running.wait()
    assert killed >= 2, "the run was over before it could be killed: a machine faster than the test"
    done = cli("run", tiny, "--out", tmp_path / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    same_work(tmp_path / "store", finished[1].parent / "store")


def test_a_sharding_killed_alone_leaves_no_worker_that_holds_its_folder(tmp_path):
    """Only the parent is killed, as the out-of-memory killer does: its pool must go too, and the
    next run goes on."""
    image_folder(tmp_path / "real", {"a": 150, "b": 150}, size=96)
    image_folder(tmp_path / "real", {"a": 3, "b": 3}, "test", size=96)
    path = tmp_path / "set.yaml"
    data = f"source: folder, path: {tmp_path / 'real'}, profile: full, shard_images: 10"
    path.write_text(f"data: {{{data}}}\n")
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", 1)
    running = started("shard", path, *where)
    while not list((tmp_path / "store").rglob("*.part.tmp")):
        assert running.poll() is None, "over before it could be killed"
        time.sleep(0.005)
    running.kill()
    running.wait()
    finished_parts = len(list((tmp_path / "store").rglob("*.part.tmp")))
    assert 0 < finished_parts < 31
    done = process("shard", path, *where, timeout=60)
    assert done.returncode == 0, done.stderr
    calm = ("--out", tmp_path / "q", "--store", tmp_path / "calm", "--nproc", 1)
    assert cli("shard", path, *calm).returncode == 0
    assert digests(tmp_path / "store") == digests(tmp_path / "calm")


def hurt(folder: Path, config: Path, fault: str, rank: int, nproc: int, *more):
    """A run on `nproc` ranks of which one is killed at `fault` ("replace:step-:3")."""
    env = {
        "PYTHONPATH": FAULTS,
        "LTDD_FAULT": f"{fault}:KILL:me",
        "LTDD_FAULT_MARK": str(folder / "killed"),
        "LTDD_FAULT_RANK": str(rank),
    }
    now = ("--nproc", nproc, "--set", "runtime.checkpoint_seconds=0", *more)
    return process(*config, "--out", folder / "run", *now, env=env)


def test_three_ranks_resume_to_the_bit(tmp_path, tiny):
    """With three ranks DDP's order of additions depends on its buckets, which a restart must not
    lay out anew."""
    command, longer = ("train", "observer", tiny), "observer.epochs=10"
    calm = cli(*command, "--out", tmp_path / "calm" / "run", "--nproc", 3, "--set", longer)
    assert calm.returncode == 0, calm.stderr
    (tmp_path / "hurt").mkdir()
    done = hurt(tmp_path / "hurt", command, "replace:step-:3", 0, 3, longer)
    assert done.returncode == 0 and (tmp_path / "hurt" / "killed").exists(), done.stderr
    assert "resumed at step" in done.stderr, done.stderr
    assert digests(tmp_path / "hurt" / "store") == digests(tmp_path / "calm" / "store")


def test_bad_input_is_one_line_on_two_ranks_too(tiny, tmp_path):
    where = ("--out", tmp_path / "r", "--nproc", 2)
    said_plainly(
        process("train", "observer", tiny, *where, "--set", "observer.batch_size=9999"),
        "observer.batch_size=9999",
        "training images",
    )


def test_a_killed_rank_is_started_again_by_the_launcher(tmp_path, tiny):
    """Two ranks, one dies: all go on from the checkpoints, in one command, to the bytes of an
    undisturbed run on two ranks."""
    calm = cli("run", tiny, "--out", tmp_path / "calm" / "run", "--nproc", 2)
    assert calm.returncode == 0, calm.stderr
    for number, (fault, rank) in enumerate([("replace:step-:4", 0), ("fsync:initialize:2", 1)]):
        folder = tmp_path / f"hurt-{number}"
        folder.mkdir()
        done = hurt(folder, ("run", tiny), fault, rank, 2)
        assert (folder / "killed").exists(), done.stderr
        assert done.returncode == 0 and "killed by SIGKILL; starting again" in done.stderr
        assert digests(folder / "store") == digests(tmp_path / "calm" / "store")


def test_two_runs_at_once_share_the_work(tmp_path):
    """Two IPCs started together: the experts are trained once, by whoever is first; the other waits
    for them."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    common = ("initialize", path, "--store", tmp_path / "store", "--nproc", 1)
    runs = [
        started(
            *common,
            *("--out", tmp_path / f"r{ipc}", "--set", f"ipc={ipc}", "teacher.epochs=60"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for ipc in (2, 3)
    ]
    said = [r.communicate(timeout=200)[1] for r in runs]
    assert all(r.returncode == 0 for r in runs), said
    store = tmp_path / "store"
    assert len(list((store / "experts").iterdir())) == 1
    assert len(list((store / "initialize").iterdir())) == 2
    assert any("waiting: another run" in s for s in said), said


WAYS_OF_EXPERTS = """
method: damed
trajectories: {width: 8, steps: 8, every: 2, batch_size: 16, experts: 3}
classifiers: {steps: 4, every: 2, batch_size: 16}
"""


def test_units_of_two_groups_on_ranks_and_in_parts(tmp_path):
    """Classifiers read experts: on two ranks, in parts of which the second finds an expert missing,
    and on one rank in one go."""
    config = tmp_path / "experts.yaml"
    config.write_text(TINY + WAYS_OF_EXPERTS)

    def done(name, where, *more):
        place = ("--out", tmp_path / where / "r", "--store", tmp_path / where / "store")
        made = cli(name, config, *place, *more)
        assert made.returncode == 0, made.stderr
        return made.stdout

    calm = done("classifiers", "calm", "--nproc", 1)
    assert calm.index("3 trajectories …") < calm.index("3 classifiers …")
    said = done("classifiers", "ranks", "--nproc", 2)
    assert "rank 1 has done 1 of" in said
    said = done("trajectories", "parts", "--nproc", 1, "--part", "0/2")
    assert "part 0 of 2 of 3 trajectories …" in said
    for k in range(2):
        said = done("classifiers", "parts", "--nproc", 1, "--part", f"{k}/2")
        left = len(digests(tmp_path / "parts" / "store"))
        # Whoever comes first makes the expert that is missing, whole.
        assert ("1 trajectories …" in said) == (k == 0)
        assert f"part {k} of 2 of 3 classifiers …" in said
        assert left == (1 + 3 + 2, 1 + 3 + 3)[k]
    for name in ("ranks", "parts"):
        ours, theirs = (digests(tmp_path / n / "store") for n in (name, "calm"))
        assert ours == theirs and len(ours) == 7


def test_an_expert_that_dies_as_it_is_sealed_is_done(tmp_path, tiny, monkeypatch):
    """Its checkpoints go after its record is there, or when there is work again."""
    from ltdd_scale.errors import UserError
    from ltdd_scale.pipeline import store

    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", 1)
    often = ("--set", "runtime.checkpoint_seconds=0")
    assert cli("shard", tiny, *where).returncode == 0

    def dying(_):
        raise UserError("the end")

    with monkeypatch.context() as patched:
        tidy = store.tidy
        patched.setattr(store, "tidy", lambda f: dying(f) if "experts" in str(f) else tidy(f))
        assert cli("train", "observer", tiny, *where, *often).returncode == 1
    (folder,) = (tmp_path / "store" / "experts").iterdir()
    assert list(folder.rglob("step-*.pt")) and store.complete(folder)
    before = (folder / "stage.json").read_bytes()
    assert cli("calibrate", tiny, *where, *often).returncode == 0
    assert not list(folder.rglob("step-*.pt"))
    assert (folder / "stage.json").read_bytes() == before
