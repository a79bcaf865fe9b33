import json

import numpy as np
import pytest
import rldd_tools
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.distilled import Distilled, to_uint8
from ltdd_scale.data.loader import open_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd import initialize
from ltdd_scale.methods.rldd.settings import Initialize


def literal(scores, ipc):
    """The algorithm word for word: in each round every image gives its best unused crop; the round's crops are taken best first."""
    unused = [list(range(scores.shape[1])) for _ in scores]
    taken = []
    while len(taken) < ipc and any(unused):
        offers = []
        for i, crops in enumerate(unused):
            if crops:
                best = crops[0]
                for k in crops:
                    if scores[i, k] > scores[i, best]:
                        best = k
                offers.append((i, best))
        while offers and len(taken) < ipc:
            best = offers[0]
            for offer in offers:
                if scores[offer] > scores[best]:
                    best = offer
            offers.remove(best)
            taken.append(best)
            unused[best[0]].remove(best[1])
    return taken


# Few distinct values, so that ties are common.
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 5)),
        elements=st.integers(-4, 0).map(float),
    ),
    st.integers(1, 60),
)
def test_selection_is_the_literal_algorithm(scores, ipc):
    images, crops = initialize.select(scores, ipc)
    assert list(zip(images.tolist(), crops.tolist(), strict=True)) == literal(scores, ipc)
    assert len(images) == min(ipc, scores.size)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shards of 12 … 3 digits a class, and a teacher."""
    folder = tmp_path_factory.mktemp("store")
    rldd_tools.run("shard", rldd_tools.config(), folder)
    rldd_tools.expert(folder / "teacher", "teacher", "convnet3", "instance")
    return folder


@pytest.fixture(scope="module")
def settings():
    return Initialize(crops=3, crop_scale=[0.6, 1.0], batch_size=7)


def test_a_class_too_small_draws_further_crops_and_says_so(store, settings, tmp_path):
    """IPC 20 from 3 images × 3 crops: the published code would loop for ever."""
    config = rldd_tools.config(ipc=20, initialize=settings)
    facts = rldd_tools.run("initialize", config, store, out=tmp_path)
    rows = json.loads((tmp_path / "00009.json").read_text())
    assert len(rows) == 20 and max(r["attempt"] for r in rows) == 2
    assert len({tuple(r["window"]) for r in rows}) == 20
    assert np.load(tmp_path / "00009.npy").shape == (20, 3, 8, 8)
    assert 0 < facts["classes needing further crops"] < 10


@pytest.mark.parametrize("confident", [True, False])
def test_provenance_makes_the_image_again(store, settings, tmp_path, confident):
    """Random crops need no teacher: none is among the inputs."""
    settings = settings.model_copy(update={"confident": confident})
    config = rldd_tools.config(ipc=5, initialize=settings)
    rldd_tools.run("initialize", config, store, out=tmp_path)
    split = ShardSplit(store / "shard", "train")
    images = open_images(split, config.data, torch.device("cpu"), 0)
    chosen = Distilled(tmp_path, 10)
    for c in (0, 5, 9):
        pixels, rows = chosen.load(c), chosen.provenance(c)
        assert len(pixels) == len(rows) == 5
        for image, row in zip(pixels, rows, strict=True):
            none = np.zeros((1, 0), int), np.zeros((1, 0), bool)
            views = Views(np.float32([row["window"]]), np.asarray([row["mirrored"]]), *none)
            plan = (np.asarray([row["image"]]), views)
            again = to_uint8(next(iter(images.stream([plan], ViewSpec(8)))))[0]
            assert np.abs(again.astype(int) - image).max() <= 1
            assert row["source"] == split.names[row["image"]]
            assert split.labels[row["image"]] == c and ("score" in row) == confident


def test_a_restart_does_the_classes_again_that_are_not_whole(store, settings, tmp_path):
    config = rldd_tools.config(initialize=settings)
    rldd_tools.run("initialize", config, store, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("0*")}
    assert len(before) == 20
    (tmp_path / "00003.json").unlink()
    (tmp_path / "00003.npy").write_bytes(b"")
    rldd_tools.run("initialize", config, store, out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("0*")} == before
