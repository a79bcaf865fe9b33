import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale.data import sampling


@given(st.integers(1, 500), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_is_a_permutation_and_epochs_differ(n, seed, epoch):
    order = sampling.uniform(n, seed, epoch)
    assert sorted(order) == list(range(n)) and (order == sampling.uniform(n, seed, epoch)).all()
    if n > 20:
        assert (order != sampling.uniform(n, seed, epoch + 1)).any() and (
            order != sampling.uniform(n, seed + 1, epoch)
        ).any()


@given(st.integers(0, 300), st.integers(1, 64))
def test_ranks_share_a_batch_without_gap_or_overlap(num, world):
    parts = [range(num)[sampling.rank_slice(num, r, world)] for r in range(world)]
    assert [i for p in parts for i in p] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(0, 100), max_size=60), st.integers(1, 9))
def test_units_are_spread_once_each(sizes, world):
    parts = sampling.spread(np.asarray(sizes), world)
    assert sorted(u for p in parts for u in p) == list(range(len(sizes))) and len(parts) == world
    loads = [sum(sizes[u] for u in p) for p in parts]
    assert not sizes or max(loads) - min(loads) <= max(sizes)


def test_resampling_follows_its_weights():
    counts = np.asarray([800, 150, 50])
    labels = np.repeat([0, 1, 2], counts)
    for power, expected in (
        (0, counts / 1000),
        (1, np.ones(3) / 3),
        (0.2, counts**0.8 / (counts**0.8).sum()),
    ):
        drawn = labels[sampling.resampled(labels, counts, power, 60000, 0, 0)]
        assert np.allclose(np.bincount(drawn) / 60000, expected, atol=0.01)
