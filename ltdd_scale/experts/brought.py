"""Stages "observer" and "teacher" with weights from elsewhere: nothing is trained, or the last
layer alone.

That layer is trained on the features of the whole images, each of which goes through the network
once, by the balanced softmax (Ren et al., NeurIPS 2020, eq. 3): its logits are debiased, as cRT's
re-trained classifier (Kang et al., ICLR 2020) is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import prepare, stream_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts import accuracy, layouts
from ltdd_scale.experts.layouts import Head
from ltdd_scale.experts.losses import soft_cross_entropy
from ltdd_scale.experts.recipes import prior
from ltdd_scale.experts.settings import TORCHVISION, Architecture
from ltdd_scale.experts.settings import Head as HeadSettings
from ltdd_scale.models import flops, frozen, registry
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Cost, Facts, Given

CHUNK = 2048  # images whose features are one file
BATCH = 256  # images a forward pass
# A network that knows the classes is further than this from chance to being always right.
ABOVE = 0.1


def check(settings: Given) -> None:
    """Raise `UserError` where the weights do not fit the network, the network not the images, or an
    observer has no BatchNorm layer."""
    made_of = _made_of(settings)
    registry.check(*made_of)
    if settings.role == "observer" and not flops.norm_layers(*made_of):
        raise UserError(
            f"observer.net={made_of[0]} has no BatchNorm layer to align: use another net"
        )
    place = settings.weights.place
    if place.startswith(TORCHVISION):  # read, and so downloaded, by the stage
        layouts.published(place.removeprefix(TORCHVISION), made_of[0])
    else:
        _fit(settings)


def cost(settings: Given, facts: Facts) -> Cost:
    """A pass over the training images, and over their features in each epoch of the head."""
    made_of, size = _made_of(settings), settings.images.resolution
    measures = flops.measure(*made_of)
    number = facts.num_images * facts.num_classes * measures.features
    parameters = measures.parameters + facts.num_classes * measures.features
    image = flops.FLOAT * 3 * size**2
    epochs = settings.head.head_epochs if "head" in settings else 0
    return Cost(
        flops=facts.num_images * measures.flops + epochs * 2 * (1 + flops.BACKWARD) * number,
        memory=2 * flops.FLOAT * parameters,
        activations=BATCH * (measures.passing + image),
        disk=flops.FLOAT * (parameters + bool(epochs) * facts.num_images * measures.features),
    )


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write ``weights.pt``, as training does. Raises `UserError` where the file's last layer does
    not know the classes."""
    role, ranks = settings.role, context.ranks
    split = ShardSplit(context.input("shard"), "train")
    normalize, num_classes = prepare(split, ranks.device), len(split.classes)
    fitted = _fit(settings)
    context.say(f"{role}: weights found {fitted.how}")
    model = registry.Student(registry.backbone(*_made_of(settings)), num_classes)
    model.backbone.load_state_dict(fitted.backbone, strict=False)  # counters may be missing
    model = ranks.to_device(model).eval().requires_grad_(False)
    found = {}
    if "head" in settings:
        _describe(model.backbone, split, normalize, settings, context)
        if ranks.is_main:
            features = _Features(context.out)
            _take(model.fc, train_head(settings, split, features, context))
            for path in features.paths:
                path.unlink()
        ranks.barrier()  # on the CPUs, where rank 0 may be waited for long
        _share(model.fc, ranks)
    else:
        _take(model.fc, _known(settings, fitted.head, num_classes))
        found = _checked(settings, model, split, normalize, context)
    if ranks.is_main:
        made_of = frozen.recipe(*_made_of(settings), num_classes)
        frozen.save(context.out / "weights.pt", made_of, model)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    judged = accuracy.judge(role, model, split, settings.images, normalize, context)
    return {"parameters": parameters, "weights": fitted.how, **found, **judged}


def _made_of(settings: Given) -> tuple[str, int, str, int]:
    net: Architecture = settings.net
    return net.net, net.width, net.norm, settings.images.resolution


def _fit(settings: Given) -> layouts.Fitted:
    place = settings.weights.place
    try:
        return layouts.fit(layouts.read(place, settings.net.net), _made_of(settings))
    except UserError as error:
        raise UserError(f"{settings.role}.weights={place}: {error}") from None


def _known(settings: Given, head: Head | None, num_classes: int) -> Head:
    if head is None or len(head.weight) != num_classes:
        has = "no last layer for these features" if head is None else f"{len(head.weight)} classes"
        raise UserError(
            f"{settings.role}.weights={settings.weights.place} has {has}, the set {num_classes} "
            f"classes: set {settings.role}.head_epochs=20 to train a last layer of its own"
        )
    return head


def _take(layer: nn.Linear, head: Head) -> None:
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)


def _share(layer: nn.Linear, ranks: Ranks) -> None:
    """Rank 0's layer on all ranks."""
    for parameter in layer.parameters():
        ranks.broadcast_tensor(parameter.data)


def knows(share: float, num_classes: int) -> bool:
    """Whether a network that is right on this `share` of images, the mean over classes, knows them:
    better than twice chance, or of few classes a tenth of the way from chance to 1."""
    chance = 1 / num_classes
    return share > min(2 * chance, chance + ABOVE * (1 - chance))


def _checked(
    settings: Given, model: nn.Module, split: ShardSplit, normalize: Any, context: Context
) -> dict[str, float]:
    """Balanced accuracy on the training images, per cent. As many classes are not the same
    classes: raises `UserError` where it is hardly better than chance."""
    images, right = accuracy.hits(model, split, settings.images, normalize, context)
    share = float((right / images).mean())
    if not knows(share, len(images)):
        raise UserError(
            f"{settings.role}.weights={settings.weights.place}: its last layer is right on "
            f"{100 * share:.1f} % of the training images (mean over classes), chance is "
            f"{100 / len(images):.1f} %: its classes are others, or in another order. Set "
            f"{settings.role}.head_epochs=20 to train a last layer of its own"
        )
    return {"train_balanced": round(100 * share, 2)}


class _Features:
    """The features of all training images, in files of `CHUNK` images; rows by image number."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("features-*.npy"))
        self.chunks = [np.load(path, mmap_mode="r") for path in self.paths]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """float32 [n, d]. What is not asked for stays on the disk: memory does not grow with the
        set."""
        return np.stack([self.chunks[i // CHUNK][i % CHUNK] for i in indices])


def _describe(
    backbone: nn.Module, split: ShardSplit, normalize: Any, settings: Given, context: Context
) -> None:
    """Write the features of all images; each rank its chunks. What is there is not made again."""
    ranks, seen = context.ranks, settings.images
    chunks = np.split(np.arange(len(split)), range(CHUNK, len(split), CHUNK))
    paths = [context.out / f"features-{n:06d}.npy" for n in range(len(chunks))]
    mine = [n for n in context.mine(range(len(chunks))) if not paths[n].exists()]
    images = stream_images(split, seen, ranks.device, context.workers)
    progress = context.progress(f"{settings.role} features", len(mine), "chunks")
    for done, number in enumerate(mine, 1):
        parts = np.split(chunks[number], range(BATCH, len(chunks[number]), BATCH))
        shown = images.stream([(part, None) for part in parts], ViewSpec(seen.resolution))
        found = []
        for x in shown:
            signals.check()
            with torch.no_grad(), ranks.autocast():
                found.append(backbone(frozen.channels_last(normalize(x))).float().cpu())
        buffer = io.BytesIO()
        np.save(buffer, torch.cat(found).numpy())
        files.write_bytes(paths[number], buffer.getvalue())
        progress.update(done)
    ranks.barrier()


def train_head(settings: Given, split: ShardSplit, features: _Features, context: Context) -> Head:
    """A last layer on `features`, from zero: AdamW, cosine to 0, the same batches everywhere.
    Raises `signals.Preempted`, with all saved, where a signal has come."""
    own: HeadSettings = settings.head
    device, labels = context.ranks.device, torch.from_numpy(split.labels).long()
    log_prior = own.prior * np.log(prior(split.counts, (0.0,)))
    shift = torch.from_numpy(log_prior).float().to(device)
    width = features.rows(np.zeros(1, np.int64)).shape[1]
    layer = nn.Linear(width, len(split.classes)).to(device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    lr, decay = own.rate_and_decay
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=decay)
    size = min(own.batch_size, len(split))
    steps = len(split) // size
    total = own.head_epochs * steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    parts = {"layer": layer, "optimizer": optimizer, "schedule": schedule}
    checkpoints, begin = context.checkpoints(f"{settings.role}-head"), 0
    if saved := checkpoints.load():
        begin, states = saved
        for name, part in parts.items():
            part.load_state_dict(states[name])
    progress = context.progress(f"{settings.role} head", total, "steps", begin, stops=False)
    order, of_epoch = np.zeros(0, np.int64), -1
    for taken in range(begin, total):
        epoch, k = divmod(taken, steps)
        if epoch != of_epoch:
            generator = rng(settings.seed, settings.role, "head", epoch)
            order, of_epoch = generator.permutation(len(split)), epoch
        at = order[k * size : (k + 1) * size]
        x = torch.from_numpy(features.rows(at)).to(device)
        targets = nn.functional.one_hot(labels[at], len(split.classes)).float().to(device)
        loss = soft_cross_entropy(layer(x) + shift, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if k == steps - 1:
            progress.update(taken + 1, f"loss {float(loss.detach()):.3f}")
        if signals.requested() or checkpoints.due():
            states = {name: part.state_dict() for name, part in parts.items()}
            checkpoints.save(taken + 1, states, wait=signals.requested())
            signals.check()
    checkpoints.clear()
    return Head(layer.weight.detach(), layer.bias.detach())
