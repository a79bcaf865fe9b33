"""The tree of classes by average linkage, and how it is cut into groups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

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


def cut_tree(linked: np.ndarray, distances: np.ndarray, k: int, smallest: int) -> Groups:
    """The tree cut where it leaves k groups of at least `smallest` classes.

    Smaller branches join the nearest group (by the mean distance of their classes). The first cut
    from the top that leaves k groups counts; if it leaves more, the nearest of them are joined. A
    chain, which takes in one class after the other, has no such cut: then classes are joined from
    the bottom, the nearest first, with no join that leaves too few groups.
    """
    from scipy.cluster import hierarchy

    for branches in range(k, min(len(distances), TRIED * k)):
        label = hierarchy.fcluster(linked, branches, "maxclust")
        groups = [np.flatnonzero(label == v).tolist() for v in np.unique(label)]
        joined = _joined(_Linking(groups, distances), k, smallest)
        if len(joined) == k:
            return in_order(joined)
    return in_order(
        _kept_apart(_Linking([[c] for c in range(len(distances))], distances), k, smallest)
    )


class _Linking:
    """Groups of classes that are joined; `mean` float64 [m, m] are their mean distances, infinite
    on the diagonal."""

    def __init__(self, groups: Groups, distances: np.ndarray):
        self.groups = [list(group) for group in groups]
        member = np.zeros((len(groups), len(distances)))
        for g, group in enumerate(groups):
            member[g, group] = 1
        self.sums, self.sizes = member @ distances @ member.T, member.sum(1)

    @property
    def mean(self) -> np.ndarray:
        mean = self.sums / (self.sizes[:, None] * self.sizes[None])
        np.fill_diagonal(mean, np.inf)
        return mean

    def join(self, a: int, b: int) -> None:
        a, b = min(a, b), max(a, b)
        self.groups[a] += self.groups.pop(b)
        self.sums[a] += self.sums[b]
        self.sums[:, a] += self.sums[:, b]
        self.sums = np.delete(np.delete(self.sums, b, 0), b, 1)
        self.sizes[a] += self.sizes[b]
        self.sizes = np.delete(self.sizes, b)


def _joined(linking: _Linking, k: int, smallest: int) -> Groups:
    """Small groups, then the nearest ones, are joined until there are k."""
    while len(linking.groups) > 1:
        mean, sizes = linking.mean, linking.sizes
        if sizes.min() < smallest:
            a = int(sizes.argmin())
            linking.join(a, int(mean[a].argmin()))
        elif len(linking.groups) > k:
            a, b = np.unravel_index(int(mean.argmin()), mean.shape)
            linking.join(int(a), int(b))
        else:
            break
    return linking.groups


def _kept_apart(linking: _Linking, k: int, smallest: int) -> Groups:
    """The nearest groups are joined until there are k, none that would leave fewer than k groups of
    `smallest` classes."""
    while len(linking.groups) > k:
        mean, sizes = linking.mean, linking.sizes.astype(int)
        counts = np.bincount(sizes, minlength=2 * sizes.max() + 1)
        there = np.flatnonzero(counts)
        for s, t in itertools.combinations_with_replacement(there, 2):
            # What a join leaves depends on the two sizes alone.
            after = counts.copy()
            np.subtract.at(after, [s, t], 1)
            after[s + t] += 1
            if after.min() < 0 or _covered(after, smallest) < k:
                mean[np.ix_(sizes == s, sizes == t)] = np.inf
                mean[np.ix_(sizes == t, sizes == s)] = np.inf
        a, b = np.unravel_index(int(mean.argmin()), mean.shape)
        linking.join(int(a), int(b))
    return linking.groups


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
