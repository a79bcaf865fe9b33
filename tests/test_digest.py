import gzip
import os
import pickle
import random
import shutil
import time

import numpy as np
import pytest
from conftest import image_folder

from ltdd_scale.data import digest, folders, sharding, sources
from ltdd_scale.data.settings import Data
from ltdd_scale.errors import UserError


def folder(root, **more):
    return Data(source="folder", path=str(root), **more)


@pytest.fixture
def tree(tmp_path):
    image_folder(tmp_path / "set", {"a": 4, "b": 3})
    image_folder(tmp_path / "set", {"a": 1, "b": 2}, "test")
    (tmp_path / "set" / "train" / "a" / "deep").mkdir()
    (tmp_path / "set" / "train" / "a" / "000.png").rename(tmp_path / "set/train/a/deep/000.png")
    return tmp_path / "set"


def test_a_folder_that_moves_is_the_same_set(tree, tmp_path):
    before = digest.of(folder(tree))
    shutil.copytree(tree, tmp_path / "copy")
    tree.rename(tmp_path / "moved")
    assert digest.of(folder(tmp_path / "moved")) == digest.of(folder(tmp_path / "copy")) == before
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert digest.of(folder(tmp_path / "link")) == before
    # How images are chosen and stored is hashed elsewhere.
    assert digest.of(folder(tmp_path / "moved", profile="full", store_resolution=4)) == before


def test_a_folder_seen_from_inside_is_the_same_set(tree, monkeypatch):
    before = digest.of(folder(tree))
    monkeypatch.chdir(tree)
    for path in (".", "../set", "train/.."):
        assert digest.of(folder(path)) == before


def test_the_order_of_the_scan_does_not_matter(tree, monkeypatch):
    before, real = digest.of(folder(tree)), os.scandir

    class Shuffled:
        def __init__(self, path):
            self.entries = list(real(path))
            random.Random(len(os.fspath(path))).shuffle(self.entries)

        def __enter__(self):
            return reversed(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(folders.os, "scandir", Shuffled)
    assert digest.of(folder(tree)) == before


CHANGES = {
    "an image more": lambda t: shutil.copy(t / "train/a/001.png", t / "train/a/009.png"),
    "an image less": lambda t: (t / "train/a/001.png").unlink(),
    "a test image less": lambda t: (t / "test/b/001.png").unlink(),
    "an image renamed": lambda t: (t / "train/a/001.png").rename(t / "train/a/1.png"),
    "an image of another class": lambda t: (t / "train/a/003.png").rename(t / "train/b/003.png"),
    "an image deeper": lambda t: (t / "train/a/003.png").rename(t / "train/a/deep/003.png"),
    "a class renamed": lambda t: [(t / s / "a").rename(t / s / "c") for s in ("train", "test")],
    "another size": lambda t: (t / "train/b/002.png").write_bytes(
        (t / "train/b/002.png").read_bytes() + b"\0"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changes_is_another_set(tree, change):
    before = digest.of(folder(tree))
    CHANGES[change](tree)
    assert digest.of(folder(tree)) != before


def test_what_is_no_image_does_not_count(tree):
    before = digest.of(folder(tree))
    (tree / "train" / "a" / "README.txt").write_text("notes")
    (tree / "notes.png").write_text("beside the splits")
    os.utime(tree / "train" / "a" / "001.png", (0, 0))
    assert digest.of(folder(tree)) == before


def test_the_digest_lists_what_is_opened(tree):
    """Links included: to an image, to a class, to nowhere, in a circle."""
    outside = tree.parent / "outside"
    (tree / "train" / "b").rename(outside)
    (tree / "train" / "b").symlink_to(outside)
    (tree / "train" / "a" / "linked.png").symlink_to(outside / "000.png")
    (tree / "train" / "a" / "nowhere.png").symlink_to(outside / "none.png")
    (tree / "train" / "a" / "circle.png").symlink_to(tree / "train" / "a" / "circle.png")
    (tree / "train" / "a" / "deep" / "up").symlink_to(tree)
    before = digest.of(folder(tree))
    names = sources.open_source(folder(tree, profile="full")).train.names
    expected = [*(f"train/a/{k:03d}.png" for k in (1, 2, 3)), "train/a/circle.png"]
    expected += ["train/a/deep/000.png", "train/a/linked.png", "train/a/nowhere.png"]
    assert names == expected + [f"train/b/{k:03d}.png" for k in range(3)]
    (outside / "000.png").write_bytes(b"another size")
    assert digest.of(folder(tree)) != before


def test_many_files_are_listed_quickly(tmp_path):
    for c in range(20):
        for split, count in (("train", 999), ("test", 1)):
            (tmp_path / split / f"{c}").mkdir(parents=True)
            for k in range(count):
                (tmp_path / split / f"{c}" / f"{k}.jpg").touch()
    begin = time.process_time()
    digest.of(folder(tmp_path))
    assert time.process_time() - begin < 2, "20,000 files take a tenth of this"


def test_tiny_imagenets_annotations_count(tmp_path):
    image_folder(tmp_path / "train" / "n01", {"images": 3}, ".")
    image_folder(tmp_path, {"images": 2}, "val")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("000.png\tn01\n001.png\tn01\n")
    before = digest.of(folder(tmp_path))
    annotations.write_text("001.png\tn01\n000.png\tn01\n")
    assert digest.of(folder(tmp_path)) != before
    annotations.write_text("000.png\tn01\n001.png\tn01\n")
    assert digest.of(folder(tmp_path)) == before
    (tmp_path / "val" / "images" / "000.png").write_bytes(b"another")
    assert digest.of(folder(tmp_path)) != before


def test_cifars_pickles_by_name_and_content(tmp_path):
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    for name in ("meta", "train", "test"):
        (root / name).write_bytes(pickle.dumps(name))
    before = digest.of(folder(tmp_path))
    assert digest.of(folder(root)) == before
    root.rename(tmp_path / "cifar-10-batches-py")
    with pytest.raises(UserError, match=r"cifar-10-batches-py/batches.meta is missing"):
        digest.of(folder(tmp_path))
    (tmp_path / "cifar-10-batches-py").rename(root)
    (root / "train").write_bytes(pickle.dumps("trajn"))  # as long as before
    assert digest.of(folder(tmp_path)) != before
    (root / "train").write_bytes(pickle.dumps("train"))
    assert digest.of(folder(tmp_path)) == before


def lists(root, **content):
    root.mkdir(exist_ok=True)
    for key, text in content.items():
        (root / f"{key}.txt").write_bytes(text)
    named = {f"{key}_list": str(root / f"{key}.txt") for key in content}
    return Data(source="list", path=str(root / "images"), **named)


TRAIN, TEST = b"train/a/0.jpg 0\ntrain/b/0.jpg 1\n", b"val/0.jpg 0\nval/1.jpg 1\n"


def test_lists_by_what_they_say(tmp_path):
    data = lists(tmp_path / "one", train=TRAIN, test=TEST)
    before = digest.of(data)
    there = lists(tmp_path / "two", train=TRAIN, test=TEST)
    assert digest.of(there.model_copy(update={"path": "/elsewhere"})) == before
    same = (
        TRAIN.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + TRAIN,
        TRAIN.rstrip(),
        TRAIN + b"\n\n",
        TRAIN.replace(b"jpg 0", b"jpg 00"),
    )
    for text in same:
        assert digest.of(lists(tmp_path / "two", train=text, test=TEST)) == before
    for name in ("train", "test"):
        path = tmp_path / "two" / f"{name}.txt"
        (tmp_path / "two" / f"{name}.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert digest.of(there) == before


def test_other_lists_are_other_sets(tmp_path):
    found = {digest.of(lists(tmp_path / "l", train=TRAIN, test=TEST))}
    others = (
        {"train": TRAIN + b"train/b/1.jpg 1\n", "test": TEST},
        {"train": TRAIN.replace(b"a/0", b"a/1"), "test": TEST},
        {"train": b"".join(reversed(TRAIN.splitlines(True))), "test": TEST},
        {"train": TRAIN, "test": TEST.replace(b"jpg 1", b"jpg 0")},
        {"train": TRAIN, "test": TEST, "val": TEST},
        {"train": TEST, "test": TRAIN},
    )
    for content in others:
        found.add(digest.of(lists(tmp_path / "l", **content)))
    assert len(found) == 1 + len(others)


def test_shards_by_their_manifest(tree, tmp_path):
    data = folder(tree, profile="full")
    for name, images in (("one", 5), ("two", 5), ("three", 4)):
        (tmp_path / name).mkdir()
        stored = data.model_copy(update={"shard_images": images})
        sharding.write(tmp_path / name, "set", sources.open_source(data), stored, 1)
    one, two, three = (
        digest.of(Data(source="shards", path=str(tmp_path / name)))
        for name in ("one", "two", "three")
    )
    assert one == two != three


def test_digits_have_a_version():
    assert digest.of(Data()) == "digits-1"
    from sklearn.datasets import load_digits

    from ltdd_scale.data import digits

    assert tuple(np.bincount(load_digits().target)) == digits.COUNTS


@pytest.mark.parametrize("source", ["folder", "list", "shards"])
def test_a_source_that_is_missing(tmp_path, source):
    named = {f"{key}_list": str(tmp_path / key) for key in ("train", "test")}
    with pytest.raises(UserError, match=r"no such folder|no such list|no shard set in"):
        digest.of(Data(source=source, path=str(tmp_path / "none"), **named))
