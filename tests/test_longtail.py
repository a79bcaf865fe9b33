import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale.data import longtail
from ltdd_scale.errors import UserError


def test_published_sizes():
    assert longtail.exponential(10, 5000, 100) == [
        5000,
        2997,
        1796,
        1077,
        645,
        387,
        232,
        139,
        83,
        50,
    ]
    for factor, total in ((10, 20431), (50, 13996), (100, 12406), (200, 11203)):
        assert sum(longtail.exponential(10, 5000, factor)) == total
    for factor, total in ((10, 19573), (20, 15907), (50, 12608), (100, 10847)):
        assert sum(longtail.exponential(100, 500, factor)) == total
    for factor, total in ((10, 39072), (20, 31711), (100, 21549)):
        assert sum(longtail.exponential(200, 500, factor)) == total
    assert longtail.exponential(10, 1000, 100) == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]


@given(
    st.integers(2, 12), st.integers(5, 40), st.floats(1, 20), st.floats(1, 20), st.integers(0, 5)
)
def test_more_imbalance_is_nested_in_less(num_classes, largest, a, b, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), largest))
    low, high = sorted((a, b))
    chosen = []
    for factor in (low, high):
        counts = [max(1, n) for n in longtail.exponential(num_classes, largest, factor)]
        found = longtail.choose(labels, counts, seed)
        assert np.bincount(labels[found], minlength=num_classes).tolist() == counts and len(
            set(found)
        ) == len(found)
        chosen.append(set(found.tolist()))
    assert chosen[1] <= chosen[0]


def test_groups_and_their_thirds():
    assert longtail.shot_groups([500, 101, 100, 20, 19, 1]).tolist() == [0, 0, 1, 1, 2, 2]
    assert longtail.shot_groups([900, 300, 800, 200, 700, 101]).tolist() == [0, 1, 0, 2, 1, 2]


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="3 numbers, but the set has 2"):
        longtail.counts_for("counts", [5, 5], explicit=[1, 2, 3])
    with pytest.raises(UserError, match="6 images of class 1, which has 5"):
        longtail.counts_for("counts", [5, 5], explicit=[5, 6])
    with pytest.raises(UserError, match="class 1 would have no training images"):
        longtail.counts_for("exponential", [5, 5], imbalance_factor=100)
    assert longtail.counts_for("exponential", [100, 3], imbalance_factor=2) == [100, 3]
