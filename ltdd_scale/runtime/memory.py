"""What one stage uses, not the process in its whole life: peak memory, and what it reads."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


def reset_peak() -> None:
    """Begin to measure anew. Where the kernel does not let us, the peak is the process's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_mb() -> dict[str, int]:
    """Peak memory since `reset_peak` in MB: of the process, and of its GPU where it has one."""
    out = {}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(x for x in lines if x.startswith("VmHWM:"))
        out["cpu"] = int(line.split()[1]) // 1024
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out["gpu"] = torch.cuda.max_memory_allocated() >> 20
    return out


def read_mb() -> int:
    """MB that this process and its workers, once they are over, have read so far: from files and
    pipes, whether the disk or its cache gave them. 0 where the kernel does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("rchar:")).split()[1]) >> 20
    return 0
