"""Validation images that come out of the training images: which, of every kind of source."""

import pickle

import numpy as np
import pytest
from conftest import TINY, image_folder
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale import recipe, session
from ltdd_scale.config import load
from ltdd_scale.data import longtail, sharding, sources
from ltdd_scale.data.settings import Chosen, Data
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.pipeline import graph

COUNTS = {"a": 21, "b": 8, "c": 2, "d": 1}


def folder(root, **more):
    image_folder(root, COUNTS)
    image_folder(root, dict.fromkeys(COUNTS, 1), "test")
    return Data(source="folder", path=str(root), profile="full", **more)


def listed(root, **more):
    """In an order that is not the classes'."""
    folder(root)
    lines = [
        f"train/{name}/{k:03d}.png {label}\n"
        for k in range(max(COUNTS.values()))
        for label, (name, count) in enumerate(COUNTS.items())
        if k < count
    ]
    (root / "train.txt").write_text("".join(lines))
    test = [f"test/{name}/000.png {label}\n" for label, name in enumerate(COUNTS)]
    (root / "test.txt").write_text("".join(test))
    lists = {"train_list": "train.txt", "test_list": "test.txt"}
    return Data(source="list", path=str(root), profile="full", **lists, **more)


def pickled(root, **more):
    """CIFAR's pickles, of which the long tail has 20 … 4."""
    root = root / "cifar-10-batches-py"
    root.mkdir(parents=True)
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}))
    pixels = np.random.default_rng(0).integers(0, 256, (15, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        names = [f"{name}-{i}.png" for i in range(15)]
        batch = {"data": pixels, "labels": [i % 3 for i in range(15)], "filenames": names}
        (root / name).write_bytes(pickle.dumps(batch))
    tail = {"max_per_class": 20, "imbalance_factor": 5}
    return Data(source="folder", path=str(root), **tail, **more)


def digits(root, **more):
    return Data(max_per_class=40, imbalance_factor=40, test_per_class=100, **more)


def by_class(split):
    return [
        {name for name, y in zip(split.names, split.labels, strict=True) if y == c}
        for c in range(split.labels.max() + 1)
    ]


@pytest.mark.parametrize("kind", [folder, listed, pickled, digits])
def test_a_share_of_what_was_drawn(tmp_path, kind):
    """Of each class; the rest is the set without it, in its order. More of them hold fewer."""
    data = kind(tmp_path)
    whole = sources.open_source(data).train
    counts = np.bincount(whole.labels)
    held: list[list[set]] = [[set()] * len(counts)]
    for share in (0.1, 0.3, 0.9):
        more = data.model_copy(update={"val_fraction": share})
        source = sources.open_source(more)
        assert np.bincount(source.val.labels, minlength=len(counts)).tolist() == [
            min(max(round(n * share), 1), n - 1) if n > 1 else 0 for n in counts
        ]
        taken = set(source.val.names)
        assert source.train.names == [name for name in whole.names if name not in taken]
        assert len(taken) == len(source.val.names) and taken < set(whole.names)
        now = [*by_class(source.val), *[set()] * len(counts)]
        assert all(a <= b for a, b in zip(held[-1], now, strict=False))
        held.append(now)
        again = sources.open_source(more)
        assert again.val.names == source.val.names
        assert (again.val.labels == source.val.labels).all()
        assert again.val.read(0) == source.val.read(0)
        assert sources.facts(more).counts == tuple(np.bincount(source.train.labels))
    other = data.model_copy(update={"val_fraction": 0.3, "split_seed": 7})
    assert by_class(sources.open_source(other).val) != held[2][: len(counts)]


@given(st.lists(st.integers(1, 2000), min_size=1), st.floats(0.001, 0.9))
def test_of_each_class_one_at_least_and_never_all(counts, share):
    for n, held in zip(counts, longtail.held_out(counts, share), strict=True):
        assert held == 0 if n == 1 else 1 <= held < n
        assert n < 3 or held in (1, n - 1) or abs(held - n * share) <= 0.5


def test_counts_leave_the_rest_for_validation(tmp_path):
    """At most so many of each class, before the tail is drawn; a class that is used up has none."""
    data = folder(tmp_path).model_copy(update={"profile": "counts", "counts": [7, 3, 1, 1]})
    few = sources.open_source(data.model_copy(update={"val_per_class": 1}))
    many = sources.open_source(data.model_copy(update={"val_per_class": 6}))
    assert np.bincount(few.val.labels, minlength=4).tolist() == [1, 1, 1, 0]
    assert np.bincount(many.val.labels, minlength=4).tolist() == [6, 5, 1, 0]
    assert set(few.val.names) < set(many.val.names)
    for source in (few, many):
        assert np.bincount(source.train.labels).tolist() == [7, 3, 1, 1]
        assert not set(source.train.names) & set(source.val.names)
    assert sources.facts(data.model_copy(update={"val_per_class": 6})).counts == (7, 3, 1, 1)
    used = data.model_copy(update={"counts": [*COUNTS.values()], "val_per_class": 2})
    for ask in (sources.facts, sources.open_source):
        with pytest.raises(UserError, match=r"leaves no image unused; data\.val_fraction"):
            ask(used)


def test_single_images_cannot_be_held_out(tmp_path):
    ones = dict.fromkeys("abc", 1)
    image_folder(tmp_path, ones)
    image_folder(tmp_path, ones, "test")
    data = Data(source="folder", path=str(tmp_path), profile="full", val_fraction=0.5)
    with pytest.raises(UserError, match="every class has a single image"):
        sources.open_source(data)


def test_the_shards_of_a_set_with_classes_that_have_none(tmp_path):
    data = folder(tmp_path / "set", val_fraction=0.2)
    (tmp_path / "shard").mkdir()
    sharding.write(tmp_path / "shard", "set", sources.open_source(data), data, workers=1)
    assert ShardSplit(tmp_path / "shard", "val").counts.tolist() == [4, 2, 1, 0]
    assert ShardSplit(tmp_path / "shard", "train").counts.tolist() == [17, 6, 1, 1]


def shard_of(config) -> str:
    return graph.build(recipe.stages(config, "digits"), config)["shard"].fingerprint


def test_sets_without_a_share_are_what_they_were(tiny):
    """What was hashed before there was such a setting is hashed still; what is on is hashed too."""
    config = load.load(tiny)
    off = load.load(tiny, ["data.val_fraction=0"])
    on = load.load(tiny, ["data.val_per_class=0", "data.val_fraction=0.25"])
    none = load.load(tiny, ["data.val_per_class=0"])
    known = set(Chosen.model_fields) - {"val_fraction", "test_fraction", "min_per_class"}
    assert set(Chosen().model_dump()) == known
    for share in ("val_fraction", "test_fraction"):
        assert set(Chosen(**{share: 0.25}).model_dump()) == known | {share}
    assert shard_of(config) == shard_of(off) and len({*map(shard_of, (config, on, none))}) == 3
    assert session.chosen_images(on) != session.chosen_images(none)
    assert load.from_text(load.to_yaml(on)) == on and load.from_text(load.to_yaml(off)) == off
    assert load.changed(on, {"data.val_fraction": 0.5}).data.val_fraction == 0.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("val_per_class: 5", "data.val_per_class say"),
        ("val_per_class: 0, val_list: v.txt", "data.val_list say"),
        ("val_per_class: 0, source: shards, path: s", "data.source=shards say"),
        ("val_per_class: 5, val_list: v.txt", "data.val_per_class and data.val_list say"),
    ],
)
def test_one_word_on_validation_images_is_enough(tmp_path, data, words):
    (tmp_path / "tiny.yaml").write_text(TINY)
    text = f"base: tiny.yaml\ndata: {{val_fraction: 0.1, {data}}}\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load.load(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_students_may_be_judged_on_the_share(tiny):
    sets = ["data.val_per_class=0", "evaluate.split=val"]
    with pytest.raises(UserError, match=r"data.val_fraction, data.val_list or data.val_folder"):
        load.load(tiny, sets)
    assert load.load(tiny, [*sets, "data.val_fraction=0.1"]).evaluate.split == "val"
