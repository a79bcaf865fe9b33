"""BatchNorm over the global batch, so that training does not depend on the number of ranks.

torch's own SyncBatchNorm refuses CPU tensors, and makes the host wait in each pass; this one runs
on both, and on a GPU by the same kernels without the wait.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltdd_scale.models import kernels

M = TypeVar("M", bound=nn.Module)


class _Normalize(torch.autograd.Function):
    """x [n, C, …] → (x − mean) / sqrt(var + eps) with the mean and biased variance over all ranks;
    also mean, var [C] and the global count."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        flat = flat.float()
        # Not a copy from the host, which would wait for the device.
        local = torch.full((1,), float(flat.shape[0] * flat.shape[2]), device=x.device)
        mean = flat.mean(2).mean(0)
        # Each rank's second moment is about its own mean: no large numbers cancel. The ranks' are
        # joined in float64.
        square = (torch.linalg.vector_norm((flat - mean[:, None]), dim=2) ** 2).sum(0)
        sums = torch.cat(
            [local.double(), mean.double() * local, square.double() + mean.double() ** 2 * local]
        )
        dist.all_reduce(sums)
        count, channels = sums[0], len(mean)
        mean = sums[1 : 1 + channels] / count
        var = (sums[1 + channels :] / count - mean**2).clamp(min=0)
        mean, var = mean.float(), var.float()
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = (1, -1) + (1,) * (x.dim() - 2)
        xhat = (x.float() - mean.view(shape)) * scale.view(shape)
        dims = [d for d in range(x.dim()) if d != 1]
        grad = grad.float()
        own = torch.cat([grad.sum(dims), (grad * xhat).sum(dims)])
        both = own.double()
        dist.all_reduce(both)
        channels = len(mean)
        mean_grad, mean_product = (
            (both[:channels] / count).float(),
            (both[channels:] / count).float(),
        )
        dx = (grad - mean_grad.view(shape) - xhat * mean_product.view(shape)) * (
            scale * weight
        ).view(shape)
        # The parameters' gradients are this rank's share: the engine averages over ranks as it does
        # for every other parameter.
        return (
            dx.to(x.dtype),
            own[channels:].to(weight.dtype),
            own[:channels].to(weight.dtype),
            None,
        )


class _Fused(torch.autograd.Function):
    """The same for x on a GPU, by the kernels of torch's SyncBatchNorm: a pass over x for the
    moments and one for the values, whatever the type of x. The running statistics move here."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor, float],
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=kernels.memory_format(x))
        mean, invstd = torch.batch_norm_stats(x, eps)
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        world_size, channels = dist.get_world_size(), len(mean)
        # A row a rank. The others' rows are zeros here, so the sum is exact: a gathering.
        rows = torch.zeros(world_size, 2 * channels + 1, device=x.device)
        rows[dist.get_rank()] = torch.cat([mean, invstd, count])
        dist.all_reduce(rows)
        means, invstds, counts = rows.split([channels, channels, 1], 1)
        running_mean, running_var, momentum = running
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x,
            means.contiguous(),
            invstds.contiguous(),
            running_mean,
            running_var,
            momentum,
            eps,
            counts.flatten(),
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=kernels.memory_format(x))
        sums, products, of_weight, of_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, True, True, True
        )
        both = torch.cat([sums, products])
        dist.all_reduce(both)
        sums, products = both.split(len(sums))
        dx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, sums, products, counts)
        # The parameters' gradients are this rank's share, as above.
        return dx, of_weight, of_bias, None, None


class _Synced(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        x = input
        tracked, mean_of, var_of = self.num_batches_tracked, self.running_mean, self.running_var
        if not self.training or tracked is None or mean_of is None or var_of is None:
            return super().forward(x)
        momentum = cast(float, self.momentum)
        tracked += 1
        if kernels.on_gpu(x):
            running = (mean_of, var_of, momentum)
            return _Fused.apply(x, self.weight, self.bias, running, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            mean_of.lerp_(mean, momentum)
            var_of.lerp_(var * (count / (count - 1)).float(), momentum)
        return y


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    pass


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    pass


def synchronize(model: M) -> M:
    """Make every BatchNorm of `model` one over all ranks, in place. Parameters, buffers and their
    names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d
        elif type(module) is nn.BatchNorm1d:
            module.__class__ = SyncedBatchNorm1d
    return model
