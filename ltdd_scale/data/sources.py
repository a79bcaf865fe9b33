"""Where real images come from: any source with its long tail drawn, and what is known of it before
shards are written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ltdd_scale.data import longtail, shards
from ltdd_scale.data.catalog import SOURCES
from ltdd_scale.data.settings import Chosen, Data
from ltdd_scale.data.split import Available, Source, Split
from ltdd_scale.errors import UserError
from ltdd_scale.stage import Facts

LOOKED_AT = 20  # images whose size tells that of all
SLACK = 0.02  # share of the images by which a set may differ from what is expected of it


def kind(data: Chosen) -> Any:
    """The module that knows sources of this kind: see `data.catalog`."""
    return importlib.import_module(SOURCES[data.source])


def open_source(data: Data) -> Source:
    """The set that `data` describes, with validation images held out and the long tail drawn.

    Validation images come from the training images: `val_per_class` before the long tail is drawn
    from the rest, `val_fraction` out of what was drawn. The test split is as it is. Raises
    `UserError` on anything missing or inconsistent.
    """
    source: Source = kind(data).open_all(data)
    found = _available(source)
    _refuse_one(found)
    _refuse_empty("training", found.train, source.classes)
    tested = np.bincount(source.test.labels, minlength=len(source.classes))
    _refuse_empty("test", tested, source.classes)
    plan = _plan(data, found, source.classes)
    train, val = source.train, source.val
    if any(plan.before):
        train, val = _hold_out(train, plan.before, data.split_seed)
    if data.profile != "full":
        train = train.take(longtail.choose(train.labels, plan.drawn, data.split_seed))
    if any(plan.after):
        train, val = _hold_out(train, plan.after, data.split_seed)
    return Source(source.classes, train, source.test, val, source.notes)


def _hold_out(train: Split, counts: list[int], seed: int) -> tuple[Split, Split]:
    """(the rest, `counts` images of each class): a larger choice holds a smaller one."""
    return train.part(longtail.choose(train.labels, counts, seed + 1))


def facts(data: Data) -> Facts:
    """What is known of the set before any shards are written; of a list without looking for its
    files. Raises `UserError` as `open_source` does."""
    if data.source == "shards":
        return shards.facts(Path(data.path))
    module, size = kind(data), 0.0
    if hasattr(module, "available"):
        found = module.available(data)
    else:
        source = module.open_all(data)
        found, size = _available(source), _mean_size(source.train)
    _refuse_one(found)
    names = [str(c) for c in range(len(found.train))]
    return Facts(_plan(data, found, names).training, found.test, size)


def _mean_size(split: Split) -> float:
    """Mean bytes of an image, by some of them; 0 where one cannot be read."""
    some = np.linspace(0, len(split.names) - 1, min(len(split.names), LOOKED_AT)).astype(int)
    try:
        return float(np.mean([len(split.read(int(i))) for i in some])) if len(some) else 0.0
    except OSError:
        return 0.0


def expected(data: Data) -> Facts | None:
    """What the config says of a set that is not here; None where it does not say enough.

    Raises `UserError` as `open_source` does where what it says leaves a class without images.
    """
    if data.profile == "counts" and data.source != "shards":
        return Facts(_Plan([], data.counts, _share(data, data.counts)).training, data.expected_test)
    each = data.expected_per_class or data.max_per_class
    train = list(data.expected_counts) or [each] * data.expected_classes
    if not train or not all(train):
        return None
    if data.source == "shards":  # the long tail is drawn already
        return Facts(tuple(train), data.expected_test)
    found = Available(train, data.expected_test, data.validated)
    names = [str(c) for c in range(len(train))]
    return Facts(_plan(data, found, names).training, data.expected_test)


def surprise(data: Data, found: Facts) -> str:
    """In one line what the config expects and the set does not have; nothing where they agree.

    `found` is what is known of the set itself. A few images more or less, as where some do not
    decode, are no surprise.
    """
    try:
        thought = expected(data)
    except UserError as error:
        return f"data.expected_*: {error}"
    if thought is None or data.profile == "counts":
        return ""
    if thought.num_classes != found.num_classes:
        what = f"{thought.num_classes} classes, and the set has {found.num_classes}"
    elif abs(thought.num_images - found.num_images) > SLACK * found.num_images:
        what = f"{thought.num_images:,} training images, and the set has {found.num_images:,}"
    elif data.expected_test and abs(thought.judged - found.judged) > SLACK * found.judged:
        what = f"{thought.judged:,} test images, and the set has {found.judged:,}"
    else:
        return ""
    return f"data.expected_*: the config expects {what}; the set counts, correct the config"


def _available(source: Source) -> Available:
    counts = np.bincount(source.train.labels, minlength=len(source.classes)).tolist()
    return Available(counts, len(source.test.names), source.val is not None)


class _Plan(NamedTuple):
    """Images of each class that are held out `before` the long tail is drawn, `drawn` for it, and
    held out of these `after` that."""

    before: list[int]
    drawn: list[int]
    after: list[int]

    @property
    def training(self) -> tuple[int, ...]:
        """What is left of each class to train on."""
        return tuple(n - k for n, k in zip(self.drawn, self.after, strict=True))


def _plan(data: Data, found: Available, classes: list[str]) -> _Plan:
    if found.validated:
        none = [0] * len(classes)
        return _Plan(none, _drawn(data, found.train, max(found.train)), none)
    before = _unused(data, found.train, classes)
    rest = [n - k for n, k in zip(found.train, before, strict=True)]
    # The largest class counts as it was, also when some of it is held out: settings are then
    # chosen on the long tail that they are for.
    drawn = _drawn(data, rest, max(found.train))
    return _Plan(before, drawn, _share(data, drawn))


def _drawn(data: Data, rest: list[int], largest: int) -> list[int]:
    """The long tail of the `rest` of each class; `largest`: of any, where the config says none."""
    most = data.max_per_class or largest
    return longtail.counts_for(data.profile, rest, data.imbalance_factor, most, data.counts)


def _unused(data: Data, available: list[int], classes: list[str]) -> list[int]:
    """Validation images of each class that the long tail does without."""
    wanted = data.val_per_class
    if data.profile == "counts" and wanted:
        counts = longtail.counts_for("counts", available, explicit=data.counts)
        held = [min(wanted, n - k) for n, k in zip(available, counts, strict=True)]
        if not any(held):
            raise UserError(
                f"data.val_per_class={wanted}: data.counts leaves no image unused; "
                "data.val_fraction holds out a share of what is used"
            )
        return held
    if wanted and min(available) <= wanted:
        c = int(np.argmin(available))
        raise UserError(
            f"data.val_per_class={wanted} leaves nothing of class {c} ({classes[c]}, "
            f"{available[c]} images)"
        )
    return [wanted] * len(available)


def _share(data: Data, drawn: list[int]) -> list[int]:
    """Validation images of each class out of what was drawn."""
    if not data.val_fraction:
        return [0] * len(drawn)
    held = longtail.held_out(drawn, data.val_fraction)
    if not any(held):
        raise UserError(
            "data.val_fraction: every class has a single image, so none can be held out: set it "
            "to 0"
        )
    return held


def _refuse_one(found: Available) -> None:
    if len(found.train) < 2:
        raise UserError(
            "the set has one class, and two are needed to tell apart: is data.path one level too "
            "high?"
        )


def _refuse_empty(kind: str, counts: Any, classes: list[str]) -> None:
    empty = np.flatnonzero(np.asarray(counts) == 0)
    if len(empty):
        c = int(empty[0])
        raise UserError(
            f"class {c} ({classes[c]}) has no {kind} images ({len(empty)} such classes)"
        )
