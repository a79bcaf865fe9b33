"""Real processes, real files: what the tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
pytest_plugins = ["slurm_tools", "set_tools"]

# A whole run in a few seconds: every stage does real work on real digits. Its report is plain. The
# observer has the default recipe, the teacher the published one: what holds, holds for both.
PLAIN_REPORT = "publish: {pictures: false, formats: []}\n"
TINY = """
data: {source: digits, resolution: 8, mirror: false, max_per_class: 24, imbalance_factor: 6, test_per_class: 10, val_per_class: 5}
ipc: 4
observer: {net: convnet3, norm: batch, width: 8, epochs: 6, batch_size: 16, crop_padding: 1}
teacher: {recipe: glmc, optimizer: sgd, lr: 0.01, net: convnet3, norm: instance, width: 8, epochs: 6, batch_size: 16, crop_padding: 1}
calibrate: {batch_size: 16}
initialize: {crops: 3, crop_scale: [0.6, 1.0], batch_size: 16}
recover: {batch_size: 12, chunk_classes: 4, iterations: 12, matching_width: 8, matching_real: 8}
relabel: {labels: stored, topk: 4, epochs: 3, batch_size: 16}
evaluate: {width: 8, epochs: 5, seeds: 1, crop_scale: [0.6, 1.0], plain: own, plain_epochs: 2}
choose: {how: never}
"""
TINY += PLAIN_REPORT


def clean_environment(env: dict | None = None) -> dict[str, str]:
    """This process's environment without what launchers set, and with `env`."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LTDD_", "SLURM_")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, **(env or {})}


def process(*arguments, env: dict | None = None, timeout: float = 300, **kwargs):
    """`ltdd-scale ARGUMENTS` in a process of its own: where the process is the point."""
    command = [sys.executable, "-m", "ltdd_scale", *map(str, arguments)]
    env = clean_environment(env)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT, **kwargs
    )


@contextmanager
def captured() -> Iterator[SimpleNamespace]:
    """What this process and its children write, as `stdout` and `stderr`, once it is over."""
    out = SimpleNamespace(returncode=0, stdout="", stderr="")
    names, numbers = ("stdout", "stderr"), (1, 2)
    kept = [os.dup(n) for n in numbers]
    files = [tempfile.TemporaryFile("w+") for _ in numbers]  # noqa: SIM115
    before = [getattr(sys, name) for name in names]
    for name, number, file in zip(names, numbers, files, strict=True):
        os.dup2(file.fileno(), number)
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
    try:
        yield out
    finally:
        for name, number, old, stream, file in zip(
            names, numbers, kept, before, files, strict=True
        ):
            getattr(sys, name).close()
            setattr(sys, name, stream)
            os.dup2(old, number)
            os.close(old)
            file.seek(0)
            setattr(out, name, file.read())
            file.close()


def cli(*arguments) -> SimpleNamespace:
    """`ltdd-scale ARGUMENTS` in this process: no imports to wait for. Ranks of `--nproc` are
    processes all the same. Has `returncode`, `stdout` and `stderr` as a process has."""
    from ltdd_scale import cli as command
    from ltdd_scale.pipeline import store
    from ltdd_scale.runtime import place, signals

    handlers = {n: signal.getsignal(n) for n in signals.SIGNALS}
    with captured() as done:
        try:
            done.returncode = command.main([str(a) for a in arguments])
        except SystemExit as end:  # argparse
            done.returncode = end.code or 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    place._here, signals._requested = None, None
    store._TRUSTED.clear()  # of a process that is over
    return done


def said_plainly(done, *words: str) -> None:
    """One line of error that has all `words`, no traceback, exit code ≠ 0."""
    assert done.returncode != 0, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0], errors[0]


def image_folder(
    root: Path, classes: dict[str, int], split: str = "train", size: int = 8, seed: int = 0
) -> None:
    """Noise images root/split/<class>/<n>.png: for what happens to files, not for what they show."""
    generator = np.random.default_rng(seed)
    for name, count in classes.items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(count):
            noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{k:03d}.png")


def digests(store: Path) -> dict[str, dict]:
    """Hashes of every file of every finished stage."""
    return {
        f"{p.parent.parent.name}/{p.parent.name}": json.loads(p.read_text())["files"]
        for p in store.glob("*/*/stage.json")
    }


def folder_of(run: Path, stage: str) -> Path:
    """The folder of a stage of a run."""
    record = json.loads((run / "run.json").read_text())
    return Path(record["store"]) / record["stages"][stage]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(config, run folder) of one finished tiny run on one rank, with a whole report; its store lies
    beside the run folder. Do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY.removesuffix(PLAIN_REPORT))
    done = cli("run", folder / "tiny.yaml", "--out", folder / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    return folder / "tiny.yaml", folder / "run"


@pytest.fixture
def same_threads() -> Iterator[None]:
    """`fit` takes all cores for itself; the tests after it do not."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
