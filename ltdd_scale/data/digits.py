"""A source that needs no download: scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from ltdd_scale.data import longtail
from ltdd_scale.data.settings import Data
from ltdd_scale.data.split import Available, Source, from_arrays

VERSION = 1  # of the images and their names; raise it when either changes
TEST_PER_CLASS = 40  # where data.test_per_class is 0
COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # images of each digit


def open_all(data: Data) -> Source:
    """1,797 real images of 8 × 8 pixels, `test_per_class` of each class held out for testing."""
    from sklearn.datasets import load_digits  # seconds of every process's start

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digit-{i:04d}" for i in range(len(pixels))]
    everything = from_arrays(names, digits.target, pixels)
    held = [data.test_per_class or TEST_PER_CLASS] * 10
    train, test = everything.part(longtail.choose(everything.labels, held, seed=0))
    return Source([str(d) for d in range(10)], train, test)


def available(data: Data) -> Available:
    """Known without scikit-learn, whose import takes seconds."""
    held = data.test_per_class or TEST_PER_CLASS
    return Available([n - held for n in COUNTS], 10 * held, False)


def digest(data: Data) -> str:
    return f"digits-{VERSION}"
