"""Stage "match": images that give a network the gradients of the real set (DC, DSA).

    min_S E_θ0 Σ_t Σ_c d(∇θ ℓ(θ_t; A(B_c)), ∇θ ℓ(θ_t; A(S_c))),   θ_{t+1}: θ_t trained on S

S_c are the images of class c, B_c real ones of it, ℓ the cross-entropy, A one Siamese augmentation,
drawn anew for each class and outer step, as DSA's code does. θ_0 is fresh for each network. Between
two outer steps the network trains on all of S, so classes are not independent: ranks share out the
classes of an outer step, exchange the gradients, and do the rest alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import distilled, sampling, siamese
from ltdd_scale.errors import UserError
from ltdd_scale.methods.gm.cost import efforts
from ltdd_scale.methods.gm.gradients import distance, gradient
from ltdd_scale.methods.gm.settings import Gm
from ltdd_scale.methods.matching.real import Pixels, RealClass, RealSet, open_real
from ltdd_scale.methods.matching.saved import Saved
from ltdd_scale.models.captured import Captured
from ltdd_scale.models.flat import Flat, in_tf32
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Given


@dataclass(frozen=True)
class Matching:
    """What stays the same. `classes` are the real images of this rank's classes. No rank has a
    class of which the set holds all images: both gradients are of the same images, their distance
    is 0, and the images stay what they are."""

    settings: Gm
    seed: int
    size: int
    strategy: tuple[str, ...]
    flat: Flat
    pixels: Pixels
    classes: Sequence[RealClass]
    ranks: Ranks
    step: Captured


@dataclass
class State:
    """What an outer step changes, the same on every rank.

    `images`, normalised, and `velocity`: float32 [C, IPC, 3, R, R]. `theta`: the network's weights,
    float32 [P]. `apart`: the sum of the mean distances in the outer steps of this network.
    `history`: a line of the log for each finished network.
    """

    images: Tensor
    velocity: Tensor
    theta: Tensor
    apart: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set that starts from random real images, and ``log.jsonl``: for each
    network the mean distance over classes and outer steps."""
    pixels, real = open_real(settings.ipc, settings.seed, settings.images, context)
    saved = Saved(context)
    if not _is_written(context, len(real.start)):
        images = match(
            _matching(settings, context, pixels, real), _start(pixels, real), context, saved
        )
        for c in context.mine(range(len(images))):
            distilled.write_class(context.out, c, pixels.to_uint8(images[c]), real.provenance(c))
    saved.clear()
    return {"networks": settings.gm.networks, "images": real.start.size}


def match(matching: Matching, images: Tensor, context: Context, saved: Saved) -> Tensor:
    """The matched images, from `images` or from where they were left: normalised, float32
    [C, IPC, 3, R, R].

    Raises `UserError` where they diverge; the last good checkpoint stays.
    """
    settings, device = matching.settings, images.device
    total = settings.networks * settings.outer_steps
    begin, state = 0, State(images.clone(), torch.zeros_like(images), images.new_zeros(0))
    resumed = saved.load()
    if resumed:
        begin, kept = resumed
        state = State(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in kept.items()})
        context.say(f"match: goes on at outer step {begin} of {total}")
    progress = context.progress("match", total, "outer steps", begin, stops=False)
    for t in range(begin, total):
        network, step = divmod(t, settings.outer_steps)
        if step == 0:
            fresh = matching.flat.initial(matching.seed, "gm net", network)
            state.theta, state.apart = fresh.to(device, non_blocking=True), 0.0
        with in_tf32():
            collected = gradients(matching, state, t)
        apart = mean_distance(matching, state, collected, t, saved)
        descend(matching, state, collected)
        state.apart += apart
        if step < settings.outer_steps - 1:
            with in_tf32():
                state.theta = train(matching, state, t)
        else:
            mean = state.apart / settings.outer_steps
            state.history.append({"network": network, "distance": round(mean, 6)})
            context.log(state.history)
        progress.update(t + 1, f"distance {apart:.3f}")
        if t + 1 < total:
            saved.after(t + 1, lambda t=t: _sound(matching, state, t, saved))
    return state.images


def gradients(matching: Matching, state: State, t: int) -> Tensor:
    """A row a class, the same on every rank: the distance's gradient by the class's images, then
    the distance; float32 [C, IPC · 3 · R · R + 1]. `t` counts the outer steps of all networks.

    A class is backpropagated alone, so memory holds the graph of one class.
    """
    settings, classes = matching.settings, matching.classes
    num_classes, device = len(state.images), state.images.device
    collected = torch.zeros(num_classes, state.images[0].numel() + 1, device=device)
    labels = torch.arange(num_classes, device=device)[:, None]
    theta = state.theta.detach().requires_grad_()
    # Which real images: all classes' in one transfer.
    drawn = [c.batch(settings.real_batch, matching.seed, "gm real", t) for c in classes]
    at = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *drawn]))
    at = at.to(device, non_blocking=True)
    for real, chosen in zip(classes, at.split([len(d) for d in drawn]), strict=True):
        c = real.label
        draw = siamese.draw(rng(matching.seed, "gm dsa", c, t), matching.strategy, matching.size)
        shown = matching.pixels.normalized(real.pixels[chosen])
        apart, pull = class_gradient(
            matching.flat, theta, (shown, state.images[c]), labels[c], draw
        )
        collected[c, :-1], collected[c, -1] = pull.reshape(-1), apart
    return matching.ranks.all_reduce(collected)


def class_gradient(
    flat: Flat,
    theta: Tensor,
    images: tuple[Tensor, Tensor],
    label: Tensor,
    draw: siamese.Draw,
) -> tuple[Tensor, Tensor]:
    """The distance of a class, and its gradient by the synthetic images.

    `images`: real and synthetic ones [n, 3, R, R], normalised; `label` int64 [1]: their class;
    `draw`: the change that both are seen after.
    """
    real, synthetic = images
    goal = gradient(flat, theta, siamese.apply(real, draw), label.expand(len(real)))
    synthetic = synthetic.detach().requires_grad_()
    shown = siamese.apply(synthetic, draw)
    found = gradient(flat, theta, shown, label.expand(len(synthetic)), graph=True)
    apart = distance(flat, goal, found)
    return apart.detach(), torch.autograd.grad(apart, synthetic)[0]


def mean_distance(
    matching: Matching, state: State, collected: Tensor, t: int, saved: Saved
) -> float:
    """The mean over classes of their distances. The one place of an outer step where a GPU is
    waited for.

    Raises `UserError` where a distance or a gradient is not finite.
    """
    apart = collected[:, -1]
    mean, finite = torch.stack([apart.mean(), collected.isfinite().all()]).tolist()
    if not finite:
        c = int(collected.isfinite().all(1).int().argmin())
        what = f"the distance of class {c} is {float(apart[c]):g}"
        if apart[c].isfinite():
            what = f"the gradient of class {c} is not finite"
        raise _diverged(matching, state, what, t, saved)
    return mean


def descend(matching: Matching, state: State, collected: Tensor) -> None:
    """One step of SGD with momentum on the images, in place; back to valid pixels."""
    grad = collected[:, :-1].reshape(state.images.shape)
    state.velocity.mul_(matching.settings.momentum).add_(grad)
    state.images.sub_(state.velocity, alpha=matching.settings.lr)
    matching.pixels.clamp(state.images, matching.ranks)


def train(matching: Matching, state: State, t: int) -> Tensor:
    """The weights after `inner_epochs` on all synthetic images, after outer step `t`: float32 [P].

    Every rank trains alike; then rank 0's weights count, or the last bits of different GPUs could
    lead ranks apart.
    """
    settings, theta = matching.settings, state.theta
    x, device = state.images.flatten(0, 1), state.images.device
    y = torch.arange(len(state.images), device=device).repeat_interleave(state.images.shape[1])
    for epoch in range(settings.inner_epochs):
        for number, chosen in enumerate(_batches(matching, len(x), t, epoch)):
            images, labels = (x, y) if chosen is None else (x[chosen], y[chosen])
            drawn = siamese.draw_each(
                rng(matching.seed, "gm inner dsa", t, epoch, number),
                matching.strategy,
                matching.size,
                len(images),
            )
            (theta,) = matching.step(theta, siamese.apply(images, drawn), labels)
    return matching.ranks.broadcast_tensor(theta)


def inner_step(flat: Flat, rate: float) -> Captured:
    """A step of the network's training: (weights [P], images [b, 3, R, R], classes [b]) → (weights
    [P],)."""

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        theta, x, y = given
        weights = theta.detach().requires_grad_()
        return (theta.sub(gradient(flat, weights, x, y), alpha=rate),)

    return Captured(step)


def _batches(matching: Matching, n: int, t: int, epoch: int) -> Sequence[Tensor | None]:
    """The images of each step of an epoch, in permuted order; None: all of them, as they are."""
    most = matching.settings.inner_batch
    if n <= most:
        return [None]
    order = rng(matching.seed, "gm order", t, epoch).permutation(n)
    return torch.from_numpy(order).to(matching.ranks.device, non_blocking=True).split(most)


def _sound(matching: Matching, state: State, t: int, saved: Saved) -> dict[str, Any]:
    """What is saved after outer step `t`. Raises `UserError` for what could not be gone on from."""
    for name, value in (("images", state.images), ("weights", state.theta)):
        if not value.isfinite().all():
            raise _diverged(matching, state, f"the {name} are not finite", t, saved)
    return {name: getattr(state, name) for name in State.__dataclass_fields__}


def _diverged(matching: Matching, state: State, what: str, t: int, saved: Saved) -> UserError:
    """Pixels are clamped, so it is the training of the network that diverges, if the rate of the
    images is a number that float32 has."""
    network, step = divmod(t, matching.settings.outer_steps)
    name = "inner_lr" if state.images.isfinite().all() else "lr"
    return UserError(
        f"match: {what} at network {network}, outer step {step}; {saved.kept()}. Lower gm.{name} "
        f"(it is {getattr(matching.settings, name):g})"
    )


def _matching(settings: Given, context: Context, pixels: Pixels, real: RealSet) -> Matching:
    """Deals the classes to ranks, the costly ones first onto the least loaded; a rank decodes its
    own alone."""
    gm, seen, ranks = settings.gm, settings.images, context.ranks
    num_classes = len(real.start)
    flat = Flat(gm.net, gm.width, gm.norm, seen.resolution, num_classes)
    work = np.asarray(
        efforts(gm, settings.ipc, np.bincount(real.labels, minlength=num_classes).tolist())
    )
    moving = np.flatnonzero(work)
    if ranks.world_size > len(moving):
        context.say(
            f"match: {len(moving)} classes move, for {ranks.world_size} ranks; the others only "
            "train the network"
        )
    mine = moving[sampling.spread(work[moving], ranks.world_size)[ranks.rank]]
    classes = [real.load(int(c)) for c in mine]
    strategy = siamese.choices(gm.dsa, seen.mirror)
    made_of = (gm, settings.seed, seen.resolution, strategy, flat, pixels)
    return Matching(*made_of, classes, ranks, inner_step(flat, gm.inner_lr))


def _start(pixels: Pixels, real: RealSet) -> Tensor:
    """The random real images that matching starts from, normalised, [C, IPC, 3, R, R]."""
    images = pixels.normalized(torch.from_numpy(real.initial()).to(pixels.device))
    return images.unflatten(0, real.start.shape)


def _is_written(context: Context, num_classes: int) -> bool:
    """Whether all classes are on the disk. Provenance is written after the images, and no class
    before all are matched."""
    marks = (distilled.provenance_file(context.out, c) for c in range(num_classes))
    return context.ranks.broadcast(context.ranks.is_main and all(m.exists() for m in marks))
