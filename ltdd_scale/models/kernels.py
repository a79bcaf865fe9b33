"""torch's kernels of a GPU that read activations of any type once, and add in float32.

They are what torch's own BatchNorm is made of. No CPU has them: what calls them has another way
for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    """Whether x [n, C, …] is where the kernels are."""
    return x.is_cuda


def memory_format(x: Tensor) -> torch.memory_format:
    """channels-last where x has that format, else the plain one. The kernels read a tensor and its
    gradient as if both had the format of one of them, and do not look."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x [n, C, …], float32 [C] each."""
    mean, invstd = torch.batch_norm_stats(x.contiguous(memory_format=memory_format(x)), 0.0)
    # Without an epsilon the inverse of a variance of zero is 0 there.
    return mean, invstd.pow(-2).nan_to_num_(nan=float("nan"), posinf=0.0)


def moments_backward(
    grad: Tensor, x: Tensor, mean: Tensor, of_mean: Tensor, of_var: Tensor
) -> Tensor:
    """The gradient of x: its own `grad`, and those of its `moments`, float32 [C] each:
    grad + (of_mean + 2 · of_var · (x − mean)) / N. In the type of x, added in float32."""
    layout = memory_format(x)
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    n = torch.full((1, 1), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
    # The kernel has (grad − a / N − (x − mean) · b / N · invstd²) · invstd.
    one = torch.ones_like(mean)
    return torch.batch_norm_backward_elemt(grad, x, mean, one, None, -of_mean, -2 * of_var, n)
