"""World-size invariance, resume after SIGKILL, sharing: with real processes."""

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
from conftest import ROOT, TINY, cli, digests, image_folder, said_plainly

EXACT = ("calibrate", "initialize", "recover", "relabel")


def same_work(store: Path, calm: Path) -> None:
    """The ten pieces of work of a tiny run (and what was copied with them) have the bytes of the undisturbed one, whose store other tests use for other work too."""
    ours, theirs = digests(store), digests(calm)
    assert len(ours) >= 10, sorted(ours)
    for key in ours:
        assert ours[key] == theirs[key], key


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_same_bytes_on_one_two_and_three_ranks(finished, tmp_path, world):
    """Calibration, initialisation, recovery and relabelling from the same experts."""
    config, run = finished
    done = run.parent / "store"
    for stage in ("shard", "experts"):
        shutil.copytree(done / stage, tmp_path / "store" / stage)
    ran = cli(
        "relabel", config, "--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", world
    )
    assert ran.returncode == 0, ran.stderr
    ours, theirs = digests(tmp_path / "store"), digests(done)
    compared = [k for k in ours if k.split("/")[0] in EXACT]
    assert sorted(k.split("/")[0] for k in compared) == sorted(EXACT)
    for key in compared:
        assert ours[key] == theirs[key], key
        assert json.loads((tmp_path / "store" / key / "stage.json").read_text())["ranks"] == world


@pytest.mark.slow
def test_training_on_two_ranks_follows_one(finished, tmp_path):
    """The same sample order and draws; InstanceNorm has no batch statistics, so only the order of additions differs."""
    config, _ = finished
    ran = cli(
        "train",
        "teacher",
        config,
        "--out",
        tmp_path / "r",
        "--nproc",
        2,
        "--set",
        "teacher.contrast=0",
    )
    alone = cli(
        "train",
        "teacher",
        config,
        "--out",
        tmp_path / "q",
        "--store",
        tmp_path / "other",
        "--nproc",
        1,
        "--set",
        "teacher.contrast=0",
    )
    assert ran.returncode == alone.returncode == 0, ran.stderr + alone.stderr
    logs = [
        json.loads(next((tmp_path / s / "experts").glob("*/log.json")).read_text())
        for s in ("store", "other")
    ]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), (a, b)


@pytest.mark.slow
def test_torchrun_does_the_same(finished, tmp_path):
    config, run = finished
    shutil.copytree(run.parent / "store" / "shard", tmp_path / "store" / "shard")
    shutil.copytree(run.parent / "store" / "experts", tmp_path / "store" / "experts")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ltdd_scale",
    ]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "run", str(config), "--out", str(tmp_path / "r")],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    same_work(tmp_path / "store", run.parent / "store")
    assert (tmp_path / "r" / "report.html").exists() and (
        tmp_path / "r" / "results.json"
    ).read_text() == (run / "results.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
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
        ],
        [
            "relabel.adjust=true",
            "relabel.labels=stored",
            "recover.ema=0",
            "recover.iterations=3",
            "strategies.calibrate=false",
            "evaluate.split=val",
        ],
        [
            "relabel.labels=hard",
            "recover.iterations=0",
            "strategies.confident_init=false",
            "evaluate.nets=[convnet3,resnet32]",
            "data.memory_gb=0",
            "runtime.workers=1",
        ],
        ["evaluate.matrix=true", "evaluate.epochs=1", "relabel.labels=single", "relabel.epochs=1"],
    ],
)
def test_every_way_through_the_settings(finished, tmp_path, sets):
    config, run = finished
    store = tmp_path / "store"
    for stage in ("shard", "experts"):
        shutil.copytree(run.parent / "store" / stage, store / stage)
    done = cli(
        "run", config, "--out", tmp_path / "r", "--store", store, "--nproc", 1, "--set", *sets
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert all(0 <= row["top1"] <= 100 for row in results["rows"])
    if "evaluate.matrix=true" in sets:
        assert (
            len({(row["set"], row["labels"]) for row in results["matrix"]}) == 12
            and "label matrix" in (tmp_path / "r" / "report.html").read_text()
        )
    fit = cli(
        "fit",
        tmp_path / "r" / "distilled",
        "--epochs",
        1,
        "--test",
        tmp_path / "r" / "distilled" / "images",
    )
    assert fit.returncode == 0, fit.stderr


def hurt(
    folder: Path, config: Path, fault: str, number: int, nproc: int = 1, rank: int | None = None
) -> subprocess.CompletedProcess:
    event, number_of = fault.split(":")
    env = {
        "PYTHONPATH": str(Path(__file__).parent / "faults"),
        "LTDD_FAULT": f"{event}::{number_of}:KILL:me",
        "LTDD_FAULT_MARK": str(folder / f"killed-{number}"),
    }
    if rank is not None:
        env["LTDD_FAULT_RANK"] = str(rank)
    return cli(
        "run",
        config,
        "--out",
        folder / "run",
        "--nproc",
        nproc,
        "--set",
        "runtime.checkpoint_seconds=0",
        env=env,
    )


@pytest.mark.slow
def test_killed_at_chosen_moments_ends_in_the_same_bytes(finished, tmp_path, tiny):
    """Between write and rename, in the middle of a write, twice in a row, in every stage: one run that dies 14 times."""
    faults = [
        "replace:1",
        "fsync:1",
        "replace:3",
        "replace:12",
        "fsync:11",
        "replace:6",
        "replace:6",
        "fsync:20",
        "replace:17",
        "replace:9",
        "fsync:5",
        "replace:14",
        "replace:8",
        "fsync:9",
    ]
    stages = set()
    for number, fault in enumerate(faults):
        done = hurt(tmp_path, tiny, fault, number)
        mark = tmp_path / f"killed-{number}"
        assert mark.exists() and done.returncode == -signal.SIGKILL, (
            f"{fault} did not kill: {done.stderr}"
        )
        stages |= {
            s
            for s in (
                "shard",
                "experts",
                "calibrate",
                "initialize",
                "recover",
                "relabel",
                "student",
            )
            if f"store/{s}/" in mark.read_text()
        }
    done = cli("run", tiny, "--out", tmp_path / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    same_work(tmp_path / "store", finished[1].parent / "store")
    assert (tmp_path / "run" / "results.json").read_bytes() == (
        finished[1] / "results.json"
    ).read_bytes()
    assert not list((tmp_path / "store").rglob("*.tmp")) and not list(
        (tmp_path / "store").rglob("step-*.pt")
    )
    assert len(list(tmp_path.glob("killed-*"))) == len(faults)


@pytest.mark.slow
def test_killed_at_random_times_ends_in_the_same_bytes(finished, tmp_path, tiny):
    chance, killed = random.Random(20), 0
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LTDD_")}
    for _ in range(6):
        command = [
            sys.executable,
            "-m",
            "ltdd_scale",
            "run",
            str(tiny),
            "--out",
            str(tmp_path / "run"),
            "--nproc",
            "1",
            "--set",
            "runtime.checkpoint_seconds=0",
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(chance.uniform(2.0, 4.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 2, (
        "the run was over before it could be killed: this machine is faster than the test"
    )
    done = cli("run", tiny, "--out", tmp_path / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    same_work(tmp_path / "store", finished[1].parent / "store")


@pytest.mark.slow
def test_a_sharding_killed_alone_leaves_no_worker_that_holds_its_folder(tmp_path):
    """Only the parent is killed, as the out-of-memory killer does: its pool must go too, and the next run goes on."""
    image_folder(tmp_path / "real", {"a": 150, "b": 150}, size=96)
    image_folder(tmp_path / "real", {"a": 3, "b": 3}, "test", size=96)
    path = tmp_path / "set.yaml"
    path.write_text(
        f"data: {{source: folder, path: {tmp_path / 'real'}, profile: full, shard_images: 10}}\n"
    )
    command = [
        sys.executable,
        "-m",
        "ltdd_scale",
        "shard",
        str(path),
        "--out",
        str(tmp_path / "r"),
        "--store",
        str(tmp_path / "store"),
        "--nproc",
        "1",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "store").rglob("*.part.json")):
        assert process.poll() is None, "over before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    finished_parts = len(list((tmp_path / "store").rglob("*.part.json")))
    assert 0 < finished_parts < 31
    done = cli(
        "shard",
        path,
        "--out",
        tmp_path / "r",
        "--store",
        tmp_path / "store",
        "--nproc",
        1,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    again = cli("shard", path, "--out", tmp_path / "q", "--store", tmp_path / "calm", "--nproc", 1)
    assert again.returncode == 0 and digests(tmp_path / "store") == digests(tmp_path / "calm")


@pytest.mark.slow
def test_three_ranks_resume_to_the_bit(tmp_path, tiny):
    """With three ranks DDP's order of additions depends on its buckets, which a restart must not lay out anew."""
    found = []
    for name in ("calm", "hurt"):
        folder = tmp_path / name
        folder.mkdir()
        env = {}
        if name == "hurt":
            env = {
                "PYTHONPATH": str(Path(__file__).parent / "faults"),
                "LTDD_FAULT": "replace::21:KILL:me",
                "LTDD_FAULT_RANK": "0",
                "LTDD_FAULT_MARK": str(folder / "killed"),
            }
        done = cli(
            "train",
            "observer",
            tiny,
            "--out",
            folder / "r",
            "--nproc",
            3,
            "--set",
            "runtime.checkpoint_seconds=0",
            "observer.epochs=10",
            env=env,
        )
        assert done.returncode == 0, done.stderr
        assert name == "calm" or (
            (folder / "killed").exists() and "resumed at step" in done.stderr
        ), done.stderr
        found.append(digests(folder / "store"))
    assert found[0] == found[1]


@pytest.mark.slow
def test_bad_input_is_one_line_on_two_ranks_too(tiny, tmp_path):
    done = cli(
        "shard",
        tiny,
        "--out",
        tmp_path / "r",
        "--nproc",
        2,
        "--set",
        "data.source=folder",
        "data.path=/nowhere/at/all",
    )
    said_plainly(done, "data.path", "no such folder")


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_the_launcher(tmp_path, tiny):
    """Two ranks, one dies: all go on from the checkpoints, in one command, to the bytes of an undisturbed run on two ranks."""
    (tmp_path / "calm").mkdir()
    calm = cli("run", tiny, "--out", tmp_path / "calm" / "run", "--nproc", 2)
    assert calm.returncode == 0, calm.stderr
    for number, (fault, rank) in enumerate([("replace:11", 0), ("fsync:2", 1)]):
        folder = tmp_path / f"hurt-{number}"
        folder.mkdir()
        done = hurt(folder, tiny, fault, number, nproc=2, rank=rank)
        assert (folder / f"killed-{number}").exists(), done.stderr
        assert done.returncode == 0 and "killed by SIGKILL; starting again" in done.stderr, (
            done.stderr
        )
        assert digests(folder / "store") == digests(tmp_path / "calm" / "store")


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(tmp_path):
    """Two IPCs started together: the experts are trained once, by whoever is first; the other waits for them."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    command = [
        sys.executable,
        "-m",
        "ltdd_scale",
        "initialize",
        str(path),
        "--store",
        str(tmp_path / "store"),
        "--nproc",
        "1",
    ]
    runs = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / f"r{ipc}"), "--set", f"ipc={ipc}"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            stdout=subprocess.DEVNULL,
        )
        for ipc in (2, 3)
    ]
    said = [r.communicate(timeout=200)[1] for r in runs]
    assert all(r.returncode == 0 for r in runs), said
    assert (
        len(list((tmp_path / "store" / "experts").iterdir())) == 1
        and len(list((tmp_path / "store" / "initialize").iterdir())) == 2
    )
    assert any("waiting: another run" in s for s in said), said
