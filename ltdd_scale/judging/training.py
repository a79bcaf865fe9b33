"""Training of a student on any set of images with any kind of labels, resumed to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images
from ltdd_scale.errors import UserError
from ltdd_scale.judging.settings import Training
from ltdd_scale.labels.contract import Labels
from ltdd_scale.labels.views import EpochViews, draw_epoch, render
from ltdd_scale.models.average import Average
from ltdd_scale.models.frozen import forward
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.late import Late
from ltdd_scale.runtime.ranks import Ranks, rng, torch_seed

Source = Literal["both", "soft", "hard"]  # what an epoch learns from
LOG_EVERY = 5.0  # seconds between two writes of log.jsonl: an epoch may take milliseconds


@dataclass(frozen=True)
class Setup:
    """All that a student's training depends on, besides its initial weights.

    `normalize` takes images float [n, 3, R, R] in [0, 1]; `spec` is what their views are drawn
    from. `key` keys every random draw. `title` is shown, and names the checkpoints. `joins`: an
    image that would be the last step of an epoch alone joins the step before it.
    """

    images: Images
    labels: Labels
    normalize: Callable[[Tensor], Tensor]
    spec: ViewSpec
    training: Training
    epochs: int
    key: str
    title: str
    joins: bool = False

    @property
    def stops(self) -> list[int]:
        """Where each step of an epoch ends, in images."""
        n, size = len(self.images.labels), self.training.batch_size
        stops = [*range(size, n, size), n]
        if self.joins and len(stops) > 1 and n % size == 1:
            del stops[-2]
        return stops

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.stops)


def train(setup: Setup, student: nn.Module, context: Context) -> tuple[nn.Module, list[float]]:
    """Train `student` in place. Returns the average of its weights, in eval mode, and the mean
    loss of each epoch.

    The loss of every epoch goes to ``log.jsonl``. Raises `signals.Preempted`, with all saved, where
    a signal has come, and `UserError` at the end of an epoch whose loss is not finite.
    """
    work = _Work(setup, student, context.ranks)
    checkpoints = context.checkpoints(setup.title.replace(" ", "-"))
    saved = checkpoints.load()
    if saved:
        work.restore(*saved)
    done = len(work.history)
    progress = context.progress(setup.title, setup.epochs, "epochs", done, stops=False)
    logged = time.monotonic()
    student.train()
    while work.taken < setup.steps * setup.epochs:
        epoch = work.taken // setup.steps
        for drawn, indices, x in work.rest_of_epoch():
            work.step(epoch, drawn, indices, x)
            if work.taken % setup.steps == 0:
                _check_finite(work.history, setup)
                progress.update(epoch + 1, work.note)
                if time.monotonic() - logged >= LOG_EVERY:
                    context.log(_entries(work.history))
                    logged = time.monotonic()
            if signals.requested() or checkpoints.due():
                checkpoints.save(work.taken, work.state(), wait=signals.requested())
                signals.check()
    checkpoints.wait()
    work.settle()
    _check_finite(work.history, setup)
    context.log(_entries(work.history))
    return work.average.network.eval(), work.history


def _check_finite(history: list[float], setup: Setup) -> None:
    if history and not math.isfinite(history[-1]):
        rate = setup.training.lr
        raise UserError(
            f"{setup.title}: the loss is {history[-1]} after {len(history)} epochs; lower "
            f"evaluate.lr (it is {rate})"
        )


class _Work:
    """A student on its way: its weights and their average, the optimizer, `taken` steps, the
    `history` of losses of whole epochs and the `total` of the one that goes on. A GPU may still
    owe the loss of the last whole epoch: `settle` waits for it."""

    def __init__(self, setup: Setup, student: nn.Module, ranks: Ranks):
        self.setup, self.student, self.ranks = setup, student, ranks
        self.optimizer = optimizer_of(setup.training, student, ranks.device)
        self.average = Average(student)
        self.history: list[float] = []
        self._owed: Late | None = None
        self.taken, self.total = 0, torch.zeros((), device=ranks.device)

    @property
    def note(self) -> str:
        return f"loss {self.history[-1]:.3f}" if self.history else ""

    def settle(self) -> None:
        """The loss of the last whole epoch into `history`."""
        if self._owed is not None:
            self.history.append(float(self._owed.read()))
            self._owed = None

    def state(self) -> dict[str, Any]:
        self.settle()
        return {
            "student": self.student.state_dict(),
            "average": self.average.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "total": self.total,
        }

    def restore(self, taken: int, state: dict[str, Any]) -> None:
        self.taken, self.history = taken, state["history"]
        self.student.load_state_dict(state["student"])
        self.average.network.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.total.copy_(state["total"])

    def rest_of_epoch(self) -> Iterator[tuple[EpochViews, np.ndarray, Tensor]]:
        """(views of the epoch, indices [b], images [b, 3, R, R]) of the steps it has left."""
        setup, stops = self.setup, self.setup.stops
        epoch, first = divmod(self.taken, len(stops))
        order = rng(setup.key, "student order", epoch).permutation(stops[-1])
        batches = np.split(order, stops[:-1])[first:]
        seed, drawn_epoch = setup.labels.view_key(setup.key, epoch)
        cutmix = setup.training.cutmix
        drawn = draw_epoch(setup.spec, setup.images.sizes, seed, drawn_epoch, cutmix)
        shown = render(setup.images, drawn, batches, setup.spec, setup.normalize)
        for indices, x in zip(batches, shown, strict=True):
            yield drawn, indices, x

    def step(self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor) -> None:
        """One step of the optimizer and of the average; at the end of an epoch, its loss."""
        setup, training, steps = self.setup, self.setup.training, self.setup.steps
        torch.manual_seed(torch_seed(setup.key, "dropout", self.taken))
        for group in self.optimizer.param_groups:
            done = (epoch + self.taken % steps / steps) / setup.epochs
            group["lr"] = learning_rate(training, done)
        classes, soft = setup.labels.targets(epoch, drawn, indices, x, self.ranks)
        logits = forward(self.student, x, self.ranks)
        loss = epoch_loss(
            logits, classes, soft, training, learned_from(training, epoch, setup.epochs)
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        # The average warms up, so that short trainings are not judged on their initial weights.
        warm = (1 + self.taken) / (10 + self.taken)
        decay = min(training.ema, warm) if training.ema else 0.0
        self.average.update(decay)
        self.total += loss.detach() / steps
        self.taken += 1
        if self.taken % steps == 0:
            self.settle()
            self._owed = Late(self.total)
            if self._owed.known:
                self.settle()
            self.total.zero_()


def optimizer_of(
    training: Training, student: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum, in one kernel where `device` is a GPU."""
    parameters, decay = student.parameters(), training.weight_decay
    fused = device.type == "cuda" or None
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(
        parameters,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=decay,
        nesterov=training.momentum > 0,
        fused=fused,
    )


def learning_rate(training: Training, done: float) -> float:
    """The rate when the share `done` in [0, 1) of training is over: cosine to 0; cosine2: EDC's
    smooth schedule with ζ = 2, to half the rate; steps: halved at 80, 90 and 95 %."""
    if training.schedule in ("cosine", "cosine2"):
        zeta = 2 if training.schedule == "cosine2" else 1
        return training.lr * 0.5 * (1 + math.cos(math.pi * done / zeta))
    return training.lr * 0.5 ** sum(done >= mark for mark in (0.8, 0.9, 0.95))


def learned_from(training: Training, epoch: int, epochs: int) -> Source:
    """What `epoch` of `epochs` learns from.

    soft_hard_soft is the order of HALD (Cui et al., arXiv 2512.15647) with the shares of its
    released code: half of the epochs learn from the class, and half of the others come before. Of
    an odd number, what is left over goes to the soft labels, and to the last part of them.
    """
    if training.order == "both":
        return "both"
    hard = epochs // 2
    first = (epochs - hard) // 2
    return "hard" if first <= epoch < first + hard else "soft"


def epoch_loss(
    logits: Tensor, classes: Tensor, teacher: Tensor | None, training: Training, source: Source
) -> Tensor:
    """`student_loss` of an epoch that learns from `source`. Where there are no soft labels, all
    epochs learn from the class."""
    return student_loss(
        logits,
        classes,
        None if source == "hard" else teacher,
        0.0 if source == "soft" else training.kappa_ce,
        training.kappa_mse,
        training.soft_loss,
        training.temperature,
    )


def student_loss(
    logits: Tensor,
    classes: Tensor,
    teacher: Tensor | None,
    kappa_ce: float,
    kappa_mse: float,
    soft_loss: str = "mse",
    temperature: float = 1.0,
) -> Tensor:
    """κ1 · CE(s(x), y) + κ2 · (the soft term); the plain cross-entropy where there are no soft
    labels.

    `logits` s(x), `classes` y, which are mixed, and the `teacher`'s logits t are float [b, C]. The
    soft term is the mean squared error of s(x) and t, or with "kl" the mean over images of
    T² · KL(softmax(t / T) ‖ softmax(s(x) / T)) (Hinton et al., 2015).
    """
    ce = -(classes * F.log_softmax(logits, 1)).sum(1).mean()
    if teacher is None:
        return ce
    if soft_loss == "kl":
        soft = _divergence(logits, teacher, temperature)
    else:
        soft = F.mse_loss(logits, teacher)
    return kappa_ce * ce + kappa_mse * soft


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(logits / T)), the mean over rows: T² keeps the size of
    the gradient."""
    p, q = (F.log_softmax(z / temperature, 1) for z in (teacher, logits))
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def _entries(history: list[float]) -> list[dict[str, Any]]:
    return [{"epoch": epoch, "loss": round(loss, 5)} for epoch, loss in enumerate(history)]
