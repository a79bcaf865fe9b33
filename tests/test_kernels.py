"""What a GPU's own kernels do for BatchNorm over ranks, recovery and calibration.

No CPU has these kernels. Here each is written out, by torch's documentation of BatchNorm and the
sources of its SyncBatchNorm, so that what we give them can be checked without a GPU. With a GPU the
same tests run on it.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ltdd_scale.methods.rldd import align
from ltdd_scale.models import kernels, moments, syncbn
from tools import bench_traffic

GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
DEVICES = ["cpu", GPU]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def shaped(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


def dims(x):
    return [d for d in range(x.dim()) if d != 1]


def same_layout(x, *others):
    """The kernels do not look: who gives them two layouts gets nonsense."""
    for other in others:
        assert kernels.memory_format(other) == kernels.memory_format(x)
        assert other.is_contiguous(memory_format=kernels.memory_format(x))


def stats(x, eps):
    var, mean = torch.var_mean(x.float(), dims(x), correction=0)
    return mean, torch.where(var + eps == 0, 0.0, (var + eps).rsqrt())


def gathered(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    counts = counts[:, None].double()
    total = counts.sum()
    mean = (means.double() * counts).sum(0) / total
    within = (invstds.double() ** -2 - eps) * counts
    var = (within + (means - mean) ** 2 * counts).sum(0) / total
    running_mean.lerp_(mean.float(), momentum)
    running_var.lerp_((var * total / (total - 1)).float(), momentum)
    return mean.float(), (var + eps).rsqrt().float()


def elements(x, weight, bias, mean, invstd, eps):
    y = (x.float() - shaped(mean, x)) * shaped(invstd * weight, x) + shaped(bias, x)
    return y.to(x.dtype)


def reduced(grad, x, mean, invstd, weight, *_):
    same_layout(x, grad)
    sums = grad.float().sum(dims(x))
    products = (grad.float() * (x.float() - shaped(mean, x))).sum(dims(x))
    return sums, products, products * invstd, sums


def backward(grad, x, mean, invstd, weight, sums, products, counts):
    same_layout(x, grad)
    assert counts.dtype == torch.int32 and grad.dtype == x.dtype
    total = counts.sum()
    slope = products / total * invstd**2
    away = (x.float() - shaped(mean, x)) * shaped(slope, x)
    scale = invstd if weight is None else invstd * weight
    return ((grad.float() - shaped(sums / total, x) - away) * shaped(scale, x)).to(x.dtype)


def written_out():
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("batch_norm_stats", stats)
    library.impl("batch_norm_gather_stats_with_counts", gathered)
    library.impl("batch_norm_elemt", elements)
    library.impl("batch_norm_backward_reduce", reduced)
    library.impl("batch_norm_backward_elemt", backward)
    return library


@pytest.fixture
def device(request, monkeypatch):
    if request.param != "cpu":
        yield torch.device(request.param)
        return
    library = written_out()
    monkeypatch.setattr(kernels, "on_gpu", lambda _: True)
    yield torch.device("cpu")
    library._destroy()


def activations(device, layout, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6, 6) * torch.tensor([1.0, 3.0, 0.1, 1.0]).view(1, 4, 1, 1) + 2
    x[:, 3] = 1.5  # a channel that does not vary
    return x.to(device, dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_and_their_gradient(device, layout, dtype):
    x = activations(device, layout, dtype).requires_grad_()
    same, mean, var = align.ChannelMoments.apply(x)
    want_var, want_mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    assert mean.dtype == var.dtype == torch.float32 and torch.equal(same, x)
    assert torch.allclose(mean, want_mean, rtol=1e-5)
    assert torch.allclose(var, want_var, rtol=1e-4, atol=1e-9) and var[3] == 0
    a, b = torch.randn(2, 4).to(device)
    # Of the other layout: a gradient comes as it comes.
    c = torch.randn(x.shape).to(device, dtype).contiguous(memory_format=LAYOUTS[0])
    (ours,) = torch.autograd.grad((mean * a + var * b).sum() + (same * c).sum(), x)
    exact = x.detach().double().requires_grad_()
    exact_var, exact_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    (want,) = torch.autograd.grad((exact_mean * a + exact_var * b).sum() + (exact * c).sum(), exact)
    rounded = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert ours.dtype == dtype and torch.allclose(ours.double(), want, rtol=rounded, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_sums_over_positions(device):
    x = activations(device, torch.contiguous_format)
    sums, squares = moments.position_sums(x)
    assert sums.dtype == squares.dtype == torch.float64 and sums.shape == (5, 4)
    assert torch.allclose(sums, x.double().sum((2, 3)), rtol=1e-6)
    assert torch.allclose(squares, x.double().square().sum((2, 3)), rtol=1e-6)


def normalized(module, x, grad):
    """What `module` makes of x, and the gradients of x and of its parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad, module.weight.grad, module.bias.grad


def batchnorm(device, dims=2):
    module = (nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d)(4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
        module.bias.copy_(torch.arange(4.0))
    return module.to(device)


def close(ours, theirs, tolerance=1e-5):
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_batchnorm_over_one_rank_is_batchnorm(device, layout, tmp_path):
    """`layout` None: BatchNorm of vectors."""
    gpu, store = device.type == "cuda", dist.FileStore(str(tmp_path / "meet"), 1)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        x = activations(device, layout or torch.contiguous_format)
        x = x if layout else x[:, :, 0, 0].contiguous()
        grad = torch.randn(x.shape, device=device)
        plain = batchnorm(device, 2 if layout else 1)
        ours = syncbn.synchronize(nn.Sequential(batchnorm(device, 2 if layout else 1)))[0]
        assert close(normalized(ours, x, grad), normalized(plain, x, grad), 1e-4)
        assert close(ours.state_dict().values(), plain.state_dict().values())
        assert int(ours.num_batches_tracked) == 1
    finally:
        dist.destroy_process_group()


def of_rank(rank, folder):
    """Two ranks, of three rows and of two."""
    library = written_out()
    kernels.on_gpu = lambda _: True
    store = dist.FileStore(f"{folder}/meet", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x = activations("cpu", torch.channels_last)
    grad = torch.randn(x.shape)
    plain, ours = (
        batchnorm("cpu"),
        syncbn.synchronize(nn.Sequential(batchnorm("cpu")))[0],
    )
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    y, of_x, of_weight, of_bias = normalized(ours, x[part], grad[part])
    whole = normalized(plain, x, grad)
    assert close((y, of_x), (whole[0][part], whole[1][part]), 1e-4)
    for share, sum_of_all in zip((of_weight, of_bias), whole[2:], strict=True):
        dist.all_reduce(share)
        assert torch.allclose(share, sum_of_all, rtol=1e-4, atol=1e-4)
    assert close(ours.state_dict().values(), plain.state_dict().values())
    dist.destroy_process_group()
    library._destroy()


@pytest.mark.slow
def test_batchnorm_over_two_ranks_is_that_of_all_rows(tmp_path):
    mp.spawn(of_rank, (str(tmp_path),), nprocs=2)


def test_what_moves_through_a_gpus_memory():
    """ResNet-50, eight rows of 64 pixels: counted, so that a cast or a copy more is seen."""
    plain, over_ranks, by_kernels, bare, _, recovery, _, sums = bench_traffic.rows(
        "resnet50", 64, 8
    ).values()
    assert by_kernels.bytes < 1.4 * plain.bytes < over_ranks.bytes / 2
    assert by_kernels.operations < plain.operations + 53 * 12
    # Statistics read each activation once more, and so does their gradient.
    assert recovery.bytes < 1.6 * bare.bytes and recovery.operations < bare.operations + 53 * 10
    read = np.prod((8, 256, 16, 16)) * 2
    assert sums.bytes < 2.2 * read
