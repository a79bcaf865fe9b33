"""Sets too large for memory, decoded by NVIDIA DALI: the same plans, windows and order as every
other backend.

DALI reads, decodes and cuts; what it is to cut comes from the plan through `external_source`. So
the loader has no state to save, resumes by being given the rest of the plans, and gives the same
global order on any number of ranks. One definition serves CPUs and GPUs (``mixed`` decoding). On a
GPU DALI resizes too; on a CPU torch does, whose resizing of bytes takes a quarter of the time. The
two need not give the same bits.
"""

from __future__ import annotations

import importlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ltdd_scale.data import augment
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Plan
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError

DEPTH = 2  # batches decoded ahead


class _Resizer:
    """Decoded images of any size, uint8 [h, w, 3], to float [n, 3, R, R] in [0, 1], on `threads`
    threads: torch lets go of the interpreter's lock."""

    def __init__(self, side: int, threads: int):
        self.side, self.threads, self.pool = side, threads, ThreadPoolExecutor(threads, "resize")

    def __call__(self, decoded: list[torch.Tensor], mirrored: np.ndarray) -> torch.Tensor:
        # The mode is the caller's thread's alone: ours could not write into a tensor made in it.
        with torch.inference_mode(False):
            out = torch.empty(len(decoded), 3, self.side, self.side)

        def some(first: int) -> None:
            for k in range(first, len(decoded), self.threads):
                small = F.interpolate(
                    decoded[k].permute(2, 0, 1)[None],
                    (self.side, self.side),
                    mode="bilinear",
                    antialias=True,
                )[0]
                out[k].copy_(small.flip(-1) if mirrored[k] else small).mul_(1 / 255)

        list(self.pool.map(some, range(self.threads)))
        return out


def _type(name: str) -> Any:
    """One of DALI's constants, which its stubs do not know."""
    return getattr(importlib.import_module("nvidia.dali.types"), name)


class _Pipeline:
    """One DALI pipeline and what it is working on. `feed` iterates over (encoded images, top left
    corners of boxes, their shapes, mirrored)."""

    def __init__(self, batch_size: int, resolution: int, device: torch.device, threads: int):
        from nvidia.dali import Pipeline

        gpu = device.type == "cuda"
        self.batch_size = batch_size
        self.feed: Iterator[tuple] = iter(())
        self.pipe = Pipeline(
            batch_size,
            threads,
            device.index or 0 if gpu else None,
            seed=0,
            prefetch_queue_depth=DEPTH,
            exec_dynamic=True,
        )
        with self.pipe:
            images, mirror = self._decode("mixed" if gpu else "cpu")
            if gpu:
                images = self._resize(images, mirror, resolution)
            self.pipe.set_outputs(images, mirror)
        self.pipe.build()

    def _decode(self, device: str) -> tuple[Any, Any]:
        from nvidia.dali import fn

        encoded, anchor, shape, mirror = fn.external_source(
            source=lambda: next(self.feed),
            num_outputs=4,
            dtype=[_type(name) for name in ("UINT8", "INT32", "INT32", "INT32")],
            ndim=[1, 1, 1, 0],
            no_copy=True,
        )
        images = fn.decoders.image_slice(
            encoded,
            anchor,
            shape,
            device=device,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            output_type=_type("RGB"),
            # Pixels as they are stored, which is what Pillow and torchvision show.
            adjust_orientation=False,
        )
        return images, mirror

    @staticmethod
    def _resize(images: Any, mirror: Any, resolution: int) -> Any:
        from nvidia.dali import fn

        images = fn.resize(
            images,
            size=[resolution, resolution],
            interp_type=_type("INTERP_LINEAR"),
            antialias=True,
        )
        return fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=0.0,
            std=255.0,
            dtype=_type("FLOAT"),
            output_layout="CHW",
        )

    def run(self, stream: Any, resizer: _Resizer | None) -> torch.Tensor | None:
        """The next batch, float [n, 3, R, R] in [0, 1], or None at the end of the feed. The tensor
        owns its memory."""
        try:
            images, mirrored = self.pipe.run(stream)
        except StopIteration:
            self.pipe.reset()
            return None
        if resizer is None:
            return torch.from_dlpack(images.as_tensor())
        return resizer(
            [torch.from_dlpack(image) for image in images], np.asarray(mirrored.as_tensor())
        )


class DaliImages:
    """A split decoded by DALI on `threads` CPU threads, or on the GPU."""

    def __init__(self, split: ShardSplit, resolution: int, device: torch.device, threads: int):
        self.split, self.resolution, self.device = split, resolution, device
        self.threads = max(threads, 1)
        self.sizes, self.labels, self.counts = split.sizes, split.labels, split.counts
        self._idle: list[_Pipeline] = []
        self._resizer = None if device.type == "cuda" else _Resizer(resolution, self.threads)

    def _pipeline(self, batch_size: int) -> _Pipeline:
        for k, found in enumerate(self._idle):
            if found.batch_size >= batch_size:
                return self._idle.pop(k)
        # A larger batch has come: the smaller pipelines' buffers are not needed beside it.
        self._idle.clear()
        return _Pipeline(batch_size, self.resolution, self.device, self.threads)

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1], in the plans' order. Plans are asked
        for as they are needed."""
        plans = iter(plans)
        first = next(plans, None)
        if first is None:
            return
        pipeline, whole = self._pipeline(max(len(first[0]), 1)), spec.crop_scale is None
        under_way: deque[tuple[Plan, Any, bool]] = deque()
        pipeline.feed = self._feed(
            itertools.chain([first], plans), pipeline.batch_size, whole, under_way
        )
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        parts = []
        try:
            while (images := pipeline.run(stream, self._resizer)) is not None:
                (_, views), _, ends = under_way.popleft()
                if views is not None and whole:
                    images = augment.apply(images, views, spec)
                elif views is not None:  # cut and mirrored by now
                    images = augment.apply_ops(images, views, spec)
                parts.append(images)
                if ends:
                    yield parts[0] if len(parts) == 1 else torch.cat(parts)
                    parts = []
        except RuntimeError as error:
            raise self._culprit([plan for plan, _, _ in under_way], error) from error
        except GeneratorExit:  # the reader has had enough: what is under way is thrown away
            pipeline.feed = iter(())
            with suppress(RuntimeError):
                while pipeline.run(stream, self._resizer) is not None:
                    pass
                self._idle.append(pipeline)
            raise
        self._idle.append(pipeline)

    def _feed(
        self, plans: Iterable[Plan], size: int, whole: bool, under_way: deque
    ) -> Iterator[tuple]:
        """What DALI is given for each plan, in pieces of at most `size` images; noted in
        `under_way` with the last piece of a plan marked."""
        for indices, views in plans:
            for i in range(0, max(len(indices), 1), size):
                piece, seen = indices[i : i + size], None if views is None else views[i : i + size]
                if seen is None or whole:
                    boxes = augment.centre_boxes(self.sizes[piece])
                    mirrored = np.zeros(len(piece), np.int32)
                else:
                    boxes = augment.pixel_boxes(seen.windows, self.sizes[piece])
                    mirrored = seen.mirrored.astype(np.int32)
                given = self._given(piece, boxes, mirrored)
                # DALI does not copy: the arrays must live until it is done with them.
                under_way.append(((piece, seen), given, i + size >= len(indices)))
                yield given

    def _given(self, indices: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray) -> tuple:
        """What `_Pipeline.feed` yields for some images."""
        encoded = [self.split.view(int(i)) for i in indices]
        return encoded, boxes[:, :2].copy(), boxes[:, 2:].copy(), mirrored

    def _culprit(self, plans: list[Plan], error: Exception) -> UserError:
        """Which image it was. DALI says only that one failed, and its pipeline is of no further
        use."""
        for indices, _ in plans:
            for i in indices:
                alone, one = _Pipeline(1, self.resolution, self.device, 1), np.asarray([i])
                box = augment.centre_boxes(self.sizes[one])
                alone.feed = iter([self._given(one, box, np.zeros(1, np.int32))])
                try:
                    alone.run(None, self._resizer)
                except RuntimeError as reason:
                    lines = [line.strip() for line in str(reason).splitlines()]
                    said = [line for line in lines if "rror" not in line and line]
                    detail = said[0] if said else "it does not decode"
                    return self.split.undecodable(int(i), ValueError(f"DALI: {detail}"))
        return UserError(
            f"DALI failed: {str(error).splitlines()[0]}; --set data.loader=torch does without it"
        )
