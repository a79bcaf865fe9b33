"""Stages "observer" and "teacher": debiased experts, resumed to the bit, on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts import accuracy, batches, engine, growth, state
from ltdd_scale.experts.batches import Batch, Course
from ltdd_scale.experts.losses import Objective
from ltdd_scale.experts.recipes import RECIPES
from ltdd_scale.experts.settings import Expert
from ltdd_scale.models import flops, frozen, registry, syncbn
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Agreement, Ranks, torch_seed
from ltdd_scale.stage import Given


def check(settings: Given) -> None:
    """Raise `UserError` where the network cannot take the images, or an observer has no BatchNorm
    layer whose statistics could be aligned."""
    expert = settings.expert
    net = (expert.net, expert.width, expert.norm, settings.images.resolution)
    registry.check(*net)
    growth.check(settings.role, expert, settings.train, settings.images.resolution)
    if expert.warmup_epochs >= expert.epochs:
        raise UserError(
            f"{settings.role}.warmup_epochs={expert.warmup_epochs}: the rate would rise until the "
            f"end of {settings.role}.epochs={expert.epochs}; set fewer of the former"
        )
    if settings.role == "observer" and not flops.norm_layers(*net):
        raise UserError(
            f"observer.net={expert.net} with norm={expert.norm} has no BatchNorm layer to align: "
            "use observer.norm=batch or another net"
        )


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Train an expert on the shards; write ``weights.pt``, ``log.json`` and ``log.jsonl``.

    The same global batch gives the same sample order on any number of ranks.
    """
    role, expert, ranks = settings.role, settings.expert, context.ranks
    split = ShardSplit(context.input("shard"), "train")
    _check_sizes(role, expert, len(split), ranks)
    normalize, num_classes = prepare(split, ranks.device), len(split.classes)
    course = _course(settings, split, context)
    model, total = build(settings, num_classes, ranks), course.steps * expert.epochs
    setup = _setup(settings, ranks)
    trainer = engine.make(_Heads(model), setup, ranks, context.checkpoints())
    objective = RECIPES[expert.recipe].objective(expert, split.counts, ranks.device)
    step = Step(trainer, objective, setup, course)
    history, watch = state.History(ranks.device), state.Watch(role, split.names, trainer)
    begin = state.resume(trainer, model, history, ranks)
    if begin:
        context.say(f"{role}: resumed at step {begin} of {total}")
    progress = context.progress(role, total, "steps", begin, stops=False)
    agreement = Agreement(ranks)
    model.train()
    for batch in batches.from_step(course, begin, total, normalize, num_classes):
        losses = step(batch)
        watch.check()  # of the step before, now that a GPU has this one to do
        watch.note(batch, losses)
        history.add(losses * (step.share / ranks.world_size / course.steps))
        if batch.ends_epoch:
            history.close(batch.epoch, ranks)
            context.log(history.epochs)
        done = batch.step + 1
        progress.update(done, history.note)
        stop, due = agreement(signals.requested(), trainer.due())
        if (stop or due) and done < total:
            watch.check()
            state.save(trainer, done, model, history, ranks, wait=stop)
            if stop:
                raise signals.Preempted(f"request at step {done} of {role}")
    agreement.close()
    watch.check()
    trainer.finish()
    if not _synced(settings, ranks):
        state.average_buffers(model, ranks)
    if ranks.is_main:
        made_of = (expert.net, expert.width, expert.norm, settings.images.resolution)
        frozen.save(context.out / "weights.pt", frozen.recipe(*made_of, num_classes), model)
        files.write_json(context.out / "log.json", history.epochs)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    judged = accuracy.judge(role, model.eval(), split, settings.images, normalize, context)
    return {"parameters": parameters, "steps": total, **judged}


def build(settings: Given, num_classes: int, ranks: Ranks) -> registry.TwoHeads:
    """The expert with its initial weights, which depend on role and seed alone."""
    expert, size = settings.expert, settings.images.resolution
    projection = RECIPES[expert.recipe].projection(expert)

    def make() -> registry.TwoHeads:
        features = registry.backbone(expert.net, expert.width, expert.norm, size)
        return registry.TwoHeads(features, num_classes, projection)

    model = ranks.to_device(registry.seeded(make, _seed(settings), "weights"))
    return syncbn.synchronize(model) if _synced(settings, ranks) else model


@dataclass(frozen=True)
class Step:
    """One step of training: called with a batch, it holds what stays from step to step."""

    trainer: engine.Trainer
    objective: Objective
    setup: engine.Setup
    course: Course

    @property
    def share(self) -> float:
        """Engines average over ranks. Their parts may differ by one image, so each loss is weighted
        by its part's share of the batch, times the number of ranks."""
        part = self.course.part
        return (part.stop - part.start) * self.course.ranks.world_size / self.course.batch_size

    def __call__(self, batch: Batch) -> Tensor:
        """Return this rank's losses, float32 [3] (see `Objective`)."""
        course, expert, ranks = self.course, self.setup.expert, self.course.ranks
        torch.manual_seed(torch_seed(course.seed, "dropout", batch.step, ranks.rank))
        losses = torch.zeros(3, device=ranks.device)
        x = frozen.channels_last(batch.x)
        views = course.mixing.views
        cut = batches.micro_batches(x, batch.y, views, self.setup.micro_batches)
        for number, (images, labels, part) in enumerate(cut, 1):
            last = number == len(cut)
            heads = self.trainer.forward(images, last)
            values = self.objective(heads, labels, (batch.epoch + 1) / expert.epochs)
            self.trainer.backward(values[0] * (self.share * part), last)
            losses += values.detach() * part
        self.trainer.step(learning_rate(expert, batch.step / course.steps))
        return losses


def learning_rate(expert: Expert, position: float) -> float:
    """Linear warm-up, then cosine to 0; `position` in epochs."""
    if position < expert.warmup_epochs:
        return expert.lr * (position + 1e-8) / expert.warmup_epochs
    done = (position - expert.warmup_epochs) / max(expert.epochs - expert.warmup_epochs, 1)
    return expert.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Heads(nn.Module):
    """What the engine runs: one forward pass that gives everything that the loss needs."""

    def __init__(self, model: registry.TwoHeads):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        return self.model.heads(x)


def _check_sizes(role: str, expert: Expert, num_images: int, ranks: Ranks) -> None:
    if expert.batch_size > num_images:
        raise UserError(
            f"{role}.batch_size={expert.batch_size}, but there are {num_images} training images: "
            "lower it"
        )
    if expert.batch_size < 2 * ranks.world_size:
        raise UserError(
            f"{role}.batch_size={expert.batch_size} is too small for {ranks.world_size} ranks: "
            "lower --nproc or raise it"
        )


def _seed(settings: Given) -> str:
    return f"{settings.role} {settings.seed}"


def _synced(settings: Given, ranks: Ranks) -> bool:
    return settings.train.sync_bn and ranks.world_size > 1


def _course(settings: Given, split: ShardSplit, context: Context) -> Course:
    expert, seen, ranks = settings.expert, settings.images, context.ranks
    spec = ViewSpec(
        seen.resolution,
        tuple(expert.crop_scale) if expert.crop_scale else None,
        expert.crop_padding,
        seen.mirror,
        expert.randaugment,
        expert.magnitude,
    )
    return Course(
        images=open_images(split, seen, ranks.device, context.workers),
        spec=spec,
        seed=_seed(settings),
        batch_size=expert.batch_size,
        mixing=RECIPES[expert.recipe].mixing(expert),
        ranks=ranks,
        sides=growth.sides(expert, seen.resolution),
    )


def _setup(settings: Given, ranks: Ranks) -> engine.Setup:
    expert, train = settings.expert, settings.train
    number = 1
    if train.micro_batch:  # as many on every rank, though their parts may differ by one image
        largest = -(-expert.batch_size // ranks.world_size)
        smallest = expert.batch_size // ranks.world_size
        number = min(-(-largest // train.micro_batch), smallest)
    # After its first step DDP lays its buckets out anew, unless it looks for unused parameters.
    # With three or more ranks the order of additions depends on the layout, and a resumed run
    # would start with the first layout again.
    unused = expert.recipe != "glmc" or expert.debias == 0 or ranks.world_size > 2
    return engine.Setup(expert, train, unused, number, settings.deepspeed)
