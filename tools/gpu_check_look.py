"""What `gpu_check.py` sees: how far two results are apart, and who waits for the GPU."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check import ROOT

from ltdd_scale.runtime import tensors

WAIT = "synchronizing CUDA operation"  # what torch says of a wait, in its debug mode


def files_of(folder: Path) -> dict[str, Path]:
    """What a stage leaves for others, by name."""
    found = (p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "log.jsonl")
    return {p.name: p for p in found if not p.name.startswith(".")}


def same(one: Path, other: Path) -> bool:
    a, b = files_of(one), files_of(other)
    return a.keys() == b.keys() and all(a[n].read_bytes() == b[n].read_bytes() for n in a)


def apart(one: Path, other: Path) -> str:
    """How far two results of a stage are apart, the worst file of each sort: grey levels (mean of
    the absolute differences), values (norm of the difference over the norm), numbers that are no
    fractions (share of those that differ), top-1 (points), losses (as values)."""
    a, b = files_of(one), files_of(other)
    found: dict[str, float] = {}
    if a.keys() != b.keys():
        return f"not the same files: {', '.join(sorted(a.keys() ^ b.keys()))[:80]}"
    for name in a:
        for sort, value in _differences(a[name], b[name]):
            found[sort] = max(found.get(sort, 0.0), value)
    return ", ".join(f"{sort} {value:.2g}" for sort, value in found.items()) or "nothing to compare"


def _differences(one: Path, other: Path) -> Iterator[tuple[str, float]]:
    if one.suffix == ".npy":
        x, y = np.load(one), np.load(other)
        if x.shape != y.shape:
            yield "SHAPES", 1.0
        elif x.dtype == np.uint8 and x.ndim == 4:
            yield "grey", float(np.abs(x.astype(int) - y.astype(int)).mean())
        elif x.dtype.kind == "f":
            yield "values", relative(x, y)
        else:
            yield "numbers", float((x != y).mean())
    elif one.suffix == ".pt":
        x, y = (np.concatenate(list(_floats(tensors.load(path)))) for path in (one, other))
        yield "values", relative(x, y)
    elif one.suffix == ".json":
        yield from _json_differences(json.loads(one.read_text()), json.loads(other.read_text()))


def relative(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-30))


def _floats(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value.double().numpy().reshape(-1)
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _floats(part)


def _json_differences(x: Any, y: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(x, dict) and isinstance(y, dict):
        for name in x.keys() & y.keys():
            yield from _json_differences(x[name], y[name], name)
    elif key in ("loss", "top1") and isinstance(x, float) and isinstance(y, float):
        yield (key, abs(x - y)) if key == "top1" else ("loss", abs(x - y) / max(abs(x), 1e-30))
    elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        if key == "loss" and x:
            yield "loss", relative(np.asarray(x), np.asarray(y))
        else:
            for one, other in zip(x, y, strict=True):
                yield from _json_differences(one, other)


@contextmanager
def listening(waits: Counter[str], notes: set[str], count: bool) -> Generator[None]:
    """Collect torch's warnings: `waits` by the line of ours that waits, all others as `notes`."""

    def hear(message: Warning | str, *_: Any) -> None:
        text = str(message)
        if WAIT in text:
            waits[_line()] += 1
        else:
            notes.add(text.splitlines()[0][:200])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear  # ty: ignore[invalid-assignment]
        if count:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if count:
                torch.cuda.set_sync_debug_mode("default")


def _line() -> str:
    """The innermost line of the package that is being run."""
    frame, package = sys._getframe(1), str(ROOT / "ltdd_scale")
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            name = Path(frame.f_code.co_filename).relative_to(package)
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
