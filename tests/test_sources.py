import gzip
import io
import os
import pickle

import numpy as np
import pytest
from conftest import image_folder
from PIL import Image

from ltdd_scale.data import digest, pickles, sources
from ltdd_scale.data.settings import Data
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


@pytest.mark.parametrize("split", ["train", "."])
def test_a_share_of_each_class_is_tested_on_where_there_are_no_test_images(tmp_path, split):
    """As people have their images: a folder a class, and nothing else."""
    image_folder(tmp_path, {"a": 20, "b": 7, "c": 2}, split)
    data = Data(source="folder", path=str(tmp_path), profile="full", val_fraction=0.1)
    with pytest.raises(UserError, match=r"data\.test_fraction holds out"):
        sources.open_source(data)
    data = data.model_copy(update={"test_fraction": 0.2})
    found = sources.open_source(data)
    counts = [np.bincount(s.labels).tolist() for s in (found.train, found.test)]
    assert counts == [[14, 5, 1], [4, 1, 1]] and found.val is not None
    names = [set(s.names) for s in (found.train, found.test, found.val)]
    assert sum(map(len, names)) == 29 == len(set.union(*names))
    assert set(sources.open_source(data).test.names) == names[1]
    assert sources.facts(data).counts == (14, 5, 1)
    # What is tested on does not depend on what is learned from.
    fewer = data.model_copy(update={"profile": "exponential", "imbalance_factor": 3.0})
    assert set(sources.open_source(fewer).test.names) == names[1]
    assert sources.kind(data).digest(data)
    image_folder(tmp_path, {"d": 1}, split)
    with pytest.raises(UserError, match="1 of 4 classes have fewer than two images"):
        sources.open_source(data)
    if split == "train":
        image_folder(tmp_path, {"a": 1, "b": 1, "c": 1, "d": 1}, "test")
        with pytest.raises(UserError, match="there are test images in"):
            sources.open_source(data)


@pytest.mark.parametrize("label", [0, 1])
def test_a_file_that_a_list_names_twice(tmp_path, label):
    data = lists(tmp_path, f"train/a/000.png 0\ntrain/b/000.png 1\n\ntrain/./a/000.png {label}\n")
    words = rf"train/a/000.png is named twice, on line 1 \(label 0\) and line 4 \(label {label}\)"
    with pytest.raises(UserError, match=words):
        sources.open_source(data)


def test_two_lines_that_mean_one_file(tmp_path):
    """ILSVRC's flat val images, found under their base name."""
    data = lists(tmp_path, test="val/a/000.png 0\nval/b/000.png 1\n")
    with pytest.raises(
        UserError, match=r"val/000.png is named twice, on line 1 \(label 0\) and line"
    ):
        sources.open_source(data)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    data = lists(tmp_path)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    source = sources.open_source(data)
    assert source.train.names == ["train/a/000.png", "train/b/000.png"]
    assert source.test.names == ["val/000.png", "val/001.png"]


@pytest.mark.parametrize(
    "name", ["../../x", "/x", "a/../../x", "..", "//x", "train/a/../../../x", "./../x"]
)
def test_a_list_stays_inside_data_path(tmp_path, name):
    (tmp_path / "x").write_bytes(b"secret")
    data = lists(tmp_path / "set", f"train/a/000.png 0\n{name} 1\n")
    with pytest.raises(UserError, match=r"line 2: .* leads out of data.path"):
        sources.open_source(data)
    with pytest.raises(UserError, match=r"line 2: .* leads out of data.path"):
        sources.facts(data)


def test_a_list_may_go_up_inside_data_path(tmp_path):
    """As it is written, also where a folder on the way is a link to somewhere else."""
    data = lists(tmp_path / "set", "train/a/000.png 0\nelsewhere/../train/b/000.png 1\n")
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "set" / "elsewhere").symlink_to(tmp_path / "far" / "away")
    source = sources.open_source(data)
    assert source.train.names[1] == "elsewhere/../train/b/000.png"
    assert source.train.read(1) == (tmp_path / "set/train/b/000.png").read_bytes()


@pytest.mark.parametrize("label", ["²", "-1", "1.0", "x"])
def test_a_label_is_a_plain_number(tmp_path, label):
    with pytest.raises(UserError, match="line 2: expected 'path label'"):
        sources.open_source(lists(tmp_path, f"train/a/000.png 0\ntrain/b/000.png {label}\n"))


@pytest.mark.parametrize("label", ["99999999999", "1" * 25, "1" * 5000])
def test_a_label_that_is_too_large_is_one_line(tmp_path, label):
    data = lists(tmp_path, f"train/a/000.png 0\ntrain/b/000.png {label}\n")
    for ask in (sources.open_source, sources.facts, digest.of):
        with pytest.raises(UserError, match=rf"line 2: a label of {len(label)} digits"):
            ask(data)


def test_a_label_that_leaves_classes_empty_takes_no_memory(tmp_path):
    data = lists(tmp_path, "train/a/000.png 0\ntrain/b/000.png 999999999\n")
    words = r"class 1 has no images \(999999998 such classes; the largest label is 999999999\)"
    with pytest.raises(UserError, match=words):
        sources.facts(data)


def test_a_file_that_is_trained_and_tested_on(tmp_path):
    data = lists(tmp_path, test="val/000.png 0\nval/001.png 1\ntrain/./b/000.png 1\n")
    with pytest.raises(UserError) as caught:
        sources.open_source(data)
    said = str(caught.value)
    assert "test.txt, line 3: train/b/000.png is in the training list too" in said
    assert "train.txt, line 2)" in said and "\n" not in said
    # Found under its base name.
    (tmp_path / "train.txt").write_text("train/a/000.png 0\ntrain/b/000.png 1\nval/001.png 1\n")
    (tmp_path / "test.txt").write_text("val/000.png 0\nval/b/001.png 1\n")
    with pytest.raises(UserError, match=r"test.txt, line 2: val/001.png is in the training list"):
        sources.open_source(data)
    (tmp_path / "test.txt").write_text("val/000.png 0\nval/001.png 1\n")
    (tmp_path / "train.txt").write_text("train/a/000.png 0\ntrain/b/000.png 1\n")
    (tmp_path / "val.txt").write_text("train/a/000.png 0\n")
    held = data.model_copy(update={"val_list": "val.txt"})
    assert sources.open_source(held).val is not None
    with pytest.raises(UserError, match=r"val/000.png is in the validation list too"):
        sources.open_source(data.model_copy(update={"val_list": "test.txt"}))


def test_tiny_imagenets_annotations_name_an_image_once_and_are_text(tmp_path):
    for wnid in ("n01", "n02"):
        image_folder(tmp_path / "train" / wnid, {"images": 1}, ".")
    image_folder(tmp_path, {"images": 2}, "val")
    data = Data(source="folder", path=str(tmp_path), profile="full")
    twice = r"line 4: 000.png is named twice \(classes n01 and n02\): keep one"
    for content, words in (
        (b"000.png\tn01\n001.png\tn02\n\n000.png\tn02\n", twice),
        (b"000.png\tn01\n\xff.png\tn02\n", "is damaged or no text"),
    ):
        (tmp_path / "val" / "val_annotations.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"val_annotations.txt.*{words}") as caught:
            sources.open_source(data)
        assert "\n" not in str(caught.value)


def test_tiny_imagenets_annotations_name_files_of_their_folder(tmp_path):
    image_folder(tmp_path / "train" / "n01", {"images": 1}, ".")
    image_folder(tmp_path, {"images": 1}, "val")
    annotations = tmp_path / "val" / "val_annotations.txt"
    data = Data(source="folder", path=str(tmp_path), profile="full")
    for line in ("../../x\tn01\n", "..\tn01\n", "000.png\n"):
        annotations.write_text(line)
        with pytest.raises(UserError, match="expected 'name<tab>class'"):
            sources.open_source(data)


def test_names_of_files_are_one_line_of_text(tmp_path):
    image_folder(tmp_path, {"a": 1})
    image_folder(tmp_path, {"a": 1}, "test")
    data = Data(source="folder", path=str(tmp_path), profile="full")
    for name in (b"two\nlines.png", b"\xff.png"):
        path = os.fsencode(tmp_path / "train" / "a") + b"/" + name
        os.link(tmp_path / "train" / "a" / "000.png", path)
        with pytest.raises(UserError, match="is not one line of UTF-8: rename it") as caught:
            sources.open_source(data)
        assert "\n" not in str(caught.value)
        os.unlink(path)


class Runs:
    """What a pickle may ask for: a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def cifar(folder, batch):
    """A download folder whose batches all are `batch`, bytes."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(batch)
    return Data(source="folder", path=str(folder), profile="full")


def batch(n=2):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), dtype=np.uint8)
    names = [f"{i}.png" for i in range(n)]
    return {"data": pixels, "labels": [i % 2 for i in range(n)], "filenames": names}


def test_a_pickle_that_calls_a_command_is_refused_and_not_run(tmp_path):
    data = cifar(tmp_path, pickle.dumps({**batch(), "more": Runs(tmp_path / "ran")}))
    with pytest.raises(
        UserError, match=r"data_batch_1: refused, it asks for posix.system"
    ) as caught:
        sources.open_source(data)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    os.system(f"touch {tmp_path / 'ran'}")
    assert (tmp_path / "ran").exists(), "the test's command does nothing"


@pytest.mark.parametrize("asked", [b"cbuiltins\neval\n", b"cnumpy\nload\n", b"cos\nsystem\n"])
def test_other_functions_are_refused(tmp_path, asked):
    (tmp_path / "p").write_bytes(asked + b"(S'1'\ntR.")
    with pytest.raises(UserError, match="refused, it asks for"):
        pickles.load(tmp_path / "p", "cure")
    encoded = b"c_codecs\nencode\n(S'1'\nS'rot13'\ntR."
    (tmp_path / "p").write_bytes(encoded)
    with pytest.raises(UserError, match=r"refused, it asks for _codecs.encode to rot13"):
        pickles.load(tmp_path / "p", "cure")
    (tmp_path / "p").write_bytes(pickle.dumps(np.asarray([print], object), 2))
    with pytest.raises(UserError, match="refused"):
        pickles.load(tmp_path / "p", "cure")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (pickle.dumps({"labels": {1, 2}}), "asks for a value of type set"),
        (pickle.dumps([frozenset((1,))]), "asks for a value of type frozenset"),
        (pickle.dumps({"labels": [(1, 2)]}), "asks for a value of type tuple"),
        (pickle.dumps({(1, 2): 1}), "asks for a value of type tuple"),
        (pickle.dumps([True]), "asks for a value of type bool"),
        (pickle.dumps([1.5]), "asks for a value of type float"),
        (pickle.dumps([None]), "asks for a value of type NoneType"),
        (b"cnumpy\nndarray\n.", "asks for a value of type type"),
        (b"cnumpy\ndtype\n(S'u1'\ntR.", "asks for a value of type"),
        (b"cnumpy\nndarray\n((I3\ntS'O'\ntR.", "an array of objects"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'O'\ntR.", "of objects"),
    ],
)
def test_a_pickle_holds_arrays_text_and_numbers_alone(tmp_path, there, words):
    (tmp_path / "p").write_bytes(there)
    with pytest.raises(UserError, match=f"refused, it .*{words}") as caught:
        pickles.load(tmp_path / "p", "cure")
    assert "\n" not in str(caught.value)


def test_a_pickle_that_holds_itself_ends(tmp_path):
    content = [1]
    content.append(content)
    (tmp_path / "p").write_bytes(pickle.dumps(content))
    assert pickles.load(tmp_path / "p", "cure")[0] == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_pickles_of_every_age_are_read(tmp_path, protocol, core):
    content = {**batch(), "raw": b"\x00\xff", "float": np.float32([1, 2]), "n": 3}
    there = pickle.dumps(content, protocol)
    if protocol < 4:  # names of modules are lines there, and their length is not written
        there = there.replace(b"numpy._core", core)
    (tmp_path / "p").write_bytes(there)
    read = pickles.load(tmp_path / "p", "cure")
    assert list(read) == list(content) and read["raw"] == content["raw"] and read["n"] == 3
    for key in ("data", "float"):
        assert read[key].dtype == content[key].dtype and (read[key] == content[key]).all()


def test_python_2s_pickles_are_read(tmp_path):
    """As CIFAR is published: protocol 2 with byte strings, and NumPy's old names."""
    there = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x01K\x02\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x07\xfetbU\x06labels]K\x06au."
    )
    (tmp_path / "p").write_bytes(there)
    read = pickles.load(tmp_path / "p", "cure")
    assert read["data"].tolist() == [[7, 254]] and read["labels"] == [6]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: {k: v for k, v in b.items() if k != "labels"}, "there is no 'labels' in it"),
        (lambda b: [b], "there is no 'data' in it"),
        (lambda b: {**b, "labels": [0, 2]}, "do not fit its images"),
        (lambda b: {**b, "labels": [0]}, "not uint8"),
        (lambda b: {**b, "labels": ["a", "b"]}, "do not fit its images"),
        (lambda b: {**b, "filenames": ["a"]}, "do not fit its images"),
        (lambda b: {**b, "data": b["data"].astype(float)}, "not uint8"),
    ],
)
def test_a_batch_that_is_none_says_so(tmp_path, spoil, words):
    with pytest.raises(UserError, match=f"data_batch_1 is damaged .*{words}"):
        sources.open_source(cifar(tmp_path, pickle.dumps(spoil(batch()))))


def test_torn_pickles_are_damaged(tmp_path):
    whole = pickle.dumps(batch())
    for size in (0, 1, 20, 100, len(whole) - 1):
        with pytest.raises(UserError, match=r"data_batch_1 is damaged .* with torchvision"):
            sources.open_source(cifar(tmp_path, whole[:size]))


def test_facts_are_those_of_the_opened_set(tmp_path):
    listed = lists(tmp_path / "list", "train/a/000.png 0\ntrain/a/001.png 0\ntrain/b/000.png 1\n")
    image_folder(tmp_path / "folder", {"a": 9, "b": 7})
    image_folder(tmp_path / "folder", {"a": 2, "b": 1}, "test")
    folder = Data(source="folder", path=str(tmp_path / "folder"), imbalance_factor=3)
    digits = Data(max_per_class=30, imbalance_factor=5, test_per_class=20, val_per_class=3)
    for data in (listed, folder, digits, folder.model_copy(update={"val_per_class": 2})):
        source, facts = sources.open_source(data), sources.facts(data)
        assert facts.counts == tuple(np.bincount(source.train.labels))
        assert facts.judged == len(source.test.names)


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match="'web' is none of digits, folder, list, shards"):
        Data(source="web")


def test_what_systems_and_people_leave_in_folders_is_no_class_and_no_image(tmp_path):
    image_folder(tmp_path, {"a": 5, "b": 4, "c": 1}, ".")
    for hidden in (".ipynb_checkpoints", "__MACOSX", "a/.picasaoriginals", "b/__MACOSX"):
        image_folder(tmp_path, {hidden: 2}, ".")
    (tmp_path / "a" / "._000.png").write_bytes(b"x")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    for name in ("1.heic", "2.heic", "notes.txt"):
        (tmp_path / "b" / name).write_bytes(b"x")
    data = Data(source="folder", path=str(tmp_path), profile="full", test_fraction=0.3)
    with pytest.raises(UserError, match=r"1 of 3 classes .* \(c\).*min_per_class=2 leaves"):
        sources.open_source(data)
    found = sources.open_source(data.model_copy(update={"min_per_class": 2}))
    assert found.classes == ["a", "b"]
    assert found.notes == {"skipped": "2 .heic, 1 .txt", "small classes": "c"}
    assert len(found.train.names) + len(found.test.names) == 9
    with pytest.raises(UserError, match="min_per_class=5: 1 classes"):
        sources.open_source(data.model_copy(update={"min_per_class": 5}))


def test_a_folder_beside_train_and_test_may_hold_the_validation_images(tmp_path):
    for split, count in (("train", 5), ("test", 3), ("val", 2)):
        image_folder(tmp_path, {"a": count, "b": count}, split)
    image_folder(tmp_path, {"late": 1}, "test")
    data = Data(source="folder", path=str(tmp_path), profile="full")
    without = sources.open_source(data)
    assert without.val is None
    assert without.notes == {
        "unused folder": "val",
        "classes without training images": "late",
    }
    told = data.model_copy(update={"val_folder": "val"})
    found = sources.open_source(told)
    assert found.val is not None and found.val.labels.tolist() == [0, 0, 1, 1]
    assert all(name.startswith("val/") for name in found.val.names)
    assert "unused folder" not in found.notes and digest.of(told) != digest.of(data)
    image_folder(tmp_path, {"a": 3}, "val", seed=1)
    assert digest.of(told) != digest.of(data)
    for wrong in ("test", "train", "none", "../val"):
        with pytest.raises(UserError, match="beside train/"):
            sources.open_source(data.model_copy(update={"val_folder": wrong}))
    with pytest.raises(UserError, match="beside train/"):
        sources.open_source(
            Data(source="folder", path=str(tmp_path / "train"), test_fraction=0.2, val_folder="val")
        )


def test_what_is_wrong_with_a_folder_is_said_as_it_is(tmp_path):
    def opened(path, **more):
        return sources.open_source(Data(source="folder", path=str(path), **more))

    for name in ("cat", "dog"):
        (tmp_path / "phone" / name).mkdir(parents=True)
        (tmp_path / "phone" / name / "1.heic").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"images in 0 of 2 class folders .* unknown types: 2 \.heic"
    ):
        opened(tmp_path / "phone", test_fraction=0.2, min_per_class=2)
    image_folder(tmp_path / "deep" / "images", {"cat": 5, "dog": 5}, ".")
    for least in (0, 2):
        with pytest.raises(UserError, match="one level too high"):
            opened(tmp_path / "deep", test_fraction=0.2, min_per_class=least)
    with pytest.raises(UserError, match="one level too high"):
        sources.facts(Data(source="folder", path=str(tmp_path / "deep"), test_fraction=0.2))
    image_folder(tmp_path / "railway", {"train": 5, "bus": 5}, ".")
    with pytest.raises(UserError, match="a class cannot be called train"):
        opened(tmp_path / "railway", test_fraction=0.2)


def test_names_that_are_no_text_can_be_noted(tmp_path):
    image_folder(tmp_path, {"a": 5, "b": 5}, ".")
    (tmp_path / "a" / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    data = Data(source="folder", path=str(tmp_path), profile="full", test_fraction=0.3)
    said = sources.open_source(data).notes["skipped"]
    assert said.startswith("1 caf") and said.encode()


def test_the_size_of_files_is_found_for_the_estimate(tmp_path):
    image_folder(tmp_path, {"a": 30, "b": 30}, ".", size=20)
    data = Data(source="folder", path=str(tmp_path), profile="full", test_fraction=0.3)
    true = np.mean([p.stat().st_size for p in tmp_path.rglob("*.png")])
    assert sources.facts(data).image_bytes == pytest.approx(true, rel=0.1)


def test_tiny_imagenets_val_is_its_test_set(tmp_path):
    for wnid in ("n01", "n02"):
        image_folder(tmp_path / "train" / wnid, {"images": 3}, ".")
    image_folder(tmp_path, {"images": 2}, "val")
    image_folder(tmp_path, {"images": 2}, "test")
    rows = "000.png\tn01\t0\t0\t8\t8\n001.png\tn02\t0\t0\t8\t8\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(rows)
    data = Data(source="folder", path=str(tmp_path), profile="full")
    assert not sources.open_source(data).notes
    with pytest.raises(UserError, match="beside train/"):
        sources.open_source(data.model_copy(update={"val_folder": "val"}))


def test_a_folder_of_validation_images_holds_some(tmp_path):
    for split in ("train", "test"):
        image_folder(tmp_path, {"a": 3, "b": 3}, split)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "flat.png").write_bytes(b"x")
    data = Data(source="folder", path=str(tmp_path), profile="full", val_folder="val")
    with pytest.raises(UserError, match="no images in the folders of the classes"):
        sources.open_source(data)
    assert data.validated and not Data(source="digits", val_folder="val").validated
    assert Data(source="list", val_list="v").validated
    assert not Data(source="folder", val_list="v").validated
