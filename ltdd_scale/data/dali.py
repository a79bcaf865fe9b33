"""Sets too large for memory, decoded by NVIDIA DALI: the same plans, windows and order as every
other backend.

DALI reads and decodes; what it is to decode comes from the plan through `external_source`. So the
loader has no state to save, resumes by being given the rest of the plans, and gives the same global
order on any number of ranks. Of an image as much is decoded as all of its views that follow each
other need, once; the views are cut out of that. One definition serves CPUs and GPUs (``mixed``
decoding, or decoding on the CPU). On a GPU DALI cuts and resizes too; on a CPU torch does, whose
resizing of bytes takes a quarter of the time. The two need not give the same bits.
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
from ltdd_scale.data.images import Plan, runs
from ltdd_scale.data.pieces import Piece, pieces
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError

DEPTH = 2  # batches decoded ahead
# Colour as CPUs and Pillow make it of JPEGs. A GPU's own decoder of JPEGs, where it has one, would
# get a share of each batch: an image's pixels would depend on what is beside it.
MIXED: dict[str, Any] = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0}


class _Resizer:
    """Decoded images of any size, uint8 [h, w, 3], to views float [n, 3, side, side] in [0, 1], on
    `threads` threads: torch lets go of the interpreter's lock."""

    def __init__(self, threads: int):
        self.threads, self.pool = threads, ThreadPoolExecutor(threads, "resize")

    def __call__(self, decoded: list[torch.Tensor], piece: Piece, side: int) -> torch.Tensor:
        # The mode is the caller's thread's alone: ours could not write into a tensor made in it.
        with torch.inference_mode(False):
            out = torch.empty(len(piece.cuts), 3, side, side)
        cuts, of = piece.cuts.tolist(), piece.of.tolist()

        def some(first: int) -> None:
            for k in range(first, len(cuts), self.threads):
                top, left, h, w = cuts[k]
                box = decoded[of[k]][top : top + h, left : left + w].permute(2, 0, 1)[None]
                # Rows that follow each other in memory are resized a sixth faster, copy included.
                box = box.contiguous(memory_format=torch.channels_last)
                small = F.interpolate(box, (side, side), mode="bilinear", antialias=True)[0]
                out[k].copy_(small.flip(-1) if piece.mirrored[k] else small).mul_(1 / 255)

        list(self.pool.map(some, range(self.threads)))
        return out


def cuts_itself(device: torch.device) -> bool:
    """Whether DALI cuts and resizes views, and not torch."""
    return device.type == "cuda"


def _type(name: str) -> Any:
    """One of DALI's constants, which its stubs do not know."""
    return getattr(importlib.import_module("nvidia.dali.types"), name)


class _Pipeline:
    """One DALI pipeline and what it is working on.

    `feed` iterates over (encoded images, top left corners of what to decode, its shapes), followed
    by (corners, shapes, mirrored) of each of `cut` views. DALI makes these; where `cut` is 0 it
    shows what it has decoded.
    """

    def __init__(
        self,
        batch_size: int,
        side: int,
        device: torch.device,
        threads: int,
        cut: int,
        on_cpu: bool,
    ):
        from nvidia.dali import Pipeline

        gpu = device.type == "cuda"
        self.batch_size, self.side, self.cut = batch_size, side, cut
        self.feed: Iterator[list] = iter(())
        self.pipe = Pipeline(
            batch_size,
            threads,
            device.index or 0 if gpu else None,
            seed=0,
            prefetch_queue_depth=DEPTH,
            exec_dynamic=True,
        )
        with self.pipe:
            images, given = self._decode("mixed" if gpu and not on_cpu else "cpu")
            images = images.gpu() if gpu and on_cpu else images
            views = [self._view(images, *given[k : k + 3], side) for k in range(0, len(given), 3)]
            self.pipe.set_outputs(*(views or [images]))
        self.pipe.build()

    def _decode(self, device: str) -> tuple[Any, list[Any]]:
        from nvidia.dali import fn

        types = ["UINT8", "INT32", "INT32", *["INT32", "INT32", "INT32"] * self.cut]
        encoded, anchor, shape, *views = fn.external_source(
            source=lambda: next(self.feed),
            num_outputs=len(types),
            dtype=[_type(name) for name in types],
            ndim=[1, 1, 1, *[1, 1, 0] * self.cut],
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
            **(MIXED if device == "mixed" else {}),
        )
        return images, views

    @staticmethod
    def _view(images: Any, anchor: Any, shape: Any, mirror: Any, side: int) -> Any:
        from nvidia.dali import fn

        images = fn.slice(
            images,
            anchor,
            shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
        )
        images = fn.resize(
            images,
            size=[side, side],
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

    def given(self, encoded: list[np.ndarray], piece: Piece) -> list:
        """What `feed` yields for a piece. Of a decoding with fewer views than `cut` the last is
        made again."""
        given = [encoded, piece.boxes[:, :2].copy(), piece.boxes[:, 2:].copy()]
        if self.cut:
            last = np.searchsorted(piece.of, np.arange(len(encoded)), side="right") - 1
            first = np.searchsorted(piece.of, np.arange(len(encoded)))
            for k in range(self.cut):
                at = np.minimum(first + k, last)
                corners, shapes = piece.cuts[at, :2], piece.cuts[at, 2:]
                given += [corners, shapes, piece.mirrored[at].astype(np.int32)]
        return given

    def run(self, stream: Any) -> list[Any] | None:
        """DALI's next outputs, or None at the end of the feed."""
        try:
            return list(self.pipe.run(stream))
        except StopIteration:
            self.pipe.reset()
            return None

    def views(self, outputs: list[Any], piece: Piece, resizer: _Resizer) -> torch.Tensor:
        """The views of a piece, float [n, 3, R, R] in [0, 1]. The tensor owns its memory."""
        if not self.cut:
            decoded = [torch.from_dlpack(image) for image in outputs[0]]
            images = resizer(decoded, piece, self.side)
        elif self.cut == 1:
            images = torch.from_dlpack(outputs[0].as_tensor())
        else:
            made = torch.stack([torch.from_dlpack(x.as_tensor()) for x in outputs], 1).flatten(0, 1)
            first = np.searchsorted(piece.of, piece.of)
            at = piece.of * self.cut + np.arange(len(piece.of)) - first
            full = len(at) == len(made)
            images = made if full else made[torch.from_numpy(at).to(made.device, non_blocking=True)]
        if len(piece.shown) == len(images):
            return images
        return images[torch.from_numpy(piece.shown).to(images.device, non_blocking=True)]


class DaliImages:
    """A split decoded by DALI on `threads` CPU threads, or on the GPU; with `on_cpu` on the
    threads, whatever the device."""

    def __init__(
        self,
        split: ShardSplit,
        resolution: int,
        device: torch.device,
        threads: int,
        on_cpu: bool = False,
    ):
        self.split, self.resolution, self.device = split, resolution, device
        self.threads, self.on_cpu = max(threads, 1), on_cpu
        self.sizes, self.labels, self.counts = split.sizes, split.labels, split.counts
        self._idle: list[_Pipeline] = []
        self._resizer = _Resizer(self.threads)

    def _pipeline(self, first: Plan, whole: bool, side: int) -> _Pipeline:
        """One that is large enough for the plan `first`, and makes images of `side` pixels."""
        lengths = np.diff(np.append(runs(first[0]), len(first[0])))
        cut = int(lengths.max(initial=1)) if cuts_itself(self.device) else 0
        cut = min(cut, 1) if whole else cut
        batch_size = max(len(lengths), 1)
        for k, found in enumerate(self._idle):
            if found.batch_size >= batch_size and (found.cut, found.side) == (cut, side):
                return self._idle.pop(k)
        # Of the earlier ones the buffers are not needed beside it, but for one of another kind:
        # initialization asks for two in turn, of crops that are judged and of those that are kept.
        others = [p for p in self._idle if (p.cut, p.side) != (cut, side)]
        self._idle = others[-1:]
        how = (side, self.device, self.threads, cut, self.on_cpu)
        return _Pipeline(batch_size, *how)

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1], in the plans' order. Plans are asked
        for as they are needed."""
        plans = iter(plans)
        first = next(plans, None)
        if first is None:
            return
        whole = spec.crop_scale is None
        as_they_are = whole or first[1] is None
        side = self.resolution if as_they_are else spec.resolution
        pipeline = self._pipeline(first, as_they_are, side)
        under_way: deque[tuple[Piece, list]] = deque()
        pipeline.feed = self._feed(itertools.chain([first], plans), pipeline, whole, under_way)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        parts = []
        try:
            while (outputs := pipeline.run(stream)) is not None:
                piece, _ = under_way.popleft()
                images = pipeline.views(outputs, piece, self._resizer)
                if piece.views is not None and whole:
                    images = augment.apply(images, piece.views, spec)
                elif piece.views is not None:  # cut and mirrored by now
                    images = augment.apply_ops(images, piece.views, spec)
                parts.append(images)
                if piece.ends:
                    yield parts[0] if len(parts) == 1 else torch.cat(parts)
                    parts = []
        except RuntimeError as error:
            raise self._culprit([piece for piece, _ in under_way], error) from error
        except GeneratorExit:  # the reader has had enough: what is under way is thrown away
            pipeline.feed = iter(())
            with suppress(RuntimeError):
                while pipeline.run(stream) is not None:
                    pass
                self._idle.append(pipeline)
            raise
        self._idle.append(pipeline)

    def _feed(
        self, plans: Iterable[Plan], pipeline: _Pipeline, whole: bool, under_way: deque
    ) -> Iterator[list]:
        """What DALI is given for the pieces of each plan; noted in `under_way`."""
        for plan in plans:
            for piece in pieces(plan, self.sizes, whole, pipeline.batch_size, pipeline.cut):
                given = pipeline.given(self._encoded(piece), piece)
                # DALI does not copy: the arrays must live until it is done with them.
                under_way.append((piece, given))
                yield given

    def _encoded(self, piece: Piece) -> list[np.ndarray]:
        return [self.split.view(int(i)) for i in piece.decoded]

    def _culprit(self, under_way: list[Piece], error: Exception) -> UserError:
        """Which image it was. DALI says only that one failed, and its pipeline is of no further
        use."""
        for i in np.concatenate([piece.decoded for piece in under_way]):
            alone = _Pipeline(1, self.resolution, self.device, 1, 0, self.on_cpu)
            (piece,) = pieces((np.asarray([i]), None), self.sizes, True, 1, 0)
            alone.feed = iter([alone.given(self._encoded(piece), piece)])
            try:
                alone.run(None)
            except RuntimeError as reason:
                lines = [line.strip() for line in str(reason).splitlines()]
                said = [line for line in lines if "rror" not in line and line]
                detail = said[0] if said else "it does not decode"
                return self.split.undecodable(int(i), ValueError(f"DALI: {detail}"))
        return UserError(
            f"DALI failed: {str(error).splitlines()[0]}; --set data.loader=torch does without it"
        )
