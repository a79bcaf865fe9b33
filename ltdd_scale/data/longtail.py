"""Long-tail profiles, nested index choices, shot groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ltdd_scale.errors import UserError

GROUPS = ("many", "medium", "few")


def exponential(num_classes: int, largest: int, imbalance_factor: float) -> list[int]:
    """n_c = int(n_max · IF^(−c/(C−1))), for c = 0 … C−1.

    `int` and not `round`, as the field does. With n_max 5000, C 10 and IF 100 this is the
    12,406-image CIFAR-10-LT.
    """
    if num_classes == 1:
        return [largest]
    return [int(largest * imbalance_factor ** (-c / (num_classes - 1))) for c in range(num_classes)]


def counts_for(
    profile: str,
    available: Sequence[int],
    imbalance_factor: float = 1,
    largest: int = 0,
    explicit: Sequence[int] = (),
) -> list[int]:
    """Images wanted of each class, never more than `available`.

    Raises `UserError` where explicit counts do not fit the set, or where a class would be left
    without images.
    """
    if profile == "full":
        counts = list(available)
    elif profile == "counts":
        if len(explicit) != len(available):
            raise UserError(
                f"data.counts has {len(explicit)} numbers, but the set has {len(available)} classes"
            )
        short = [
            c for c, (want, have) in enumerate(zip(explicit, available, strict=True)) if want > have
        ]
        if short:
            raise UserError(
                f"data.counts asks for {explicit[short[0]]} images of class {short[0]}, which has "
                f"{available[short[0]]}"
            )
        counts = list(explicit)
    else:
        wanted = exponential(len(available), largest or max(available), imbalance_factor)
        counts = [min(want, have) for want, have in zip(wanted, available, strict=True)]
    empty = [c for c, n in enumerate(counts) if n < 1]
    if empty:
        lower = "add images" if profile == "full" else "lower data.imbalance_factor or add images"
        raise UserError(
            f"class {empty[0]} would have no training images ({len(empty)} such classes): {lower}"
        )
    return counts


def held_out(counts: Sequence[int], share: float) -> list[int]:
    """Images held out of each class of n: round(n · share), at least one and never all; of a single
    image none."""
    return [min(max(round(n * share), 1), n - 1) if n > 1 else 0 for n in counts]


def choose(labels: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """Indices of the chosen images, class by class: the first n_c of one permutation a class.

    The permutations do not depend on the counts, so the choice for IF 100 lies within that for
    IF 10.
    """
    state = np.random.RandomState(seed)
    chosen = []
    for c, n in enumerate(counts):
        members = np.flatnonzero(labels == c)
        chosen.append(members[state.permutation(len(members))[:n]])
    return np.concatenate(chosen)


def shot_groups(counts: Sequence[int]) -> np.ndarray:
    """0 many (> 100 training images), 1 medium (20–100), 2 few (< 20) for each class.

    Where every class is "many" (exponential IF 5 and 10 of ImageNet) the groups are thirds by rank
    instead.
    """
    sizes = np.asarray(counts)
    groups = np.where(sizes > 100, 0, np.where(sizes >= 20, 1, 2))
    if (groups == 0).all():
        ranks = np.empty(len(sizes), int)
        ranks[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
        groups = ranks * 3 // len(sizes)
    return groups
