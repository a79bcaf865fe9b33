"""Which rank of how many this process is: from torchrun (or `--nproc`), from a SLURM step, or alone."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STEP = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}


def adopt(env: MutableMapping[str, str] = os.environ) -> bool:
    """Make the tasks of a SLURM step look like ranks that torchrun started; return whether others started us.

    A step of one task, as `srun --pty bash` gives, is "alone": `--nproc` works there. torchrun's variables win over SLURM's, as with one torchrun
    a node. Raises `UserError` for a half-set environment.
    """
    given = [name for name in TORCHRUN if name in env]
    if given:
        _refuse_half(given, TORCHRUN, "start with torchrun or --nproc, or unset them")
        return True
    if "SLURM_STEP_ID" not in env or env.get("SLURM_STEP_NUM_TASKS") == "1":
        return False
    _refuse_half(
        [name for name in _STEP.values() if name in env],
        tuple(_STEP.values()),
        "start with srun, or unset the SLURM_ variables",
    )
    env.update({ours: env[theirs] for ours, theirs in _STEP.items()})
    return True


def _refuse_half(given: list[str], needed: tuple[str, ...], cure: str) -> None:
    missing = [name for name in needed if name not in given]
    if missing:
        raise UserError(
            f"the environment has {', '.join(given) or 'SLURM_STEP_ID'} but not {', '.join(missing)}: {cure}"
        )


def attempt(env: MutableMapping[str, str] = os.environ) -> str:
    """A name for this start of this step: no two attempts share it."""
    return f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', '0')}"


def in_step() -> bool:
    return (
        "SLURM_STEP_ID" in os.environ
        and "MASTER_ADDR" not in os.environ
        and "LTDD_RENDEZVOUS" not in os.environ
    )


def note_of(folder: Path) -> Path:
    """Where rank 0 of this attempt writes the address at which the others meet it."""
    return folder / attempt()


meeting: Any = (
    None  # the torch.distributed store by which the ranks of this step have met; rank 0 serves it
)


def have_left() -> None:
    """A rank's word that it has saved and waits for the end."""
    if meeting is not None:
        with suppress(RuntimeError):  # rank 0 is gone already
            meeting.add("left", 1)


def all_have_left(seconds: float) -> None:
    """For rank 0: wait until all others have saved, but not for one that is in a collective and will not hear of it."""
    end = time.monotonic() + seconds
    while (
        meeting is not None
        and time.monotonic() < end
        and meeting.add("left", 0) < int(os.environ["WORLD_SIZE"]) - 1
    ):
        time.sleep(0.05)
