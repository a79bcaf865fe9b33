"""Which images a source has, in one word: hashed instead of their path, so that a set that has
moved is the same set."""

from __future__ import annotations

from ltdd_scale.data.settings import Data
from ltdd_scale.data.sources import kind


def of(data: Data) -> str:
    """The digest of the source, whatever its place.

    Digits: their version. A list: what the lists say; another tree under the same lists counts as
    the same set. A folder: relative names and sizes of its images. CIFAR's pickles: their content.
    Shards: their manifest. Raises `UserError` where the source is missing.
    """
    return kind(data).digest(data)
