"""A real SLURM of two virtual nodes for these tests; where its packages are not installed the tests are skipped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, cli

from ltdd_scale import session
from ltdd_scale.config import load
from ltdd_scale.launch import campaign, perform, profile
from ltdd_scale.launch.cluster import State
from ltdd_scale.launch.clusters.slurm import Slurm
from ltdd_scale.launch.jobs import Point
from ltdd_scale.session import Session

TESTBED = ROOT / "slurm" / "testbed"

# Jobs of these tests look at their signals slowly (tests/faults/sitecustomize.py), so that they can be disturbed on the fastest of machines.
DRAG = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "tests" / "faults"),
    "LTDD_DRAG": "0.1",
}
# Some hundred steps, with a checkpoint every second.
LONG = """
data: {source: digits, resolution: 8, mirror: false, max_per_class: 64, imbalance_factor: 4, test_per_class: 10, val_per_class: 5}
ipc: 4
observer: {net: convnet3, norm: batch, width: 8, epochs: 14, batch_size: 16, crop_padding: 1}
teacher: {recipe: glmc, optimizer: sgd, lr: 0.01, net: convnet3, norm: instance, width: 8, epochs: 4, batch_size: 16, crop_padding: 1}
calibrate: {batch_size: 16}
initialize: {select: confident, crops: 3, crop_scale: [0.6, 1.0], batch_size: 16}
recover: {batch_size: 20, chunk_classes: 5, iterations: 150, matching_width: 8, matching_real: 8}
relabel: {labels: single}
evaluate: {width: 8, epochs: 5, seeds: 1, crop_scale: [0.6, 1.0], plain: none}
choose: {how: never}
runtime: {checkpoint_seconds: 1, device: cpu}
publish: {pictures: false, formats: []}
"""


def _apart() -> dict[str, str]:
    """Settings that keep the clusters of two test processes apart (`make test` starts two, and sets
    LTDD_TEST_CLUSTER): their ports, and the numbers of their jobs, by which tests find processes."""
    number = int(os.environ.get("LTDD_TEST_CLUSTER", "0"))
    first = number * 20_000_000 + int(time.time()) % 19_000_000 + 1
    return {"TESTBED_PORT": str(16800 + 1000 * number), "TESTBED_FIRST_JOB": str(first)}


@pytest.fixture(scope="session")
def testbed():
    """The folder of a cluster that runs; SLURM_CONF points to it."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        pytest.skip(
            "SLURM is not installed: 'slurm/testbed install' (as root, Debian or Ubuntu) does it"
        )
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch is not found")
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # asked to end, pytest takes the cluster down first
    folder = Path(tempfile.mkdtemp(prefix="ltdd-slurm-"))
    folder.chmod(0o755)  # munge wants its socket reachable for all
    env = {**os.environ, "LTDD_TESTBED": str(folder), **_apart()}
    done = subprocess.run([TESTBED, "up"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(folder / "slurm.conf")
    os.environ["LTDD_TESTBED"] = str(folder)
    yield folder
    subprocess.run([TESTBED, "wipe"], env=env, capture_output=True, timeout=120)
    del os.environ["LTDD_TESTBED"], os.environ["SLURM_CONF"]
    if before:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def nodes(testbed):
    """An empty cluster with all nodes up, before and after."""
    subprocess.run([TESTBED, "up"], capture_output=True, timeout=120, check=True)
    yield testbed
    subprocess.run("scancel -u $(id -un); true", shell=True)
    until(
        lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip(),
        60,
        "the queue is not empty",
    )


@pytest.fixture(scope="session")
def calm(tmp_path_factory) -> Path:
    """A folder with long.yaml and, in its store, what the undisturbed stages up to relabelling make on two ranks for the observer, one for the others."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "long.yaml").write_text(LONG)
    where = ["--out", folder / "run", "--store", folder / "store"]
    for stage, ranks in (
        (["shard"], 1),
        (["train", "observer"], 2),
        (["train", "teacher"], 1),
        (["initialize"], 1),
        (["recover"], 1),
        (["relabel"], 1),
    ):
        done = cli(*stage, folder / "long.yaml", *where, "--nproc", ranks)
        assert done.returncode == 0, done.stderr
    return folder


def until(condition, seconds: float, what: str):
    """`condition`'s first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.1)
    return value


def queue() -> dict[str, State]:
    """What SLURM knows of our jobs."""
    return Slurm(Path()).states()


def occupy(node: str, seconds: int = 2) -> str:
    """Submit a job of high priority that wants the whole node; return its id."""
    wanted = ["-p", "high", "-w", node, "--exclusive", "-c", "4", "-t", "5", "-o", "/dev/null"]
    command = ["sbatch", "--parsable", *wanted, "--wrap", f"sleep {seconds}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Jobs:
    """Some jobs of a run of `long.yaml` on the cluster; everything before `stage` is taken from the calm run."""

    def __init__(
        self, calm: Path, folder: Path, stage: str, settings: dict, sets: tuple[str, ...] = ()
    ):
        self.calm, self.folder, self.store, self.stage = calm, folder, folder / "store", stage
        shutil.copytree(calm / "store", self.store)
        values = {
            "partition": "main",
            "cpus_per_task": 1,
            "mem_gb": 0.5,
            "minutes": 10,
            "signal_delay_s": 30,
        }
        path = folder / "profile.yaml"
        path.write_text(
            yaml.safe_dump({**values, **settings, "env": {**DRAG, **settings.get("env", {})}})
        )
        self.profile = profile.load(path)
        out = folder / "run"
        found = perform.resolve(load.load(calm / "long.yaml", sets), out)
        point = Point("", found.config, out, found.source, found.asked)
        self.made = campaign.make(
            campaign.Campaign("long", out / "jobs", self.store, "slurm", [point]), self.profile
        )
        self.cluster = self.made.open()
        (self.job,) = [j for j in self.made.jobs if j.name == stage]
        self.made.jobs = [self.job]
        shutil.rmtree(self.work, ignore_errors=True)
        session.enter(Session(self.job.requests[0]))

    @property
    def work(self) -> Path:
        return self.store / self.job.nodes[0]

    def submit(self) -> str:
        assert campaign.submit(self.made, self.cluster, self.profile, 0, lambda text: None) == 1
        return self.made.ids[self.stage]

    def checkpoint(self, seconds: float = 120, after: int = 0) -> int:
        """Wait for a checkpoint of a step later than `after`, let another step pass, and return the step."""

        def newer() -> int:
            steps = [int(p.stem.split("-")[1]) for p in self.work.glob("*/step-*.pt")]
            return max([s for s in steps if s > after], default=0) or (
                -1 if self.state().phase.over else 0
            )

        found = until(newer, seconds, f"no checkpoint after step {after} in {self.work}")
        assert found > 0, self.log()
        time.sleep(0.3)
        return found

    def state(self) -> State:
        number = self.made.ids[self.stage]
        mine = [s for i, s in self.cluster.states().items() if i.split("_")[0] == number]
        return max(mine, key=lambda s: (not s.phase.over, s.restarts))

    def ended(self, seconds: float = 180) -> State:
        until(
            lambda: self.state().phase.over,
            seconds,
            f"the job is not over: {self.state()}\n{self.log()}",
        )
        return self.state()

    def log(self) -> str:
        return "".join(
            f"--- {p.name}\n{p.read_text()}"
            for p in sorted((self.folder / "run" / "jobs" / "logs").glob("*_log.err"))
        )

    def ends(self) -> str:
        return "".join(p.read_text() for p in (self.folder / "run" / "jobs" / "ends").glob("*"))

    def processes(self, wanted) -> list[int]:
        """Of this job those that `wanted(environment, command line)` picks."""
        found, number = [], self.made.ids[self.stage]
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                env = dict(
                    v.split("=", 1) for v in (proc / "environ").read_text().split("\0") if "=" in v
                )
                command = (proc / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
            mine = env.get("SLURM_JOB_ID") == number or command.startswith(
                f"slurmstepd: [{number}."
            )
            if mine and wanted(env, command):
                found.append(int(proc.name))
        return found


@pytest.fixture
def jobs(nodes, calm, tmp_path):
    return lambda stage, *sets, **settings: Jobs(calm, tmp_path, stage, settings, sets)
