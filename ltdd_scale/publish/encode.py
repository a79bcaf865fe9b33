"""Images as files: PNG and lossless WebP, or WebP and JPEG of a stated quality."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltdd_scale.errors import UserError


@dataclass(frozen=True)
class Encoding:
    """`name` is one of `settings.Images`; `quality` counts where `lossy` only."""

    name: str
    quality: int = 90

    @property
    def lossy(self) -> bool:
        return self.name in ("webp-lossy", "jpeg")

    @property
    def suffix(self) -> str:
        """Without the dot: also the name of the image in a WebDataset sample."""
        return {"png": "png", "jpeg": "jpg"}.get(self.name, "webp")

    @property
    def title(self) -> str:
        """As the card says it."""
        shown = {"png": "PNG", "jpeg": "JPEG", "webp": "lossless WebP", "webp-lossy": "WebP"}
        if not self.lossy:
            return shown[self.name]
        return f"{shown[self.name]} of quality {self.quality}"

    def encode(self, pixels: np.ndarray) -> bytes:
        """The file of an image uint8 [3, R, R]."""
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.save(buffer, **self._how())
        return buffer.getvalue()

    def _how(self) -> dict[str, Any]:
        match self.name:
            case "png":
                return {"format": "PNG"}
            case "webp":
                return {"format": "WEBP", "lossless": True, "quality": 100, "method": 4}
            case "webp-lossy":
                return {"format": "WEBP", "quality": self.quality, "method": 4}
        # Colours at full resolution: half of it is a lot of an image of 32 pixels.
        return {"format": "JPEG", "quality": self.quality, "subsampling": 0, "optimize": True}


def decode(content: bytes, name: str | Path = "an image") -> np.ndarray:
    """The pixels uint8 [3, R, R] of an image file's bytes. Raises `UserError`, which says `name`,
    where they are no image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: not an image that can be read ({error})") from None
