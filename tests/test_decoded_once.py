"""Images that are looked at pass after pass are decoded in the first."""

import errno
import os

import numpy as np
import pytest
import torch
from conftest import image_folder

from ltdd_scale.data import kept, sharding, sources
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.kept import Kept
from ltdd_scale.data.settings import Data
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.data.streamed import StreamedImages

CPU, SIDE = torch.device("cpu"), 8
SPEC = ViewSpec(SIDE)
PLANS = [(np.asarray(part), None) for part in ([3, 0, 5], [1], [2, 4, 6])]
SIZE = 7 * 3 * SIDE**2  # bytes


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    image_folder(root / "real", {"a": 4, "b": 3}, size=20)
    image_folder(root / "real", {"a": 1, "b": 1}, "test", size=20)
    data = Data(source="folder", path=str(root / "real"), profile="full")
    (root / "shards").mkdir()
    sharding.write(root / "shards", "set", sources.open_source(data), data, 1)
    return StreamedImages(ShardSplit(root / "shards", "train"), SIDE, CPU, 0)


@pytest.fixture
def read(images, monkeypatch):
    """The images that were read, to be decoded."""
    found, view = [], images.split.view
    monkeypatch.setattr(images.split, "view", lambda i: found.append(i) or view(i))
    return found


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["memory", "file", "nowhere"])
def test_every_pass_shows_the_same_and_only_the_first_decodes(images, read, where, monkeypatch):
    said: list[str] = []
    if where == "nowhere":
        monkeypatch.setattr(os, "posix_fallocate", no_room)
    batches = Kept(images, PLANS, SPEC, CPU, SIZE if where == "memory" else SIZE - 1, said.append)
    expected = list(images.stream(PLANS, SPEC))
    read.clear()
    passes = [list(batches) for _ in range(3)]
    for shown in passes:
        assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))
    assert len(read) == (21 if where == "nowhere" else 7)
    assert isinstance(batches.pixels, np.memmap) == (where == "file")
    assert ("TMPDIR" in " ".join(said)) == (where == "nowhere")


def test_a_pass_that_was_left_is_begun_anew(images, read):
    batches = Kept(images, PLANS, SPEC, CPU, SIZE, print)
    next(iter(batches))
    read.clear()
    assert sum(len(x) for x in batches) == 7 and len(read) == 7


def test_the_file_has_no_name_and_goes_with_its_owner(images, tmp_path, monkeypatch):
    monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path))
    batches = Kept(images, PLANS, SPEC, CPU, 0, print)
    assert sum(len(x) for x in batches) == 7 and not list(tmp_path.iterdir())


def test_what_is_in_memory_is_not_kept_again(images):
    pixels = np.arange(7 * 3 * SIDE**2, dtype=np.uint8).reshape(7, 3, SIDE, SIDE)
    held = MemoryImages(pixels, images.labels, CPU)
    batches = Kept(held, PLANS, SPEC, CPU, SIZE, print)
    expected = held.stream(PLANS, SPEC)
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    assert batches.pixels is None


def test_a_rank_without_images_has_no_batches(images):
    assert list(Kept(images, [], SPEC, CPU, 0, print)) == []
