"""Matching of trajectories: segments of experts' ways, the gradients of several, SGD on the images.

An iteration has one or more segments. Ranks share them out; each segment's gradient is broadcast by
the rank that has it, and all ranks add them up in the order of their numbers. So the bytes do not
depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import distilled, siamese
from ltdd_scale.errors import UserError
from ltdd_scale.methods.matching.real import Pixels, RealSet
from ltdd_scale.methods.matching.saved import Saved, State
from ltdd_scale.methods.matching.settings import Unrolled
from ltdd_scale.methods.matching.unroll import Gradient, Segment, Unroll
from ltdd_scale.models.flat import in_tf32
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng

LOG_EVERY = 50  # iterations of which log.jsonl has the mean


@dataclass(frozen=True)
class Weighted:
    """A segment, and the weight of its gradient."""

    weight: float
    segment: Segment


# (iteration, number of the segment) → what is matched there. Pure: any rank may ask for any.
Pick = Callable[[int, int], list[Weighted]]


class Synthetic:
    """The synthetic set on its way: normalised images [n, 3, R, R], labels [n, C], log β.

    `learn_labels`: `labels` are logits that are learned too, at the rate `lr_labels` with momentum
    .9. Else they stay as they are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        settings: Unrolled,
        learn_labels: bool = False,
        lr_labels: float = 0.0,
    ):
        device = images.device
        log_rate = torch.tensor(math.log(settings.rate), dtype=torch.float32, device=device)
        self.images, self.labels, self.log_rate = images.clone(), labels.clone(), log_rate
        self.learn_labels = learn_labels
        self.unroll = Unroll(learn_labels, settings.gradient == "exact")
        learned = [{"params": [self.images], "lr": settings.lr_images}]
        learned.append({"params": [self.log_rate], "lr": settings.lr_rate})
        if learn_labels:
            learned.append({"params": [self.labels], "lr": lr_labels, "momentum": 0.9})
        self.optimizer = torch.optim.SGD(learned, lr=0.0, momentum=settings.momentum, foreach=False)

    @property
    def learned(self) -> list[Tensor]:
        """What is learned, in the order of a gradient's parts."""
        return [self.images, self.log_rate, *([self.labels] if self.learn_labels else [])]

    def gradient(self, matched: list[Weighted]) -> Tensor:
        """The weighted gradient of what is learned and, last, the weighted distance: one vector
        float32."""
        out = torch.zeros(sum(x.numel() for x in self.learned) + 1, device=self.images.device)
        for one in matched:
            found = self.unroll.gradient(one.segment, self.images, self.labels, self.log_rate.exp())
            out += one.weight * _flat(found)
        return out

    def step(self, vector: Tensor) -> None:
        """One step of SGD along a gradient as `gradient` gives it."""
        parts = vector[:-1].split([x.numel() for x in self.learned])
        for x, part in zip(self.learned, parts, strict=True):
            x.grad = part.view_as(x)
        self.optimizer.step()

    def state(self) -> State:
        return {
            "images": self.images,
            "labels": self.labels,
            "log_rate": self.log_rate,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: State) -> None:
        for name in ("images", "labels", "log_rate"):
            getattr(self, name).copy_(state[name])
        self.optimizer.load_state_dict(state["optimizer"])


def _flat(found: Gradient) -> Tensor:
    labels = [] if found.labels is None else [found.labels]
    parts = [found.images, found.log_rate, *labels, found.loss]
    return torch.cat([part.reshape(-1) for part in parts])


@dataclass(frozen=True)
class Matching:
    """What a run of matching is made of. `section`: of the config, for messages."""

    section: str
    settings: Unrolled
    synthetic: Synthetic
    pixels: Pixels
    pick: Pick
    ranks: Ranks
    saved: Saved

    def iterate(self, t: int) -> float:
        """One iteration: the segments, a step of the images, back to valid pixels. Returns the mean
        distance. Raises `UserError` for a distance or a gradient that is not finite; nothing has
        moved then."""
        vectors, numbers = [], self.settings.segments
        total: Tensor | None = None
        for first in range(0, numbers, self.ranks.world_size):
            own = first + self.ranks.rank
            vector = self.synthetic.gradient(self.pick(t, own)) if own < numbers else None
            for j in range(first, min(first + self.ranks.world_size, numbers)):
                found = self._from_rank(vector, j - first)
                vectors.append(torch.stack([found[-1], found.sum()]))
                total = found if total is None else total + found
        assert total is not None
        # One wait an iteration: a step along a gradient that is not finite cannot be taken back.
        told = torch.stack(vectors).tolist()
        for j, (distance, gradients) in enumerate(told):
            if not (math.isfinite(distance) and math.isfinite(gradients)):
                raise UserError(self._diverged(t, j, distance))
        self.synthetic.step(total / numbers)
        self.pixels.clamp(self.synthetic.images, self.ranks)
        return sum(distance for distance, _ in told) / numbers

    def check_state(self) -> None:
        """Raise `UserError` for what could not be gone on from: it is not to be saved."""
        synthetic = self.synthetic
        sound = torch.stack([x.isfinite().all() for x in synthetic.learned])
        if not (bool(sound.all()) and math.isfinite(float(synthetic.log_rate.exp()))):
            raise UserError(
                f"match: what is learned is not finite (β {float(synthetic.log_rate.exp()):.2g}); "
                f"{self.saved.kept()}. Lower {self.section}.lr_images or .lr_rate"
            )

    def _from_rank(self, vector: Tensor | None, source: int) -> Tensor:
        """The vector of the rank `source` on every rank."""
        if self.ranks.world_size == 1:
            assert vector is not None
            return vector
        if self.ranks.rank == source:
            assert vector is not None
            return self.ranks.broadcast_tensor(vector, source)
        size = sum(x.numel() for x in self.synthetic.learned) + 1
        return self.ranks.broadcast_tensor(
            torch.empty(size, device=self.synthetic.images.device), source
        )

    def _diverged(self, t: int, j: int, distance: float) -> str:
        names = ", ".join(one.segment.name for one in self.pick(t, j))
        rate = float(self.synthetic.log_rate.exp())
        return (
            f"match: the distance is {distance} at iteration {t}, segment {j} ({names}; "
            f"β {rate:.2g}); {self.saved.kept()}. Lower {self.section}.lr_images, .lr_rate or .rate"
        )


class _History:
    """The distances since the last entry, and an entry for each `LOG_EVERY` iterations."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.running: list[float] = []

    def add(self, distance: float) -> bool:
        """Note a distance; return whether it is time for an entry."""
        self.running.append(distance)
        return len(self.running) == LOG_EVERY

    def close(self, iterations: int, rate: float) -> None:
        mean = sum(self.running) / len(self.running)
        self.entries.append({"iteration": iterations, "distance": round(mean, 6), "rate": rate})
        self.running = []

    @property
    def note(self) -> str:
        last = self.entries[-1] if self.entries else None
        return f"distance {last['distance']:.3f}, β {last['rate']:.2g}" if last else ""

    def state(self) -> State:
        return {"entries": self.entries, "running": self.running}

    def restore(self, state: State) -> None:
        self.entries, self.running = state["entries"], state["running"]


def run(matching: Matching, context: Context) -> None:
    """All iterations, from where they were left. Every rank ends with the same synthetic set."""
    settings, synthetic = matching.settings, matching.synthetic
    history, begin = _History(), 0
    found = matching.saved.load()
    if found:
        begin, state = found
        synthetic.restore(state["synthetic"])
        history.restore(state["history"])
        context.say(f"match: resumed at iteration {begin} of {settings.iterations}")
    if context.world_size > settings.segments:
        context.say(
            f"match has {settings.segments} segments an iteration for {context.world_size} ranks: "
            f"the others have nothing to do. Raise {matching.section}.segments to use them"
        )

    def state_now() -> State:
        matching.check_state()
        return {"synthetic": synthetic.state(), "history": history.state()}

    progress = context.progress("match", settings.iterations, "iterations", begin, stops=False)
    for t in range(begin, settings.iterations):
        last = t + 1 == settings.iterations
        with in_tf32():
            distance = matching.iterate(t)
        if history.add(distance) or last:
            history.close(t + 1, float(synthetic.log_rate.exp()))
            context.log(history.entries)
        progress.update(t + 1, history.note)
        if not last:
            matching.saved.after(t + 1, state_now)
    # Who is killed while the set is written and sealed has all iterations behind him.
    matching.saved.save(settings.iterations, state_now(), wait=True)


def write(matching: Matching, real: RealSet, context: Context) -> dict[str, Any]:
    """The distilled set with its provenance, learned labels and the learned rate; the facts."""
    synthetic, ranks = matching.synthetic, matching.ranks
    num_classes, ipc = real.start.shape
    by_class = synthetic.images.view(num_classes, ipc, *synthetic.images.shape[1:])
    if ranks.is_main:
        if synthetic.learn_labels:
            distilled.write_learned(context.out, synthetic.labels.cpu().numpy())
        rate = float(synthetic.log_rate.exp())
        distilled.write_hints(context.out, {"rate": rate})
        for label, images in enumerate(by_class):
            pixels = matching.pixels.to_uint8(images)
            distilled.write_class(context.out, label, pixels, real.provenance(label))
    ranks.barrier()
    return {"images": real.start.size, "rate": float(synthetic.log_rate.exp())}


@dataclass(frozen=True)
class Draws:
    """The random choices of one segment: `expert`, `start` (a snapshot), `batches` int64 [N, b] on
    the device, and a change of the images for each step."""

    expert: int
    start: int
    batches: Tensor
    changes: list[siamese.Draw]

    def augment(self, step: int, x: Tensor) -> Tensor:
        """Images [b, 3, R, R] of a step, changed."""
        return siamese.apply(x, self.changes[step])


def draw(
    key: tuple[int | str, ...],
    experts: int,
    starts: tuple[int, int],
    batches: tuple[int, int, int],
    strategy: tuple[str, ...],
    like: Tensor,
) -> Draws:
    """The choices of a segment, by `key` alone. `starts`: first and last snapshot to start from.
    `batches`: steps N, images a batch b, images of the set n ≥ b. `like`: images of the size and on
    the device that are asked for."""
    generator = rng(*key)
    expert = int(generator.integers(experts))
    start = int(generator.integers(starts[0], starts[1] + 1))
    steps, size, count = batches
    # Whole batches of one permutation after another: an image is at most once in a batch.
    each = count // size
    orders = [generator.permutation(count)[: each * size] for _ in range(-(-steps // each))]
    chosen = np.concatenate(orders).reshape(-1, size)[:steps]
    side = like.shape[-1]
    changes = [siamese.draw_each(generator, strategy, side, size) for _ in range(steps)]
    return Draws(
        expert, start, torch.from_numpy(chosen).to(like.device, non_blocking=True), changes
    )
