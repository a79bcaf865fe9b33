"""What holds for every method: the same bytes on any ranks, in any parts, after any kill.

The suite runs over the catalog: a new method is under it by being there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from conftest import TINY, cli, digests, process

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.pipeline import graph
from ltdd_scale.stage import Division

pytestmark = pytest.mark.slow

# A method's own small settings. Stored labels have bytes to compare, and want a teacher: where a
# method trains none, two methods with them are enough.
UNROLLED = {
    "iterations": 5,
    "inner_steps": 2,
    "max_start": 2,
    "batch_size": 16,
    "rate": 0.1,
    "segments": 2,
}
TRAJECTORIES = {"experts": 2, "width": 8, "steps": 9, "every": 2, "batch_size": 16}
OWN = {
    "rldd": {},
    "dm": {"dm": {"iterations": 6, "width": 8, "real_batch": 8}},
    "gm": {
        "relabel": {"labels": "hard"},
        "gm": {
            "networks": 2,
            "outer_steps": 2,
            "inner_epochs": 2,
            "width": 8,
            "real_batch": 8,
            "inner_batch": 16,
        },
    },
    "mtt": {"relabel": {"labels": "hard"}, "trajectories": TRAJECTORIES, "mtt": UNROLLED},
    "damed": {
        "relabel": {"labels": "learned"},
        "trajectories": TRAJECTORIES,
        "classifiers": {"steps": 6, "every": 2, "batch_size": 16},
        "damed": {**UNROLLED, "classifier_steps": 2},
    },
}


def config_of(method: str, folder: Path) -> Path:
    values = yaml.safe_load(TINY.replace("plain: own", "embedding: false, plain: own"))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**values, "method": method, **OWN[method]}))
    return path


def own_stages(config: Path) -> list[str]:
    """Names of the method's stages and of the labels."""
    loaded = load.load(config)
    return [s.name for s in METHODS[loaded.method].stages(loaded)] + ["relabel"]


@pytest.fixture(scope="module", params=sorted(METHODS))
def calm(request, tmp_path_factory) -> tuple[Path, Path]:
    """(config, run folder) of an undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp(f"calm-{request.param}")
    config = config_of(request.param, folder)
    done = cli("run", config, "--out", folder / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    return config, folder / "run"


def compare(config: Path, calm: Path, store: Path) -> dict[str, Path]:
    """The method's stages and the labels have the calm run's bytes; name → folder in `store`."""
    record = json.loads((calm / "run.json").read_text())
    theirs, ours = digests(calm.parent / "store"), digests(store)
    names = own_stages(config)
    for name in names:
        where = record["stages"][name]
        assert ours[where] == theirs[where], name
    return {name: store / record["stages"][name] for name in names}


def with_experts(calm: Path, store: Path) -> None:
    for stage in ("shard", "experts"):
        if (calm.parent / "store" / stage).exists():
            shutil.copytree(calm.parent / "store" / stage, store / stage)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_bytes_on_one_two_and_three_ranks(calm, tmp_path, world_size):
    config, run = calm
    with_experts(run, tmp_path / "store")
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", world_size)
    done = cli("relabel", config, *where)
    assert done.returncode == 0, done.stderr
    for name, folder in compare(config, run, tmp_path / "store").items():
        saved = json.loads((folder / "stage.json").read_text())
        unit = "/" in name  # an expert is one rank's work
        assert saved["ranks"] == (1 if unit else world_size), name
        assert saved["seconds"] >= 0 and saved["peak_mb"]["cpu"] > 0


def whole_only(config: Path, stage: str, folder: Path) -> None:
    """A method whose classes are not independent says so, and begins nothing."""
    where = ("--out", folder / "r", "--store", folder / "store")
    done = cli(stage, config, *where, "--part", "0/2")
    assert done.returncode == 1 and not (folder / "store").exists()
    (line,) = done.stderr.strip().splitlines()
    assert f"{stage} cannot be done in parts" in line and "--part 0/2" in line


def test_parts_make_each_chunk_once(calm, tmp_path):
    """Two jobs of an array, one after the other, then the job that puts the parts together."""
    config, run = calm
    loaded = load.load(config)
    nodes = graph.build(recipe.stages(loaded, ""), loaded)
    chunked = [n for n in nodes.values() if n.stage.division is Division.CHUNKS]
    if not chunked:
        return whole_only(config, METHODS[loaded.method].distilled, tmp_path)
    with_experts(run, tmp_path / "store")
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store", "--nproc", 1)
    for node in chunked:
        made: dict[str, int] = {}
        for k in range(2):
            done = cli(node.name, config, *where, "--part", f"{k}/2")
            assert done.returncode == 0, done.stderr
            (folder,) = (tmp_path / "store" / node.kind).iterdir()
            now = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}
            assert {name: now[name] for name in made} == made and len(now) > len(made)
            made = now
        assert not (folder / "stage.json").exists()
    done = cli("relabel", config, *where)
    assert done.returncode == 0, done.stderr
    compare(config, run, tmp_path / "store")


def test_killed_again_and_again_ends_in_the_same_bytes(calm, tmp_path):
    """Between write and rename, in the middle of a write, in many stages, and in the one that makes
    the images: a run that dies often."""
    config, run = calm
    killed, stages = 0, set()
    own = METHODS[load.load(config).method].distilled
    kind = json.loads((run / "run.json").read_text())["stages"][own].partition("/")[0]
    steps = ("replace::4", "fsync::9", f"replace:{kind}/:2", "replace::17", "fsync::16")
    for number, fault in enumerate(steps):
        event, place, count = fault.split(":")
        mark = tmp_path / f"killed-{number}"
        env = {
            "PYTHONPATH": str(Path(__file__).parent / "faults"),
            "LTDD_FAULT": f"{event}:store/{place}:{count}:KILL:me",
            "LTDD_FAULT_MARK": str(mark),
        }
        now = ("--set", "runtime.checkpoint_seconds=0")
        done = process("run", config, "--out", tmp_path / "run", "--nproc", 1, *now, env=env)
        if not mark.exists():
            assert done.returncode == 0, done.stderr
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        stages.add(mark.read_text().partition("store/")[2].partition("/")[0])
    assert killed >= 4 and len(stages) >= 2 and kind in stages, (killed, stages)
    done = cli("run", config, "--out", tmp_path / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    compare(config, run, tmp_path / "store")
    ours, theirs = (r / "results.json" for r in (tmp_path / "run", run))
    assert ours.read_bytes() == theirs.read_bytes()
    store = tmp_path / "store"
    assert not list(store.rglob("*.tmp")) and not list(store.rglob("step-*.pt"))
    assert not [p for p in store.rglob("chunk-*") if os.path.isfile(p)]
