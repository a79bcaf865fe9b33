"""Sealed files of tensors: the bytes end in their own hash, which is checked on reading."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files

_SEAL = b"LTDD-sha256:"  # a sealed file ends in this and the 32-byte digest of all before it


def snapshot(value: Any) -> Any:
    """`value` with every tensor copied to the CPU: what a thread can write while training goes
    on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v) for v in value)
    return value


def save(path: str | Path, value: Any) -> None:
    """`torch.save` into a sealed file. Equal values give equal bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    files.write_bytes(path, content + _SEAL + hashlib.sha256(content).digest())


def is_whole(content: bytes) -> bool:
    """Whether a sealed file's bytes carry their own hash."""
    body = content[: -32 - len(_SEAL)]
    return content[len(body) : -32] == _SEAL and hashlib.sha256(body).digest() == content[-32:]


def load(path: str | Path, device: Any = "cpu") -> Any:
    """Read what `save` wrote. Raises `UserError` where the bytes are not those that were
    written."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror}") from None
    if not is_whole(content):
        raise UserError(
            f"{path} is damaged (its hash does not match); delete it and run the same command again"
        )
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
