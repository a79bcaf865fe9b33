"""The stage graph as jobs: what each does, what it waits for, what it makes.

A job that several configs need is there once. No stage is known by its name here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ltdd_scale import recipe, session
from ltdd_scale.config.load import to_yaml
from ltdd_scale.data.settings import Location
from ltdd_scale.launch.profile import SUMMARY, Profile, Resources
from ltdd_scale.pipeline import graph
from ltdd_scale.pipeline import store as folders
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.request import Request
from ltdd_scale.session import Session
from ltdd_scale.stage import Division, Section, look_up


@dataclass(frozen=True)
class Point:
    """One config of a campaign with nothing left to resolve, and its run folder.

    `source` is the digest of its real images, `asked` that of the config as it was asked for.
    """

    name: str
    config: Any
    out: Path
    source: str
    asked: str = ""

    @cached_property
    def nodes(self) -> dict[str, Node]:
        return graph.build(recipe.stages(self.config, self.source), self.config)

    @cached_property
    def how(self) -> str:
        """Hash of what is not hashed into fingerprints, but is in the requests."""
        location = look_up(self.config, Section("data", Location))
        return _hash(f"{location.model_dump_json()} {self.config.runtime.model_dump_json()}")

    @cached_property
    def published(self) -> str:
        """Hash of how the report is written."""
        return _hash(f"{self.how} {self.config.publish.model_dump_json()}")

    @cached_property
    def text(self) -> str:
        return to_yaml(self.config)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Summary:
    """What a sweep's last job needs in order to write the sweep's table."""

    file: str
    out: str
    store: str
    sets: tuple[str, ...] = ()


@dataclass
class Job:
    """One job of a cluster, or an array of them where `requests` has several, one an element.

    `stage` is the target that it makes, "report" or "summary". `nodes` are the folders of the
    store, kind/fingerprint, that it makes; with `parts` each element makes its part of them and
    leaves them unfinished. `joins` are folders whose parts other jobs made and this one puts
    together. `how`: hash of what does not change results, such as where the images lie: a job in
    the queue keeps what it was submitted with. `needs` are names of jobs that must have ended well.
    `report` is the run folder whose report it writes.
    """

    name: str
    stage: str
    point: str = ""
    requests: list[Request] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    parts: bool = False
    joins: list[str] = field(default_factory=list)
    report: str = ""
    summary: Summary | None = None
    how: str = ""
    wants: Resources = field(default_factory=Resources)

    @property
    def elements(self) -> int:
        return max(1, len(self.requests))

    @property
    def identity(self) -> list[Any]:
        """What tells this job from another one of its name."""
        return [self.nodes, self.joins, self.parts, self.report, self.elements, self.how]

    def titles(self) -> list[str]:
        """What each element does, for people."""
        if self.summary:
            return [f"table of the sweep {self.summary.file}"]
        return [title(request) for request in self.requests]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the configs: they are the point's, and long."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "wants"}
        out["summary"] = self.summary and dataclasses.asdict(self.summary)
        out["requests"] = [json.loads(r.to_json()) for r in self.requests]
        for request in out["requests"]:
            del request["config"]
        return out

    @staticmethod
    def from_dict(values: Mapping[str, Any], config: str) -> Job:
        values = dict(values)
        requests = [
            Request.from_json(json.dumps({**r, "config": config})) for r in values.pop("requests")
        ]
        table = values.pop("summary")
        summary = (
            Summary(table["file"], table["out"], table["store"], tuple(table["sets"]))
            if table
            else None
        )
        return Job(requests=requests, summary=summary, **values)


def title(request: Request) -> str:
    """What a request asks for, in a few words."""
    what = [*request.targets, *([recipe.REPORT] * request.report)]
    part = f", part {request.part[0]} of {request.part[1]}" if request.part else ""
    return f"{', '.join(what)}{part} of {Path(request.out).name}"


def plan(points: Iterable[Point], store: Path, profile: Profile, force: bool = False) -> list[Job]:
    """All jobs of the points, each after those that it needs. What is done is planned too."""
    planned = _Plan(store, profile, force)
    for point in points:
        batches: dict[str, list[Node]] = {}
        for node in point.nodes.values():
            batches.setdefault(node.stage.job, []).append(node)
        for name, nodes in batches.items():
            planned.add(point, name, nodes)
        planned.add_report(point)
    return planned.jobs


class _Plan:
    """Jobs so far. `maker`: folder → the job that makes it; `part_maker`: the one that makes its
    parts, which the next job that reads the folder puts together."""

    def __init__(self, store: Path, profile: Profile, force: bool):
        self.store, self.profile, self.force = store, profile, force
        self.jobs: list[Job] = []
        self.maker: dict[str, str] = {}
        self.part_maker: dict[str, str] = {}

    def add(self, point: Point, name: str, nodes: list[Node]) -> None:
        """The job that makes `nodes`, which are one stage or one group of stages."""
        own = [n.where for n in nodes]
        if all(f in self.maker or f in self.part_maker for f in own):
            return  # a job of another point makes them
        stage = nodes[0].stage
        wants = self.profile.of(name, stage)
        count = min(wants.array, len(nodes)) if stage.division is Division.UNITS else wants.array
        reads = [point.nodes[i] for n in nodes for i in n.inputs]
        joined = [n for n in reads if n.where in self.part_maker and n.where not in self.maker]
        # Whoever puts parts together reads what they were made from.
        reads += [point.nodes[i] for n in joined for i in n.inputs]
        joins = {n.where: n.name for n in joined}
        needs = [self.part_maker[f] for f in joins]
        # If another job makes one of these too, wait for it instead of making it twice.
        needs += [self.maker[f] for f in (*(n.where for n in reads), *own) if f in self.maker]
        job = Job(
            name=self._name(point, name),
            stage=name,
            point=point.name,
            requests=self._requests(point, name, count, list(joins.values())),
            nodes=own,
            needs=list(dict.fromkeys(needs)),
            parts=count > 1 and stage.division is Division.CHUNKS,
            joins=list(joins),
            how=point.how,
            wants=wants,
        )
        self.jobs.append(job)
        for folder in own:
            (self.part_maker if job.parts else self.maker).setdefault(folder, job.name)
        for folder in joins:
            self.maker[folder] = job.name

    def _requests(self, point: Point, name: str, count: int, joins: list[str]) -> list[Request]:
        """One an element. An element's part is of all targets, so those of an array name only one;
        what they read is put together all the same."""
        if count == 1:
            return [self._request(point, (*joins, name), None)]
        return [self._request(point, (name,), (k, count)) for k in range(count)]

    def add_report(self, point: Point) -> None:
        verdict = point.nodes[recipe.VERDICT].where
        self.jobs.append(
            Job(
                name=self._name(point, recipe.REPORT),
                stage=recipe.REPORT,
                point=point.name,
                requests=[self._request(point, (), None).replace(report=True)],
                nodes=[verdict],
                needs=[self.maker[verdict]],
                report=str(point.out),
                how=point.published,
                wants=self.profile.of(recipe.REPORT),
            )
        )

    def _name(self, point: Point, name: str) -> str:
        return f"{point.name}/{name}" if point.name else name

    def _request(
        self, point: Point, targets: tuple[str, ...], part: tuple[int, int] | None
    ) -> Request:
        return Request(
            config=point.text,
            targets=targets,
            out=str(point.out),
            store=str(self.store),
            source=point.source,
            part=part,
            force=self.force,
            asked=point.asked,
        )


def summary_job(summary: Summary, profile: Profile) -> Job:
    """The job that writes a sweep's table. The campaign makes it wait for all reports."""
    return Job("report", SUMMARY, summary=summary, wants=profile.of(SUMMARY))


def is_done(job: Job, store: Path) -> bool:
    """Whether the disk has what the job, which is not a summary, makes."""
    if not all(folders.complete(store / f) for f in job.joins):
        return False
    whole = all(folders.complete(store / f) for f in job.nodes)
    if job.report:
        return whole and session.is_published(Session(job.requests[0]))
    return whole or (
        job.parts and all(folders.parts_done(store / f, job.elements) for f in job.nodes)
    )
