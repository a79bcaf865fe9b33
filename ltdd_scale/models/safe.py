"""Weights as safetensors: for people without this package. The recipe and a hash of it and of all
tensors stand in the file's metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files

SUFFIX = ".safetensors"


def save(path: Path, recipe: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write `weights` with `recipe` (``frozen.recipe``) as JSON in the metadata. Equal weights give
    equal bytes."""
    weights = {name: value.cpu().contiguous() for name, value in sorted(weights.items())}
    said = json.dumps(recipe)
    told = {"format": "pt", "recipe": said, "sha256": _digest(weights, said)}
    files.write_bytes(path, _in_order(safetensors.torch.save(weights, told)))


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(recipe, weights) on the CPU. Raises `UserError` where the file is missing, damaged, or not
    from here."""
    try:
        with safetensors.safe_open(path, "pt") as opened:
            told = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        said = error.strerror or "no such file"
        raise files.kind(error)(f"cannot read {path}: {said}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); write it again") from None
    if "recipe" not in told:
        raise UserError(
            f"{path} does not say what network it is of (no 'recipe' in its metadata): it is not "
            "from ltdd_scale"
        )
    # The first files of this kind have a hash of the tensors alone.
    if told.get("sha256") not in (_digest(weights, told["recipe"]), _digest(weights, "")):
        raise UserError(f"{path} is damaged (its hash does not match); write it again")
    try:
        return json.loads(told["recipe"]), weights
    except ValueError as error:
        raise UserError(f"{path} is damaged (its recipe: {error}); write it again") from None


def _in_order(content: bytes) -> bytes:
    """The same file with its header's keys in order: the library writes metadata in any."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[end:]


def _digest(weights: dict[str, Tensor], recipe: str) -> str:
    digest = hashlib.sha256(recipe.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
