"""Runs that are hurt and end in the bytes of an undisturbed one: real processes, two ranks, real signals.

`make test-faults` does the random part at length (LTDD_FAULTS=200). Every fault is counted, and one that did not happen fails the test.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, digests

from ltdd_scale.runtime.signals import STOP_CODE

pytestmark = pytest.mark.slow
# Longer trainings than elsewhere, so that most random moments fall into a step; conv observers with BatchNorm over both ranks.
CONFIG = TINY.replace("epochs: 6, batch_size: 16", "epochs: 12, batch_size: 16")
CONFIG = CONFIG.replace("plain: own", "embedding: false, plain: own")


def start(
    config: Path,
    folder: Path,
    env: dict | None = None,
    seconds: float = 0,
    sets: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
) -> subprocess.Popen:
    """`ltdd-scale run` on two ranks, in a session of its own."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LTDD_"))
    }
    command = [
        sys.executable,
        "-m",
        "ltdd_scale",
        "run",
        str(config),
        "--out",
        str(folder / "run"),
        "--nproc",
        "2",
        *more,
        "--set",
        f"runtime.checkpoint_seconds={seconds}",
        *sets,
    ]
    log = open(folder / "log.txt", "a")  # noqa: SIM115 (closed when the process is)
    with log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**clean, **(env or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The ranks that the launcher has started."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    return [int(p) for p in found.split()]


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def finish(config: Path, folder: Path, calm: Path) -> None:
    """Run to the end, undisturbed; every byte is as it should be, and nothing is left behind."""
    process = start(config, folder)
    assert process.wait(timeout=400) == 0, log_of(folder)
    ours, theirs = digests(folder / "store"), digests(calm / "store")
    assert len(theirs) >= 10 and ours == theirs, log_of(folder)
    assert (folder / "run" / "results.json").read_bytes() == (
        calm / "run" / "results.json"
    ).read_bytes()
    assert not list((folder / "store").rglob("*.tmp")) and not list(
        (folder / "store").rglob("step-*")
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> tuple[Path, Path]:
    """(config, folder) of the undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert start(folder / "tiny.yaml", folder, seconds=3600).wait(timeout=400) == 0, log_of(folder)
    return folder / "tiny.yaml", folder


# (what, where, the how-manieth, signal, whom), rank; None is the launcher.
CHOSEN = [
    ("import:torch:1:TERM:me", 0),  # before there is anything to save
    ("import:ltdd_scale.launch.run:1:USR2:me", None),
    ("fsync:shard:2:TERM:me", 0),
    ("replace:manifest:1:KILL:me", 0),
    ("import:torch.distributed:1:KILL:all", 1),
    ("fsync:step-:1:KILL:me", 0),  # in the first save
    ("replace:step-:2:KILL:me", 0),  # between write and rename
    ("replace:step-:1:TERM:me", 0),  # asked to stop while saving
    ("replace:step-:4:USR2:all", 0),
    ("fsync:step-:7:STOP:me", 0),  # hangs in a save, then is killed
    ("replace:weights:1:KILL:all", 0),  # trained to the end, not yet told
    ("replace:log.json:1:KILL:me", 0),
    ("fsync:calibrate:1:TERM:me", 0),
    ("replace:initialize:2:KILL:me", 0),
    ("replace:chunk-:1:KILL:me", 1),  # between chunks, one rank only
    ("replace:recover:1:TERM:me", 0),  # whatever of it is left to do
    ("replace:relabel:1:KILL:me", 0),
    ("fsync:student:1:KILL:all", 0),
    ("replace:stage.json:1:KILL:me", 0),  # done but for the last rename
]


def test_hurt_at_chosen_moments(calm, tmp_path):
    """One run that is hurt again and again; the launcher brings back what it can, the next command the rest."""
    config, calm_folder = calm
    env = {"PYTHONPATH": str(Path(__file__).parent)}
    for number, (fault, rank) in enumerate(CHOSEN):
        mark = tmp_path / f"hurt-{number}"
        victim = {} if rank is None else {"LTDD_FAULT_RANK": str(rank)}
        process = start(
            config, tmp_path, {**env, "LTDD_FAULT": fault, "LTDD_FAULT_MARK": str(mark), **victim}
        )
        deadline = time.monotonic() + 200
        while not mark.exists():
            assert process.poll() is None and time.monotonic() < deadline, (
                f"{fault} did not happen: {log_of(tmp_path)[-2000:]}"
            )
            time.sleep(0.02)
        if ":STOP:" in fault:
            time.sleep(1.0)
            os.kill(int(mark.read_text().split()[0]), signal.SIGKILL)
        # Where one rank was hurt the launcher goes on by itself; it is asked to stop, so that the next fault finds work to do.
        time.sleep(0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=100)
        assert code in (STOP_CODE, -signal.SIGKILL), (fault, code, log_of(tmp_path)[-2000:])
    assert len(list(tmp_path.glob("hurt-*"))) == len(CHOSEN)
    finish(config, tmp_path, calm_folder)


def test_hurt_at_random(calm, tmp_path):
    """SIGKILL, SIGTERM, SIGUSR2, SIGSTOP and then SIGKILL, once or twice in a row, to one rank, all ranks or the launcher, at any time."""
    config, calm_folder = calm
    wanted, chance, done, kinds = (
        int(os.environ.get("LTDD_FAULTS", "4")),
        random.Random(os.environ.get("LTDD_FAULTS_SEED", "7")),
        0,
        {},
    )
    begin, runs, folder = time.monotonic(), 0, tmp_path / "0"
    folder.mkdir()
    while done < wanted:
        process = start(config, folder)
        time.sleep(chance.uniform(0.2, 9.0))
        while process.poll() is None and done < wanted:
            kind, whom = (
                chance.choice(("KILL", "TERM", "USR2", "STOP")),
                chance.choice(("one", "all", "launcher")),
            )
            ranks = ranks_of(process)
            targets = {
                "one": ranks[:1] if chance.random() < 0.5 else ranks[1:2],
                "all": ranks,
                "launcher": [process.pid],
            }[whom]
            hit = 0
            for pid in targets:
                try:
                    os.kill(pid, getattr(signal, f"SIG{kind}"))
                    if chance.random() < 0.3:
                        os.kill(pid, getattr(signal, f"SIG{kind}"))
                    hit += 1
                except ProcessLookupError:
                    pass
            if kind == "STOP":
                time.sleep(0.5)
                for pid in targets:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        hit -= 1
            if hit > 0 and process.poll() in (
                None,
                STOP_CODE,
                -signal.SIGKILL,
                -signal.SIGTERM,
                -signal.SIGUSR2,
            ):
                done += 1
                kinds[f"{kind} {whom}"] = kinds.get(f"{kind} {whom}", 0) + 1
            time.sleep(chance.uniform(0.2, 6.0))
        if process.poll() is None and done >= wanted:
            process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=100)
        # Signals may come before Python listens; 128 + SIGKILL: the launcher has started all again as often as it may.
        assert code in (
            0,
            STOP_CODE,
            -signal.SIGKILL,
            -signal.SIGTERM,
            -signal.SIGUSR2,
            128 + signal.SIGKILL,
        ), (code, log_of(folder)[-2000:])
        if code == 0:  # over: check it and hurt another one
            finish(config, folder, calm_folder)
            runs += 1
            folder = tmp_path / str(runs)
            folder.mkdir()
    finish(config, folder, calm_folder)
    assert done >= wanted and sum(kinds.values()) == done
    print(
        f"{done} faults in {runs + 1} runs, {time.monotonic() - begin:.0f} s: "
        + ", ".join(f"{k} {v}" for k, v in sorted(kinds.items()))
    )
    if os.environ.get("LTDD_FAULTS_REPORT"):
        rows = "\n".join(f"| {k} | {v} |" for k, v in sorted(kinds.items()))
        text = f"{done} faults at random moments in {runs + 1} runs of two ranks, every one of which ended in the bytes of the undisturbed run.\n\n| signal, to whom | times |\n|---|---|\n{rows}\n"
        Path(os.environ["LTDD_FAULTS_REPORT"]).write_text(text)


def stopped_in_training(config: Path, folder: Path) -> Path:
    """A run that was stopped in an expert's training; the folder of its checkpoints."""
    process = start(config, folder)
    deadline = time.monotonic() + 200
    while len(list((folder / "store" / "experts").glob("*/checkpoints/step-*.pt"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, log_of(folder)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(
        timeout=100
    ) == STOP_CODE and "the same command goes on from here" in log_of(folder), log_of(folder)
    (checkpoints,) = (folder / "store" / "experts").glob("*/checkpoints")
    assert len(list(checkpoints.glob("step-*.pt"))) == 2
    return checkpoints


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint(calm, tmp_path, damage):
    newest = sorted(stopped_in_training(calm[0], tmp_path).glob("step-*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    newest.write_bytes(content if damage == "flipped" else content[: len(content) // 3])
    finish(calm[0], tmp_path, calm[1])


def test_a_vanished_shard(calm, tmp_path):
    stopped_in_training(calm[0], tmp_path)
    (tar,) = (tmp_path / "store" / "shard").glob("*/*-train-000000.tar")
    tar.unlink()
    finish(
        calm[0], tmp_path, calm[1]
    )  # the set is made again, to the same bytes, and training goes on


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_and_then_a_larger_one(calm, tmp_path):
    """A real one: a file system in memory that the first checkpoints fill."""
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(store)], check=True)
    try:
        process = start(calm[0], tmp_path, more=("--force",))
        assert process.wait(timeout=200) == 1, log_of(tmp_path)
        said = [line for line in log_of(tmp_path).splitlines() if line.startswith("error: ")]
        assert (
            len(said) == 1
            and "no space left on the device" in said[0]
            and "Traceback" not in log_of(tmp_path)
        ), log_of(tmp_path)
        subprocess.run(["mount", "-o", "remount,size=64m", str(store)], check=True)
        finish(calm[0], tmp_path, calm[1])
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_folder_that_may_not_be_written(calm, tmp_path):
    stopped_in_training(calm[0], tmp_path)
    store = tmp_path / "store"
    subprocess.run(["mount", "--bind", str(store), str(store)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(store)], check=True)
        before = len(log_of(tmp_path))
        assert start(calm[0], tmp_path).wait(timeout=200) == 1
        said = [
            line for line in log_of(tmp_path)[before:].splitlines() if line.startswith("error: ")
        ]
        assert len(said) == 1 and "ead-only" in said[0], said
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)
    finish(calm[0], tmp_path, calm[1])


def test_the_undisturbed_run_is_what_one_rank_gives_after_training(calm, tmp_path):
    """Sanity of the oracle: from the same experts one rank makes the same bytes, so a fault cannot hide in what two ranks agree on."""
    config, folder = calm
    for stage in ("shard", "experts"):
        shutil.copytree(folder / "store" / stage, tmp_path / "store" / stage)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LTDD_")}
    command = [
        sys.executable,
        "-m",
        "ltdd_scale",
        "run",
        str(config),
        "--out",
        str(tmp_path / "run"),
        "--nproc",
        "1",
    ]
    assert (
        subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, timeout=300).returncode
        == 0
    )
    assert digests(tmp_path / "store") == digests(folder / "store")


def test_a_signal_to_all_processes_spares_the_decoding_ones(calm, tmp_path):
    """As a terminal or a service manager sends it. A decoding process that died of it would take the step, and so the save, with it."""
    sets = ("data.memory_gb=0", "data.loader=torch", "runtime.workers=1")
    process = start(calm[0], tmp_path, sets=sets)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "store" / "experts").glob("*/checkpoints/step-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, log_of(tmp_path)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=100) == STOP_CODE and "Traceback" not in log_of(tmp_path), log_of(
        tmp_path
    )
    assert start(calm[0], tmp_path, sets=sets).wait(
        timeout=400
    ) == 0 and "resumed at step" in log_of(tmp_path), log_of(tmp_path)


def test_torchrun_brings_a_killed_worker_back(calm, tmp_path):
    config, folder = calm
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "-m",
        "ltdd_scale",
    ]
    fault = {
        "LTDD_FAULT": "replace:chunk-:1:KILL:me",
        "LTDD_FAULT_RANK": "1",
        "LTDD_FAULT_MARK": str(tmp_path / "hurt"),
    }
    env = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        **fault,
    }
    done = subprocess.run(
        [*command, "run", str(config), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=400,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0 and (tmp_path / "hurt").exists(), done.stderr[-3000:]
    assert digests(tmp_path / "store") == digests(folder / "store")
