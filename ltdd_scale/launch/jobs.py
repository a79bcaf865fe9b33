"""The stage graph as jobs: which commands, what they wait for, what they make. A job that several configs need is there once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ltdd_scale import graph, report
from ltdd_scale.config import Config
from ltdd_scale.launch.profile import Profile


@dataclass
class Point:
    """One config of a campaign, and its run folder."""

    name: str
    config: Config
    path: Path  # the config as it was when the jobs were made
    out: Path


@dataclass
class Job:
    """One SLURM job, or an array of them where `commands` has several. `needs` are names of jobs that must have ended well."""

    name: str
    stage: str
    point: str
    commands: list[list[str]]
    nodes: list[str]  # stage/fingerprint folders of the store that are there when it is done
    needs: list[str]
    report: str = ""  # the run folder whose report it writes

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def _commands(stage: str, count: int, tail: list[str]) -> list[list[str]]:
    """The `ltdd-scale` arguments of each element."""
    if stage in ("observer", "teacher"):
        return [["train", stage, *tail]]
    if stage in ("recover", "students"):
        return [
            ["evaluate" if stage == "students" else stage, *tail, "--part", f"{k}/{count}"]
            for k in range(count)
        ]
    return [[stage, *tail]]


def _where(node: graph.Node) -> str:
    return f"{node.stage}/{node.fingerprint}"


def plan(points: list[Point], store: Path, profile: Profile) -> list[Job]:
    """All jobs of the points, each after those that it needs. What is done already is planned too."""
    jobs: list[Job] = []
    maker: dict[
        str, str
    ] = {}  # what -> the job that makes it; what is a folder of the store, or "parts of" one

    def add(
        point: Point,
        stage: str,
        makes: list[str],
        reads: list[str],
        count: int = 1,
        folder: str = "",
    ) -> None:
        if all(m in maker for m in makes):
            return  # another point's job does it
        name = f"{point.name}/{stage}" if point.name else stage
        needs = [
            maker[r] for r in (*reads, *makes) if r in maker
        ]  # what another job makes as well is waited for, not waited at
        commands = _commands(
            stage, count, [str(point.path), "--out", str(point.out), "--store", str(store)]
        )
        jobs.append(
            Job(
                name,
                stage,
                point.name,
                commands,
                [m.removeprefix("parts of ") for m in makes],
                list(dict.fromkeys(needs)),
                folder,
            )
        )
        for m in makes:
            maker.setdefault(m, name)

    for point in points:
        nodes = graph.graph(point.config)
        at = {name: _where(n) for name, n in nodes.items()}
        inputs = {name: [at[i] for i in n.inputs] for name, n in nodes.items()}
        for stage in ("shard", "observer", "teacher", "calibrate", "initialize"):
            add(point, stage, [at[stage]], inputs[stage])
        add(
            point,
            "recover",
            [f"parts of {at['recover']}"],
            inputs["recover"],
            profile.of("recover").array,
        )
        # The next job puts together what the parts of recovery made.
        add(
            point,
            "relabel",
            [at["recover"], at["relabel"]],
            [f"parts of {at['recover']}", *inputs["relabel"], *inputs["recover"]],
        )
        students = [name for name, n in nodes.items() if n.stage == "student"]
        reads = [at["relabel"], *(i for s in students for i in inputs[s])]
        add(
            point,
            "students",
            [at[s] for s in students],
            reads,
            min(profile.of("students").array, len(students)),
        )
        add(point, "evaluate", [at["evaluate"]], inputs["evaluate"])
        add(
            point,
            "report",
            [f"report of {at['evaluate']} in {point.out}"],
            [at["evaluate"]],
            folder=str(point.out),
        )
    return jobs


def is_done(job: Job, store: Path, configs: dict[str, Config]) -> bool:
    """Whether the disk has what the job makes."""
    if job.report:
        config = configs[job.point]
        return report.is_current(config, graph.graph(config), Path(job.report))
    if all(graph.complete(store / f) for f in job.nodes):
        return True
    n = len(job.commands)
    return job.stage == "recover" and all(
        (store / job.nodes[0] / graph.part_mark(k, n)).exists() for k in range(n)
    )
