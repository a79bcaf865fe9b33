"""What becomes of an image that goes into a shard: decoded, and rewritten where it has to be.

Every image is decoded whole: DALI stops for good on one it cannot decode.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from ltdd_scale.data.settings import Chosen
from ltdd_scale.data.shards import square, turn, upright

# Formats and modes whose bytes are kept. Any other (CMYK, palettes, 16 bits, …) decoders understand
# each in its own way: it is rewritten as RGB, a turned photograph as JPEG, all else as PNG.
KEPT = {("JPEG", "RGB"): "jpg", ("JPEG", "L"): "jpg", ("PNG", "RGB"): "png", ("PNG", "L"): "png"}

REWRITTEN = 95  # JPEG quality of photographs whose bytes cannot be kept, in their own size

VALUES = np.arange(256)
# The mean colour is taken of every k-th pixel of every k-th row, k such that a short side of at
# least so many remains.
SAMPLED = 128


class Colours:
    """Integer sums over pixels: the mean and deviation do not depend on how work was shared out."""

    def __init__(self) -> None:
        self.sums, self.squares, self.pixels = np.zeros(3, np.int64), np.zeros(3, np.int64), 0

    def add(self, rgb: Image.Image) -> None:
        step = max(min(rgb.size) // SAMPLED, 1)
        if step > 1:
            rgb = rgb.resize(
                (rgb.width // step, rgb.height // step),
                Image.Resampling.NEAREST,
                box=(0, 0, rgb.width // step * step, rgb.height // step * step),
            )
        counts = np.asarray(rgb.histogram(), np.int64).reshape(3, 256)
        self.sums = self.sums + counts @ VALUES
        self.squares = self.squares + counts @ VALUES**2
        self.pixels += rgb.width * rgb.height


@contextmanager
def strict_about_size() -> Generator[None]:
    """Images so large that they may be an attack are refused, by an exception. Around all calls of
    `admit`: threads share what Python does of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def admit(content: bytes, chosen: Chosen) -> tuple[bytes, str, tuple[int, int], Image.Image]:
    """Bytes to store, their extension, the stored image's width and height, and the decoded RGB
    image. Raises with the reason where it does not decode.

    Every coefficient of a JPEG is read, which is what can fail; large ones whose bytes are kept are
    then shown at half their size, which takes half the time. With a `store_resolution` the centre
    square of that side is stored, as JPEG of `store_quality`, or as PNG where that is 0. What EXIF
    says is turned is turned here: decoders do not agree on it.
    """
    if not content:
        raise ValueError("zero bytes")
    side, quality = chosen.store_resolution, chosen.store_quality
    image = Image.open(io.BytesIO(content))
    size, ext = image.size, KEPT.get((image.format or "", image.mode))
    ext = None if turn(image) is not None or image.has_transparency_data else ext
    if ext and not side and min(size) >= 2 * SAMPLED:
        image.draft(image.mode, (size[0] // 2, size[1] // 2))  # of JPEGs only
    image.load()
    shown = upright(image)
    if side:
        shown, ext = square(shown, side), None
    if ext is None:
        if not side:  # a photograph as PNG would be ten times as large
            photograph = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            quality = REWRITTEN if photograph else 0
        buffer = io.BytesIO()
        shown.save(buffer, "JPEG", quality=quality) if quality else shown.save(buffer, "PNG")
        content, ext, size = buffer.getvalue(), "jpg" if quality else "png", shown.size
    return content, ext, size, shown
