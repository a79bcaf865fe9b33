"""One step of an expert, and all of its steps: kept on the way, resumed to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import siamese
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories.kept import Form, Snapshots
from ltdd_scale.experts.trajectories.orders import Order
from ltdd_scale.experts.trajectories.settings import Descent
from ltdd_scale.models.captured import Captured
from ltdd_scale.models.flat import in_tf32
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng

LINES = 50  # of log.jsonl, at most: each waits for a GPU
TINY = 1e-12

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (weights [P], what is seen, labels) → scalar


@dataclass(frozen=True)
class Batches:
    """The images of each step, changed. `key` keys the changes, `normalize` takes images float
    [n, 3, R, R] in [0, 1], R is `size`."""

    images: Images
    order: Order
    normalize: Callable[[Tensor], Tensor]
    strategy: tuple[str, ...]
    size: int
    device: torch.device
    key: tuple[int | str, ...]

    def steps(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float32 [b, 3, R, R], labels int64 [b]) of the steps `begin` … `end` − 1."""
        plans = _Plans(self.order, begin, end)
        shown = self.images.stream(plans, ViewSpec(self.size))
        for step, x in zip(range(begin, end), shown, strict=True):
            labels = torch.from_numpy(self.images.labels[self.order.batch(step)])
            change = siamese.draw_each(rng(*self.key, step), self.strategy, self.size, len(x))
            y = labels.to(self.device, non_blocking=True)
            yield siamese.apply(self.normalize(x), change), y


@dataclass(frozen=True)
class _Plans(Sequence[Plan]):
    """What is asked of the images, step by step."""

    order: Order
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, k: Any) -> Any:
        if not 0 <= k < len(self):
            raise IndexError(k)
        return self.order.batch(self.begin + k), None


@dataclass(frozen=True)
class Course:
    """All that a descent depends on, besides the weights that it starts from.

    `name` is shown in messages, `section` is that of the config. `see` makes of a step's images
    what the loss sees. `limit` changes the weights in place after each step.
    """

    name: str
    section: str
    settings: Descent
    form: Form
    batches: Batches
    loss: Loss
    see: Callable[[Tensor], Tensor] = lambda images: images
    limit: Callable[[Tensor], None] = lambda weights: None


def gsam(plain: Tensor, climbed: Tensor, alpha: float) -> Tensor:
    """g_p − α g⊥, g⊥ being the part of the plain gradient g that is orthogonal to g_p, the gradient
    at the top of the ascent (GSAM, Zhuang et al., ICLR 2022, algorithm 1). All are float [P]."""
    along = (plain @ climbed) / (climbed @ climbed + TINY)
    return climbed - alpha * (plain - along * climbed)


def direction(
    settings: Descent, weights: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss at `weights` [P], and the gradient that is followed, [P]: the plain one, or GSAM's,
    whose ascent is θ + ρ g / ‖g‖."""
    value, plain = _gradient(weights, loss)
    if settings.optimizer == "sgd":
        return value, plain
    climbed = weights + settings.rho / (plain.norm() + TINY) * plain
    return value, gsam(plain, _gradient(climbed, loss)[1], settings.alpha)


def _gradient(weights: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    at = weights.detach().requires_grad_()
    value = loss(at)
    return value.detach(), torch.autograd.grad(value, at)[0]


def advance(
    settings: Descent, weights: Tensor, velocity: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights and velocity after a step of SGD along `gradient`, as torch's."""
    if settings.weight_decay:
        gradient = gradient + settings.weight_decay * weights
    if settings.momentum:
        gradient = velocity = settings.momentum * velocity + gradient
    return weights - settings.lr * gradient, velocity


def one_step(settings: Descent, loss: Loss) -> Captured:
    """(weights [P], velocity [P], what is seen, labels) → (weights, velocity, loss)."""

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        weights, velocity, seen, y = given
        value, gradient = direction(settings, weights, lambda at: loss(at, seen, y))
        return *advance(settings, weights, velocity, gradient), value

    return Captured(step)


class _Way:
    """What a descent carries from step to step, and into its checkpoints: the weights, the
    optimizer's velocity, the sum of losses since the last entry of the history."""

    def __init__(self, course: Course, weights: Tensor):
        self.course, self.weights = course, weights.detach().clone()
        self.velocity = torch.zeros_like(self.weights if course.settings.momentum else weights[:0])
        self.total = torch.zeros((), device=weights.device)
        self.history: list[dict[str, Any]] = []
        self._one_step = one_step(course.settings, course.loss)

    def state(self) -> dict[str, Any]:
        tensors = {n: getattr(self, n) for n in ("weights", "velocity", "total")}
        return {**tensors, "history": self.history}

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("weights", "velocity", "total"):
            getattr(self, name).copy_(state[name])
        self.history = state["history"]

    def step(self, x: Tensor, y: Tensor) -> None:
        seen = self.course.see(x)
        self.weights, self.velocity, value = self._one_step(self.weights, self.velocity, seen, y)
        self.course.limit(self.weights)
        self.total += value

    def note(self, done: int) -> None:
        """An entry of the history: the mean loss since the one before."""
        before = self.history[-1]["step"] if self.history else 0
        self.check(done)
        self.history.append({"step": done, "loss": round(float(self.total) / (done - before), 6)})
        self.total.zero_()

    def check(self, done: int) -> None:
        """Raise `UserError` where a loss was not finite, or weights are not. Waits for a GPU, so it
        is asked seldom."""
        total = float(self.total + 0 * self.weights.sum())
        if math.isfinite(total):
            return
        course, before = self.course, self.history[-1]["step"] if self.history else 0
        raise UserError(
            f"{course.name}: the loss is {total} between steps {before} and {done}; "
            f"lower {course.section}.lr (it is {course.settings.lr:g})"
        )


def descend(course: Course, start: Tensor, context: Context) -> tuple[Tensor, list[dict[str, Any]]]:
    """Follow the gradient from `start` [P], keep snapshots in the stage's folder, write
    ``log.jsonl``. Returns the last weights and the mean losses now and then.

    Raises `signals.Preempted`, with all saved, where a signal has come, and `UserError` for a loss
    that is not finite.
    """
    settings, form, checkpoints = course.settings, course.form, context.checkpoints()
    way, log_every = _Way(course, start), -(-settings.steps // LINES)
    with Snapshots(context.out, form) as kept, in_tf32():
        begin = _resume(way, kept, checkpoints, context)
        progress = context.progress(course.name, settings.steps, "steps", begin, stops=False)
        for done, (x, y) in enumerate(course.batches.steps(begin, settings.steps), begin + 1):
            way.step(x, y)
            if form.rows(done) > form.rows(done - 1):
                kept.add(way.weights)
            if done % log_every == 0 or done == settings.steps:
                way.note(done)
                context.log(way.history)
            progress.update(done, f"loss {way.history[-1]['loss']:.3f}" if way.history else "")
            stop = signals.requested()  # asked once: a signal may come while it is saved
            if done < settings.steps and (stop or checkpoints.due()):
                way.check(done)
                kept.save()  # first: a checkpoint counts on the snapshots before it
                checkpoints.save(done, way.state(), wait=stop)
                if stop:
                    signals.check()
        checkpoints.wait()
        kept.finish(way.weights)
    return way.weights, way.history


def _resume(way: _Way, kept: Snapshots, checkpoints: Checkpoints, context: Context) -> int:
    """The step to go on at. Without a checkpoint, or the snapshots before it, it is 0."""
    course, saved = way.course, checkpoints.load()
    if saved and kept.resume(kept.form.rows(saved[0])):
        way.restore(saved[1])
        context.say(f"{course.name}: resumed at step {saved[0]} of {course.settings.steps}")
        return saved[0]
    checkpoints.clear()  # those without their snapshots would stand above the next ones
    kept.begin()
    kept.add(way.weights)
    return 0


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor], batches: Batches, num_classes: int, most: int = 5000
) -> dict[str, float]:
    """Top-1 in per cent on the training images, `most` of them at most, unchanged; and its mean
    over classes."""
    images, number = batches.images, min(len(batches.images.labels), most)
    chosen = np.linspace(0, len(images.labels) - 1, number).astype(np.int64)
    plans = [(part, None) for part in np.split(chosen, range(256, number, 256))]
    right = []
    with in_tf32():
        for x in images.stream(plans, ViewSpec(batches.size)):
            right.append(logits(batches.normalize(x)).argmax(1).cpu().numpy())
    labels = images.labels[chosen]
    hits = np.bincount(labels[np.concatenate(right) == labels], minlength=num_classes)
    seen = np.bincount(labels, minlength=num_classes)
    by_class = hits[seen > 0] / seen[seen > 0]
    values = {"accuracy": hits.sum() / number, "balanced": by_class.mean()}
    return {name: round(100 * float(value), 2) for name, value in values.items()}
