"""How the stages should scale from 1 to 256 GPUs: the runner's own division of the work, timed by a small model.

    python tools/simulate_scale.py [--step-ms 26] [--recover-ms 54] [--decode 7680] …

Who does what comes from the functions that the stages themselves use (chunks, class units, slices of a batch), on ImageNet-LT's class counts. How long a piece takes is
an assumption, NOT measured: arithmetic by the published rate of an A100 that `--dry-run` reckons with, round numbers for its network. Give your own from tools/bench_*.py.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields

import numpy as np

from ltdd_scale.data.sampling import rank_slice, spread
from ltdd_scale.launch.devices import DECODED, GPUS, RESNET50
from ltdd_scale.methods.rldd.calibrate import class_units
from ltdd_scale.methods.rldd.chunks import chunks

RATE = RESNET50 / GPUS["a100"].flops  # seconds of a training step on one image
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Machine:
    """Assumed speeds."""

    # An expert's step on `local_batch` images of each view: ResNet-50 at 224, forward and backward.
    step_ms: float = 1e3 * 64 * RATE
    local_batch: int = 32
    floor: float = 0.25  # share of that time below which smaller steps do not get faster
    forward_ms: float = 1e3 * 128 * RATE / 3  # forward of 128 images
    # One recovery iteration of a chunk: forward and back to the pixels, of observer and teacher.
    recover_ms: float = 1e3 * 100 * 2 * 2 * RATE / 3
    decode: float = 12 * DECODED  # images a second of the cores of one GPU
    local_gb: float = 200.0  # GB/s between the GPUs of one box
    network_gb: float = 20.0  # GB/s of a GPU between boxes
    box: int = 8  # GPUs a box
    latency_us: float = 25.0  # of one message
    disk_gb: float = 2.0  # GB/s of the file system


@dataclass
class Work:
    """ImageNet-LT, IPC 10, as configs/imagenet_lt_if256_ipc10.yaml has it."""

    classes: int = 1000
    largest: int = 1280
    smallest: int = 5
    images: int = 115_846
    epochs: int = 135
    global_batch: int = 256
    parameters: float = 29.7e6
    norm_layers: int = 55  # the projector's two are not calibrated
    statistics_gb: float = 0.425
    lead: int = 8  # images a class that go layer after layer, as calibrate.lead; 0: all do
    turns: int = 3  # of the lead and the set, which is assumed: calibration ends when it is close
    layers: int = 53  # of BatchNorm in the observer
    unit: int = 128
    ipc: int = 10
    chunk: int = 100  # images
    chunk_classes: int = 10
    iterations: int = 1000
    label_epochs: int = 300
    checkpoint_gb: float = 0.24


def class_counts(w: Work) -> np.ndarray:
    """A Pareto-like tail between the given ends with the given sum (the official counts are not the exponential rule)."""
    low, high, ranks = 0.05, 50.0, np.arange(w.classes) / (w.classes - 1)
    for _ in range(60):
        power = (low + high) / 2
        counts = w.smallest + (w.largest - w.smallest) * (1 - ranks) ** power
        low, high = (power, high) if counts.sum() > w.images else (low, power)
    return counts.astype(int)


def all_reduce(gb: float, world: int, m: Machine) -> float:
    """Seconds of a ring all-reduce."""
    if world == 1:
        return 0.0
    return (
        2 * (world - 1) / world * gb / (m.local_gb if world <= m.box else m.network_gb)
        + 2 * math.log2(world) * m.latency_us * 1e-6
    )


def expert(world: int, m: Machine, w: Work) -> tuple[float, str]:
    """One expert: the global batch lam, so a rank's slice shrinks."""
    local = max(
        s.stop - s.start for s in (rank_slice(w.global_batch, r, world) for r in range(world))
    )
    compute = m.step_ms / 1e3 * max(local / m.local_batch, m.floor)
    load = 2 * local / m.decode  # an image of each stream, decoded once for both views
    norms = (
        2 * w.norm_layers * all_reduce(1e-6, world, m)
    )  # BatchNorm over all ranks waits, forward and backward
    waits = max(
        0.0, all_reduce(w.parameters * 4 / 1e9, world, m) - compute * 2 / 3
    )  # gradients travel during the backward pass
    parts = {
        "arithmetic" if local >= m.local_batch * m.floor else "steps too small for a GPU": compute,
        "BatchNorm over ranks": norms,
        "gradients": waits,
    }
    step = sum(parts.values())
    bound = "decoding" if load > step else max(parts, key=lambda k: parts[k])
    return max(step, load) * (w.images // w.global_batch) * w.epochs, bound


def passes(w: Work) -> tuple[float, int]:
    """Of calibration: forward passes over the set, and how often its sums travel."""
    layer_by_layer = (w.layers + 1) / 2  # a pass for each layer, up to that layer
    if not w.lead:
        return layer_by_layer, 1
    led = np.minimum(class_counts(w), w.lead).sum() / w.images
    return w.turns * (1 + layer_by_layer * float(led)), 2 * w.turns


def calibrate(world: int, m: Machine, w: Work) -> tuple[float, str]:
    counts = class_counts(w)
    sizes = np.asarray([counts[u].sum() for u in class_units(counts, w.unit)])
    busiest = max(sizes[part].sum() for part in spread(sizes, world) if part)
    whole, sums = passes(w)
    arithmetic, load, talk = (
        whole * busiest / 128 * m.forward_ms / 1e3,
        busiest / m.decode,  # once
        sums * all_reduce(w.statistics_gb, world, m),
    )
    bound = (
        "the sums' all-reduce"
        if talk > max(arithmetic, load)
        else "the largest class"
        if busiest <= w.largest
        else "decoding"
        if load > arithmetic
        else "arithmetic"
    )
    return max(arithmetic, load) + talk, bound


def recover(world: int, m: Machine, w: Work) -> tuple[float, str]:
    work = chunks(w.classes, w.ipc, w.chunk, w.chunk_classes)
    turns = max(len(work[r::world]) for r in range(world))
    bound = (
        "fewer chunks than GPUs"
        if len(work) < world
        else "the last round of chunks"
        if turns * world > 1.15 * len(work)
        else "arithmetic"
    )
    return turns * w.iterations * m.recover_ms / 1e3, bound


def relabel(world: int, m: Machine, w: Work) -> tuple[float, str]:
    turns = max(len(range(r, w.label_epochs, world)) for r in range(world))
    bound = (
        "fewer epochs than GPUs"
        if w.label_epochs < world
        else "the last round of epochs"
        if turns * world > 1.15 * w.label_epochs
        else "arithmetic"
    )
    return turns * math.ceil(w.classes * w.ipc / 128) * m.forward_ms / 1e3, bound


STAGES = {
    "one expert": expert,
    "calibration": calibrate,
    "recovery": recover,
    "relabelling": relabel,
}


def table(m: Machine, w: Work) -> str:
    lines = [
        "| GPUs | " + " | ".join(f"{s}, min | × one GPU | bound by" for s in STAGES) + " |",
        "|---" * (1 + 3 * len(STAGES)) + "|",
    ]
    for world in WORLDS:
        cells = []
        for stage in STAGES.values():
            seconds, bound = stage(world, m, w)
            cells.append(f"{seconds / 60:.2f} | {stage(1, m, w)[0] / seconds:.1f} | {bound}")
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    return (
        "\n".join(lines)
        + f"\n\nA checkpoint of {w.checkpoint_gb} GB is written behind training in {w.checkpoint_gb / m.disk_gb:.1f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in (Machine, Work):
        for f in fields(kind):
            parser.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=type(f.default),
                default=f.default,
                help=f"{kind.__name__.lower()} (default: %(default)s)",
            )
    args = vars(parser.parse_args())
    m, w = (kind(**{f.name: args[f.name] for f in fields(kind)}) for kind in (Machine, Work))
    print(
        "Assumed: "
        + ", ".join(f"{f.name} {getattr(m, f.name):g}" for f in fields(m))
        + "\n\n"
        + table(m, w)
    )


if __name__ == "__main__":
    main()
