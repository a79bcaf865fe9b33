"""What the benchmarks share: timing in turns, and a table with its circumstances."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

from ltdd_scale.runtime import ranks
from ltdd_scale.runtime.ranks import Ranks


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in `rounds` rounds of all of them (so that a busy machine slows all alike), after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, work in candidates.items():
            _synchronize()
            begin = time.perf_counter()
            work()
            _synchronize()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def peak_mb(work: Callable[[], object]) -> float:
    """Largest memory while `work` runs, in MB: of the GPU's allocator, or of this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's own mark of the peak starts again
    work()
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        / 1e3
    )


def begin(doc: str) -> tuple[int, Ranks]:
    """Read --rounds and --threads, print the circumstances; return the rounds and this process, in float32 on the GPU where there is one."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(circumstances(args.threads), "\n")
    # As a run joins: on a GPU with deterministic kernels, and no TF32 in float32.
    return args.rounds, ranks.join("auto", "float32", args.threads)


def circumstances(threads: int) -> str:
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        model = next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.machine(),
        )
        where = f"{model}, {threads} thread{'s' * (threads > 1)}"
    return f"{where}; torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"


def table(title: str, times: dict[str, list[float]], limit: str, items: int, unit: str) -> str:
    """Median, spread (the middle half), rate, and time relative to the candidate called `limit`."""
    base = statistics.median(times[limit])
    lines = [
        f"### {title}",
        "",
        f"| | median s | middle half | {unit}/s | × {limit} |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        middle = statistics.median(values)
        lines.append(
            f"| {name} | {middle:.3f} | {quarters[0]:.3f} – {quarters[2]:.3f} | {items / middle:,.0f} | {middle / base:.2f} |"
        )
    return "\n".join([*lines, "", f"n = {len(next(iter(times.values())))} each, in turns.", ""])
