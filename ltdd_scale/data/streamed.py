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
from ltdd_scale.data.images import Plan
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import signals


def plan_list(plans: Iterable[Plan]) -> Sequence[Plan]:
    """`plans` with a length and random access: a sequence that draws its views when asked stays
    one."""
    return plans if isinstance(plans, Sequence) else list(plans)


class _Decoding(Dataset):
    """Item k is the whole batch of plan k: uint8 [n, 3, R, R], with its plan's views."""

    def __init__(self, split: ShardSplit, plans: Sequence[Plan], resolution: int, whole: bool):
        self.split, self.plans, self.resolution, self.whole = split, plans, resolution, whole

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Views | None]:
        indices, views = self.plans[index]
        r = self.resolution
        out = np.empty((len(indices), 3, r, r), np.uint8)
        boxes = (
            None
            if views is None or self.whole
            else augment.pixel_boxes(views.windows, self.split.sizes[indices])
        )
        for j, i in enumerate(indices):
            image = (
                square(self.split.image(int(i)), r)
                if boxes is None
                else _crop(self.split, int(i), boxes[j], r)
            )
            out[j] = np.asarray(image).transpose(2, 0, 1)
        return torch.from_numpy(out), views


def _crop(split: ShardSplit, i: int, box: np.ndarray, size: int) -> Image.Image:
    """A box (top, left, height, width in pixels) of image `i` at size × size, decoding no finer
    than needed."""
    top, left, h, w = (int(v) for v in box)
    try:
        image = Image.open(io.BytesIO(split.encoded(i)))
        full = image.size
        image.draft("RGB", (size * full[0] // w, size * full[1] // h))
        image = image.convert("RGB")
    except Exception as error:
        raise split.undecodable(i, error) from error
    x, y = image.width / full[0], image.height / full[1]
    return image.resize(
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
    whole: bool,
    workers: int,
    pin: bool = False,
) -> Iterator[tuple[torch.Tensor, Views | None]]:
    """The batches of `plans`, uint8, in their order."""
    loader = DataLoader(
        _Decoding(split, plans, resolution, whole),
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
        for images, views in decoded(
            self.split,
            plan_list(plans),
            self.resolution,
            spec.crop_scale is None,
            self.workers,
            self.device.type == "cuda",
        ):
            images = images.to(self.device, non_blocking=True).float() / 255
            yield images if views is None else augment.apply(images, spec.after_crop(views), spec)
