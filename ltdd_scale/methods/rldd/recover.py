"""Stage "recover": images whose statistics under the observer match the fair ones (RLDD §Recovery).

Loss = ce · CE(observer(aug(x)), y) + t · CE(teacher(aug(x)), y) + r · alignment (`align.py`)
+ m · matching (`matched.py`). The last and the teacher's term are not in the paper. Aligned images
drift from what the teacher, who labels them, takes for their class, and one fixed soft label an
image then teaches less: its term holds them, and `guard.py` can stop a chunk that drifts.

The unit of work is a class chunk (`chunks.py`). Its random numbers depend on the config alone: the
same bytes on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltdd_scale.data import augment, distilled
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd import guard, matched
from ltdd_scale.methods.rldd.align import Alignment, alignment_targets
from ltdd_scale.methods.rldd.chunks import Chunk, chunks
from ltdd_scale.methods.rldd.guard import Watch
from ltdd_scale.methods.rldd.matched import Matched, Source
from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.methods.rldd.sides import mixed, resized, stages
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime import files, signals, tensors
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Given

State = dict[str, Any]  # of a chunk, between two iterations
Tick = Callable[[int, Callable[[], State]], None]
STOPS = "stopped.json"  # in the stage's folder: number of a chunk → iteration that it stopped at


@dataclass(frozen=True)
class Objective:
    """What all chunks share: the networks, the bounds of normalised pixels, the settings.

    Without a `teacher` its term is left out; where chunks may stop, it watches them too. It may be
    the `observer` itself: one pass then serves both. `low`, `high`: float32 [1, 3, 1, 1]. `size`:
    the side of images in and out. Networks that take `any_size` see a stage's images at their own
    side, others enlarged to `size`.
    """

    observer: nn.Module
    teacher: nn.Module | None
    low: Tensor
    high: Tensor
    settings: Recover
    size: int
    any_size: bool
    ranks: Ranks

    def loss(
        self, shown: Tensor, labels: Tensor, alignment: Alignment, trust: Tensor | None = None
    ) -> Tensor:
        """Of the views `shown`, float32 [n, 3, H, H], of classes int64 [n]; all terms but matching,
        which sees no views. `trust` float32 [n]: weights of the teacher's term."""
        settings = self.settings
        logits = frozen.forward(self.observer, shown, self.ranks)
        loss = settings.alignment * alignment.loss()
        if settings.ce:
            loss = loss + settings.ce * F.cross_entropy(logits, labels)
        if self.teacher is not None and settings.teacher_ce:
            judged = logits
            if self.teacher is not self.observer:
                judged = frozen.forward(self.teacher, shown, self.ranks)
            loss = loss + settings.teacher_ce * _weighted(judged, labels, trust)
        return loss

    def trust(self, batch: Batch) -> Tensor | None:
        """How much the teacher's term of each image counts, float32 [n]; None: all the same."""
        if self.teacher is None or not self.settings.weighs_images:
            return None
        sure = guard.confidence(self.teacher, batch.images, batch.labels, self.ranks)
        return (1 - sure).square() if self.settings.guard == "unsure" else sure

    def settled(self, batch: Batch, x: Tensor) -> Tensor:
        """The recovered images `x`, as far as they stay of their class."""
        if self.teacher is None or not self.settings.settle:
            return x
        networks = list(dict.fromkeys((self.teacher, self.observer)))
        shown = (networks, batch.images, x, batch.labels, self.settings.settle, self.ranks)
        return guard.settled(*shown)

    def watch(self, batch: Batch) -> Watch | None:
        """What stops the chunk, where the settings want that."""
        if self.teacher is None or not self.settings.stop:
            return None
        return Watch(self.teacher, batch.images, batch.labels, self.settings, self.ranks)


def _weighted(logits: Tensor, labels: Tensor, trust: Tensor | None) -> Tensor:
    """Mean cross-entropy, each image's times its `trust`."""
    if trust is None:
        return F.cross_entropy(logits, labels)
    return (trust * F.cross_entropy(logits, labels, reduction="none")).mean()


@dataclass(frozen=True)
class Batch:
    """What one chunk has of its own, on the device.

    `images`: the initial ones, normalised, float32 [n, 3, R, R]; `labels` int64 [n]; `windows`
    float32 [T, n, 4] and `mirrored` bool [T, n]: the draws of all T iterations. `matched`: the
    matching term, where there is one.
    """

    images: Tensor
    labels: Tensor
    windows: Tensor
    mirrored: Tensor
    matched: Matched | None = None


def recover_chunk(
    objective: Objective,
    batch: Batch,
    alignment: Alignment,
    tick: Tick | None = None,
    resume: State | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Recover one chunk: normalised images float32 [n, 3, R, R]. No host synchronisation inside the
    loop, but for the few checks of a `watch`, which may stop it.

    With `settings.resolutions` the images go through stages of other sides. `tick(iteration,
    state)` is called after each iteration with a function that makes the state to save; `resume` is
    such a state.
    """
    settings, size = objective.settings, objective.size
    sides, images, trust = stages(settings, size), batch.images, objective.trust(batch)
    if resume is None:
        begin, x = 0, resized(images, sides[0]).clone().requires_grad_()
    else:
        begin = resume["iteration"]
        x = resume["images"].to(images.device).clone().requires_grad_()
    optimizer = _adam(x, settings)
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        averages = resume["average"].items()
        alignment.average = {k: tuple(t.to(x.device) for t in v) for k, v in averages}
        if watch is not None:
            watch.kept = resume["kept"].to(x.device)
    for t in range(begin, settings.iterations):
        if t and t in sides:
            x = mixed(x.detach(), images, sides[t], settings.residual).requires_grad_()
            optimizer = _adam(x, settings)
        cosine = math.cos(math.pi * t / settings.iterations)
        optimizer.param_groups[0]["lr"] = settings.lr * 0.5 * (1 + cosine)
        side = x.shape[-1] if objective.any_size else size
        shown = augment.crop_resize(x, batch.windows[t], batch.mirrored[t], side)
        loss = objective.loss(shown, batch.labels, alignment, trust)
        if batch.matched is not None:
            loss = loss + settings.matching * batch.matched.loss(resized(x, size), t)
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        x.data.clamp_(objective.low, objective.high)
        if watch is not None and watch.due(t + 1):
            watch.look(t + 1, resized(x.detach(), size))
            if watch.stopped:
                return watch.kept
        if tick is not None:
            tick(t + 1, partial(_state, t + 1, x, optimizer, alignment, watch))
    return resized(x.detach(), size)


def _adam(x: Tensor, settings: Recover) -> torch.optim.Adam:
    first, second = settings.betas
    return torch.optim.Adam([x], lr=settings.lr, betas=(first, second))


def _state(
    iteration: int,
    x: Tensor,
    optimizer: torch.optim.Adam,
    alignment: Alignment,
    watch: Watch | None,
) -> State:
    return {
        **({} if watch is None else {"kept": watch.kept}),
        "iteration": iteration,
        "images": x.detach(),
        "optimizer": optimizer.state_dict(),
        "average": alignment.average,
    }


@dataclass(frozen=True)
class Material:
    """What chunks are recovered with, loaded once. `layers` are the aligned layers of the observer,
    `statistics` what calibration wrote, `mean` and `std` float32 [1, 3, 1, 1] of the real set,
    `source` what chunks are matched with, if they are."""

    objective: Objective
    layers: dict[str, nn.Module]
    statistics: dict[str, Any]
    variance: str
    mean: Tensor
    std: Tensor
    spec: ViewSpec
    seed: int
    source: Source | None = None

    def batch(self, chunk: Chunk, pixels: np.ndarray) -> Batch:
        """`pixels`: the chunk's initial images, uint8 [n, 3, R, R]."""
        device, sizes = self.mean.device, np.full((len(pixels), 2), self.spec.resolution)

        def sent(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        drawn = [
            self.spec.draw(rng(self.seed, "recover", chunk.number, t), sizes)
            for t in range(self.objective.settings.iterations)
        ]
        return Batch(
            (sent(pixels).float() / 255 - self.mean) / self.std,
            sent(chunk.labels),
            sent(np.stack([d.windows for d in drawn])),
            sent(np.stack([d.mirrored for d in drawn])),
            None if self.source is None else self.source.of(chunk),
        )

    def alignment(self, chunk: Chunk) -> Alignment:
        settings, device = self.objective.settings, self.mean.device
        targets = alignment_targets(
            self.statistics,
            list(self.layers),
            chunk.labels,
            settings.classwise,
            self.variance,
            device,
        )
        return Alignment(self.layers, targets, settings)


def load(settings: Given, context: Context, split: ShardSplit, mine: Sequence[Chunk]) -> Material:
    """The networks and the statistics that the stage's inputs hold, for the chunks `mine`."""
    recover, seen, ranks = settings.recover, settings.images, context.ranks
    calibrated = context.input("calibrate")
    observer, teacher = frozen.load(calibrated / "observer.pt", ranks), None
    if recover.needs_teacher:
        teacher = frozen.load(context.input("teacher") / "weights.pt", ranks)
        if frozen.same(observer, teacher):  # one training, buffers left alone
            teacher = observer
    statistics = tensors.load(calibrated / "statistics.pt")
    layers: dict[str, nn.Module] = dict(registry.norm_layers(observer.model))
    if settings.conv_inputs and statistics["fair"]:
        layers.update(registry.conv_layers(observer.model))
    mean, std = (
        torch.tensor(v, device=ranks.device).view(1, 3, 1, 1) for v in (split.mean, split.std)
    )
    objective = Objective(
        observer.model,
        teacher.model if teacher else None,
        (0 - mean) / std,
        (1 - mean) / std,
        recover,
        seen.resolution,
        observer.any_size and (not teacher or not recover.teacher_ce or teacher.any_size),
        ranks,
    )
    spec = ViewSpec(seen.resolution, tuple(recover.crop_scale), mirror=seen.mirror)
    made_of = (objective, layers, statistics, settings.variance, mean, std, spec, settings.seed)
    return Material(*made_of, matched.source(settings, context, mine) if recover.matching else None)


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set, by way of one file a chunk. A restart skips finished chunks.

    Provenance is that of the initial images.
    """
    ranks, recover = context.ranks, settings.recover
    split = ShardSplit(context.input("shard"), "train")
    classes = range(len(split.classes))
    initial = distilled.Distilled(context.input("initialize"), len(classes))
    work = chunks(len(classes), settings.ipc, recover.batch_size, recover.chunk_classes)
    # Provenance is written after the images: both are there, or the class is put together again.
    finished = all(distilled.provenance_file(context.out, c).exists() for c in classes)
    if not ranks.broadcast(finished):
        mine = context.mine(work)
        _recover_chunks(load(settings, context, split, mine), initial, context, mine)
        if context.part:
            return {}  # classes are put together when the chunks of all parts are there
        ranks.barrier()
        for c in classes[ranks.rank :: ranks.world_size]:
            pixels = _class_images(context.out, work, c)
            distilled.write_class(context.out, c, pixels, initial.provenance(c))
        ranks.barrier()
    facts = {"chunks": len(work), "images": len(classes) * settings.ipc}
    if ranks.is_main:
        if recover.stop:
            facts["chunks stopped"] = len(_stops(context.out, work))
            context.say(f"recover: {facts['chunks stopped']} of {len(work)} chunks stopped early")
        for chunk in work:
            for file in (_chunk_file, _stop_file):
                file(context.out, chunk).unlink(missing_ok=True)
    return facts


def _stops(folder: Path, work: list[Chunk]) -> dict[str, int]:
    """The chunks that were stopped, and at which iteration. They are written down before what the
    chunks have left is deleted, so that a restart knows them too."""
    path = folder / STOPS
    if not path.exists():
        left = {str(c.number): _stop_file(folder, c) for c in work}
        files.write_json(path, {k: files.read_json(f) for k, f in left.items() if f.exists()})
    return files.read_json(path)


def _recover_chunks(
    material: Material, initial: distilled.Distilled, context: Context, mine: Sequence[Chunk]
) -> None:
    """The chunks `mine`, this rank's, each into its file."""
    steps = material.objective.settings.iterations
    progress = context.progress("recover", len(mine) * max(steps, 1), "iterations", stops=False)
    for position, chunk in enumerate(mine):
        signals.check()
        path = _chunk_file(context.out, chunk)
        if path.exists():
            continue
        of_classes = [initial.load(c)[chunk.first : chunk.last] for c in chunk.classes]
        pixels = np.concatenate([np.asarray(images) for images in of_classes])
        checkpoints = context.checkpoints(path.stem)
        if steps:
            resumed = checkpoints.load()
            if resumed:
                context.say(
                    f"recover: chunk {chunk.number} goes on at iteration {resumed[0]} of {steps}"
                )
            tick = _saving(checkpoints, progress, position * steps, steps)
            pixels, stopped = _recovered(
                material, chunk, pixels, tick, resumed[1] if resumed else None
            )
            if stopped is not None:
                files.write_json(_stop_file(context.out, chunk), stopped)
                progress.update((position + 1) * steps)
        distilled.save(path, pixels)
        checkpoints.clear()


def _saving(checkpoints: Checkpoints, progress: Progress, before: int, steps: int) -> Tick:
    """After each iteration: say how far the work is, and save where it is time or a signal asks
    for it. `before`: iterations of the chunks before this one."""

    def tick(t: int, state: Callable[[], State]) -> None:
        progress.update(before + t)
        if t < steps and (signals.requested() or checkpoints.due()):
            checkpoints.save(t, state(), wait=signals.requested())
            signals.check()

    return tick


def _recovered(
    material: Material, chunk: Chunk, pixels: np.ndarray, tick: Tick, resume: State | None
) -> tuple[np.ndarray, int | None]:
    """Initial images of a chunk → recovered ones, both uint8 [n, 3, R, R], and the iteration that
    they were stopped at, if they were."""
    batch = material.batch(chunk, pixels)
    watch = material.objective.watch(batch)
    with material.alignment(chunk) as alignment:
        x = recover_chunk(material.objective, batch, alignment, tick, resume, watch)
    x = material.objective.settled(batch, x)
    stopped = None if watch is None else watch.stopped
    return distilled.to_uint8(x * material.std + material.mean), stopped


def _chunk_file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"chunk-{chunk.number:05d}.npy"


def _stop_file(folder: Path, chunk: Chunk) -> Path:
    """There if the chunk was stopped."""
    return _chunk_file(folder, chunk).with_suffix(".stop.json")


def _class_images(folder: Path, work: list[Chunk], label: int) -> np.ndarray:
    """A class from its parts in the chunk files, uint8 [IPC, 3, R, R]. Of these no more is read:
    each may hold one image of each of a hundred classes."""
    parts = []
    for chunk in work:
        if label in chunk.classes:
            at, n = chunk.classes.index(label), chunk.last - chunk.first
            mapped = distilled.mapped(_chunk_file(folder, chunk))
            parts.append(np.array(mapped[at * n : (at + 1) * n]))  # maps keep files open
    return np.concatenate(parts)
