"""Stage "recover": images whose statistics under the observer match the fair ones (RLDD §Recovery).

Loss = ce · CE(observer(aug(x)), y) + t · CE(teacher(aug(x)), y) + r · Σ_layers w_l (‖μ_batch − μ‖₂ + ‖σ²_batch − σ²‖₂), against a mix of the global
statistics and those of the labels in the batch. Batch statistics are straight-through moving averages, new for every chunk. The teacher's term is
not in the paper: aligned images drift from what the teacher, who labels them, takes for their class, and one fixed soft label an image then teaches less.

The unit of work is a class chunk: classes at a stride, so that head and tail meet in a batch, and some images of each. What is in a chunk,
and its random numbers, depend on the config alone: the same bytes on any number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltdd_scale.config import Config, Recover
from ltdd_scale.data import arrays, augment
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.models import registry
from ltdd_scale.models.moments import fair_statistics, position_sums
from ltdd_scale.runtime import signals, tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng


def check_ranks(settings: Recover, num_classes: int, ipc: int, world: int) -> None:
    """Raise `UserError` for more ranks than chunks: known before any expert is trained, and said then."""
    n = len(chunks(num_classes, ipc, settings.batch_size, settings.chunk_classes))
    if world > n:
        limit = max(1, settings.batch_size * n // world)
        raise UserError(
            f"recover has {n} chunk{'s' * (n > 1)} for {world} ranks: use --nproc {n}, or smaller chunks with --set recover.batch_size={limit}"
        )


@dataclass(frozen=True)
class Chunk:
    """`classes` × images `first` … `last` − 1 of each: one batch, one unit of work."""

    number: int
    classes: tuple[int, ...]
    first: int
    last: int

    @property
    def labels(self) -> np.ndarray:
        return np.repeat(self.classes, self.last - self.first)


def chunks(num_classes: int, ipc: int, batch_size: int, chunk_classes: int = 0) -> list[Chunk]:
    """All chunks, of at most `batch_size` images. Chunk g of G takes classes g, g + G, …: the long tail, thinned, in every batch."""
    per_chunk = min(chunk_classes or num_classes, num_classes, batch_size)
    groups = -(-num_classes // per_chunk)
    images = max(1, batch_size // -(-num_classes // groups))
    out = []
    for g in range(groups):
        for first in range(0, ipc, images):
            out.append(
                Chunk(
                    len(out), tuple(range(g, num_classes, groups)), first, min(first + images, ipc)
                )
            )
    return out


class ChannelMoments(torch.autograd.Function):
    """x itself [n, C, H, W], and its mean and biased variance per channel, float32 [C] each.

    x passes through so that the gradient of the moments (∂mean/∂x = 1/N, ∂var/∂x = 2 (x − mean)/N) is added to x's own in one pass, not as a
    tensor of its own that autograd then has to add.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.device.type == "cpu":  # torch.var_mean over (n, H, W) takes 40 times as long on a CPU
            sums, squares = (s.sum(0) / (x.numel() // x.shape[1]) for s in position_sums(x))
            mean, var = sums.float(), (squares - sums**2).clamp(min=0).float()
        else:
            var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var

    @staticmethod
    def backward(ctx, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 * grad_var / n
        offset = grad_mean / n - slope * mean
        shape = (1, -1, 1, 1)
        # In float32: slope · x and offset nearly cancel.
        return (
            torch.addcmul(grad.float(), x.float(), slope.view(shape))
            .add_(offset.view(shape))
            .to(x.dtype)
        )


class Alignment:
    """Captures the inputs of the aligned layers during a forward pass and turns them into the alignment loss.

    `targets[layer]` is a list of (weight, mean [C], var [C]). The moving average belongs to one chunk and starts with its first batch,
    so it is right from the first step and nothing leaks from chunk to chunk.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        targets: dict[str, list[tuple[float, Tensor, Tensor]]],
        settings: Recover,
    ):
        self.targets, self.ema, self.first_layer = targets, settings.ema, settings.first_layer
        self.average: dict[str, tuple[Tensor, Tensor]] = {}
        self.terms: list[Tensor] = []
        self._first = next(iter(layers))
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()
        ]

    def _hook(self, name: str):
        def align(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            x, mean, var = ChannelMoments.apply(inputs[0])
            if self.ema:
                old = self.average.get(name)
                new = [
                    m.detach() if old is None else self.ema * o + (1 - self.ema) * m.detach()
                    for m, o in zip((mean, var), old or (0, 0), strict=True)
                ]
                self.average[name] = (new[0], new[1])
                # Straight through: the value of the average, the gradient of the batch.
                mean, var = (new[k] + (m - m.detach()) for k, m in enumerate((mean, var)))
            scale = self.first_layer if name == self._first else 1.0
            for weight, goal_mean, goal_var in self.targets[name]:
                self.terms.append(
                    scale
                    * weight
                    * (
                        torch.linalg.vector_norm(mean - goal_mean)
                        + torch.linalg.vector_norm(var - goal_var)
                    )
                )
            return (x,)

        return align

    def loss(self) -> Tensor:
        """Σ over the layers of the pass just made."""
        total = torch.stack(self.terms).sum()
        self.terms = []
        return total

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def alignment_targets(
    statistics: dict, layers: list[str], labels: np.ndarray, classwise: float, variance: str, device
) -> dict[str, list[tuple[float, Tensor, Tensor]]]:
    """Per layer: the global statistics with weight 1 − `classwise`, and those of the chunk's labels with weight `classwise`.

    Only the chunk's classes are read, so memory does not grow with the number of classes.
    """
    targets = {}
    for name in layers:
        if statistics["fair"]:
            moments = statistics["moments"][name]
            pairs = [
                (1 - classwise, *fair_statistics(moments, variance)),
                (classwise, *fair_statistics(moments[torch.from_numpy(labels)], variance)),
            ]
        else:
            pairs = [(1.0, *statistics["running"][name])]
        targets[name] = [
            (w, m.float().to(device), v.float().to(device)) for w, m, v in pairs if w > 0
        ]
    return targets


def recover_chunk(
    images: Tensor,
    labels: Tensor,
    observer: nn.Module,
    teacher: nn.Module | None,
    alignment: Alignment,
    low: Tensor,
    high: Tensor,
    settings: Recover,
    views: tuple[Tensor, Tensor],
    size: int,
    ranks: Ranks,
    any_size: bool = True,
    tick=None,
    resume=None,
) -> Tensor:
    """Recover one chunk: normalised images float32 [n, 3, R, R] → the same shape. No host synchronisation inside the loop.

    With `settings.resolutions` the images go through stages of other sides; networks that take `any_size` see them at that side, others enlarged.
    `views` holds the draws of all iterations on the device (windows [T, n, 4], mirrored [T, n]); `low` and `high` bound the pixels.
    Without a `teacher` its term is left out. `tick(iteration, state)` is called after each iteration with a function that makes the state to save; `resume` is such a state.
    """
    sides = stages(settings, size)
    x, begin = (
        (resized(images, sides[0]), 0)
        if resume is None
        else (resume["images"].to(images.device), resume["iteration"])
    )
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=settings.lr, betas=tuple(settings.betas))
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        alignment.average = {
            k: tuple(t.to(x.device) for t in v) for k, v in resume["average"].items()
        }
    windows, mirrored = views
    for t in range(begin, settings.iterations):
        if (
            t and t in sides
        ):  # FADRM: to the next stage's resolution, some of the initial image mixed in again
            kept = (1 - settings.residual) * resized(
                x.detach(), sides[t]
            ) + settings.residual * resized(images, sides[t])
            x = kept.requires_grad_()
            optimizer = torch.optim.Adam([x], lr=settings.lr, betas=tuple(settings.betas))
        optimizer.param_groups[0]["lr"] = (
            settings.lr * 0.5 * (1 + math.cos(math.pi * t / settings.iterations))
        )
        shown = augment.crop_resize(x, windows[t], mirrored[t], x.shape[-1] if any_size else size)
        if x.device.type == "cuda":
            shown = shown.contiguous(memory_format=torch.channels_last)
        with ranks.autocast():
            logits = observer(shown)
            judged = None if teacher is None else teacher(shown)
        loss = settings.alignment * alignment.loss()
        if settings.ce:
            loss = loss + settings.ce * F.cross_entropy(logits.float(), labels)
        if judged is not None:
            loss = loss + settings.teacher_ce * F.cross_entropy(judged.float(), labels)
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        x.data.clamp_(low, high)
        if tick is not None:
            tick(
                t + 1,
                lambda t=t, x=x, optimizer=optimizer: {
                    "iteration": t + 1,
                    "images": x.detach(),
                    "optimizer": optimizer.state_dict(),
                    "average": dict(alignment.average),
                },
            )
    return resized(x.detach(), size)


def stages(settings: Recover, size: int) -> dict[int, int]:
    """First iteration of each stage → side of the images in it; stages are equally long."""
    sides = settings.resolutions or [size]
    return {settings.iterations * k // len(sides): side for k, side in enumerate(sides)}


def resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    n, device = len(images), images.device
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).expand(n, -1)
    return augment.crop_resize(images, whole, torch.zeros(n, dtype=torch.bool, device=device), side)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write one ``00000.npy`` a class, uint8 [IPC, 3, R, R], by way of one file a chunk. A restart skips finished chunks."""
    ranks, settings = context.ranks, config.recover
    split = ShardSplit(context.input("shard"), "train")
    num_classes = len(split.classes)
    work = chunks(num_classes, config.ipc, settings.batch_size, settings.chunk_classes)
    if ranks.world * (context.part or (0, 1))[1] > len(work):
        context.say(
            f"recover has {len(work)} chunks for {ranks.world * (context.part or (0, 1))[1]} ranks; the others have nothing to do"
        )
    finished = [arrays.class_file(context.out, c).exists() for c in range(num_classes)]
    if not ranks.share(all(finished)):
        _recover_chunks(config, context, split, work)
        if context.part:
            return {}  # classes are put together when the chunks of all parts are there
        ranks.barrier()
        for c in range(ranks.rank, num_classes, ranks.world):
            arrays.save(arrays.class_file(context.out, c), _class_images(context, work, c))
        ranks.barrier()
    if ranks.first:
        for chunk in work:
            _chunk_file(context, chunk).unlink(missing_ok=True)
    return {"chunks": len(work), "images": num_classes * config.ipc}


def _chunk_file(context: Context, chunk: Chunk):
    return context.out / f"chunk-{chunk.number:05d}.npy"


def _class_images(context: Context, work: list[Chunk], label: int) -> np.ndarray:
    parts = []
    for chunk in work:
        if label in chunk.classes:
            at, n = chunk.classes.index(label), chunk.last - chunk.first
            parts.append(arrays.load(_chunk_file(context, chunk))[at * n : (at + 1) * n])
    return np.concatenate(parts)


def _recover_chunks(config: Config, context: Context, split: ShardSplit, work: list[Chunk]) -> None:
    ranks, settings, size = context.ranks, config.recover, config.data.resolution
    device = ranks.device
    statistics = tensors.load(context.input("calibrate") / "statistics.pt")
    saved = tensors.load(context.input("calibrate") / "observer.pt")
    observer = ranks.to_device(registry.Network.build(saved["recipe"], saved["model"]))
    teacher = None
    if settings.teacher_ce:
        made = tensors.load(context.input("teacher") / "weights.pt")
        teacher = ranks.to_device(registry.Network.build(made["recipe"], made["model"]))
    any_size = not any(
        role.net in registry.CONVNETS
        for role in (config.observer, *([config.teacher] if teacher else []))
    )
    layers: dict[str, nn.Module] = dict(registry.norm_layers(observer))
    if config.calibrate.conv_inputs and statistics["fair"]:
        layers.update(registry.conv_layers(observer))
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (split.mean, split.std))
    low, high = (0 - mean) / std, (1 - mean) / std
    spec = ViewSpec(size, tuple(settings.crop_scale), mirror=config.data.mirror)
    mine = context.share(work)
    progress = context.progress(
        "recover", len(mine) * max(settings.iterations, 1), "iterations", stops=False
    )
    for position, chunk in enumerate(mine):
        signals.check()
        path = _chunk_file(context, chunk)
        if path.exists():
            continue
        pixels = np.concatenate(
            [
                arrays.load(arrays.class_file(context.input("initialize"), c))[
                    chunk.first : chunk.last
                ]
                for c in chunk.classes
            ]
        )
        if settings.iterations:
            targets = alignment_targets(
                statistics,
                list(layers),
                chunk.labels,
                settings.classwise,
                config.calibrate.variance,
                device,
            )
            alignment = Alignment(layers, targets, settings)
            sizes = np.full((len(pixels), 2), size)
            drawn = [
                spec.draw(rng(config.seed, "recover", chunk.number, t), sizes)
                for t in range(settings.iterations)
            ]
            views = (
                torch.from_numpy(np.stack([d.windows for d in drawn])).to(device),
                torch.from_numpy(np.stack([d.mirrored for d in drawn])).to(device),
            )
            checkpoints = context.checkpoints(f"chunk-{chunk.number:05d}")
            resumed = checkpoints.load()
            if resumed:
                context.say(
                    f"recover: chunk {chunk.number} goes on at iteration {resumed[0]} of {settings.iterations}"
                )

            def tick(t: int, state, position=position, checkpoints=checkpoints) -> None:
                progress.update(position * settings.iterations + t)
                if t < settings.iterations and (signals.requested() or checkpoints.due()):
                    checkpoints.save(t, state(), wait=signals.requested())
                    signals.check()

            x = (torch.from_numpy(pixels).to(device).float() / 255 - mean) / std
            labels = torch.from_numpy(chunk.labels).to(device)
            x = recover_chunk(
                x,
                labels,
                observer,
                teacher,
                alignment,
                low,
                high,
                settings,
                views,
                size,
                ranks,
                any_size,
                tick,
                resumed[1] if resumed else None,
            )
            alignment.close()
            pixels = arrays.to_uint8(x * std + mean)
            arrays.save(path, pixels)
            checkpoints.clear()
        else:
            arrays.save(path, pixels)
