"""Stage "observer" and stage "teacher": debiased experts, resumed to the bit, on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ltdd_scale.config import Config, Expert
from ltdd_scale.data import sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import normalizer, open_images, stream_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts import batches, engine, losses
from ltdd_scale.models import registry, syncbn
from ltdd_scale.runtime import files, signals, tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng, torch_seed

PROJECTION = 256  # width of SimSiam's projector


def learning_rate(settings: Expert, position: float) -> float:
    """Linear warm-up, then cosine to 0; `position` in epochs."""
    if position < settings.warmup_epochs:
        return settings.lr * (position + 1e-8) / settings.warmup_epochs
    done = (position - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Training(nn.Module):
    """One forward pass for the engine: everything the loss needs from one concatenated batch of both views."""

    def __init__(self, model: registry.TwoHeads):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.heads(x)


def _loss(
    outputs: tuple,
    y: torch.Tensor,
    settings: Expert,
    debiased: bool,
    weights: torch.Tensor,
    progress: float,
) -> torch.Tensor:
    """(loss, its debiasing term, its robust term), float32 [3], of a batch or a part of one."""
    plain, rebalanced, z, p = (None if o is None else o.float() for o in outputs)
    zero = torch.zeros((), device=y.device)
    if not debiased:
        loss = losses.soft_cross_entropy(rebalanced, y)
        return torch.stack([loss, loss, zero])
    biased = losses.debias(plain, rebalanced, y, weights, progress)
    contrast = losses.robust(p, z) if z is not None else zero
    # Both views: a mean over 2n rows is half of GLMC's sum over the two views.
    return torch.stack(
        [2 * settings.debias * biased + settings.contrast * contrast, biased, contrast]
    )


@torch.no_grad()
def accuracy(
    model: nn.Module, split: ShardSplit, config: Config, normalize, ranks, batch: int = 256
) -> float:
    """Top-1 in per cent of a split, every image once, shared over ranks."""
    mine = np.arange(len(split))[sampling.rank_slice(len(split), ranks.rank, ranks.world)]
    images = stream_images(
        split, config, ranks.device
    )  # one pass: each rank decodes its own part only
    plans = [(mine[i : i + batch], None) for i in range(0, len(mine), batch)]
    right = 0
    for (indices, _), x in zip(
        plans, images.stream(plans, ViewSpec(config.data.resolution)), strict=True
    ):
        signals.check()
        with ranks.autocast():
            right += int(
                (model(normalize(x)).argmax(1).cpu().numpy() == split.labels[indices]).sum()
            )
    return 100 * sum(ranks.gather(right)) / len(split)


def average_buffers(model: nn.Module, ranks) -> None:
    """One mean of the BN running statistics over ranks, before they are read. DDP would broadcast rank 0's instead."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            ranks.sum_(buffer.mul_(1 / ranks.world))


def _check_sizes(settings: Expert, role: str, num_images: int, ranks) -> None:
    if settings.batch_size > num_images:
        raise UserError(
            f"{role}.batch_size={settings.batch_size}, but there are {num_images} training images: lower it"
        )
    if settings.batch_size < 2 * ranks.world:
        raise UserError(
            f"{role}.batch_size={settings.batch_size} is too small for {ranks.world} ranks: lower --nproc or raise it"
        )


def run(role: str, config: Config, context: Context) -> dict[str, Any]:
    """Train the expert of `role` ("observer" or "teacher") on the shards; write ``weights.pt`` and ``log.json``.

    Returns facts for ``stage.json``. The same global batch gives the same sample order on any number of ranks.
    """
    settings: Expert = getattr(config, role)
    ranks, split = context.ranks, ShardSplit(context.input("shard"), "train")
    size, debiased, num_classes = (
        config.data.resolution,
        config.strategies.debias,
        len(split.classes),
    )
    _check_sizes(settings, role, len(split), ranks)
    projection = PROJECTION if debiased and settings.contrast else 0
    recipe = registry.Network.describe(
        settings.net, settings.width, settings.norm, size, num_classes
    )
    features = lambda: registry.backbone(settings.net, settings.width, settings.norm, size)  # noqa: E731
    seed = f"{role} {config.seed}"
    model = ranks.to_device(
        registry.seeded(
            lambda: registry.TwoHeads(features(), num_classes, projection), seed, "weights"
        )
    )
    if role == "observer" and not registry.norm_layers(model):
        raise UserError(
            f"observer.net={settings.net} with norm={settings.norm} has no BatchNorm layer to align: use observer.norm=batch or another net"
        )
    synced = config.train.sync_bn and ranks.world > 1
    if synced:
        syncbn.synchronize(model)
    images = open_images(split, config, ranks.device)
    normalize = normalizer(split.mean, split.std, ranks.device)
    spec = ViewSpec(
        size,
        tuple(settings.crop_scale) if settings.crop_scale else None,
        settings.crop_padding,
        config.data.mirror,
        settings.randaugment,
        settings.magnitude,
    )
    weights = losses.class_weights(split.counts, settings.reweight_power).to(ranks.device)
    local = sampling.rank_slice(settings.batch_size, ranks.rank, ranks.world)
    # Engines average over ranks; slices may differ by one image, so each loss is weighted by its share.
    share = (local.stop - local.start) * ranks.world / settings.batch_size
    # After its first step DDP lays its buckets out anew, unless it looks for unused parameters; with three or more ranks the
    # order of additions depends on the layout, and a resumed run would start with the first layout again.
    unused = not debiased or settings.debias == 0 or ranks.world > 2
    largest = -(-settings.batch_size // ranks.world)  # parts must be as many on every rank
    parts = (
        min(-(-largest // config.train.micro_batch), settings.batch_size // ranks.world)
        if config.train.micro_batch
        else 1
    )
    trainer = engine.make(
        _Training(model), settings, config.train, ranks, context.checkpoints(), unused, parts
    )
    views, steps = 2 if debiased else 1, len(split) // settings.batch_size
    begin, history, running = (
        0,
        [],
        torch.zeros(3, device=ranks.device),
    )  # this rank's share of the epoch's losses
    saved = trainer.load()
    if saved:
        begin, state = saved
        history = state["history"]
        _restore_own(model, running, state["own"], ranks)
        context.say(f"{role}: resumed at step {begin} of {steps * settings.epochs}")
    step, total = begin, steps * settings.epochs
    progress = context.progress(role, total, "steps", begin, stops=False)
    watched: tuple[int, torch.Tensor, np.ndarray] | None = None
    model.train()
    while step < total:
        epoch, first = divmod(step, steps)
        plans = batches.EpochPlans(settings, spec, images, seed, epoch, first, steps, ranks, views)
        stream = images.stream(plans, spec)
        for k in range(first, steps):
            pictures = [normalize(next(stream)) for _ in range(views**2)]
            chosen = [plans.chosen(k, s)[local] for s in range(views)]
            labels = [
                F.one_hot(torch.from_numpy(images.labels[c]).to(ranks.device), num_classes).float()
                for c in chosen
            ]
            torch.manual_seed(torch_seed(seed, "dropout", step, ranks.rank))
            x, y = (
                batches.mix(pictures, labels, rng(seed, "mix", epoch, k))
                if debiased
                else (pictures[0], labels[0])
            )
            if ranks.device.type == "cuda":
                x = x.contiguous(memory_format=torch.channels_last)
            _check_finite(role, watched, split, trainer)
            found = torch.zeros(3, device=ranks.device)
            cut = batches.pieces(x, y, views, parts)
            for number, (xs, ys, part) in enumerate(cut):
                last = number == len(cut) - 1
                values = _loss(
                    trainer.forward(xs, last),
                    ys,
                    settings,
                    debiased,
                    weights,
                    (epoch + 1) / settings.epochs,
                )
                trainer.backward(values[0] * (share * part), last)
                found += values.detach() * part
            watched = (step, found, np.concatenate(chosen))
            trainer.step(learning_rate(settings, step / steps))
            running += found * (share / ranks.world / steps)
            step += 1
            if k == steps - 1:
                entry = ranks.sum_(running).tolist()
                history.append(
                    {"epoch": epoch, "loss": entry[0], "debias": entry[1], "robust": entry[2]}
                )
                running.zero_()
            progress.update(step, f"loss {history[-1]['loss']:.3f}" if history else "")
            stop, due = ranks.agree(signals.requested(), trainer.due())
            if (stop or due) and step < total:
                _check_finite(role, watched, split, trainer)
                trainer.save(
                    step, {"history": history, "own": ranks.gather(_own(model, running))}, wait=stop
                )
                if stop:
                    raise signals.Preempted(f"request at step {step} of {role}")
    _check_finite(role, watched, split, trainer)
    trainer.finish()
    if not synced:
        average_buffers(model, ranks)
    model.eval()
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "steps": total,
    }
    if "val" in split.manifest["splits"]:
        facts["val_top1"] = round(
            accuracy(model, ShardSplit(context.input("shard"), "val"), config, normalize, ranks), 2
        )
        context.say(f"{role}: {facts['val_top1']:.1f} % on validation images")
    if ranks.first:
        tensors.save(
            context.out / "weights.pt",
            {
                "recipe": recipe,
                "model": {k: v.cpu().contiguous() for k, v in model.state_dict().items()},
            },
        )
        files.write_json(context.out / "log.json", history)
    return facts


def _check_finite(
    role: str, watched: tuple[int, torch.Tensor, np.ndarray] | None, split: ShardSplit, trainer
) -> None:
    """Raise `UserError` where the loss of a step is not finite. Asked a step late, when a GPU has long known it."""
    if watched is None or math.isfinite(float(watched[1][0])):
        return
    step, found, chosen = watched
    names = split.names
    trainer.finish()  # the last save may be on its way
    last = max(
        (int(p.name.split("-")[1].split(".")[0]) for p in trainer.folder.glob("step-*")),
        default=None,
    )
    kept = (
        f"the last good checkpoint is of step {last}"
        if last is not None
        else "there is no checkpoint yet"
    )
    raise UserError(
        f"{role}: the loss is {float(found[0])} at step {step}, on {', '.join(names[i] for i in chosen[:3])} and {len(chosen) - 3} more; {kept}. "
        f"Lower {role}.lr, or set train.clip (1.0, say)"
    )


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
