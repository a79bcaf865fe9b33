"""Cluster profiles: what is asked for, from a small YAML such as slurm/testbed.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml

from ltdd_scale import recipe
from ltdd_scale.errors import UserError
from ltdd_scale.settings import Number, Settings, Text, Whole, option, parse
from ltdd_scale.stage import Division, Stage
from ltdd_scale.stage import Resources as Wanted

SUMMARY = "summary"  # a sweep's table; it gets what the report gets

_GPUS = re.compile(r"^(gpu(?::[A-Za-z_][^:,()]*)?)(?::\d+)?(?=$|,)")  # of --gres=gpu:a100:4


class Resources(Settings):
    """What one job, or one element of an array of jobs, gets."""

    partition: Text = option("", "partition; empty: the cluster's default")
    account: Text = option("", "account to charge")
    qos: Text = option("", "quality of service")
    constraint: Text = option(
        "", "node features, such as a100; a checkpoint goes on only on the kind of GPU it is of"
    )
    nodes: Whole = option(1, "nodes", low=1)
    gpus_per_node: Whole = option(1, "GPUs a node, one task each; 0: none, one task a node", low=0)
    gres: Text = option(
        "", "asked for instead of --gpus-per-node, where a cluster wants it: gpu:a100:4"
    )
    cpus_per_task: Whole = option(1, "CPUs a task", low=1)
    mem_gb: Number = option(0.0, "memory a node; 0: the cluster's default", low=0)
    minutes: Whole = option(
        60, "time limit; work goes on in a new turn where it is too short", low=1
    )
    array: Whole = option(1, "jobs over which a stage's chunks, or the students, are spread", low=1)

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)


class Profile(Resources):
    """A cluster: the resources of every stage, what single stages get instead, and its customs."""

    stages: dict[str, Resources] = option(
        {}, "settings for single stages, laid over the others: {recover: {array: 16}}"
    )
    array_parallelism: Whole = option(32, "elements of one array that run at a time", low=1)
    signal_delay_s: Whole = option(
        90,
        "seconds between SIGUSR2 and the end of the time limit: enough for a step and a save",
        low=5,
    )
    retries: Whole = option(
        3,
        "times a job starts again after it was killed or broke down, not counting preemptions",
        low=0,
    )
    device: Literal["auto", "cpu", "v100", "a100", "h100"] = option(
        "auto",
        "what a dry run reckons with: published rates of a GPU, or a core of this machine, "
        "measured; auto: on this machine what it has, on a cluster a100",
    )
    tflops: Number = option(
        0.0, "what a device reaches, for a dry run only; 0: what is known of `device`", low=0
    )
    preempted_hours: Number = option(
        0.0, "a running job is preempted once in so many hours, for a dry run only; 0: never", low=0
    )
    requeue_minutes: Number = option(
        10.0, "minutes until a preempted job runs again, for a dry run only", low=0
    )
    setup: list[Text] = option([], "lines of shell before the work: module load …")
    env: dict[str, Text] = option({}, "environment variables of the jobs")
    srun_args: list[Text] = option(
        [], "more arguments of srun, for instance a container's: --container-image=…"
    )
    python: Text = option("", "the interpreter on the nodes; empty: the one that submits")
    extra: dict[str, Any] = option(
        {}, "more sbatch parameters: {reservation: maintenance, exclude: node7}"
    )

    def of(self, job: str, stage: Stage | None = None) -> Resources:
        """The resources of a job that makes `stage`; None: one that needs no GPU, as the report."""
        values = {name: getattr(self, name) for name in Resources.model_fields}
        wanted = stage.resources if stage else Wanted.CPU
        division = stage.division if stage else Division.ONE
        if wanted is Wanted.CPU:
            values.update(gpus_per_node=0, gres="")
        if division is Division.ONE:  # one rank's work
            values.update(gpus_per_node=min(1, values["gpus_per_node"]))
        if wanted is not Wanted.NODES:
            values.update(nodes=1)
        own = self._own(job)
        values.update(own)
        if values["gres"] and "gres" not in own:  # the profile's, for as many GPUs as this job gets
            count = values["gpus_per_node"]
            values["gres"] = _GPUS.sub(rf"\g<1>:{count}", values["gres"]) if count else ""
        if division not in (Division.CHUNKS, Division.UNITS):
            values["array"] = 1
        return Resources(**values)

    def _own(self, job: str) -> dict[str, Any]:
        """What the profile says of this job alone."""
        own = self.stages.get(job) or (self.stages.get(recipe.REPORT) if job == SUMMARY else None)
        return {name: getattr(own, name) for name in own.model_fields_set} if own else {}


def known_jobs() -> tuple[str, ...]:
    """Every job that a profile may name."""
    return (*recipe.commands(), recipe.REPORT, SUMMARY)


def load(path: Path) -> Profile:
    """Raises `UserError` naming the key of whatever is unknown, of a wrong type or out of range."""
    values = _read(path)
    stages = values.get("stages") or {}
    if not isinstance(stages, dict):
        raise UserError(f"{path}: stages: expected settings, got {stages!r}")
    known, own = known_jobs(), {}
    for name, wants in stages.items():
        if name not in known:
            raise UserError(f"{path}: stages.{name}: unknown stage (known: {', '.join(known)})")
        if not isinstance(wants, dict):
            raise UserError(f"{path}: stages.{name}: expected settings, got {wants!r}")
        own[name] = parse(Resources, wants, f"stages.{name}.")
    profile = parse(Profile, {**values, "stages": own})
    for name in known:
        minutes = profile.of(name).minutes
        # It would be asked to stop before it has begun, again and again.
        if minutes * 60 < 2 * profile.signal_delay_s:
            raise UserError(
                f"{path}: minutes: {minutes} ({name}) is too short for signal_delay_s: "
                f"{profile.signal_delay_s}: at least twice as long"
            )
    return profile


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the profile {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines")
    return values
