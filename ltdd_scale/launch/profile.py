"""Cluster profiles: what SLURM is asked for, from a small YAML such as slurm/testbed.yaml."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ltdd_scale import config as configuration
from ltdd_scale.config import option
from ltdd_scale.errors import UserError

CPU_STAGES = (
    "shard",
    "report",
    "summary",
)  # no GPU is of use there; "summary" is a sweep's report, and gets what "report" gets
EXPERTS = ("observer", "teacher")  # what gains from more than one node
STAGES = (
    "shard",
    "observer",
    "teacher",
    "calibrate",
    "initialize",
    "recover",
    "relabel",
    "students",
    "evaluate",
    "report",
    "summary",
)


_GPUS = re.compile(r"^(gpu(?::[A-Za-z_][^:,()]*)?)(?::\d+)?(?=$|,)")  # of --gres=gpu:a100:4


@dataclass
class Resources:
    """What one job, or one element of an array of jobs, gets."""

    partition: str = option("", "partition; empty: the cluster's default")
    account: str = option("", "account to charge")
    qos: str = option("", "quality of service")
    constraint: str = option("", "node features, such as a100|h100")
    nodes: int = option(1, "nodes", low=1)
    gpus_per_node: int = option(1, "GPUs a node, one task each; 0: none, one task a node", low=0)
    gres: str = option(
        "", "asked for instead of --gpus-per-node, where a cluster wants it: gpu:a100:4"
    )
    cpus_per_task: int = option(1, "CPUs a task", low=1)
    mem_gb: float = option(0.0, "memory a node; 0: the cluster's default", low=0)
    minutes: int = option(60, "time limit; work goes on in a new turn where it is too short", low=1)
    array: int = option(1, "jobs over which recovery's chunks, or the students, are spread", low=1)

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)


@dataclass
class Profile(Resources):
    """A cluster: the resources of every stage, what single stages get instead, and its customs."""

    stages: dict = dataclasses.field(
        default_factory=dict,
        metadata={
            "doc": "settings for single stages, laid over the others: {recover: {array: 16}}"
        },
    )
    array_parallelism: int = option(32, "elements of one array that run at a time", low=1)
    signal_delay_s: int = option(
        90,
        "seconds between SIGUSR2 and the end of the time limit: enough for a step and a save",
        low=5,
    )
    retries: int = option(
        3,
        "times a job starts again after it was killed or broke down, not counting preemptions",
        low=0,
    )
    tflops: float = option(
        60.0, "what a GPU is assumed to reach, for the estimate of GPU-hours only", low=0.001
    )
    setup: list[str] = option([], "lines of shell before the work: module load …")
    env: dict = dataclasses.field(
        default_factory=dict, metadata={"doc": "environment variables of the jobs"}
    )
    srun_args: list[str] = option(
        [], "more arguments of srun, for instance a container's: --container-image=…"
    )
    python: str = option("", "the interpreter on the nodes; empty: the one that submits")
    extra: dict = dataclasses.field(
        default_factory=dict,
        metadata={"doc": "more sbatch parameters: {reservation: maintenance, exclude: node7}"},
    )

    def of(self, stage: str) -> Resources:
        """The resources of a stage's job."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Resources)}
        own = self.stages.get(stage, self.stages.get("report", {}) if stage == "summary" else {})
        if stage in CPU_STAGES:
            values.update(gpus_per_node=0, gres="")
        if stage not in EXPERTS:
            values.update(nodes=1)
        if stage == "evaluate":  # it judges the experts: one rank's work
            values.update(gpus_per_node=min(1, self.gpus_per_node))
        out = Resources(**{**values, **own})
        if out.gres and "gres" not in own:  # the profile's, for as many GPUs as this stage gets
            out.gres = (
                _GPUS.sub(rf"\g<1>:{out.gpus_per_node}", out.gres) if out.gpus_per_node else ""
            )
        return out if stage in ("recover", "students") else dataclasses.replace(out, array=1)


def load(path: Path) -> Profile:
    """Raises `UserError` naming the key of whatever is unknown, of the wrong type or out of range."""
    profile = Profile()
    try:
        values: Any = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the profile {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    configuration.fill(profile, values, "")
    configuration.check_values(profile)
    for stage, own in profile.stages.items():
        if stage not in STAGES:
            raise UserError(f"{path}: stages.{stage}: unknown stage (known: {', '.join(STAGES)})")
        resources = Resources()
        configuration.fill(resources, own, f"stages.{stage}.")
        configuration.check_values(resources, f"stages.{stage}.")
        profile.stages[stage] = {name: getattr(resources, name) for name in own}
    for stage in STAGES:
        minutes = profile.of(stage).minutes
        if (
            minutes * 60 < 2 * profile.signal_delay_s
        ):  # it would be asked to stop before it has begun, again and again
            raise UserError(
                f"{path}: minutes: {minutes} ({stage}) is too short for signal_delay_s: {profile.signal_delay_s}: at least twice as long"
            )
    return profile
