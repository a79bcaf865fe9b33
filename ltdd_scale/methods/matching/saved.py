"""One state on many ranks: work that all ranks do alike is saved by one and resumed by all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ltdd_scale.runtime import signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Agreement
from ltdd_scale.runtime.signals import Preempted

State = dict[str, Any]


class Saved:
    """The checkpoints of work whose state is the same on every rank. Every method is called on
    every rank.

        saved = Saved(context)
        found = saved.load()
        step, state = found or (0, initial)
        while step < steps:
            state, step = one(state, step), step + 1
            saved.after(step, lambda: state)
        write(state)
        saved.clear()

    Rank 0 writes. All ranks go on from the step that rank 0 has found, so they must not differ by
    more than what a broadcast or an all-reduce has made equal.
    """

    def __init__(self, context: Context, name: str = "checkpoints"):
        self.ranks, self.name = context.ranks, context.out.name
        self.checkpoints = context.checkpoints(name)
        self._agreement = Agreement(context.ranks)

    def load(self) -> tuple[int, State] | None:
        """(step, state) of the newest valid checkpoint, on the CPU, or None: the same on every
        rank.

        Raises `UserError` for a checkpoint of other work, `PassingError` where this rank cannot
        read what rank 0 has found.
        """
        found = self.checkpoints.load() if self.ranks.is_main else None
        step = self.ranks.broadcast(found and found[0])
        if step is not None and not self.ranks.is_main:
            found = self.checkpoints.load(step=step)
        return found

    def due(self) -> bool:
        """Whether it is time to save; false on all ranks but rank 0."""
        return self.ranks.is_main and self.checkpoints.due()

    def save(self, step: int, state: State, wait: bool = False) -> None:
        """Rank 0 writes `state`, in the background; with `wait` no rank returns before it is on
        the disk."""
        if self.ranks.is_main:
            self.checkpoints.save(step, state, wait)
        if wait:
            self._agreement.close()
            self.ranks.barrier()

    def after(self, step: int, state: Callable[[], State]) -> None:
        """After a step: save where it is time to. Where any rank was asked to stop, save and raise
        `Preempted` on all of them.

        `state()` makes what is saved. It is called on every rank, so it may raise on every rank,
        and then nothing is saved: the last good checkpoint stays.
        """
        stop, due = self._agreement(signals.requested(), self.due())
        if not (stop or due):
            return
        self.save(step, state(), wait=stop)
        if stop:
            raise Preempted(f"request at step {step} of {self.name}")

    def kept(self) -> str:
        """What an error can say is left, once the last save is on the disk."""
        self.checkpoints.wait()
        steps = [int(p.stem.split("-")[1]) for p in self.checkpoints.folder.glob("step-*.pt")]
        if not steps:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is of step {max(steps)}"

    def clear(self) -> None:
        """Delete the checkpoints, once no rank needs them and the result is on the disk."""
        self._agreement.close()
        self.ranks.barrier()
        if self.ranks.is_main:
            self.checkpoints.clear()
