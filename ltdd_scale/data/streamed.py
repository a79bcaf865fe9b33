"""Sets too large for memory, decoded as they are needed by PyTorch's worker processes: the backend
that runs everywhere."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ltdd_scale.data import augment
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.images import Plan, runs
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import signals


def plan_list(plans: Iterable[Plan]) -> Sequence[Plan]:
    """`plans` with a length and random access: a sequence that draws its views when asked stays
    one."""
    return plans if isinstance(plans, Sequence) else list(plans)


class _Decoding(Dataset):
    """Item k is the whole batch of plan k: uint8 [n, 3, R, R], with its plan's views. Views are
    crops of side `crop`, cut and mirrored; where it is 0, and without views, images are whole."""

    def __init__(self, split: ShardSplit, plans: Sequence[Plan], resolution: int, crop: int):
        self.split, self.plans, self.resolution, self.crop = split, plans, resolution, crop

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Views | None]:
        indices, views = self.plans[index]
        crops = views is not None and self.crop
        r = self.crop if crops else self.resolution
        out = np.empty((len(indices), 3, r, r), np.uint8)
        boxes = augment.pixel_boxes(views.windows, self.split.sizes[indices]) if crops else None
        starts = runs(indices)
        for first, end in zip(starts, [*starts[1:], len(indices)], strict=True):
            i = int(indices[first])
            shown = (
                [square(self.split.image(i), r)] * (end - first)
                if boxes is None
                else _crops(self.split, i, boxes[first:end], r)
            )
            for j, image in enumerate(shown, first):
                pixels = np.asarray(image).transpose(2, 0, 1)
                turn = boxes is not None and views is not None and views.mirrored[j]
                out[j] = pixels[:, :, ::-1] if turn else pixels
        return torch.from_numpy(out), views


def _crops(split: ShardSplit, i: int, boxes: np.ndarray, size: int) -> Iterator[Image.Image]:
    """Boxes int [n, 4] (top, left, height, width in pixels) of image `i`, each at size × size: all
    from one decoding, no finer than the smallest of them needs."""
    h, w = (int(v) for v in boxes[:, 2:].min(0))
    try:
        image = Image.open(io.BytesIO(split.encoded(i)))
        full = image.size
        image.draft("RGB", (size * full[0] // w, size * full[1] // h))
        image = image.convert("RGB")
    except Exception as error:
        raise split.undecodable(i, error) from error
    x, y = image.width / full[0], image.height / full[1]
    for top, left, h, w in boxes.tolist():
        yield image.resize(
            (size, size),
            Image.Resampling.BILINEAR,
            box=(left * x, top * y, (left + w) * x, (top + h) * y),
        )


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    signals.helper()


def _said_plainly(loader: DataLoader) -> Iterator[tuple[torch.Tensor, Views | None]]:
    """The loader's batches; a worker's `UserError` without the worker's traceback around it."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from error


def decoded(
    split: ShardSplit,
    plans: Sequence[Plan],
    resolution: int,
    crop: int,
    workers: int,
    pin: bool = False,
) -> Iterator[tuple[torch.Tensor, Views | None]]:
    """The batches of `plans`, uint8, in their order: whole images of `resolution`, crops of side
    `crop` (0: whole, whatever their views)."""
    loader = DataLoader(
        _Decoding(split, plans, resolution, crop),
        batch_size=None,
        # One batch is not worth a process.
        num_workers=max(0, min(workers, len(os.sched_getaffinity(0)), len(plans) - 1)),
        worker_init_fn=_quiet_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # its own: the loader must not draw from the global one
    )
    return _said_plainly(loader)


class StreamedImages:
    """A split decoded as it is needed, by `workers` processes."""

    def __init__(self, split: ShardSplit, resolution: int, device: torch.device, workers: int):
        self.split, self.resolution, self.device, self.workers = split, resolution, device, workers
        self.sizes, self.labels, self.counts = split.sizes, split.labels, split.counts

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1], in the plans' order."""
        whole = spec.crop_scale is None
        for images, views in decoded(
            self.split,
            plan_list(plans),
            self.resolution,
            0 if whole else spec.resolution,
            self.workers,
            self.device.type == "cuda",
        ):
            images = images.to(self.device, non_blocking=True).float() / 255
            if views is None:
                yield images
            elif whole:
                yield augment.apply(images, views, spec)
            else:  # cut and mirrored by now
                yield augment.apply_ops(images, views, spec)
