"""Whole images that are looked at pass after pass: decoded once, kept as bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ltdd_scale.data import distilled
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, MemoryImages, Plan


class Kept:
    """The batches of `plans`, whole images float [n, 3, R, R] in [0, 1] on `device`, again and
    again.

    The first pass decodes them. Their bytes are kept: in memory where they take at most `memory`
    bytes, else in a file without a name in the system's folder for temporary files (the
    environment's TMPDIR), which is gone when the process is. Without room there each pass decodes
    anew, and `say` tells so. All ways give the same bits. A set that is in memory by now is just
    looked at.
    """

    def __init__(
        self,
        images: Images,
        plans: Sequence[Plan],
        spec: ViewSpec,
        device: torch.device,
        memory: float,
        say: Callable[[str], None],
    ):
        self.images, self.plans, self.spec, self.device = images, plans, spec, device
        side = spec.resolution
        self.ends = np.cumsum([0, *(len(indices) for indices, _ in plans)])
        self.shape = (int(self.ends[-1]), 3, side, side)
        self.pixels: np.ndarray | None = None
        self.complete = False
        if not isinstance(images, MemoryImages) and len(plans):
            self.pixels = self._room(memory, say)

    def _room(self, memory: float, say: Callable[[str], None]) -> np.ndarray | None:
        size = int(np.prod(self.shape))
        if size <= memory:
            return np.empty(self.shape, np.uint8)
        with tempfile.TemporaryFile(prefix="ltdd-decoded-") as file:
            try:
                # A file with holes would fail when they are filled, and then by a signal.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                where = tempfile.gettempdir()
                say(
                    f"no room for {size / 1e9:.1f} GB of decoded images in {where} "
                    f"({error.strerror}): each pass decodes anew; TMPDIR may name another folder"
                )
                return None
            return np.memmap(file, np.uint8, "r+", shape=self.shape)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if isinstance(self.images, MemoryImages):
            yield from self.images.stream(self.plans, self.spec)
        elif self.complete and self.pixels is not None:
            for begin, end in zip(self.ends, self.ends[1:], strict=False):
                yield self._shown(self.pixels[begin:end])
        else:
            begins = zip(self.ends, self.images.stream(self.plans, self.spec), strict=False)
            for begin, x in begins:
                pixels = distilled.to_uint8(x)
                if self.pixels is not None:
                    self.pixels[begin : begin + len(pixels)] = pixels
                yield self._shown(pixels)
            self.complete = True

    def _shown(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(pixels)).to(self.device, non_blocking=True).float() / 255
