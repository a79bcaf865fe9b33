"""What inner loops ask of a GPU, counted and not timed: operations, and bytes that they read and write.

    python tools/bench_traffic.py                # ResNet-50 at 224 px; needs no GPU and no memory

Tensors without numbers ("meta") stand for those of a GPU. Each operation reads what it is given and writes what it returns; views move nothing. What a
GPU does at the same speed as it moves bytes (BatchNorm, sums, additions) is the number of bytes over its bandwidth; a small operation takes some
microseconds to start. Convolutions and matrix products are counted too: their own work comes on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltdd_scale.methods.rldd import recover
from ltdd_scale.methods.rldd.align import Alignment
from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models import kernels, moments, registry, syncbn
from ltdd_scale.runtime.ranks import Ranks

META = torch.device("meta")
HALF = torch.bfloat16
RANKS = 8


class Traffic(TorchDispatchMode):
    """Counts `operations` that move something, and their `bytes`."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func in FREE:
            return out
        read, written = _tensors((args, kwargs)), _tensors(out)
        # What is written in place is read by most operations, and it is the same tensor.
        self.operations += 1
        self.bytes += sum(map(_bytes, read)) + sum(map(_bytes, written))
        return out


FREE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.lift_fresh.default,
}


def _tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def shapes() -> torch.library.Library:
    """Gives the kernels of a GPU that ours call a form without numbers, for as long as what is
    returned lives."""
    library = torch.library.Library("aten", "IMPL", "Meta")

    def of_channels(x: Tensor) -> Tensor:
        return torch.empty(x.shape[1], device=x.device)

    def two(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return of_channels(x), of_channels(x)

    def reduced(grad: Tensor, *_: object) -> tuple[Tensor, ...]:
        return tuple(of_channels(grad) for _ in range(4))

    def like(x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)

    library.impl("batch_norm_stats", two)
    library.impl("batch_norm_gather_stats_with_counts", two)
    library.impl("batch_norm_elemt", like)
    library.impl("batch_norm_backward_reduce", reduced)
    library.impl("batch_norm_backward_elemt", like)
    return library


def count(
    work: Callable[[], object], on_gpu: bool = True, sent: list[int] | None = None
) -> Traffic:
    """Of `work` on meta tensors, taken for those of a GPU or not. `sent` gets the bytes of each collective."""

    def reduce(x: Tensor) -> None:
        if sent is not None:
            sent.append(_bytes(x))

    with ExitStack() as stack:
        library = shapes()
        stack.callback(library._destroy)
        stack.enter_context(mock.patch.object(kernels, "on_gpu", lambda _: on_gpu))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        stack.enter_context(mock.patch.object(dist, "all_reduce", reduce))
        stack.enter_context(mock.patch.object(dist, "get_world_size", lambda: RANKS))
        stack.enter_context(mock.patch.object(dist, "get_rank", lambda: 0))
        traffic = stack.enter_context(Traffic())
        work()
    return traffic


def network(net: str, size: int, synced: bool = False) -> nn.Module:
    """In bfloat16 but for its BatchNorm: what autocast makes of activations, without the copies that it makes of weights once a step."""

    def made() -> nn.Module:
        return registry.TwoHeads(registry.backbone(net, 0, "batch", size), 1000, 0)

    with META:
        model = made().to(HALF)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    model = model.to(memory_format=torch.channels_last)
    return syncbn.synchronize(model) if synced else model


def images(n: int, size: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(n, 3, size, size, device=META, dtype=dtype).to(
        memory_format=torch.channels_last
    )


def training(net: str, size: int, n: int, synced: bool) -> Callable[[], object]:
    """Forward and back through a network that trains."""
    model, x = network(net, size, synced).train(), images(n, size)
    return lambda: model(x).sum().backward()


def recovery(net: str, size: int, n: int, bare: bool) -> Callable[[], object]:
    """A step of recovery without a teacher; `bare`: forward and gradient of the images alone."""
    model = network(net, size).eval().requires_grad_(False)
    layers: dict[str, nn.Module] = dict(registry.norm_layers(model))
    settings = Recover(iterations=1, matching=0, teacher_ce=0, settle=0)
    labels = torch.zeros(n, dtype=torch.long, device=META)
    goals = {
        name: [(0.5, *(torch.zeros(layer.num_features, device=META) for _ in range(2)))] * 2
        for name, layer in layers.items()
    }
    one = torch.ones(1, 3, 1, 1, device=META)
    x = images(n, size, torch.float32)

    def plain() -> None:
        shown = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(shown.to(HALF)).float(), labels), shown)

    class Half(nn.Module):
        """Takes float32, as under autocast."""

        def forward(self, shown: Tensor) -> Tensor:
            return model(shown.to(HALF))

    ranks = Ranks(0, 1, META, None)
    objective = recover.Objective(Half(), None, -one, one, settings, size, True, ranks)
    windows = torch.from_numpy(np.tile(np.float32([0, 0, 1, 1]), (1, n, 1))).to(META)
    mirrored = torch.zeros(1, n, dtype=torch.bool, device=META)
    batch = recover.Batch(x, labels, windows, mirrored)

    def ours() -> None:
        with Alignment(layers, goals, settings) as alignment:
            recover.recover_chunk(objective, batch, alignment)

    return plain if bare else ours


def sums(n: int, channels: int, side: int) -> Callable[[], object]:
    """Calibration's sums of one layer."""
    x = torch.empty(n, channels, side, side, device=META, dtype=HALF)
    return lambda: moments.position_sums(x)


def rows(net: str, size: int, n: int) -> dict[str, Traffic]:
    """Title → what is counted, of a batch of n images."""
    wide = sums(n, 256, size // 4)
    return {
        f"BatchNorm of one rank: a pass of {n} rows, forward and back": count(
            training(net, size, n, False)
        ),
        "BatchNorm over ranks, written out": count(training(net, size, n, True), on_gpu=False),
        "BatchNorm over ranks, by a GPU's kernels": count(training(net, size, n, True)),
        f"forward and gradient of {n} images": count(recovery(net, size, n, True)),
        "a step of recovery, moments written out": count(
            recovery(net, size, n, False), on_gpu=False
        ),
        "a step of recovery, moments by a GPU's kernels": count(recovery(net, size, n, False)),
        f"calibration's sums of {n} × 256 × {size // 4}², written out": count(wide, on_gpu=False),
        "calibration's sums, by a GPU's kernels": count(wide),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()
    print(f"{asked.net} at {asked.size} px, bfloat16, torch {torch.__version__}\n")
    print("| | GB | operations |\n|---|---|---|")
    for title, found in rows(asked.net, asked.size, asked.batch).items():
        print(f"| {title} | {found.bytes / 1e9:.1f} | {found.operations:,} |")


if __name__ == "__main__":
    main()
