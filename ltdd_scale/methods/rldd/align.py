"""The alignment term of recovery: batch statistics under the observer against the fair ones.

RLDD §Recovery: Σ_layers w_l (‖μ_batch − μ‖₂ + ‖σ²_batch − σ²‖₂), against a mix of the global
statistics and those of the labels in the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models.moments import fair_statistics, position_sums

Targets = dict[str, list[tuple[float, Tensor, Tensor]]]  # layer → (weight, mean [C], variance [C])


class ChannelMoments(torch.autograd.Function):
    """x itself [n, C, H, W], and its mean and biased variance per channel, float32 [C] each.

    x passes through so that the gradient of the moments (∂mean/∂x = 1/N, ∂var/∂x = 2 (x − mean)/N)
    is added to x's own in one pass, not as a tensor of its own that autograd then has to add.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # torch.var_mean over (n, H, W) takes 40 times as long on a CPU.
        if x.device.type == "cpu":
            sums, squares = (s.sum(0) / (x.numel() // x.shape[1]) for s in position_sums(x))
            mean, var = sums.float(), (squares - sums**2).clamp(min=0).float()
        else:
            var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        (grad, grad_mean, grad_var), (x, mean) = grads, ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 * grad_var / n
        offset = grad_mean / n - slope * mean
        shape = (1, -1, 1, 1)
        # In float32: slope · x and offset nearly cancel.
        total = torch.addcmul(grad.float(), x.float(), slope.view(shape))
        return total.add_(offset.view(shape)).to(x.dtype)


class Alignment:
    """Captures the inputs of the aligned layers in a forward pass; their distance is the loss.

    `targets[layer]` is a list of (weight, mean [C], var [C]). The moving average of the batch
    statistics belongs to one chunk and starts with its first batch, so it is right from the first
    step and nothing leaks from chunk to chunk. Use as a context manager: its end takes the hooks
    off.
    """

    def __init__(self, layers: dict[str, nn.Module], targets: Targets, settings: Recover):
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
                new = self._averaged(name, mean.detach(), var.detach())
                # Straight through: the value of the average, the gradient of the batch.
                mean, var = (n + (m - m.detach()) for n, m in zip(new, (mean, var), strict=True))
            scale = self.first_layer if name == self._first else 1.0
            for weight, goal_mean, goal_var in self.targets[name]:
                distance = torch.linalg.vector_norm(mean - goal_mean) + torch.linalg.vector_norm(
                    var - goal_var
                )
                self.terms.append(scale * weight * distance)
            return (x,)

        return align

    def _averaged(self, name: str, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        old = self.average.get(name)
        if old is not None:
            mean = self.ema * old[0] + (1 - self.ema) * mean
            var = self.ema * old[1] + (1 - self.ema) * var
        self.average[name] = (mean, var)
        return mean, var

    def loss(self) -> Tensor:
        """Σ over the layers of the pass just made."""
        total = torch.stack(self.terms).sum()
        self.terms = []
        return total

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
