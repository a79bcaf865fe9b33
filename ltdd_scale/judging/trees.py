"""The tree of classes by average linkage, and how it is cut into groups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ltdd_scale.runtime import signals

TRIED = 10  # cuts that are tried, as a multiple of the groups wanted

Groups = list[list[int]]


def in_order(groups: Sequence[Sequence[int]]) -> Groups:
    """The same groups, however they were found: the one with the first class first."""
    return sorted(sorted(int(c) for c in group) for group in groups)


def tree(distances: np.ndarray) -> np.ndarray:
    """SciPy's average linkage of `distances` [C, C]: rows (a, b, height, size), float64."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    off = distances.copy()
    np.fill_diagonal(off, 0)
    return hierarchy.linkage(squareform(off, checks=False), "average")


class Cutter:
    """Cuts the tree `linked` (see `tree`) into groups of at least `smallest` classes.

    What one number of groups has shown of the tree is kept for the next.
    """

    def __init__(self, linked: np.ndarray, distances: np.ndarray, smallest: int):
        self.linked, self.distances, self.smallest = linked, distances, smallest
        self._left: dict[int, int] = {}

    def cut(self, k: int) -> Groups:
        """`k` groups. Smaller branches join the nearest group (by the mean distance of their
        classes).

        The first cut from the top that leaves k groups counts; if it leaves more, the nearest of
        them are joined. A chain, which takes in one class after the other, has no such cut: then
        classes are joined from the bottom, the nearest first, with no join that leaves too few
        groups.
        """
        classes = len(self.distances)
        for branches in range(k, min(classes, TRIED * k)):
            if self.left(branches) >= k:
                joined = _Linking(self._branches(branches), self.distances)
                _join_small(joined, self.smallest)
                _join_nearest(joined, k)
                return in_order(joined.groups)
        apart = _Linking([[c] for c in range(classes)], self.distances)
        _keep_apart(apart, k, self.smallest)
        return in_order(apart.groups)

    def left(self, branches: int) -> int:
        """Groups that are left of so many branches once the small ones have joined others."""
        if branches not in self._left:
            signals.check()
            groups = self._branches(branches)
            if min(map(len, groups)) < self.smallest:
                linking = _Linking(groups, self.distances)
                _join_small(linking, self.smallest)
                groups = linking.groups
            self._left[branches] = len(groups)
        return self._left[branches]

    def _branches(self, branches: int) -> Groups:
        from scipy.cluster import hierarchy

        label = hierarchy.fcluster(self.linked, branches, "maxclust")
        return [np.flatnonzero(label == v).tolist() for v in np.unique(label)]


class _Linking:
    """Groups of classes that are joined.

    `mean` float64 [m, m] are their mean distances, infinite on the diagonal; `sizes` float64 [m].
    A group that has joined another keeps its place, with infinite numbers, until half of the places
    are such: so a join costs m operations, not m².
    """

    def __init__(self, groups: Groups, distances: np.ndarray):
        member = np.zeros((len(groups), len(distances)))
        for g, group in enumerate(groups):
            member[g, group] = 1
        self._places: list[list[int] | None] = [list(group) for group in groups]
        self.count = len(groups)
        self.sums, self.sizes = member @ distances @ member.T, member.sum(1)
        self.mean = self.sums / (self.sizes[:, None] * self.sizes[None])
        np.fill_diagonal(self.mean, np.inf)

    @property
    def groups(self) -> Groups:
        return [group for group in self._places if group is not None]

    def join(self, a: int, b: int) -> None:
        """The groups at the places `a` and `b` become one. Places may change."""
        a, b = min(a, b), max(a, b)
        one, other = self._places[a], self._places[b]
        assert one is not None and other is not None
        self._places[a], self._places[b] = one + other, None
        self.count -= 1
        self.sums[a] += self.sums[b]
        self.sums[:, a] += self.sums[:, b]
        self.sizes[a] += self.sizes[b]
        self.sizes[b] = np.inf
        # A mean with a group that is gone: the sum over an infinite number, to be no one's nearest.
        row, column = self.sums[a] / (self.sizes[a] * self.sizes), self.sums[:, a]
        column = column / (self.sizes * self.sizes[a])
        gone = np.isinf(self.sizes)
        row[gone], column[gone], row[a], column[a] = np.inf, np.inf, np.inf, np.inf
        self.mean[a], self.mean[:, a] = row, column
        self.mean[b], self.mean[:, b] = np.inf, np.inf
        if 2 * self.count <= len(self._places):
            self._close_ranks()

    def _close_ranks(self) -> None:
        there = np.flatnonzero(np.isfinite(self.sizes))
        self._places = [self._places[i] for i in there]
        self.sizes = self.sizes[there]
        self.sums, self.mean = (x[np.ix_(there, there)] for x in (self.sums, self.mean))

    def nearest(self, mean: np.ndarray) -> tuple[int, int]:
        """The places of the least of `mean` [m, m]."""
        a, b = divmod(int(mean.argmin()), len(mean))
        return a, b


def _join_small(linking: _Linking, smallest: int) -> None:
    """The smallest group joins its nearest one until all are large enough."""
    while linking.count > 1 and linking.sizes.min() < smallest:
        a = int(linking.sizes.argmin())
        linking.join(a, int(linking.mean[a].argmin()))


def _join_nearest(linking: _Linking, k: int) -> None:
    """The nearest groups are joined until there are k."""
    while linking.count > k:
        linking.join(*linking.nearest(linking.mean))


def _keep_apart(linking: _Linking, k: int, smallest: int) -> None:
    """The nearest groups are joined until there are k, none that would leave fewer than k groups of
    `smallest` classes."""
    while linking.count > k:
        signals.check()
        there = np.isfinite(linking.sizes)
        sizes = np.where(there, linking.sizes, 0).astype(int)
        counts = np.bincount(sizes[there], minlength=2 * sizes.max() + 1)
        found = np.flatnonzero(counts)
        refused = np.zeros((len(counts), len(counts)), bool)
        for s, t in itertools.combinations_with_replacement(found, 2):
            # What a join leaves depends on the two sizes alone.
            after = counts.copy()
            np.subtract.at(after, [s, t], 1)
            after[s + t] += 1
            refused[s, t] = refused[t, s] = after.min() < 0 or _covered(after, smallest) < k
        mean = linking.mean
        if refused.any():
            mean = np.where(refused[sizes][:, sizes], np.inf, mean)
        linking.join(*linking.nearest(mean))


def _covered(counts: np.ndarray, smallest: int) -> int:
    """Groups of at least `smallest` classes that can be made by joining `counts[s]` groups of s
    classes; small ones are filled up from the large end."""
    whole, filled = int(counts[smallest:].sum()), 0
    for s in range(min(smallest, len(counts)) - 1, 0, -1):
        for _ in range(int(counts[s])):
            filled += s
            if filled >= smallest:
                whole, filled = whole + 1, 0
    return whole
