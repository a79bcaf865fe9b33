"""Criteria that group classes, as pure functions of what a network says of the classes.

Each is ``criterion(described, wanted) -> cuts``, the best cut first, at most five. A new one is a
function here and a line of `CRITERIA` in `settings.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ltdd_scale.errors import UserError
from ltdd_scale.judging.trees import Cutter, Groups, in_order, tree
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.ranks import rng

MOST = 50  # groups that are tried where their number is chosen by the silhouette
EXHAUSTIVE = 16  # classes up to which every cut in two is looked at
KEPT = 5  # cuts that are told
ONCE = ": name every class once"
STARTS = 10  # of the search where there are too many cuts, beside the spectral one


@dataclass(frozen=True)
class Described:
    """What a network says of C classes, by their images.

    `means` float64 [C, d] are their mean features. `centres` are k-means centres float64 [M_c, d]
    of each class, `confusion` float64 [C, C] its mean probabilities (rows: the true class), both
    None where nobody asks. `names` are the classes' names.
    """

    means: np.ndarray
    names: Sequence[str]
    centres: list[np.ndarray] | None = None
    confusion: np.ndarray | None = None

    @property
    def num_classes(self) -> int:
        return len(self.means)


@dataclass(frozen=True)
class Wanted:
    """`groups`: how many, 0 for as many as the silhouette likes best; `smallest`: the classes that
    a group has at least; `seed` draws random groups; `given` are groups by name or number."""

    groups: int
    smallest: int = 1
    seed: int = 0
    given: Sequence[Sequence[str]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Cut:
    """Groups of classes and the criterion's score, None where it has none; more is better."""

    groups: Groups
    score: float | None


def check(wanted: Wanted, num_classes: int) -> None:
    """Raise `UserError` for a number of groups that so few classes cannot make."""
    k, most = wanted.groups, num_classes // 2
    if most < 2:
        raise UserError(
            f"two_stage: {num_classes} classes are too few for groups: use protocol=single_stage"
        )
    if k and not 2 <= k <= most:
        raise UserError(
            f"two_stage.groups={k}: {num_classes} classes make 2 to {most} groups (0: by the best "
            "silhouette)"
        )
    if max(k, 2) * wanted.smallest > num_classes:
        raise UserError(
            f"two_stage.smallest={wanted.smallest}: {num_classes} classes do not make {max(k, 2)} "
            f"groups of so many; at most {num_classes // max(k, 2)}"
        )


def check_given(given: Sequence[Sequence[str]], num_classes: int) -> None:
    """Raise `UserError` for lists that cannot hold each of so many classes once, whatever the
    classes are called: a number beyond them may be a name."""
    listed = [text for group in given for text in group]
    twice = sorted({text for text in listed if listed.count(text) > 1})
    if twice:
        raise UserError(f"two_stage.given: {', '.join(twice[:5])} in two places{ONCE}")
    if len(given) < 2 or not all(given):
        raise UserError("two_stage.given: expected two groups or more, none of them empty")
    if len(listed) != num_classes:
        raise UserError(f"two_stage.given: {len(listed)} names for {num_classes} classes{ONCE}")


# --- The criteria ---------------------------------------------------------------------------------


def maxcut(described: Described, wanted: Wanted) -> list[Cut]:
    """Groups of largest Σ D_ik over pairs of classes in different groups (Two-stage, §Grouping).

    Two groups of at most 16 classes: every cut is looked at. Otherwise a spectral start (and some
    random ones) and the best single move of a class until none helps: a local optimum. For more
    than two groups the same sum, as in max-k-cut.
    """
    check(wanted, described.num_classes)
    assert described.centres is not None
    distances = centre_distances(described.centres)

    def best(k: int) -> list[Cut]:
        return cut_apart(distances, k, wanted.smallest, wanted.seed)

    return best(wanted.groups) if wanted.groups else _by_silhouette(distances, wanted, best)


def linkage(described: Described, wanted: Wanted) -> list[Cut]:
    """Average linkage on the Euclidean distances of class means. The score is the silhouette."""
    return _linked(mean_distances(described.means), wanted)


def confusion(described: Described, wanted: Wanted) -> list[Cut]:
    """Average linkage on 1 − (P + Pᵀ)/2, P the soft confusion. The score is the silhouette."""
    assert described.confusion is not None
    return _linked(confusion_distances(described.confusion), wanted)


def given(described: Described, wanted: Wanted) -> list[Cut]:
    """`wanted.given`: classes by name, or by number where no class is called so.

    Raises `UserError` for a class that is unknown, named twice, or left out.
    """
    names = {name: c for c, name in enumerate(described.names)}
    groups = [[_class_of(text, names) for text in group] for group in wanted.given]
    listed = [c for group in groups for c in group]
    twice = sorted({c for c in listed if listed.count(c) > 1})
    left = sorted(set(range(described.num_classes)) - set(listed))
    for wrong, what in ((twice, "in two places"), (left, "in no group")):
        if wrong:
            shown = ", ".join(described.names[c] for c in wrong[:5])
            raise UserError(f"two_stage.given: {shown} {what}{ONCE}")
    if len(groups) < 2 or not all(groups):
        raise UserError("two_stage.given: expected two groups or more, none of them empty")
    return [Cut([sorted(group) for group in groups], None)]


def random(described: Described, wanted: Wanted) -> list[Cut]:
    """As many classes in each group as may be, drawn from the seed: the control."""
    check(wanted, described.num_classes)
    order = rng(wanted.seed, "random groups").permutation(described.num_classes)
    parts = np.array_split(order, wanted.groups)
    return [Cut(in_order([part.tolist() for part in parts]), None)]


def _class_of(text: str, names: dict[str, int]) -> int:
    if text in names:
        return names[text]
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise UserError(f"two_stage.given: there is no class {text!r}")


# --- Distances and trees --------------------------------------------------------------------------


def mean_distances(means: np.ndarray) -> np.ndarray:
    """‖μ_i − μ_k‖, float64 [C, C]."""
    return _sqrt(_squared(means))


def centre_distances(centres: Sequence[np.ndarray]) -> np.ndarray:
    """D_ik = sqrt(Σ_j Σ_l ‖c_ij − c_kl‖²) of `centres` [M_c, d] of each class, float64 [C, C].

    It is computed by its closed form, D_ik² = M²·(‖μ_i − μ_k‖² + W_i/M_i + W_k/M_k), μ the mean of
    a class's centres, W their squared spread about it. A class with fewer images than centres has
    M_c of them, and its sum is scaled to M², M the most that any class has. The diagonal is that of
    the formula too: a class is not at 0 from itself.
    """
    means = np.stack([c.mean(0) for c in centres])
    spread = np.asarray([((c - m) ** 2).sum(1).mean() for c, m in zip(centres, means, strict=True)])
    most = max(len(c) for c in centres)
    return most * _sqrt(_squared(means) + spread[:, None] + spread[None])


def confusion_distances(probabilities: np.ndarray) -> np.ndarray:
    """1 − (P + Pᵀ)/2, 0 on the diagonal, float64 [C, C]."""
    distances = 1 - (probabilities + probabilities.T) / 2
    np.fill_diagonal(distances, 0)
    return distances


def silhouette(distances: np.ndarray, groups: Groups) -> float:
    """Mean silhouette of the classes in −1 … 1, by `distances` [C, C] between them."""
    from sklearn.metrics import silhouette_score

    off = distances.copy()
    np.fill_diagonal(off, 0)
    return float(silhouette_score(off, group_of(groups, len(off)), metric="precomputed"))


def group_of(groups: Groups, num_classes: int) -> np.ndarray:
    """The group of each class, int64 [C]."""
    out = np.zeros(num_classes, np.int64)
    for g, classes in enumerate(groups):
        out[classes] = g
    return out


def _squared(points: np.ndarray) -> np.ndarray:
    norms = (points**2).sum(1)
    return np.maximum(norms[:, None] + norms[None] - 2 * points @ points.T, 0)


def _sqrt(squared: np.ndarray) -> np.ndarray:
    return np.sqrt((squared + squared.T) / 2)


def _by_silhouette(
    distances: np.ndarray, wanted: Wanted, cuts: Callable[[int], list[Cut]]
) -> list[Cut]:
    """The best cut into each number of groups, the best silhouette first."""
    most = min(len(distances) // max(2, wanted.smallest), MOST)
    found = []
    for k in range(2, most + 1):
        signals.check()
        for cut in cuts(k)[:1]:
            found.append(Cut(cut.groups, silhouette(distances, cut.groups)))
    if not found:
        raise UserError("two_stage.smallest: no cut has groups so large; lower it")
    return sorted(found, key=lambda cut: -(cut.score or 0.0))[:KEPT]


# --- Linkage --------------------------------------------------------------------------------------


def _linked(distances: np.ndarray, wanted: Wanted) -> list[Cut]:
    check(wanted, len(distances))
    cutter = Cutter(tree(distances), distances, wanted.smallest)

    def best(k: int) -> list[Cut]:
        groups = cutter.cut(k)
        return [Cut(groups, silhouette(distances, groups))]

    return best(wanted.groups) if wanted.groups else _by_silhouette(distances, wanted, best)


# --- Max-cut --------------------------------------------------------------------------------------


def cut_apart(distances: np.ndarray, k: int, smallest: int, seed: int = 0) -> list[Cut]:
    """The best cuts into k groups by Σ D over pairs in different groups, the best first."""
    if k == 2 and len(distances) <= EXHAUSTIVE:
        return _every_cut(distances, smallest)
    starts = [_spectral(distances, k), *_random_starts(len(distances), k, seed)]
    found: dict[str, Cut] = {}
    for start in starts:
        moved = _moved(distances, start, k, smallest)
        groups = in_order([np.flatnonzero(moved == g).tolist() for g in range(k)])
        found[str(groups)] = Cut(groups, _between(distances, moved))
    return sorted(found.values(), key=lambda cut: -(cut.score or 0.0))[:KEPT]


def _every_cut(distances: np.ndarray, smallest: int) -> list[Cut]:
    """All cuts in two; class 0 is in the first group of each."""
    classes = len(distances)
    masks = np.arange(2 ** (classes - 1))
    second = (masks[:, None] >> np.arange(classes - 1)[None] & 1).astype(np.float64)
    second = np.concatenate([np.zeros((len(masks), 1)), second], 1)
    sizes = second.sum(1)
    second = second[(sizes >= smallest) & (classes - sizes >= smallest)]
    scores = ((second @ distances) * (1 - second)).sum(1)
    best = np.argsort(-scores, kind="stable")[:KEPT]
    parts = [[np.flatnonzero(second[i] == g).tolist() for g in (0, 1)] for i in best]
    return [Cut(in_order(p), float(scores[i])) for p, i in zip(parts, best, strict=True)]


def _between(distances: np.ndarray, label: np.ndarray) -> float:
    return float(distances[label[:, None] != label[None]].sum() / 2)


def _spectral(distances: np.ndarray, k: int) -> np.ndarray:
    """Groups by k-means of the classes laid out by their distances (classical scaling), int [C]."""
    from sklearn.cluster import KMeans

    off = distances**2
    np.fill_diagonal(off, 0)
    centred = off - off.mean(0) - off.mean(1)[:, None] + off.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    places: Any = vectors[:, -k:] * np.sqrt(np.maximum(values[-k:], 0))
    with quietly():
        return KMeans(k, n_init=10, random_state=0).fit(places).labels_.astype(np.int64)


def _random_starts(classes: int, k: int, seed: int) -> list[np.ndarray]:
    draw = rng(seed, "starts of max-cut")
    return [draw.permutation(np.arange(classes) % k) for _ in range(STARTS)]


def _moved(distances: np.ndarray, label: np.ndarray, k: int, smallest: int) -> np.ndarray:
    """`label` int [C] after the best single moves: first until no group is too small, then until no
    move helps."""
    label, classes = label.copy(), np.arange(len(label))
    off = distances.copy()
    np.fill_diagonal(off, 0)
    sums = off @ np.eye(k)[label]  # of the distances of a class to each group [C, k]
    sizes = np.bincount(label, minlength=k)
    while True:
        gain = sums[classes, label][:, None] - sums
        gain[classes, label] = -np.inf
        gain[sizes[label] <= smallest] = -np.inf
        small = sizes < smallest
        if small.any():
            gain[:, ~small] = -np.inf
        c, g = np.unravel_index(int(gain.argmax()), gain.shape)
        if not small.any() and gain[c, g] <= 1e-9 * max(1.0, off.max()):
            return label
        sums[:, label[c]] -= off[c]
        sums[:, g] += off[c]
        sizes[label[c]] -= 1
        sizes[g] += 1
        label[c] = g


def quietly() -> Any:
    """scikit-learn in one thread, whose results do not depend on the number of cores, and without
    its warning of points that are the same."""
    import warnings
    from contextlib import ExitStack

    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    stack = ExitStack()
    stack.enter_context(threadpool_limits(1))
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore", ConvergenceWarning)
    return stack
