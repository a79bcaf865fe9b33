"""Which images a step sees: pure functions of a key and the step.

A batch is a piece of one long stream, so that steps count, and not epochs: step i takes positions
i · b to (i + 1) · b.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ltdd_scale.runtime.ranks import rng


class Order(Protocol):
    def batch(self, step: int) -> np.ndarray:
        """Indices int64 [b] of the images of a step."""
        ...


class Shuffled:
    """0 … n − 1 in random order, again and again, each time in another: an endless stream. It
    depends on `key` alone, and can be looked at anywhere."""

    def __init__(self, n: int, *key: int | str):
        self._n, self._key = n, key
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """What stands at `positions` int64 [k] of the stream: int64 [k]."""
        rounds, places = np.divmod(positions, self._n)
        out = np.empty(len(positions), np.int64)
        for k in np.unique(rounds):
            out[rounds == k] = self._round(int(k))[places[rounds == k]]
        return out

    def _round(self, k: int) -> np.ndarray:
        if self._last[0] != k:
            self._last = k, rng(*self._key, k).permutation(self._n)
        return self._last[1]


class Uniform:
    """Every image as often as any other: epochs one after the other, cut into batches."""

    def __init__(self, num_images: int, batch_size: int, *key: int | str):
        self._stream, self._size = Shuffled(num_images, *key, "images"), batch_size

    def batch(self, step: int) -> np.ndarray:
        return self._stream.at(np.arange(step * self._size, (step + 1) * self._size))


class ClassAware:
    """Every class as often as any other (Kang et al., ICLR 2020): classes take turns in shuffled
    rounds, and one whose turn it is gives `per_class` images, the next ones of its own shuffled
    stream.

    `labels` int64 [N] are those of the images. A class without images has no turn.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, per_class: int, *key: int | str):
        self._size, self._per_class = batch_size, per_class
        present = np.unique(labels)
        self._members = [np.flatnonzero(labels == c) for c in present]
        self._turns = Shuffled(len(present), *key, "classes")
        self._streams = [
            Shuffled(len(m), *key, "class", int(c))
            for c, m in zip(present, self._members, strict=True)
        ]

    def batch(self, step: int) -> np.ndarray:
        turn, place = np.divmod(
            np.arange(step * self._size, (step + 1) * self._size), self._per_class
        )
        whose = self._turns.at(turn)
        # A class has had one turn in each round before this one.
        position = turn // len(self._members) * self._per_class + place
        out = np.empty(self._size, np.int64)
        for c in np.unique(whose):
            mine = whose == c
            out[mine] = self._members[c][self._streams[c].at(position[mine])]
        return out
