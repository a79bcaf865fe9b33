"""Small image sets between stages: one ``00000.npy`` a class, uint8 [IPC, 3, R, R]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files


def class_file(folder: Path, label: int) -> Path:
    return folder / f"{label:05d}.npy"


def save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    files.write_bytes(path, buffer.getvalue())


def load(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; delete its folder and run the stage again") from None


def load_classes(folder: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """All classes of a folder: uint8 [N, 3, R, R] and labels int64 [N], class by class."""
    parts = [load(class_file(folder, c)) for c in range(num_classes)]
    return np.concatenate(parts), np.repeat(np.arange(num_classes), [len(p) for p in parts])


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
