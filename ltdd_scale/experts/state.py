"""What training carries from step to step, and into its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.errors import UserError
from ltdd_scale.experts.batches import Batch
from ltdd_scale.experts.engine import Trainer
from ltdd_scale.runtime.late import Late
from ltdd_scale.runtime.ranks import Ranks

TERMS = ("loss", "debias", "robust")  # what `losses.Objective` gives


class History:
    """The mean losses of finished epochs, and this rank's share of those of the running one."""

    def __init__(self, device: torch.device):
        self.epochs: list[dict[str, float]] = []
        self.running = torch.zeros(len(TERMS), device=device)

    def add(self, losses: Tensor) -> None:
        """`losses`, float32 [3], in the share that they have of the epoch's mean."""
        self.running += losses

    def close(self, epoch: int, ranks: Ranks) -> None:
        """The epoch is over: sum up over ranks."""
        values = ranks.all_reduce(self.running).tolist()
        self.epochs.append({"epoch": epoch, **dict(zip(TERMS, values, strict=True))})
        self.running.zero_()

    @property
    def note(self) -> str:
        return f"loss {self.epochs[-1]['loss']:.3f}" if self.epochs else ""


class Watch:
    """Stops a training whose loss is not finite.

    Each loss is looked at when the next step is under way, and a GPU has long known it: nobody
    waits for it.
    """

    def __init__(self, role: str, names: Sequence[str], trainer: Trainer):
        self.role, self.names, self.trainer = role, names, trainer
        self._last: tuple[int, np.ndarray, Late] | None = None

    def note(self, batch: Batch, losses: Tensor) -> None:
        """The losses of a step, float32 [3]: looked at by the next `check`."""
        self._last = (batch.step, batch.chosen, Late(losses))

    def check(self) -> None:
        """Raise `UserError` where the loss of the noted step is not finite."""
        if self._last is None:
            return
        step, chosen, losses = self._last
        loss = float(losses.read()[0])
        if math.isfinite(loss):
            return
        self.trainer.finish()  # the last save may be on its way
        saved = [
            int(p.name.split("-")[1].split(".")[0]) for p in self.trainer.folder.glob("step-*")
        ]
        kept = f"the last good checkpoint is of step {max(saved)}" if saved else ""
        shown = ", ".join(self.names[i] for i in chosen[:3])
        if len(chosen) > 3:
            shown += f" and {len(chosen) - 3} more"
        raise UserError(
            f"{self.role}: the loss is {loss} at step {step}, on {shown}; "
            f"{kept or 'there is no checkpoint yet'}. Lower {self.role}.lr, or set train.clip "
            "(1.0, say)"
        )


def save(
    trainer: Trainer, step: int, model: nn.Module, history: History, ranks: Ranks, wait: bool
) -> None:
    """Save a checkpoint, with what differs between ranks of all of them."""
    own = {
        "buffers": {name: value.cpu() for name, value in model.named_buffers()},
        "running": history.running.cpu(),
    }
    trainer.save(step, {"history": history.epochs, "own": ranks.gather(own)}, wait)


def resume(trainer: Trainer, model: nn.Module, history: History, ranks: Ranks) -> int:
    """Restore the newest checkpoint; return its step, 0 where there is none."""
    saved = trainer.load()
    if saved is None:
        return 0
    step, state = saved
    history.epochs = state["history"]
    restore_own(model, history.running, state["own"], ranks)
    return step


def restore_own(model: nn.Module, running: Tensor, own: list[dict[str, Any]], ranks: Ranks) -> None:
    """This rank's own state: BatchNorm's running statistics and its share of the epoch's losses.

    After a change of the number of ranks: the mean of the statistics, an equal share of the losses.
    """
    buffers = dict(model.named_buffers())
    if len(own) == ranks.world_size:
        running.copy_(own[ranks.rank]["running"])
        for name, value in own[ranks.rank]["buffers"].items():
            buffers[name].copy_(value)
        return
    running.copy_(torch.stack([o["running"] for o in own]).sum(0) / ranks.world_size)
    for name in own[0]["buffers"]:
        values = torch.stack([o["buffers"][name] for o in own])
        buffers[name].copy_(values.mean(0) if values.is_floating_point() else values[0])


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """One mean of BatchNorm's running statistics over ranks, before they are read. DDP would
    broadcast rank 0's instead."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            ranks.all_reduce(buffer.mul_(1 / ranks.world_size))
