"""What a cluster is to the rest of the house: a place that takes jobs and says what they are at.

A cluster is a file of `clusters/` and a line of `clusters/catalog.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ltdd_scale.launch.jobs import Job
from ltdd_scale.launch.profile import Profile


class Phase(StrEnum):
    """What a job is at, whatever the cluster calls it."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether the cluster does not run it again unless asked."""
        return self in (Phase.COMPLETED, Phase.CANCELLED, Phase.FAILED)


@dataclass(frozen=True)
class State:
    """Of one job, or of one element of an array. `state` is the cluster's own word for it."""

    state: str
    phase: Phase
    reason: str = ""
    restarts: int = 0


@dataclass(frozen=True)
class Order:
    """A job as it is submitted.

    `code`: the folder of the snapshot that it runs, named by its digest. `after`: ids of jobs that
    must have ended well, with `after_any` however they ended.
    `lane`: jobs of one lane run one at a time; empty: no lane.
    """

    job: Job
    profile: Profile
    code: Path
    after: tuple[str, ...] = ()
    after_any: bool = False
    lane: str = ""


class Cluster(ABC):
    """A cluster, as one campaign uses it. `folder` is where the campaign keeps notes and logs.

    `title`: its name for people. `absent`: what to say where `available` is False. `detached`: jobs
    go on without whoever submitted them; else `submit` returns when the job is over. `nproc`: ranks
    of a job, where its profile does not say.
    """

    title: str
    absent: str
    detached: bool = True

    def __init__(self, folder: Path, nproc: int | None = None, quiet: bool = False):
        self.folder, self.nproc, self.quiet = folder, nproc, quiet

    @abstractmethod
    def available(self) -> bool:
        """Whether it can be asked from here."""

    @abstractmethod
    def need(self) -> None:
        """Raise `UserError` where jobs cannot be submitted from here."""

    @abstractmethod
    def submit(self, order: Order) -> str:
        """Submit a job, or an array; return its id. Raises `UserError` where it is refused."""

    @abstractmethod
    def script(self, order: Order) -> str:
        """What is run, for people to read."""

    @abstractmethod
    def states(self) -> dict[str, State]:
        """The user's jobs that the cluster still knows: id, or id_k for an element of an array.

        Raises `UserError` where the cluster does not answer.
        """

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """End these jobs, or keep them from starting."""

    def logs(self, number: str, kind: str = "err") -> list[Path]:
        """Logs of all attempts and elements of a job. `kind`: err or out."""
        return []

    def ends(self, number: str) -> list[str]:
        """Notes on attempts of a job that ended early, a line each."""
        return []

    def forget(self, number: str) -> None:  # noqa: B027 (there need not be notes)
        """Remove the notes on a job that is about to be submitted anew."""


def alive(known: Mapping[str, State]) -> set[str]:
    """Ids, of arrays as a whole, that the cluster runs or will run."""
    return {i.split("_")[0] for i, s in known.items() if not s.phase.over}


def waiting(known: Mapping[str, State]) -> set[str]:
    """Ids, of arrays as a whole, of which nothing has begun yet."""
    begun = {i.split("_")[0] for i, s in known.items() if s.phase is not Phase.WAITING}
    return {i.split("_")[0] for i in known} - begun
