"""What a request asks for against what is there: ranks, memory, disk. Asked before anything starts.

A wrong guess costs a `--force`; a machine that is brought down costs other people's work. So the
costs are rough, and only what is clearly too much is refused.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ltdd_scale.data import sources
from ltdd_scale.errors import UserError
from ltdd_scale.launch import perform
from ltdd_scale.launch.jobs import Job, Point
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.pipeline.store import complete
from ltdd_scale.runtime import files
from ltdd_scale.session import Session
from ltdd_scale.stage import Cost, Division, Facts, Resources, function

RANKS_A_CORE = 4  # above this many ranks a core the machine no longer answers
PYTHON = 0.4e9  # bytes of a rank that has imported torch
HALF = 0.5  # activations are bfloat16 on a GPU; costs are of float32
INSIST = "(--force to insist)"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def may_have_gpu() -> bool:
    """Quick, without torch: whether there is a device file of a GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def check(work: Session, num_ranks: int) -> dict[str, Any]:
    """Raise `UserError` where the pending stages cannot work here: in one line that says what to
    change. With `force` say it and go on. Returns what `remember` is given.

    `num_ranks`: ranks on this machine.
    """
    nodes = [work.nodes[name] for name in work.pending()]
    runtime = work.config.runtime
    check_ranks(num_ranks, runtime.device, work.request.force, runtime.ranks_per_gpu)
    known = _asked_before(work)
    if not all(n.fingerprint in known for n in nodes):
        check_settings(nodes)
        facts = perform.known_facts(work.config, work.request.source, work.store)
        if line := sources.surprise(work.config.data, facts):
            print(f"warning: {line}", file=sys.stderr)
        found = costs(nodes, facts)
        new = {n.fingerprint: asdict(found[n.name]) if n.name in found else None for n in nodes}
        known = {**known, **new}
    wanted = any(n.stage.resources is not Resources.CPU for n in nodes)
    gpu = gpu_memory() if wanted and runtime.device != "cpu" else 0.0
    gpu /= min(runtime.ranks_per_gpu, num_ranks)  # they share it
    found = {n.name: Cost(**c) for n in nodes if (c := known[n.fingerprint])}
    check_sizes(nodes, found, work.store, num_ranks, work.request.force, gpu)
    return known


COSTS = ".costs.json"


def _asked_before(work: Session) -> dict[str, Any]:
    """Costs that the run folder keeps, by fingerprint."""
    path = work.out / COSTS
    return files.read_json(path) if path.exists() else {}


def remember(work: Session, known: dict[str, Any]) -> None:
    """Keep the costs in the run folder: a command that goes on starts without waiting for torch."""
    if known != _asked_before(work):
        files.write_json(work.out / COSTS, known)


def check_ranks(num: int, device: str, force: bool, per_gpu: int = 1) -> None:
    """Ranks against GPUs, of which each takes `per_gpu`, or against cores where there are none."""
    if num <= 1:
        return
    if device != "cpu" and may_have_gpu():
        import torch

        gpus = torch.cuda.device_count()
        if torch.cuda.is_available() and num > gpus * per_gpu:
            _refuse(
                f"--nproc {num}, but there are {gpus} GPUs: use --nproc {gpus * per_gpu}, or let "
                "more ranks share one with runtime.ranks_per_gpu",
                force,
            )
        if torch.cuda.is_available():
            return
    most = RANKS_A_CORE * cores()
    if num > most:
        _refuse(f"--nproc {num}, but there are {cores()} cores: use at most {most}", force)
    elif num > cores():
        print(
            f"warning: {num} ranks on {cores()} cores: one rank a core is as fast",
            file=sys.stderr,
        )


def check_settings(nodes: Iterable[Node]) -> None:
    """What each stage says of its own settings: that a net takes the resolution, for instance."""
    asked = set()
    for node in nodes:
        key = (node.stage.check, str(node.settings.hashed()))
        if node.stage.check and key not in asked:
            asked.add(key)
            function(node.stage.check)(node.settings)


def costs(nodes: Iterable[Node], facts: Facts) -> dict[str, Cost]:
    """The cost of each node that has one."""
    return {n.name: _cost(n, facts) for n in nodes if n.stage.cost}


def _cost(node: Node, facts: Facts) -> Cost:
    found = function(node.stage.cost)(node.settings, facts)
    if not node.stage.pieces:
        return found
    return replace(found, pieces=function(node.stage.pieces)(node.settings, facts))


def check_sizes(
    nodes: list[Node],
    found: dict[str, Cost],
    store: Path,
    num_ranks: int,
    force: bool,
    gpu: float = 0.0,
) -> None:
    """Memory of the hungriest stage and disk of all stages against what is free.

    `gpu`: bytes of memory of a GPU; 0: the stages run on the CPUs of this machine.
    """
    by_name = {n.name: n.stage for n in nodes}

    def memory(name: str) -> float:
        """On one GPU, or on the machine."""
        cost = found[name]
        ranks = 1 if by_name[name].division is Division.ONE else num_ranks
        if gpu:
            return cost.memory + HALF * (cost.activations + cost.batch / ranks)
        return (cost.memory + cost.activations) * ranks + cost.batch + num_ranks * PYTHON

    hungriest, have = max(found, key=memory, default=None), gpu or free_memory()
    if hungriest is not None and memory(hungriest) > have:
        where = "what a rank has of a GPU" if gpu else f"{num_ranks} rank{'s' * (num_ranks > 1)}"
        there = "are there" if gpu else "are free"
        fewer = " or --nproc" if num_ranks > 1 and not gpu else ""
        _refuse(
            f"{hungriest} needs about {_gb(memory(hungriest))} of memory on {where}, and "
            f"{_gb(have)} {there}: lower {by_name[hungriest].smaller}{fewer}",
            force,
        )
    check_disk([(n, found[n.name]) for n in nodes if n.name in found], store, force)


def check_jobs(
    points: Iterable[Point], jobs: Iterable[Job], known: Mapping[str, Facts | None], store: Path
) -> None:
    """Jobs that are left: the memory that each is given, the disk of all together.

    Memory is compared for jobs without GPUs alone: it is theirs that networks need. `known`: what
    is known of each point's set, None where nothing is.
    """
    jobs = list(jobs)
    force = any(request.force for job in jobs for request in job.requests)
    wanted = {where for job in jobs for where in (*job.nodes, *job.joins)}
    work: dict[str, tuple[Node, Cost]] = {}  # by folder: points share some
    for point in points:
        facts, nodes = known[point.name], point.nodes.values()
        new = [n for n in nodes if n.where in wanted and n.where not in work]
        new = [n for n in new if not complete(n.folder(store))]
        found = costs(new, facts) if facts is not None else {}
        work |= {n.where: (n, found[n.name]) for n in new if n.name in found}
    check_disk(work.values(), store, force)
    for job in jobs:
        ranks, given = job.wants.tasks_per_node, job.wants.mem_gb * 2**30
        if not given or job.wants.gpus_per_node:
            continue
        for node, cost in (work[where] for where in job.nodes if where in work):
            # A batch is that of the ranks of all nodes.
            batch = cost.batch / job.wants.nodes
            need = (cost.memory + cost.activations + PYTHON) * ranks + batch
            if need > given:
                _refuse(
                    f"{node.name} needs about {_gb(need)} of memory, and the profile gives its "
                    f"job {_gb(given)}: raise mem_gb, or lower {node.stage.smaller}",
                    force,
                )


def check_disk(work: Iterable[tuple[Node, Cost]], store: Path, force: bool) -> None:
    """Disk of all stages that are left against what is free under the store."""
    # What an interrupted stage has written is there already.
    left = [(max(c.disk - _written(n.folder(store)), 0.0), n) for n, c in work]
    asked, have = sum(size for size, _ in left), free_disk(store)
    if asked > have:
        _, largest = max(left, key=lambda one: one[0])
        _refuse(
            f"the stages that are left need about {_gb(asked)} of disk ({largest.name} most), and "
            f"{store} has {_gb(have)} free: lower {largest.stage.smaller}, or choose another "
            "--store",
            force,
        )


def _written(folder: Path) -> float:
    """Bytes of the files in a stage's folder."""
    if not folder.is_dir():
        return 0.0
    return float(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))


def _refuse(text: str, force: bool) -> None:
    if not force:
        raise UserError(f"{text} {INSIST}")
    print(f"warning: {text}", file=sys.stderr)


def free_memory() -> float:
    """Bytes that new processes may use: of the machine, or of our control group and those that it
    is in. SLURM and systemd set their limits on some group on the way down."""
    free = float("inf")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024.0
    for limit, used, table, cache in _groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        try:
            text = limit.read_text().strip()
            if text == "max":
                continue
            rows = dict(line.split() for line in table.read_text().splitlines())
            # The kernel gives file pages back when somebody asks for memory.
            taken = float(used.read_text()) - float(rows.get(cache, 0))
            free = min(free, float(text) - taken)
        except (OSError, ValueError):
            continue
    return free


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, Path, Path, str]]:
    """Of each control group that we are in: files of its limit, of what is used and of what that
    is, and the word for file pages in the last. `own` says which groups, of either version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    where = {"0": "", "memory": ""}  # version 2, and 1
    for line in lines:
        number, names, path = line.split(":", 2)
        key = "memory" if "memory" in names.split(",") else number if not names else ""
        if key in where:
            where[key] = path.strip("/")
    for path in [Path(where["0"]), *Path(where["0"]).parents]:
        at = root / path
        yield at / "memory.max", at / "memory.current", at / "memory.stat", "inactive_file"
    for path in [Path(where["memory"]), *Path(where["memory"]).parents]:
        at = root / "memory" / path
        limit, used = at / "memory.limit_in_bytes", at / "memory.usage_in_bytes"
        yield limit, used, at / "memory.stat", "total_inactive_file"


def gpu_memory() -> float:
    """Bytes of memory of the first GPU, 0 where there is none."""
    if not may_have_gpu():
        return 0.0
    import torch

    if not torch.cuda.is_available():
        return 0.0
    # Not `mem_get_info`: that would keep a context on the GPU while ranks work.
    return float(torch.cuda.get_device_properties(0).total_memory)


def free_disk(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def _gb(size: float) -> str:
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
    unit, scale = next((u for u in units if size >= u[1]), units[-1])
    return f"{size / scale:.1f} {unit}"
