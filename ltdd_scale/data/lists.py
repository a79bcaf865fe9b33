"""Lists of files as a source: OLTR's `path label` lines, plain or gzipped, as ImageNet-LT's are."""

from __future__ import annotations

import gzip
import hashlib
import os
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltdd_scale.data.settings import Data
from ltdd_scale.data.split import Available, Source, from_files
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files

# Git blob id of the official ImageNet_LT_train.txt.
IMAGENET_LT_TRAIN_BLOB = "a063f095fcd475db4cf8b0658c4b73955535bbf9"
DIGITS = 9  # of a label at most


@dataclass(frozen=True)
class Listed:
    """A list that was read: `names` and `labels` of its files, the number of each one's line, and
    the list's git blob id."""

    path: Path
    names: list[str]
    labels: list[int]
    lines: list[int]
    blob: str


def open_all(data: Data) -> Source:
    """Raises `UserError` for a list that is missing or wrong, and for files that are not there."""
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(
            f"data.path: no such folder: {root} (the root that list lines like "
            "train/n01440764/….JPEG start from)"
        )
    listed = _read_all(data)
    train = listed["train"]
    classes = _class_names(train)
    located = {key: _locate(root, found, classes) for key, found in listed.items()}
    # Validation images may be training images, as ImageNet-LT's are.
    for key in ("train", "val"):
        if key in listed:
            _refuse_shared(listed[key], located[key][1], listed["test"], located["test"][1], key)
    splits = {
        key: from_files(root, names, listed[key].labels, where)
        for key, (names, where) in located.items()
    }
    official = "yes" if train.blob == IMAGENET_LT_TRAIN_BLOB else "no"
    notes = {"train_list_git_blob": train.blob, "official ImageNet-LT": official}
    return Source(classes, splits["train"], splits["test"], splits.get("val"), notes)


def available(data: Data) -> Available:
    """Counted without looking for the files."""
    listed = _read_all(data)
    counts = np.bincount(listed["train"].labels).tolist()
    return Available(counts, len(listed["test"].names), "val" in listed)


def digest(data: Data) -> str:
    """Of what the lists say: neither where they lie nor how they are packed.

    The images are not looked at: another tree under the same lists counts as the same set.
    """
    digest = hashlib.sha256()
    for key, listed in _read_all(data).items():
        digest.update(f"{key}\n".encode())
        pairs = zip(listed.names, listed.labels, strict=True)
        digest.update("".join(f"{name} {label}\n" for name, label in pairs).encode())
    return digest.hexdigest()


def _read_all(data: Data) -> dict[str, Listed]:
    """The lists that the config names: "train", "val", "test"."""
    train = read(_list_path(data, data.train_list))
    # Not counted class by class: a mistyped label may be larger than memory.
    num_classes, present = max(train.labels) + 1, set(train.labels)
    if len(present) < num_classes:
        first = next(c for c in range(num_classes) if c not in present)
        raise UserError(
            f"{data.train_list}: class {first} has no images ({num_classes - len(present)} such "
            f"classes; the largest label is {num_classes - 1})"
        )
    out = {"train": train}
    for key, name in (("val", data.val_list), ("test", data.test_list)):
        if name:
            out[key] = read(_list_path(data, name), num_classes)
    return out


def _list_path(data: Data, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() or Path(name).exists() else Path(data.path) / name


def read(path: Path, num_classes: int | None = None) -> Listed:
    """The list at `path`, or at `path`.gz.

    Raises `UserError`, with the number of the line, for what is no 'path label', for a label of
    more than `DIGITS` digits or outside 0 … `num_classes` − 1, for a file outside of data.path, and
    for one that is named twice.
    """
    content, text = _content(path)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    names, labels, lines = [], [], []
    for number, name, label in _rows(path, text):
        if num_classes is not None and label >= num_classes:
            raise UserError(
                f"{path}, line {number}: label {label}, but the training list has classes 0 to "
                f"{num_classes - 1}"
            )
        names.append(name)
        labels.append(label)
        lines.append(number)
    if not names:
        raise UserError(f"{path}: the list is empty")
    listed = Listed(path, names, labels, lines, blob)
    _refuse_twice(listed, [posixpath.normpath(name) for name in names])
    return listed


def _content(path: Path) -> tuple[bytes, str]:
    """A list's bytes, unpacked, and its text without a byte-order mark."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            break
    else:
        raise UserError(f"no such list: {path}")
    try:
        content = candidate.read_bytes()
    except OSError as error:
        raise files.kind(error)(f"cannot read {candidate}: {error.strerror}") from None
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        return content, content.decode("utf-8-sig")
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{candidate} is damaged or no text: {error}") from error


def _rows(path: Path, text: str) -> Iterator[tuple[int, str, int]]:
    """Number, name and label of each line that is not blank."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.rpartition(" ")
        if not name or not (label.isascii() and label.isdigit()):
            raise UserError(f"{path}, line {number}: expected 'path label', got {line[:80]!r}")
        if len(label) > DIGITS:
            raise UserError(
                f"{path}, line {number}: a label of {len(label)} digits: number the classes from 0"
            )
        if posixpath.normpath(name).startswith(("/", "../")) or posixpath.normpath(name) == "..":
            raise UserError(
                f"{path}, line {number}: {name[:80]!r} leads out of data.path: name files relative "
                "to it"
            )
        yield number, name, int(label)


def _refuse_twice(listed: Listed, where: Sequence[str]) -> None:
    """`where` are the files that the lines mean."""
    if len(set(where)) == len(where):
        return
    first: dict[str, int] = {}
    for k, name in enumerate(where):
        j = first.setdefault(name, k)
        if j != k:
            said = [f"line {listed.lines[i]} (label {listed.labels[i]})" for i in (j, k)]
            raise UserError(
                f"{listed.path}: {name} is named twice, on {said[0]} and {said[1]}: keep one"
            )


def _refuse_shared(
    train: Listed, train_where: Sequence[str], test: Listed, test_where: Sequence[str], key: str
) -> None:
    """A file that is tested on, and trained on, or chosen by. `…_where` are the files that the
    lines mean, `key` is "train" or "val"."""
    called = {"train": "training", "val": "validation"}[key]
    trained = {name: k for k, name in enumerate(train_where)}
    for k, name in enumerate(test_where):
        if name in trained:
            raise UserError(
                f"{test.path}, line {test.lines[k]}: {name} is in the {called} list too "
                f"({train.path}, line {train.lines[trained[name]]}): keep it in one of them"
            )


def _class_names(train: Listed) -> list[str]:
    """The folder of each class (wnids), or numbers where classes are not folders."""
    num_classes = max(train.labels) + 1
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    for name, label in zip(train.names, train.labels, strict=True):
        folders[label].add(os.path.basename(os.path.dirname(posixpath.normpath(name))))
    named = all(len(f) == 1 for f in folders) and len(set.union(*folders)) == num_classes
    return [f.pop() for f in folders] if named else [f"{c:04d}" for c in range(num_classes)]


def _locate(root: Path, listed: Listed, wnids: list[str]) -> tuple[list[str], list[str]]:
    """Names of the files, and where they lie under `root`: ILSVRC's val images may be flat or in
    one folder a class."""
    names, where, missing = list(listed.names), [], []
    for i, name in enumerate(names):
        plain = posixpath.normpath(name)  # so that no ".." is left to the file system
        if not (root / plain).exists():
            folder, base = os.path.split(plain)
            top, wnid = plain.split("/")[0], wnids[listed.labels[i]]
            others = (f"{top}/{base}", f"{folder}/{wnid}/{base}", f"{top}/{wnid}/{base}")
            found = next((other for other in others if (root / other).exists()), None)
            if found is None:
                missing.append(name)
            else:
                names[i] = plain = found
        where.append(plain)
    if missing:
        raise UserError(
            f"{listed.path}: {len(missing)} of {len(names)} files are not under {root}, the first "
            f"is {missing[0]}: check data.path"
        )
    _refuse_twice(listed, where)
    return names, where
