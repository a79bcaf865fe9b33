"""What one stage uses, not the process in its whole life: peak memory, what it reads, how long it
keeps cores busy."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
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


def core_seconds() -> float:
    """Seconds that cores have worked for this process and its workers, once they are over."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Used:
    """What one rank used: its peaks by `peak_mb`, what it read, what cores did for it."""

    peak_mb: dict[str, int]
    read_mb: int
    core_seconds: float


class Meter:
    """What is used from when this is made."""

    def __init__(self):
        self._read, self._cores = read_mb(), core_seconds()
        reset_peak()

    def used(self) -> Used:
        return Used(peak_mb(), read_mb() - self._read, core_seconds() - self._cores)
