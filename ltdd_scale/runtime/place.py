"""Where this process runs: its rank, its SLURM step. The environment is read here, and once.

A rank's number comes from torchrun (or from `launch.run`, which sets the same variables), from a
SLURM step, or this process is alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STEP = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
RENDEZVOUS = "LTDD_RENDEZVOUS"  # where ranks that `launch.run` started meet: a file:// address


@dataclass(frozen=True)
class Place:
    """`launched`: others started us as one of several ranks, `local_size` of them on this machine.
    `rendezvous`: the address at which ranks meet, empty where torchrun's variables tell it. `step`:
    a name for this start of a SLURM step, empty outside of one; no two attempts share it. `job`:
    the SLURM job as SLURM's commands take it (123, or 123_4 for an element of an array). `attempt`:
    how often SLURM has restarted it. `notified`: we are in a SLURM step, whose processes all get
    SLURM's notices.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    rendezvous: str = ""
    step: str = ""
    job: str = ""
    attempt: int = 0
    node: str = ""
    notified: bool = False
    elastic_attempt: str = "0"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def in_slurm(self) -> bool:
        return bool(self.job)

    @property
    def in_step(self) -> bool:
        return bool(self.step)


def read(env: Mapping[str, str]) -> Place:
    """The place that `env` describes.

    torchrun's variables win over SLURM's, as with one torchrun a node. A SLURM step of one task,
    as `srun --pty bash` gives, is "alone": `--nproc` works there. Raises `UserError` for a
    half-set environment.
    """
    alone = _alone(env)
    given = [name for name in TORCHRUN if name in env]
    if given:
        _refuse_half(given, TORCHRUN, "start with torchrun or --nproc, or unset them")
        address = env.get(RENDEZVOUS, "")
        # With an address they meet where their launcher says, not as a step.
        step = "" if address or "MASTER_ADDR" in env else alone.step
        return replace(_ranked(alone, env, TORCHRUN), rendezvous=address, step=step)
    if not alone.step or env.get("SLURM_STEP_NUM_TASKS") == "1":
        return replace(alone, step="")
    found = [name for name in _STEP if name in env]
    _refuse_half(found, _STEP, "start with srun, or unset the SLURM_ variables")
    return _ranked(alone, env, _STEP)


def _ranked(alone: Place, env: Mapping[str, str], names: tuple[str, ...]) -> Place:
    rank, world_size, local_rank = (int(env[name]) for name in names)
    ranks = {"rank": rank, "world_size": world_size, "local_rank": local_rank}
    local_size = _local_size(env) or world_size
    return replace(alone, **ranks, local_size=local_size, launched=True)


def _local_size(env: Mapping[str, str]) -> int:
    """Ranks on a node, of the fullest where they differ; 0 where nobody says it. srun says it of
    its step as "8(x2),4": 8 on each of two nodes, then 4."""
    said = env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", "")
    numbers = re.findall(r"(\d+)(?:\(x\d+\))?", said) or [env.get("SLURM_NTASKS_PER_NODE", "")]
    return max(int(n) if n.isdecimal() else 0 for n in numbers)


def _alone(env: Mapping[str, str]) -> Place:
    """What SLURM and torchrun say beside the rank."""
    job = env.get("SLURM_JOB_ID", "")
    attempt = env.get("SLURM_RESTART_COUNT", "0")
    step = f"{job}.{env['SLURM_STEP_ID']}.{attempt}" if "SLURM_STEP_ID" in env else ""
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return Place(
        step=step,
        job=job,
        attempt=int(attempt),
        node=env.get("SLURMD_NODENAME", ""),
        notified="SLURM_STEP_ID" in env,
        elastic_attempt=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _refuse_half(given: list[str], needed: tuple[str, ...], cure: str) -> None:
    missing = [name for name in needed if name not in given]
    if missing:
        there = ", ".join(given) or "SLURM_STEP_ID"
        raise UserError(f"the environment has {there} but not {', '.join(missing)}: {cure}")


_here: Place | None = None


def here() -> Place:
    """The place of this process. Raises `UserError` for a half-set environment."""
    global _here
    if _here is None:
        _here = read(os.environ)
    return _here


def become_task() -> Place:
    """In a SLURM task: one task is one rank, be it the only one of its step.

    Without this a job of one task would start as many ranks as it sees cores. What leaked from
    whoever submitted (another job, say) does not count.
    """
    global _here
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", RENDEZVOUS)}
    env.update(zip(TORCHRUN, (os.environ[name] for name in _STEP), strict=True))
    _here = read(env)
    return _here


def speaks() -> bool:
    """Whether this process is the one that speaks for all: rank 0, or alone."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def note_of(folder: Path) -> Path:
    """Where rank 0 of this attempt writes the address at which the others meet it."""
    return folder / here().step


meeting: Any = None  # the torch.distributed store by which a step's ranks met; rank 0 serves it


def have_left() -> None:
    """Say, as a rank, that we have saved and wait for the end."""
    if meeting is not None:
        with suppress(RuntimeError):  # rank 0 is gone already
            meeting.add("left", 1)


def all_have_left(seconds: float) -> None:
    """For rank 0: wait until all others have saved, but not for one that hangs in a collective."""
    end = time.monotonic() + seconds
    while (
        meeting is not None
        and time.monotonic() < end
        and meeting.add("left", 0) < here().world_size - 1
    ):
        time.sleep(0.05)
