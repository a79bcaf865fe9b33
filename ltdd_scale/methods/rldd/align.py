"""The alignment term of recovery: batch statistics under the observer against the fair ones.

RLDD §Recovery: Σ_layers w_l (‖μ_batch − μ‖₂ + ‖σ²_batch − σ²‖₂), against a mix of the global
statistics and those of the labels in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models import kernels
from ltdd_scale.models.moments import fair_statistics, position_sums

Targets = dict[str, list[tuple[float, Tensor, Tensor]]]  # layer → (weight, mean [C], variance [C])


class ChannelMoments(torch.autograd.Function):
    """x itself [n, C, H, W], and its mean and biased variance per channel, float32 [C] each.

    x passes through so that the gradient of the moments (∂mean/∂x = 1/N, ∂var/∂x = 2 (x − mean)/N)
    is added to x's own in one pass, not as a tensor of its own that autograd then has to add.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if kernels.on_gpu(x):
            mean, var = kernels.moments(x)
        else:  # torch.var_mean over (n, H, W) takes 40 times as long on a CPU
            sums, squares = (s.sum(0) / (x.numel() // x.shape[1]) for s in position_sums(x))
            mean, var = sums.float(), (squares - sums**2).clamp(min=0).float()
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        (grad, grad_mean, grad_var), (x, mean) = grads, ctx.saved_tensors
        if kernels.on_gpu(x):
            return kernels.moments_backward(grad, x, mean, grad_mean, grad_var)
        n = x.numel() // x.shape[1]
        slope = 2 * grad_var / n
        offset = grad_mean / n - slope * mean
        shape = (1, -1, 1, 1)
        # In float32: slope · x and offset nearly cancel.
        total = torch.addcmul(grad.float(), x.float(), slope.view(shape))
        return total.add_(offset.view(shape)).to(x.dtype)


class PartNorms(torch.autograd.Function):
    """The 2-norm of each part of a vector, float32 [n] → [parts], for all parts at once: forward
    one kernel on a GPU, backward a few, however many layers there are."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], part_of: Tensor) -> Tensor:
        """`sizes` of the parts; `part_of` int64 [n]: the part of each number."""
        norms = torch.stack(torch._foreach_norm(x.split(sizes)))
        ctx.save_for_backward(x, norms, part_of)
        return norms

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norms, part_of = ctx.saved_tensors
        norms = norms[part_of]
        return grads[0][part_of] * (x / norms).masked_fill_(norms == 0, 0), None, None


class Alignment:
    """Captures the inputs of the aligned layers in a forward pass; their distance is the loss.

    `targets[layer]` is a list of (weight, mean [C], var [C]), as long for each layer. The moving
    average of the batch statistics belongs to one chunk and starts with its first batch, so it is
    right from the first step and nothing leaks from chunk to chunk. Use as a context manager: its
    end takes the hooks off. A pass comes to each layer once. The statistics of all layers are one
    vector, means then variances: 53 layers have a few operations together, not thousands.
    """

    def __init__(self, layers: dict[str, nn.Module], targets: Targets, settings: Recover):
        self.names, self.ema = list(layers), settings.ema
        goals = [targets[name] for name in self.names]
        self._sizes = [len(mean) for mean in (goal[0][1] for goal in goals)] * 2
        columns = list(zip(*goals, strict=True))  # a target of every layer, then the next
        self._goals = [torch.cat([g[1] for g in c] + [g[2] for g in c]) for c in columns]
        device = self._goals[0].device
        scales = [settings.first_layer] + [1.0] * (len(goals) - 1)
        weights = [
            [s * weight for weight, *_ in goal] for s, goal in zip(scales, goals, strict=True)
        ]
        self._weights = torch.tensor(weights).to(device, non_blocking=True)  # [layers, targets]
        parts = torch.arange(len(columns) * len(self._sizes))
        sizes = torch.tensor(self._sizes * len(columns))
        self._part_of = parts.repeat_interleave(sizes).to(device, non_blocking=True)
        self._vector: Tensor | None = None  # the moving average
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()
        ]

    def _hook(self, name: str):
        def align(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            x, mean, var = ChannelMoments.apply(inputs[0])
            self._seen[name] = (mean, var)
            return (x,)

        return align

    @property
    def average(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer → the moving averages of its mean and variance; empty before the first pass."""
        if self._vector is None:
            return {}
        parts, number = self._vector.split(self._sizes), len(self.names)
        return dict(zip(self.names, zip(parts[:number], parts[number:], strict=True), strict=True))

    @average.setter
    def average(self, saved: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._vector = self._joined(saved) if saved else None

    def _joined(self, moments: Mapping[str, Sequence[Tensor]]) -> Tensor:
        return torch.cat([moments[name][k] for k in (0, 1) for name in self.names])

    def terms(self) -> Tensor:
        """Of the pass just made, float32 [layers, targets]: weighted distances."""
        seen = self._joined(self._seen)
        self._seen = {}
        if self.ema:
            now, old = seen.detach(), self._vector
            self._vector = now if old is None else self.ema * old + (1 - self.ema) * now
            # Straight through: the value of the average, the gradient of the batch.
            seen = self._vector + (seen - now)
        away = torch.cat([seen - goal for goal in self._goals])
        norms = PartNorms.apply(away, self._sizes * len(self._goals), self._part_of)
        of_mean, of_var = norms.view(len(self._goals), 2, -1).unbind(1)
        return self._weights * (of_mean + of_var).T

    def loss(self) -> Tensor:
        """Σ over the layers and targets of the pass just made."""
        return self.terms().flatten().sum()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Alignment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def alignment_targets(
    statistics: dict[str, Any],
    layers: list[str],
    labels: np.ndarray,
    classwise: float,
    variance: str,
    device: torch.device,
) -> Targets:
    """Per layer, float32 on `device`: the global statistics with weight 1 − `classwise`, and those
    of `labels` int64 [n] with weight `classwise`.

    Only the classes of `labels` are read, so memory does not grow with the number of classes.
    Without fair `statistics` the observer's own are the only target.
    """

    def sent(values: Tensor) -> Tensor:
        return values.float().to(device, non_blocking=True)

    targets: Targets = {}
    for name in layers:
        if statistics["fair"]:
            moments = statistics["moments"][name]
            own = moments[torch.from_numpy(labels)]
            pairs = [
                (1 - classwise, *fair_statistics(moments, variance)),
                (classwise, *fair_statistics(own, variance)),
            ]
        else:
            pairs = [(1.0, *statistics["running"][name])]
        targets[name] = [(w, sent(m), sent(v)) for w, m, v in pairs if w > 0]
    return targets
