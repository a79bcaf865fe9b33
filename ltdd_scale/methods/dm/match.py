"""Stage "match": images with their class's mean features under random networks (DM, WACV 2023).

    min_S E_θ,A Σ_c ‖ mean f_θ(A(B_c)) − mean f_θ(A(S_c)) ‖²

S_c are the images of class c, B_c real ones of it, f_θ the features of an untrained network, A one
Siamese augmentation. Network and augmentation are new in each iteration, and the same for every
class. Classes are independent, and each goes through the network alone: the bytes do not depend on
chunks, ranks or parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.data import distilled, siamese
from ltdd_scale.methods.dm.chunks import divide
from ltdd_scale.methods.dm.settings import Dm
from ltdd_scale.methods.matching import features
from ltdd_scale.methods.matching.features import distance, mean_features
from ltdd_scale.methods.matching.real import Pixels, RealClass, RealSet, open_real
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Given

State = dict[str, Any]  # of a chunk, between two iterations
Tick = Callable[[int, Callable[[], State]], None]


@dataclass(frozen=True)
class Matching:
    """What all chunks share."""

    settings: Dm
    seed: int
    size: int
    strategy: tuple[str, ...]
    pixels: Pixels
    ranks: Ranks

    def network(self, iteration: int) -> nn.Module:
        """The random features of an iteration, [n, 3, R, R] → [n, d]."""
        made_of = (self.settings.net, self.settings.width, self.settings.norm, self.size)
        return features.network(made_of, self.ranks, self.seed, "dm net", iteration)

    def draw(self, iteration: int) -> siamese.Draw:
        return siamese.draw(rng(self.seed, "dsa", iteration), self.strategy, self.size)


def match_chunk(
    matching: Matching,
    classes: Sequence[RealClass],
    tick: Tick | None = None,
    resume: State | None = None,
) -> list[Tensor]:
    """The matched images of each class, normalised, float32 [IPC, 3, R, R].

    `tick(iteration, state)` is called after each iteration with a function that makes the state to
    save; `resume` is such a state.
    """
    settings, begin = matching.settings, 0
    images = [matching.pixels.normalized(_seen(c, c.start)) for c in classes]
    if resume is not None:
        begin = resume["iteration"]
        images = [x.to(matching.pixels.device).clone() for x in resume["images"]]
    images = [x.requires_grad_() for x in images]
    optimizer = torch.optim.SGD(images, lr=settings.lr, momentum=settings.momentum, foreach=False)
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])

    def state(iteration: int) -> State:
        return {
            "iteration": iteration,
            "images": [x.detach() for x in images],
            "optimizer": optimizer.state_dict(),
        }

    for t in range(begin, settings.iterations):
        net, draw = matching.network(t), matching.draw(t)
        for real, x in zip(classes, images, strict=True):
            (x.grad,) = torch.autograd.grad(class_loss(matching, real, x, t, net, draw), x)
        optimizer.step()
        for x in images:
            matching.pixels.clamp(x)
        if tick is not None:
            tick(t + 1, lambda t=t: state(t + 1))
    return [x.detach() for x in images]


def class_loss(
    matching: Matching,
    real: RealClass,
    images: Tensor,
    iteration: int,
    net: nn.Module,
    draw: siamese.Draw,
) -> Tensor:
    """The term of one class in one iteration, a scalar that knows the gradient of `images`."""
    which = real.batch(matching.settings.real_batch, matching.seed, "dm real", iteration)
    with torch.no_grad():
        shown = matching.pixels.normalized(_seen(real, which))
        goal = mean_features(net, shown, draw, matching.ranks)
    return distance(goal, mean_features(net, images, draw, matching.ranks))


def _seen(real: RealClass, which: np.ndarray) -> Tensor:
    """Real images `which` int64 [n]. Nobody waits for the indices."""
    return real.pixels[torch.from_numpy(which).to(real.pixels.device, non_blocking=True)]


def open_set(settings: Given, context: Context) -> tuple[Matching, RealSet]:
    """What the stage works with."""
    seen = settings.images
    pixels, real = open_real(settings.ipc, settings.seed, seen, context)
    strategy = siamese.choices(settings.dm.dsa, seen.mirror)
    made_of = (settings.dm, settings.seed, seen.resolution, strategy, pixels, context.ranks)
    return Matching(*made_of), real


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set that starts from random real images. Finished chunks are kept."""
    matching, real = open_set(settings, context)
    work = divide(len(real.start))
    mine, steps = context.mine(work), max(settings.dm.iterations, 1)
    progress = context.progress("match", len(mine) * steps, "iterations", stops=False)
    for position, classes in enumerate(mine):
        signals.check()
        # Provenance is written after the images: both are there, or the class is matched again.
        if not all(distilled.provenance_file(context.out, c).exists() for c in classes):
            _match_classes(matching, real, classes, context, progress, position * steps)
    if context.part:
        return {}
    context.ranks.barrier()
    return {"chunks": len(work), "images": real.start.size}


def _match_classes(
    matching: Matching,
    real: RealSet,
    classes: Sequence[int],
    context: Context,
    progress: Progress,
    before: int,
) -> None:
    """One chunk, from where it was left. `before`: iterations of the chunks before this one."""
    steps = matching.settings.iterations
    checkpoints = context.checkpoints(f"chunk-{classes[0]:05d}")
    resumed = checkpoints.load()
    if resumed:
        context.say(f"match: class {classes[0]} goes on at iteration {resumed[0]} of {steps}")

    def tick(t: int, state: Callable[[], State]) -> None:
        progress.update(before + t)
        if t < steps and (signals.requested() or checkpoints.due()):
            checkpoints.save(t, state(), wait=signals.requested())
            signals.check()

    loaded = [real.load(c) for c in classes]
    matched = match_chunk(matching, loaded, tick, resumed[1] if resumed else None)
    for label, x in zip(classes, matched, strict=True):
        pixels = matching.pixels.to_uint8(x)
        distilled.write_class(context.out, label, pixels, real.provenance(label))
    checkpoints.clear()
