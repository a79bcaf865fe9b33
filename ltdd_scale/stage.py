"""What a stage says of itself: what it reads, what it needs, how its work is shared out.

A stage is a record, not code: a list of stages imports no torch, so that ``status`` answers at
once. `run` names the function that does the work. The graph resolves `reads` into one frozen
object. That object is hashed, and the same object is what `run` receives: a stage cannot depend
on a setting that its fingerprint does not know.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ltdd_scale.settings import Settings


class Division(StrEnum):
    """How a stage's work is shared out."""

    ONE = "one"  # rank 0 alone; the other ranks wait
    RANKS = "ranks"  # all ranks together
    CHUNKS = "chunks"  # all ranks, each its own pieces; `--part` gives jobs of an array their share
    UNITS = "units"  # one rank alone; stages of one group are dealt to ranks and to arrays


class Resources(StrEnum):
    """What a stage can use on a cluster."""

    CPU = "cpu"
    GPU = "gpu"  # the GPUs of one node
    NODES = "nodes"  # the GPUs of many nodes


@dataclass(frozen=True)
class Section:
    """A place in the config, seen as `kind`: only the fields that `kind` has."""

    place: str
    kind: type[Settings]


Place = str | Section


@dataclass(frozen=True)
class Facts:
    """What is known of the real set before any work: training images of each class, test images,
    and the mean bytes of an image's file (0: not known)."""

    counts: tuple[int, ...]
    judged: int = 0
    image_bytes: float = field(default=0.0, compare=False)

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def num_images(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage asks for: FLOPs in all, bytes of memory, bytes on the disk.

    Memory of each rank: `memory`, and `activations` as float32. `batch`: activations of the global
    batch, which ranks share out. `decodes`: images decoded in all. `steps`: steps that wait for
    each other, of training or recovery, in all pieces of the work. `meetings`: small reductions
    over all ranks that a step waits for, in all. `pieces`: into how many the work of a stage of
    chunks is cut; 0: it is not.
    """

    flops: float = 0.0
    decodes: float = 0.0
    steps: float = 0.0
    meetings: float = 0.0
    memory: float = 0.0
    activations: float = 0.0
    batch: float = 0.0
    disk: float = 0.0
    pieces: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    `name` is unique in a run; `kind` is its folder in the store; stages of one kind share `version`
    and code. `reads` maps fields to places in the config, `given` holds further fields, fixed
    when the record is made. `inputs` maps what `run` asks for to the names of earlier stages.
    `run(settings, context)` returns facts for ``stage.json``. `pieces(settings, facts)` is the
    number of pieces of a stage of chunks. `cost(settings, facts)` returns a `Cost`.
    `check(settings)` raises `UserError` for settings that cannot work, before anything starts.
    These four are named as ``package.module:function``.
    """

    name: str
    kind: str
    version: int
    run: str
    reads: Mapping[str, Place] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    division: Division = Division.RANKS
    resources: Resources = Resources.GPU
    group: str = ""  # stages of one group are one job, and one target of a command
    pieces: str = ""
    cost: str = ""
    check: str = ""
    help: str = ""
    smaller: str = "ipc or the stage's batch_size"  # settings that make it need less

    @property
    def job(self) -> str:
        """The name of the job, and of the target, that makes it."""
        return self.group or self.name


def places(*names: str) -> dict[str, Place]:
    """Places read under their own last name: ``places("data.resolution", "seed")``."""
    return {name.rpartition(".")[2]: name for name in names}


class Given:
    """The settings of one stage, frozen: what it reads, and nothing else."""

    __slots__ = ("_stage", "_values")

    def __init__(self, stage: str, values: Mapping[str, Any]):
        object.__setattr__(self, "_stage", stage)
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(
                f"the stage {self._stage} does not read '{name}': add it to its record"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a stage's settings are frozen")

    def __reduce__(self):
        return Given, (self._stage, self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def hashed(self) -> dict[str, Any]:
        """What the fingerprint is made of: plain values, in no particular order."""
        return {name: _plain(value) for name, value in self._values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def look_up(config: Any, place: Place) -> Any:
    """What the config has at `place`. Raises `AttributeError` where it has nothing there."""
    path = place.place if isinstance(place, Section) else place
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    if isinstance(place, Section):
        return place.kind(**{name: getattr(value, name) for name in place.kind.model_fields})
    return value


def settings_of(stage: Stage, config: Any) -> Given:
    """What `stage` reads of `config`, and what it was given."""
    values = {name: look_up(config, place) for name, place in stage.reads.items()}
    return Given(stage.name, {**values, **stage.given})


def function(reference: str) -> Callable[..., Any]:
    """The function that ``package.module:name`` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
