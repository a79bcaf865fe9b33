"""What SLURM costs: submission, making room, coming back, watching.

    eval "$(slurm/testbed up)"
    python tools/bench_slurm.py [--rounds 3] [--profile slurm/testbed.yaml]

Needs a cluster that may be used freely: it submits 1,000 held array elements and cancels them, and one training job that it requeues again and again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ltdd_scale import session
from ltdd_scale.config import load
from ltdd_scale.launch import board, campaign, perform, profile
from ltdd_scale.launch.cluster import Cluster, Order
from ltdd_scale.launch.jobs import Job, Point
from ltdd_scale.session import Session

ROOT = Path(__file__).parent.parent
ELEMENTS = 1000  # SLURM's default MaxArraySize allows indices up to 1000


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} – {max(values):.2f})"


def submissions(
    cluster: Cluster, many: Job, wants: profile.Profile, rounds: int
) -> tuple[list[float], list[float], float]:
    """Seconds to submit one array, and the same without sbatch; bytes of one element's pickle."""
    held = wants.model_copy(update={"extra": {**wants.extra, "hold": True}})
    order = Order(many, held, cluster.folder / "code" / "none")
    whole, dry = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        number = cluster.submit(order)
        whole.append(time.perf_counter() - begin)
        cluster.cancel([number])
        begin = time.perf_counter()
        cluster.script(order)
        dry.append(time.perf_counter() - begin)
    size = next((cluster.folder / "logs").glob(f"{number}_*_submitted.pkl")).stat().st_size
    return whole, dry, size


def until(condition, seconds: float):
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds} s in vain")
        time.sleep(0.02)
    return value


def one_state(number: str, column: str) -> str:
    return subprocess.run(
        ["squeue", "-h", "-t", "all", "-j", number, "-o", column], capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path, default=ROOT / "slurm" / "testbed.yaml")
    args = parser.parse_args()
    wants, work = profile.load(args.profile), Path(tempfile.mkdtemp(prefix="bench-slurm-", dir="."))
    work = work.absolute()
    config = load.load(ROOT / "configs" / "quickstart.yaml", ["observer.epochs=100000"])
    resolved = perform.resolve(config, work / "run")
    request = perform.make_request(resolved, (), work / "run", work / "store")
    session.enter(Session(request))
    point = Point("", resolved.config, work / "run", resolved.source)
    made = campaign.Campaign("bench", work / "run" / "jobs", work / "store", "slurm", [point])
    campaign.make(made, wants)
    campaign.prepare(made)
    cluster = made.open()
    cluster.need()
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
    print(
        f"{version}; medians of {args.rounds} (smallest – largest)\n\n| what | measured |\n|---|---|"
    )
    (recover,) = [j for j in made.jobs if j.name == "recover"]
    parts = [replace(recover.requests[0], part=(k, ELEMENTS)) for k in range(ELEMENTS)]
    many = replace(recover, requests=parts, needs=[])
    whole, dry, size = submissions(cluster, many, wants, args.rounds)
    print(
        f"| submit one array of {ELEMENTS:,} elements | {median(whole)}; {size:,} bytes a pickle |\n| the same, dry (the sbatch file only) | {median(dry)} |",
        flush=True,
    )

    made.jobs = [j for j in made.jobs if j.name in ("shard", "observer")]
    campaign.submit(made, cluster, wants, 0, lambda text: None)
    number = made.ids["observer"]
    log = made.folder / "logs" / f"{number}_0_log.err"
    until(
        lambda: (
            list((work / "store/experts").glob("*/checkpoints/step-*.pt"))
            or one_state(number, "%T") == "RUNNING"
        ),
        120,
    )
    saved, ended, back = [], [], []
    for turn in range(args.rounds):
        until(
            lambda: (
                log.exists()
                and re.search(r"\d+ steps\)|resumed", log.read_text().rsplit("== job", 1)[-1])
            ),
            180,
        )
        time.sleep(2)  # steps go by
        begin = time.perf_counter()
        subprocess.run(["scancel", "--signal=USR2", number], check=True)
        until(lambda t=turn: log.read_text().count("saved: the job is queued again") > t, 60)
        saved.append(time.perf_counter() - begin)
        until(lambda: one_state(number, "%T") == "PENDING", 60)
        ended.append(time.perf_counter() - begin)
        until(lambda t=turn: log.read_text().count("resumed at step") > t, 120)
        back.append(time.perf_counter() - begin - ended[-1])
    print(
        f"| SIGUSR2 to saved and requeued | {median(saved)} |\n| SIGUSR2 to back in the queue | {median(ended)} |\n| from there to the first new step, SLURM's own waiting included | {median(back)} |",
        flush=True,
    )

    subprocess.run(["sdiag", "--reset"], capture_output=True)
    begin, looks = time.perf_counter(), 0
    took = []
    while time.perf_counter() - begin < 60:
        t = time.perf_counter()
        board.table(campaign.load(work / "run"))
        took.append(time.perf_counter() - t)
        looks += 1
        time.sleep(5)
    found = re.search(
        r"REQUEST_JOB_INFO\S*\s+\(\s*\d+\) count:(\d+)\s+ave_time:(\d+)",
        subprocess.run(["sdiag"], capture_output=True, text=True).stdout,
    )
    rpc = (
        f"; the controller counted {found[1]} job queries, {int(found[2]) / 1e3:.1f} ms each"
        if found
        else ""
    )
    print(f"| watching: looks a minute | {looks} (one squeue call each, {median(took)}){rpc} |")
    cluster.cancel([number])
    until(lambda: one_state(number, "%T") in ("", "CANCELLED"), 60)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
