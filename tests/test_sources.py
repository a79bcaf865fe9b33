import gzip
import io
import pickle

import numpy as np
import pytest
from conftest import image_folder
from PIL import Image

from ltdd_scale.config import Data
from ltdd_scale.data import sources
from ltdd_scale.errors import UserError


def pixels(split, i):
    return np.asarray(Image.open(io.BytesIO(split.read(i))).convert("RGB"))


def lists(
    tmp_path, train="train/a/000.png 0\ntrain/b/000.png 1\n", test="val/000.png 0\nval/001.png 1\n"
):
    image_folder(tmp_path, {"a": 2, "b": 2})
    image_folder(tmp_path / "val-source", {"a": 2}, "x")
    (tmp_path / "val").mkdir()
    for k in range(2):
        (tmp_path / "val-source" / "x" / "a" / f"{k:03d}.png").rename(
            tmp_path / "val" / f"{k:03d}.png"
        )
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "test.txt").write_text(test)
    return Data(
        source="list",
        path=str(tmp_path),
        train_list="train.txt",
        test_list="test.txt",
        profile="full",
    )


def test_a_list_as_it_is(tmp_path):
    source = sources.open_source(lists(tmp_path))
    assert (
        source.classes == ["a", "b"]
        and source.train.labels.tolist() == [0, 1]
        and source.test.names == ["val/000.png", "val/001.png"]
    )
    assert (pixels(source.train, 1) == np.asarray(Image.open(tmp_path / "train/b/000.png"))).all()
    assert source.notes["official ImageNet-LT"] == "no"


def test_a_gzipped_list_and_val_images_in_folders(tmp_path):
    data = lists(tmp_path, test="val/000.png 0\nval/001.png 1\n")
    for k, wnid in enumerate("ab"):
        (tmp_path / "val" / wnid).mkdir()
        (tmp_path / "val" / f"{k:03d}.png").rename(tmp_path / "val" / wnid / f"{k:03d}.png")
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress((tmp_path / "train.txt").read_bytes()))
    (tmp_path / "train.txt").unlink()
    assert sources.open_source(data).test.names == ["val/a/000.png", "val/b/001.png"]


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ("", "val/000.png 0\n", "the list is empty"),
        (
            "train/a/000.png 0\ntrain/b/999.png 1\n",
            "val/000.png 0\nval/001.png 1\n",
            "1 of 2 files are not under",
        ),
        (
            "train/a/000.png 0\ntrain/b/000.png 1\n",
            "val/000.png 0\nval/001.png 7\n",
            "line 2: label 7, but the training list has classes 0 to 1",
        ),
        ("train/a/000.png 0\ntrain/b/000.png 2\n", "val/000.png 0\n", "class 1 has no images"),
        ("train/a/000.png 0\nnonsense\n", "val/000.png 0\n", "line 2: expected 'path label'"),
        (
            "train/a/000.png 0\ntrain/b/000.png 1\n",
            "val/000.png 0\n",
            r"class 1 \(b\) has no test images",
        ),
    ],
)
def test_a_wrong_list_says_where(tmp_path, train, test, words):
    with pytest.raises(UserError, match=words):
        sources.open_source(lists(tmp_path, train, test))


def test_torchvision_pickles_and_png_folders_are_the_same_set(tmp_path):
    names = ["airplane", "automobile", "bird"]
    generator = np.random.default_rng(0)
    batches = tmp_path / "one" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for batch in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (6, 3072), dtype=np.uint8)
        labels = [0, 1, 2, 0, 1, 2]
        files = [f"{batch}_{i}.png" for i in range(6)]
        (batches / batch).write_bytes(
            pickle.dumps({"data": data, "labels": labels, "filenames": files})
        )
        for row, label, name in zip(data, labels, files, strict=True):
            folder = (
                tmp_path / "two" / ("test" if batch == "test_batch" else "train") / names[label]
            )
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(folder / name)
    one, two = (
        sources.open_source(Data(source="folder", path=str(tmp_path / p), imbalance_factor=3))
        for p in ("one", "two")
    )
    assert (
        one.classes == two.classes == names
        and one.train.labels.tolist() == two.train.labels.tolist()
    )
    of = {name.rsplit("/")[-1]: i for i, name in enumerate(two.test.names)}
    for i, name in enumerate(one.test.names):
        assert (pixels(one.test, i) == pixels(two.test, of[name])).all()


def test_tiny_imagenet_layout(tmp_path):
    for wnid, n in (("n01", 3), ("n02", 2)):
        image_folder(tmp_path / "train" / wnid, {"images": n}, ".")
    image_folder(tmp_path, {"images": 2}, "val")
    (tmp_path / "val" / "val_annotations.txt").write_text(
        "000.png\tn02\t0\t0\t1\t1\n001.png\tn01\t0\t0\t1\t1\n"
    )
    source = sources.open_source(Data(source="folder", path=str(tmp_path), profile="full"))
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1] and source.test.labels.tolist() == [1, 0]


def test_digits_splits_are_disjoint_and_validation_comes_from_training():
    data = Data(
        source="digits", max_per_class=50, imbalance_factor=10, test_per_class=30, val_per_class=7
    )
    source = sources.open_source(data)
    assert (
        np.bincount(source.test.labels).tolist() == [30] * 10
        and np.bincount(source.val.labels).tolist() == [7] * 10
    )
    parts = [set(s.names) for s in (source.train, source.val, source.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_folders_that_are_no_set(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        sources.open_source(Data(source="folder", path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="found neither"):
        sources.open_source(Data(source="folder", path=str(tmp_path)))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        sources.open_source(Data(source="folder", path=str(tmp_path)))
    image_folder(tmp_path, {"a": 2})
    (tmp_path / "train" / "b").mkdir()
    image_folder(tmp_path, {"a": 2, "b": 1}, "test")
    with pytest.raises(UserError, match=r"class 1 \(b\) has no training images"):
        sources.open_source(Data(source="folder", path=str(tmp_path)))
