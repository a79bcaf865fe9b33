"""What decodes the images of a set: nothing once it is held in memory, else DALI or PyTorch.

Imports neither, so that a config can be resolved at once.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

from ltdd_scale.data.settings import Seen
from ltdd_scale.errors import UserError

if TYPE_CHECKING:
    from ltdd_scale.data.shards import ShardSplit

Loader = Literal["dali", "dali-cpu", "torch"]


def dali_is_installed() -> bool:
    return (
        importlib.util.find_spec("nvidia") is not None
        and importlib.util.find_spec("nvidia.dali") is not None
    )


def fits_memory(split: ShardSplit, seen: Seen) -> bool:
    """Whether the decoded images of `split` are held in memory."""
    return seen.fits(len(split))


def resolve_loader(seen: Seen) -> Loader:
    """What decodes sets too large for memory; "auto" is DALI where it is installed.

    Raises `UserError` for DALI where it is not.
    """
    if seen.loader == "torch":
        return "torch"
    if dali_is_installed():
        return "dali" if seen.loader == "auto" else seen.loader
    if seen.loader == "auto":
        return "torch"
    raise UserError(
        f"data.loader={seen.loader}, but nvidia-dali is not installed: "
        "pip install nvidia-dali-cuda130 (it needs no GPU), or --set data.loader=torch"
    )


def backend(split: ShardSplit, seen: Seen) -> Loader:
    """What decodes the images of `split`: DALI only where they do not fit memory."""
    return "torch" if fits_memory(split, seen) else resolve_loader(seen)
