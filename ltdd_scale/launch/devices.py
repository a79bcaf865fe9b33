"""How fast devices are: what a dry run reckons with. Published rates, with where they stand; only
the CPU is measured, here and now."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from ltdd_scale.launch import limits
from ltdd_scale.launch.profile import Profile

RESNET50 = 3 * 2 * 4.09e9  # FLOPs of a training step on one image of 224 px: 4.09 G products
DECODED = (
    640.0  # JPEGs of 500 × 375 a second and core, decoded and cut: benchmarks/2026-11-21-loader.md
)


@dataclass(frozen=True)
class Device:
    """What one device reaches.

    `flops` a second in training a large network; `together`: the share of it that each of eight
    in a box keeps; `step`: seconds that no step of a small network is shorter than.
    """

    name: str
    flops: float
    together: float
    step: float
    source: str


_NVIDIA = "NVIDIA DeepLearningExamples, ResNet-50 v1.5, PyTorch, mixed precision"
# A student's step on an H200 that others shared (2026-11-27-gpu.md); others were not measured.
_STEP = 7e-3
GPUS = {
    device.name: device
    for device in (
        Device("v100", 1200 * RESNET50, 8322 / 1200 / 8, _STEP, f"{_NVIDIA}: 1,200 images/s"),
        Device("a100", 2470 * RESNET50, 16621 / 2470 / 8, _STEP, f"{_NVIDIA}: 2,470 images/s"),
        Device(
            "h100",
            2 * 2470 * RESNET50,
            16621 / 2470 / 8,
            _STEP,
            "Lambda, NVIDIA H100 deep learning performance analysis: about twice an A100 for "
            "vision models",
        ),
    )
}


def of(profile: Profile, local: bool) -> Device:
    """The device that a dry run reckons with. `local`: the jobs run on this machine."""
    name = profile.device
    if name == "auto":
        name = _here() if local else "a100"
    device = core() if name == "cpu" else GPUS[name]
    if profile.tflops:
        given = "tflops in the profile"
        return replace(device, flops=profile.tflops * 1e12, together=1.0, source=given)
    return device


def _here() -> str:
    """What this machine has; a GPU that is not known here counts as an A100."""
    if not limits.may_have_gpu():
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name().lower()
    return next((name for name in GPUS if name in found), "a100")


def core() -> Device:
    """A core of this machine: a small network's training steps, timed for about a second."""
    import torch

    from ltdd_scale.models import flops, registry

    net, batch = ("convnet3", 64, "batch", 32), 32
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, x = registry.backbone(*net), torch.zeros(batch, 3, 32, 32)
        model(x).sum().backward()  # the first is slow
        begin, steps = time.perf_counter(), 0
        while (took := time.perf_counter() - begin) < 1.0:
            model(x).sum().backward()
            steps += 1
    finally:
        torch.set_num_threads(before)
    work = steps * batch * flops.forward(*net) * (1 + flops.BACKWARD)
    return Device("cpu", work / took, 1.0, 0.0, "one core of this machine, just measured")
