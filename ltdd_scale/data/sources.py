"""Where real images come from: lists, folders, torchvision's download folders, and a set that needs no download."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ltdd_scale.config import Data
from ltdd_scale.data import longtail
from ltdd_scale.errors import UserError

IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
IMAGENET_LT_TRAIN_BLOB = (
    "a063f095fcd475db4cf8b0658c4b73955535bbf9"  # git blob id of the official ImageNet_LT_train.txt
)


@dataclass
class Split:
    """Names, labels and a reader of encoded bytes. Image `i` has class `labels[i]`."""

    names: list[str]
    labels: np.ndarray
    read: Callable[[int], bytes]

    def take(self, chosen: np.ndarray) -> Split:
        read = self.read
        return Split(
            [self.names[i] for i in chosen], self.labels[chosen], lambda k: read(int(chosen[k]))
        )


@dataclass
class Source:
    """The splits of a set, long tail already drawn, and its class names in label order."""

    classes: list[str]
    train: Split
    test: Split
    val: Split | None = None
    notes: dict[str, str] = field(default_factory=dict)


def _from_files(root: Path, names: list[str], labels: list[int]) -> Split:
    return Split(names, np.asarray(labels, np.int64), lambda i: (root / names[i]).read_bytes())


def _from_arrays(names: list[str], labels: list[int] | np.ndarray, pixels: np.ndarray) -> Split:
    def read(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels[i]).save(buffer, "PNG")
        return buffer.getvalue()

    return Split(names, np.asarray(labels, np.int64), read)


def _walk(root: Path, split: str, classes: list[str]) -> Split:
    """Images under root/split/<class>/, at any depth (Tiny-ImageNet has …/images/), sorted by name."""
    names, labels = [], []
    for label, name in enumerate(classes):
        found = []
        for folder, _, members in os.walk(root / split / name):
            found += [
                os.path.relpath(os.path.join(folder, m), root)
                for m in members
                if m.lower().endswith(IMAGE_NAMES)
            ]
        names += sorted(found)
        labels += [label] * len(found)
    return _from_files(root, names, labels)


def _folder(root: Path) -> tuple[list[str], Split, Split]:
    if not root.is_dir():
        raise UserError(
            f"data.path: no such folder: {root} (put the images there, or --set data.path=…)"
        )
    for name, reader in (("cifar-10-batches-py", _cifar), ("cifar-100-python", _cifar)):
        if root.name == name or (root / name).is_dir():
            return reader(root if root.name == name else root / name)
    if not (root / "train").is_dir():
        raise UserError(
            f"{root}: found neither train/<class>/…, cifar-10-batches-py nor cifar-100-python"
        )
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    if not classes:
        raise UserError(f"{root / 'train'}: no class folders in it")
    train = _walk(root, "train", classes)
    annotations = root / "val" / "val_annotations.txt"
    if annotations.exists():  # Tiny-ImageNet: the labelled val images serve as the test set
        rows = [
            line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()
        ]
        index = {name: label for label, name in enumerate(classes)}
        unknown = [wnid for _, wnid in rows if wnid not in index]
        if unknown:
            raise UserError(f"{annotations}: class {unknown[0]} has no folder in {root / 'train'}")
        return (
            classes,
            train,
            _from_files(
                root, [f"val/images/{name}" for name, _ in rows], [index[wnid] for _, wnid in rows]
            ),
        )
    held = next((s for s in ("test", "val") if (root / s).is_dir()), None)
    if held is None:
        raise UserError(
            f"{root}: no test/<class>/… (or val/<class>/…) folder to judge the result on"
        )
    return classes, train, _walk(root, held, classes)


def _cifar(root: Path) -> tuple[list[str], Split, Split]:
    """torchvision's download folder of CIFAR-10 or CIFAR-100 (python pickles)."""
    ten = root.name == "cifar-10-batches-py"

    def read(name: str) -> dict:
        path = root / name
        if not path.exists():
            raise UserError(f"{path} is missing: download the set again with torchvision")
        try:
            with open(path, "rb") as f:
                return pickle.load(f, encoding="latin1")  # the format that the set is published in
        except (EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} is damaged ({error}): download the set again with torchvision"
            ) from error

    meta = read("batches.meta" if ten else "meta")
    classes = list(meta["label_names" if ten else "fine_label_names"])

    def split(batches: list[str]) -> Split:
        parts = [read(name) for name in batches]
        pixels = (
            np.concatenate([p["data"] for p in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )
        labels = np.concatenate([p["labels" if ten else "fine_labels"] for p in parts])
        names = [name for p in parts for name in p["filenames"]]
        return _from_arrays(names, labels, np.ascontiguousarray(pixels))

    return (
        classes,
        split([f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]),
        split(["test_batch" if ten else "test"]),
    )


def _digits(test_per_class: int) -> tuple[list[str], Split, Split]:
    """scikit-learn's handwritten digits: 1,797 real images of 8 × 8 pixels that come with the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digit-{i:04d}" for i in range(len(pixels))]
    everything = _from_arrays(names, digits.target, pixels)
    test = longtail.choose(everything.labels, [test_per_class or 40] * 10, seed=0)
    rest = np.setdiff1d(np.arange(len(names)), test)
    return [str(d) for d in range(10)], everything.take(rest), everything.take(np.sort(test))


def _read_list(path: Path, num_classes: int | None) -> tuple[list[str], list[int], str]:
    """Names, labels and git blob id of an OLTR list (`path label` a line, plain or gzipped)."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.exists():
            content = candidate.read_bytes()
            break
    else:
        raise UserError(f"no such list: {path}")
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        text = content.decode()
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{candidate} is damaged or no text: {error}") from error
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    names, labels = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.rpartition(" ")
        if not name or not label.isdigit():
            raise UserError(f"{path}, line {number}: expected 'path label', got {line[:80]!r}")
        if num_classes is not None and int(label) >= num_classes:
            raise UserError(
                f"{path}, line {number}: label {label}, but the training list has classes 0 to {num_classes - 1}"
            )
        names.append(name)
        labels.append(int(label))
    if not names:
        raise UserError(f"{path}: the list is empty")
    return names, labels, blob


def _locate(
    root: Path, names: list[str], path: Path, wnids: list[str], labels: list[int]
) -> list[str]:
    """Names as they lie under root: ILSVRC's val images may be flat or in one folder a class."""
    missing = []
    for i, name in enumerate(names):
        if (root / name).exists():
            continue
        folder, base = os.path.split(name)
        top = name.split("/")[0]
        for other in (
            f"{top}/{base}",
            f"{folder}/{wnids[labels[i]]}/{base}",
            f"{top}/{wnids[labels[i]]}/{base}",
        ):
            if (root / other).exists():
                names[i] = other
                break
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} files are not under {root}, the first is {missing[0]}: check data.path"
        )
    return names


def _list_path(data: Data, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() or Path(name).exists() else Path(data.path) / name


def class_counts(data: Data) -> list[int]:
    """Training images of each class, long tail drawn; of a list without looking for its files. Raises `UserError` as `open_source` does."""
    if data.source == "list":
        available = np.bincount(_read_list(_list_path(data, data.train_list), None)[1]).tolist()
        return longtail.counts_for(
            data.profile, available, data.imbalance_factor, data.max_per_class, data.counts
        )
    source = open_source(data)
    return np.bincount(source.train.labels, minlength=len(source.classes)).tolist()


def _lists(data: Data) -> Source:
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(
            f"data.path: no such folder: {root} (the root that list lines like train/n01440764/….JPEG start from)"
        )

    def at(name: str) -> Path:
        return _list_path(data, name)

    names, labels, blob = _read_list(at(data.train_list), None)
    num_classes = max(labels) + 1
    present = np.bincount(labels, minlength=num_classes)
    if (present == 0).any():
        raise UserError(
            f"{data.train_list}: class {int(np.flatnonzero(present == 0)[0])} has no images ({int((present == 0).sum())} such classes)"
        )
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    for name, label in zip(names, labels, strict=True):
        folders[label].add(os.path.basename(os.path.dirname(name)))
    named = all(len(f) == 1 for f in folders) and len(set.union(*folders)) == num_classes
    classes = [f.pop() for f in folders] if named else [f"{c:04d}" for c in range(num_classes)]
    splits: dict[str, Split] = {}
    for key in ("train", "val", "test"):
        listed = getattr(data, f"{key}_list")
        if not listed:
            continue
        n, y, _ = (names, labels, blob) if key == "train" else _read_list(at(listed), num_classes)
        splits[key] = _from_files(root, _locate(root, n, at(listed), classes, y), y)
    notes = {
        "train_list_git_blob": blob,
        "official ImageNet-LT": "yes" if blob == IMAGENET_LT_TRAIN_BLOB else "no",
    }
    return Source(classes, splits["train"], splits["test"], splits.get("val"), notes)


def open_source(data: Data) -> Source:
    """The set that the config describes, with validation images held out and the long tail drawn.

    Validation images come from the training images, before the long tail is drawn from the rest; the test split is as it is.
    Raises `UserError` on anything missing or inconsistent.
    """
    if data.source == "list":
        source = _lists(data)
    else:
        classes, train, test = (
            _digits(data.test_per_class) if data.source == "digits" else _folder(Path(data.path))
        )
        source = Source(classes, train, test)
    available = np.bincount(source.train.labels, minlength=len(source.classes))
    largest = data.max_per_class or int(
        available.max()
    )  # also when some are held out: settings are then chosen on the long tail that they are for
    tested = np.bincount(source.test.labels, minlength=len(source.classes))
    for kind, sizes in (("training", available), ("test", tested)):
        if (sizes == 0).any():
            c = int(np.flatnonzero(sizes == 0)[0])
            raise UserError(
                f"class {c} ({source.classes[c]}) has no {kind} images ({int((sizes == 0).sum())} such classes)"
            )
    if data.val_per_class and source.val is None:
        if (available <= data.val_per_class).any():
            c = int(available.argmin())
            raise UserError(
                f"data.val_per_class={data.val_per_class} leaves nothing of class {c} ({source.classes[c]}, {available[c]} images)"
            )
        held = longtail.choose(
            source.train.labels, [data.val_per_class] * len(source.classes), data.split_seed + 1
        )
        rest = np.setdiff1d(np.arange(len(source.train.names)), held)
        source.val, source.train = source.train.take(np.sort(held)), source.train.take(rest)
        available = available - data.val_per_class
    counts = longtail.counts_for(
        data.profile, available.tolist(), data.imbalance_factor, largest, data.counts
    )
    if data.profile != "full":
        source.train = source.train.take(
            longtail.choose(source.train.labels, counts, data.split_seed)
        )
    return source
