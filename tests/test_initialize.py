import json

import numpy as np
from conftest import cli
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ltdd_scale import initialize


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


def test_a_class_too_small_draws_further_crops_and_says_so(finished, tmp_path):
    """IPC 30 from 4 images × 3 crops: the published code would loop for ever."""
    config, run = finished
    done = cli(
        "initialize",
        config,
        "--out",
        tmp_path / "run",
        "--store",
        run.parent / "store",
        "--nproc",
        1,
        "--set",
        "ipc=30",
    )
    assert done.returncode == 0, done.stderr
    folder = max(
        (run.parent / "store" / "initialize").iterdir(),
        key=lambda p: (p / "stage.json").stat().st_mtime,
    )
    rows = json.loads((folder / "00009.json").read_text())
    assert (
        len(rows) == 30
        and max(r["attempt"] for r in rows) == 2
        and len({tuple(r["window"]) for r in rows}) == 30
    )
    assert np.load(folder / "00009.npy").shape == (30, 3, 8, 8)
    assert (
        json.loads((folder / "stage.json").read_text())["facts"]["classes needing further crops"]
        > 0
    )


def test_provenance_makes_the_image_again(finished):
    import torch

    from ltdd_scale.config import Config, Data
    from ltdd_scale.data import arrays
    from ltdd_scale.data.augment import Views, ViewSpec
    from ltdd_scale.data.loader import open_images
    from ltdd_scale.data.shards import ShardSplit

    _, run = finished
    stages = json.loads((run / "run.json").read_text())["stages"]
    store = run.parent / "store"
    split = ShardSplit(store / stages["shard"], "train")
    images, folder = (
        open_images(split, Config(data=Data(resolution=8)), torch.device("cpu")),
        store / stages["initialize"],
    )
    for c in (0, 5, 9):
        pixels, rows = (
            arrays.load(arrays.class_file(folder, c)),
            json.loads((folder / f"{c:05d}.json").read_text()),
        )
        for image, row in zip(pixels, rows, strict=True):
            views = Views(
                np.float32([row["window"]]),
                np.asarray([row["mirrored"]]),
                np.zeros((1, 0), int),
                np.zeros((1, 0), bool),
            )
            again = arrays.to_uint8(
                next(iter(images.stream([(np.asarray([row["image"]]), views)], ViewSpec(8))))
            )[0]
            assert (
                np.abs(again.astype(int) - image).max() <= 1
                and row["source"] == split.names[row["image"]]
                and split.labels[row["image"]] == c
            )
