"""Stage "observer" and stage "teacher": debiased experts under DDP, resumed to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ltdd_scale.config import Config, Expert
from ltdd_scale.data import augment, sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import normalizer, open_images, stream_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts import losses
from ltdd_scale.models import registry
from ltdd_scale.runtime import files, tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng, torch_seed

PROJECTION = 256  # width of SimSiam's projector
DUE_EVERY = 16  # steps between looks at the clock: ranks must agree on when to save


def learning_rate(settings: Expert, position: float) -> float:
    """Linear warm-up, then cosine to 0; `position` in epochs."""
    if position < settings.warmup_epochs:
        return settings.lr * (position + 1e-8) / settings.warmup_epochs
    done = (position - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Training(nn.Module):
    """One forward pass for DDP: everything the loss needs from one concatenated batch of both views."""

    def __init__(self, model: registry.TwoHeads):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.heads(x)


class EpochPlans(Sequence):
    """The rest of an epoch, from step `first`: for each step `views`² plans of this rank's slice of the global batch.

    The uniform stream comes first, then (with 2 views) the re-sampled one; each is seen `views` times. Views are drawn when a plan is asked
    for, from (seed, epoch, step, stream, copy) alone: by whoever decodes it, and starting late costs nothing.
    """

    def __init__(self, settings: Expert, spec: ViewSpec, images, seed: str, epoch: int, first: int, steps: int, ranks, views: int):
        self.batch_size, self.spec, self.sizes, self.seed, self.epoch, self.first, self.steps, self.views = (
            settings.batch_size,
            spec,
            images.sizes,
            seed,
            epoch,
            first,
            steps,
            views,
        )
        self.part = sampling.rank_slice(self.batch_size, ranks.rank, ranks.world)
        self.orders = [sampling.uniform(len(images.labels), seed, epoch)]
        if views > 1:
            self.orders.append(sampling.resampled(images.labels, images.counts, settings.resample_power, len(images.labels), seed, epoch))

    def __len__(self) -> int:
        return (self.steps - self.first) * self.views**2

    def chosen(self, step: int, stream: int) -> np.ndarray:
        """The global batch of `step`, indices [batch_size]."""
        return self.orders[stream][step * self.batch_size : (step + 1) * self.batch_size]

    def __getitem__(self, k: int):
        if not 0 <= k < len(self):
            raise IndexError(k)
        step, (stream, copy) = self.first + k // self.views**2, divmod(k % self.views**2, self.views)
        chosen = self.chosen(step, stream)
        views = self.spec.draw(rng(self.seed, "views", self.epoch, step, stream, copy), self.sizes[chosen])
        return chosen[self.part], views[self.part]


def _mix(pictures: list[torch.Tensor], labels: list[torch.Tensor], generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """View 1: MixUp of uniform and re-sampled images. View 2: CutMix of their second views. λ ~ Beta(1, 1), one a step as in GLMC."""
    uniform1, uniform2, other1, other2 = pictures
    mixed = float(generator.random())
    boxes, stays = augment.cutmix_boxes(generator, 1, uniform2.shape[-1])
    x = torch.cat([mixed * uniform1 + (1 - mixed) * other1, augment.paste(uniform2, other2, boxes.repeat(len(uniform2), 0))])
    y = [share * labels[0] + (1 - share) * labels[1] for share in (mixed, float(stays[0]))]
    return x, torch.cat(y)


@torch.no_grad()
def accuracy(model: nn.Module, split: ShardSplit, config: Config, normalize, ranks, batch: int = 256) -> float:
    """Top-1 in per cent of a split, every image once, shared over ranks."""
    mine = np.arange(len(split))[sampling.rank_slice(len(split), ranks.rank, ranks.world)]
    images = stream_images(split, config, ranks.device)  # one pass: each rank decodes its own part only
    plans = [(mine[i : i + batch], None) for i in range(0, len(mine), batch)]
    right = 0
    for (indices, _), x in zip(plans, images.stream(plans, ViewSpec(config.data.resolution)), strict=True):
        with ranks.autocast():
            right += int((model(normalize(x)).argmax(1).cpu().numpy() == split.labels[indices]).sum())
    return 100 * sum(ranks.gather(right)) / len(split)


def average_buffers(model: nn.Module, ranks) -> None:
    """One mean of the BN running statistics over ranks, before they are read. DDP would broadcast rank 0's instead."""
    if ranks.world > 1:
        share = 1 / ranks.world
        for buffer in model.buffers():
            if buffer.is_floating_point():
                ranks.sum_(buffer.mul_(share))


def run(role: str, config: Config, context: Context) -> dict[str, Any]:
    """Train the expert of `role` ("observer" or "teacher") on the shards; write ``weights.pt`` and ``log.json``.

    Returns facts for ``stage.json``. The same global batch gives the same sample order on any number of ranks.
    """
    settings: Expert = getattr(config, role)
    ranks, split = context.ranks, ShardSplit(context.input("shard"), "train")
    size = config.data.resolution
    if settings.batch_size > len(split):
        raise UserError(f"{role}.batch_size={settings.batch_size}, but there are {len(split)} training images: lower it")
    if settings.batch_size < 2 * ranks.world:
        raise UserError(f"{role}.batch_size={settings.batch_size} is too small for {ranks.world} ranks: lower --nproc or raise it")
    debiased, num_classes = config.strategies.debias, len(split.classes)
    projection = PROJECTION if debiased and settings.contrast else 0
    recipe = registry.Network.describe(settings.net, settings.width, settings.norm, size, num_classes)
    features = lambda: registry.backbone(settings.net, settings.width, settings.norm, size)  # noqa: E731
    seed = f"{role} {config.seed}"
    model = ranks.to_device(registry.seeded(lambda: registry.TwoHeads(features(), num_classes, projection), seed, "weights"))
    if role == "observer" and not registry.norm_layers(model):
        raise UserError(f"observer.net={settings.net} with norm={settings.norm} has no BatchNorm layer to align: use observer.norm=batch or another net")
    images = open_images(split, config, ranks.device)
    normalize = normalizer(split.mean, split.std, ranks.device)
    spec = ViewSpec(size, tuple(settings.crop_scale) if settings.crop_scale else None, settings.crop_padding, config.data.mirror, settings.randaugment, settings.magnitude)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    weights = losses.class_weights(split.counts, settings.reweight_power).to(ranks.device)
    steps = len(split) // settings.batch_size
    checkpoints = context.checkpoints()
    begin, history = 0, []
    saved = checkpoints.load(ranks.device)
    running = torch.zeros(3, device=ranks.device)  # this rank's share of the epoch's losses
    if saved:
        begin, state = saved
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
        _restore_own(model, running, state["own"], ranks)
        context.say(f"{role}: resumed at step {begin} of {steps * settings.epochs}")
    local = sampling.rank_slice(settings.batch_size, ranks.rank, ranks.world)
    # DDP averages over ranks; slices may differ by one image, so each loss is weighted by its share.
    share = (local.stop - local.start) * ranks.world / settings.batch_size
    training: nn.Module = _Training(model)
    if ranks.world > 1:
        # After its first step DDP lays its buckets out anew, unless it looks for unused parameters; with three or more ranks the
        # order of additions depends on the layout, and a resumed run would start with the first layout again.
        unused = not debiased or settings.debias == 0 or ranks.world > 2
        training = ranks.parallel(training, find_unused_parameters=unused)
    step, total = begin, steps * settings.epochs
    progress = context.progress(role, total, "steps", begin)
    model.train()
    while step < total:
        epoch, first = divmod(step, steps)
        plans = EpochPlans(settings, spec, images, seed, epoch, first, steps, ranks, 2 if debiased else 1)
        stream = images.stream(plans, spec)
        for k in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step / steps)
            pictures = [normalize(next(stream)) for _ in range(plans.views**2)]
            shown = [images.labels[plans.chosen(k, s)[local]] for s in range(plans.views)]
            labels = [F.one_hot(torch.from_numpy(y).to(ranks.device), num_classes).float() for y in shown]
            optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(torch_seed(seed, "dropout", step, ranks.rank))
            if debiased:
                x, y = _mix(pictures, labels, rng(seed, "mix", epoch, k))
            else:
                x, y = pictures[0], labels[0]
            if ranks.device.type == "cuda":
                x = x.contiguous(memory_format=torch.channels_last)
            with ranks.autocast():
                plain, rebalanced, z, p = training(x)
            plain, rebalanced = plain.float(), rebalanced.float()
            if debiased:
                biased = losses.debias(plain, rebalanced, y, weights, (epoch + 1) / settings.epochs)
                # Both views: a mean over 2n rows is half of GLMC's sum over the two views.
                loss = 2 * settings.debias * biased
                contrast = losses.robust(p.float(), z.float()) if z is not None else torch.zeros((), device=ranks.device)
                loss = loss + settings.contrast * contrast
            else:
                biased = loss = losses.soft_cross_entropy(rebalanced, y)
                contrast = torch.zeros((), device=ranks.device)
            (loss * share).backward()
            optimizer.step()
            running += torch.stack([loss.detach(), biased.detach(), contrast.detach()]) * (share / ranks.world / steps)
            step += 1
            if k == steps - 1:
                entry = ranks.sum_(running).tolist()
                history.append({"epoch": epoch, "loss": entry[0], "debias": entry[1], "robust": entry[2]})
                if not math.isfinite(entry[0]):
                    raise UserError(f"{role}: the loss is {entry[0]} in epoch {epoch}; lower {role}.lr (it is {settings.lr})")
                running.zero_()
            progress.update(step, f"loss {history[-1]['loss']:.3f}" if history else "")
            if step % DUE_EVERY == 0 and step < total and ranks.share(checkpoints.due()):
                own = ranks.gather(_own(model, running))
                if ranks.first:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history, "own": own}
                    checkpoints.save(step, state)
    average_buffers(model, ranks)
    model.eval()
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.backbone.parameters()), "steps": total}
    held = context.input("shard")
    if "val" in split.manifest["splits"]:
        facts["val_top1"] = round(accuracy(model, ShardSplit(held, "val"), config, normalize, ranks), 2)
        context.say(f"{role}: {facts['val_top1']:.1f} % on validation images")
    if ranks.first:
        tensors.save(context.out / "weights.pt", {"recipe": recipe, "model": {k: v.cpu().contiguous() for k, v in model.state_dict().items()}})
        files.write_json(context.out / "log.json", history)
    return facts


def _own(model: nn.Module, running: torch.Tensor) -> dict[str, Any]:
    """What differs between ranks: BN running statistics and the part of the epoch's loss."""
    return {"buffers": {k: v.cpu() for k, v in model.named_buffers()}, "running": running.cpu()}


def _restore_own(model: nn.Module, running: torch.Tensor, own: list[dict], ranks) -> None:
    """This rank's own state; after a change of world size the mean of the statistics and an equal part of the loss."""
    buffers = dict(model.named_buffers())
    if len(own) == ranks.world:
        running.copy_(own[ranks.rank]["running"])
        for name, value in own[ranks.rank]["buffers"].items():
            buffers[name].copy_(value)
        return
    running.copy_(torch.stack([o["running"] for o in own]).sum(0) / ranks.world)
    for name in own[0]["buffers"]:
        values = torch.stack([o["buffers"][name] for o in own])
        buffers[name].copy_(values.mean(0) if values.is_floating_point() else values[0])
