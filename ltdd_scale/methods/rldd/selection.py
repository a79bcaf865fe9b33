"""Which crops of a class are taken: by confidence, or by where they lie in feature space.

Pure functions of one class's candidates, in float64 and in a fixed order: the same choice on any
number of ranks and threads. Each returns the candidates chosen, int [m] in order of choice, and the
round of each, int [m]. In a round every image gives one crop at most.
"""

from __future__ import annotations

import numpy as np

Chosen = tuple[np.ndarray, np.ndarray]


def confident(scores: np.ndarray, number: int) -> Chosen:
    """Multi-round selection of at most `number` crops from scores [images, crops] (RLDD
    §Initialisation). Candidates are positions in ``scores.ravel()``.

    In round r every image offers its r-th best crop; offers are taken best first. Ties go to the
    lower index.
    """
    ranked = np.argsort(-scores, axis=1, kind="stable")
    offered = np.take_along_axis(scores, ranked, 1)
    chosen, rounds = [], []
    for r in range(scores.shape[1]):
        best_first = np.argsort(-offered[:, r], kind="stable")
        chosen.append(best_first * scores.shape[1] + ranked[best_first, r])
        rounds.append(np.full(len(scores), r))
    return np.concatenate(chosen)[:number], np.concatenate(rounds)[:number]


def pool(confidence: np.ndarray, bar: float, number: int) -> np.ndarray:
    """The candidates that `number` are chosen from: sorted positions int [m] in
    ``confidence.ravel()``. `confidence` [images, crops]: the teacher's probability of the class.

    An image is in the pool if its surest crop is at or above `bar`. Where few are, the pool is
    filled up, surest images first, to half of the images, and to two for each crop that is wanted,
    as far as there are that many. Of an image in the pool, its crops at or above `bar` are in. In
    any case the surer half of them is, or as many as make two for each crop that is wanted.

    So a class that the teacher is sure of keeps all its images, a class that it finds hard keeps
    the surer half, and a class of few images keeps all of them. A bar of 0 keeps all crops, a bar
    of 1 about half of the images. The lower the bar the larger the pool, with no jump.
    """
    n, k = confidence.shape
    images = _surest(confidence.max(1)[None], bar, max(-(-n // 2), 2 * number))[0]
    each = max(-(-k // 2), -(-2 * number // int(images.sum())))
    return np.flatnonzero(images[:, None] & _surest(confidence, bar, each))


def _surest(confidence: np.ndarray, bar: float, at_least: int) -> np.ndarray:
    """Which entries of `confidence` [n, m] are at or above `bar` or among the `at_least` surest of
    their row, bool [n, m]; ties go to the lower index."""
    ranks = np.argsort(np.argsort(-confidence, axis=1, kind="stable"), axis=1)
    return (confidence >= bar) | (ranks < at_least)


def herding(features: np.ndarray, images: np.ndarray, number: int, taken: np.ndarray) -> Chosen:
    """At most `number` candidates whose mean feature is close to the mean of all, greedily
    (Welling, ICML 2009; for choosing examples: iCaRL, CVPR 2017).

    Each one chosen is the one that brings the running mean closest. `features` float64 [n, d] of
    the candidates, `images` int [n] which image each is of, `taken` float64 [t, d] features of what
    was chosen before. Features are compared as they are: the head is linear in them, so that equal
    means have equal mean logits.
    """
    mean, total, norms = features.mean(0), taken.sum(0), _norms(features)
    turns = _Turns(images)
    for k in range(min(number, len(features))):
        # With this feature as the next one, the running mean would be the mean itself.
        wanted = (len(taken) + k + 1) * mean - total
        chosen = turns.take(_distances(features, norms, wanted))
        total = total + features[chosen]
    return turns.chosen()


def k_center(features: np.ndarray, images: np.ndarray, number: int, taken: np.ndarray) -> Chosen:
    """At most `number` candidates, each the farthest from all that were chosen before (Gonzalez,
    1985; for choosing examples: Sener and Savarese, ICLR 2018).

    The first is the one nearest to the mean. Arguments as `herding` has them.
    """
    norms = _norms(features)
    nearest = np.full(len(features), np.inf)  # of those chosen, to each candidate
    for point in taken:
        nearest = np.minimum(nearest, _distances(features, norms, point))
    turns = _Turns(images)
    for k in range(min(number, len(features))):
        first = k == 0 and not len(taken)
        costs = _distances(features, norms, features.mean(0)) if first else -nearest
        point = features[turns.take(costs)]
        nearest = np.minimum(nearest, _distances(features, norms, point))
    return turns.chosen()


class _Turns:
    """Candidates of `images` int [n] are taken one by one. Next in turn are the images that have
    given the fewest, of those that have candidates left."""

    def __init__(self, images: np.ndarray):
        self.images = images
        self.given = np.zeros(images.max(initial=0) + 1, int)
        self.left = np.ones(len(images), bool)
        self.order: list[int] = []
        self.rounds: list[int] = []

    def take(self, costs: np.ndarray) -> int:
        """The candidate in turn with the lowest of `costs` [n]; ties go to the lower index."""
        given = self.given[self.images]
        in_turn = self.left & (given == given[self.left].min())
        k = int(np.where(in_turn, costs, np.inf).argmin())
        self.order.append(k)
        self.rounds.append(int(given[k]))
        self.left[k] = False
        self.given[self.images[k]] += 1
        return k

    def chosen(self) -> Chosen:
        return np.asarray(self.order, int), np.asarray(self.rounds, int)


def _norms(features: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", features, features)


def _distances(features: np.ndarray, norms: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Squared distances [n] of features [n, d] to `point` [d]. `norms`: `_norms` of the features.

    einsum adds in one fixed order; a matrix product's order may depend on the number of threads.
    """
    return norms - 2 * np.einsum("nd,d->n", features, point) + np.einsum("d,d->", point, point)
