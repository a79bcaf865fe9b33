"""Folders of images as a source: <split>/<class>/… or <class>/…, Tiny-ImageNet's, torchvision's
CIFAR."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ltdd_scale.data import cifar, longtail
from ltdd_scale.data.settings import Data
from ltdd_scale.data.split import IMAGE_NAMES, Source, Split, from_files
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files


@dataclass(frozen=True)
class _Layout:
    """`train` is the folder of the classes' folders, "" where that is the root itself. `held` is
    the split that is tested on, "" where test images are a share of the others; `annotations` tell
    its classes in Tiny-ImageNet. `validation` is the split for that, "" where there is none."""

    root: Path
    classes: list[str]
    train: str
    held: str
    annotations: Path | None = None
    validation: str = ""

    def folder(self, split: str, name: str) -> str:
        """Of a class, relative to the root."""
        return f"{split}/{name}" if split else name


def open_all(data: Data) -> Source:
    """Raises `UserError` where the folder is missing or none of these."""
    root = _root(data)
    if found := cifar.find(root):
        if data.val_folder:
            raise UserError(
                f"data.val_folder={data.val_folder}: {root} is torchvision's CIFAR, which has no "
                "such folder; data.val_per_class or data.val_fraction holds images out"
            )
        return cifar.open_all(*found)
    layout, notes = _layout(root, data), _unused(root, data)
    skipped: Counter[str] = Counter()
    everything = _split(layout, layout.train, skipped)
    if skipped:
        notes["skipped"] = _named(f"{n} {kind}" for kind, n in skipped.most_common())
    if data.min_per_class > 1:
        _refuse_few(layout, everything, notes)
        layout, few = _large_enough(layout, everything, data.min_per_class)
        everything = _split(layout, layout.train)
        if few:
            notes["small classes"] = _named(few)
    if layout.held:
        val = _split(layout, layout.validation) if layout.validation else None
        if val and not val.names:
            raise UserError(
                f"data.val_folder={layout.validation}: no images in the folders of the classes in "
                f"{root / layout.validation}"
            )
        return Source(layout.classes, everything, _test(layout), val, notes)
    return Source(layout.classes, *_shared_out(everything, layout, data), notes=notes)


def _refuse_few(layout: _Layout, everything: Split, notes: dict[str, str]) -> None:
    """Raise `UserError` where less than two class folders hold images: then it is not the number of
    images that is wrong."""
    there = len(np.unique(everything.labels))
    if there < 2:
        skipped = f" Files of unknown types: {notes.get('skipped')}"
        raise UserError(
            f"{layout.root / layout.train}: images in {there} of {len(layout.classes)} class "
            f"folders ({', '.join(layout.classes[:5])}), and two are needed: is data.path one "
            f"level too high, or too low?{skipped if 'skipped' in notes else ''}"
        )


def _large_enough(layout: _Layout, everything: Split, least: int) -> tuple[_Layout, list[str]]:
    """The layout without classes of fewer than `least` images, and their names."""
    counts = np.bincount(everything.labels, minlength=len(layout.classes))
    named = list(zip(layout.classes, counts, strict=True))
    kept = [name for name, n in named if n >= least]
    if len(kept) < 2:
        raise UserError(
            f"data.min_per_class={least}: {len(kept)} classes have so many images, and two are "
            "needed: lower it"
        )
    return replace(layout, classes=kept), [name for name, n in named if n < least]


def _shared_out(everything: Split, layout: _Layout, data: Data) -> tuple[Split, Split]:
    """(training, test) images: a share of each class is tested on."""
    counts = np.bincount(everything.labels, minlength=len(layout.classes)).tolist()
    if few := [name for name, n in zip(layout.classes, counts, strict=True) if n < 2]:
        raise UserError(
            f"data.test_fraction: {len(few)} of {len(layout.classes)} classes have fewer than two "
            f"images ({', '.join(few[:10])}): one is to be learned from, one to be tested on; "
            "data.min_per_class=2 leaves such classes out"
        )
    held = longtail.held_out(counts, data.test_fraction)
    return everything.part(longtail.choose(everything.labels, held, data.split_seed + 2))


def digest(data: Data) -> str:
    """Of the relative names and sizes of the images that `open_all` would find; of CIFAR's pickles,
    their content.

    What image files show is not read: one that is replaced by another of the same size goes unseen.
    """
    root = _root(data)
    if found := cifar.find(root):
        return cifar.digest(*found)
    layout = _layout(root, data)
    lines, tops, others = [], [], [layout.held, layout.validation]
    if layout.annotations:
        shown, tops = hashlib.sha256(layout.annotations.read_bytes()).hexdigest(), ["val"]
        lines.append(f"{layout.annotations.name}\0{shown}\n".encode())
        others.remove("val")
    splits = [layout.train, *filter(None, others)]
    tops += [layout.folder(split, name) for split in splits for name in layout.classes]
    for top in tops:
        for name, entry in images(layout.root, top):
            lines.append(os.fsencode(f"{name}\0{_size(entry)}\n"))
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _root(data: Data) -> Path:
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(
            f"data.path: no such folder: {root.absolute()} (put the images there, or --set "
            "data.path=…; a relative path begins where the command is run)"
        )
    return root


def _unused(root: Path, data: Data) -> dict[str, str]:
    """What lies in the folder and is not used, which its owner may not expect."""
    notes, splits = {}, ("train", "test", "val")
    if not (root / "train").is_dir():
        return notes
    if (root / "val" / "val_annotations.txt").exists():
        return notes
    here, known = [s for s in splits if (root / s).is_dir()], _classes(root / "train")
    if len(here) == len(splits) and not data.val_folder:
        notes["unused folder"] = "val"
    elsewhere = {c for s in here for c in _classes(root / s)} - set(known)
    if elsewhere:
        notes["classes without training images"] = _named(sorted(elsewhere))
    return notes


def _layout(root: Path, data: Data) -> _Layout:
    test_fraction, validation = data.test_fraction, data.val_folder
    train = "train" if (root / "train").is_dir() else ""
    if not train and not test_fraction:
        raise UserError(
            f"{root}: found neither train/<class>/…, cifar-10-batches-py nor cifar-100-python; "
            f"of folders {root}/<class>/… data.test_fraction holds out test images, 0.2 say"
        )
    classes = _classes(root / train)
    if not classes:
        own = any(p.suffix.lower() in IMAGE_NAMES for p in (root / train).iterdir())
        raise UserError(
            f"{root / train}: no class folders in it: "
            + (
                "a class cannot be called train beside others; rename its folder"
                if train and own and len(_classes(root)) > 1
                else "put the images into one for each"
            )
        )
    annotations = root / "val" / "val_annotations.txt"
    held = next((s for s in ("test", "val") if train and (root / s).is_dir()), "")
    if annotations.exists() and train:
        held = "val"  # Tiny-ImageNet's test images have no labels
    beside = os.path.basename(validation) == validation and (root / validation).is_dir()
    if validation and (not beside or not held or validation in (train, held)):
        raise UserError(
            f"data.val_folder={validation}: {root} needs a folder of that name beside train/ and "
            "another one to test on, each with a folder for each class"
        )
    if held and test_fraction:
        raise UserError(
            f"data.test_fraction: there are test images in {root / held}: set it to 0, or move them"
        )
    if annotations.exists() and train:
        return _Layout(root, classes, train, held, annotations, validation)
    if not held and not test_fraction:
        raise UserError(
            f"{root}: no test/<class>/… (or val/<class>/…) folder to judge the result on; "
            "data.test_fraction holds out a share of the training images, 0.2 say"
        )
    return _Layout(root, classes, train, held, validation=validation)


def _classes(folder: Path) -> list[str]:
    """Names of the class folders in it. What systems and editors hide there is none."""
    there = (p.name for p in folder.iterdir() if p.is_dir())
    return sorted(name for name in there if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    """Whether systems and editors keep their own in a file or folder of this name."""
    return name.startswith((".", "__MACOSX"))


def _named(names: Iterable[str]) -> str:
    """Names in a note. What is no UTF-8 is shown as far as it goes."""
    return os.fsencode(", ".join(names)).decode(errors="replace")


def _split(layout: _Layout, split: str, skipped: Counter[str] | None = None) -> Split:
    """Images under split/<class>/, at any depth (Tiny-ImageNet has …/images/), sorted by name.
    `skipped` counts other files by their type."""
    names, labels = [], []
    for label, name in enumerate(layout.classes):
        folder = layout.folder(split, name)
        found = sorted(name for name, _ in images(layout.root, folder, skipped))
        names += found
        labels += [label] * len(found)
    _refuse_odd(layout.root, names)
    return from_files(layout.root, names, labels)


def _test(layout: _Layout) -> Split:
    """The held split; Tiny-ImageNet's labelled val images serve as the test set."""
    if layout.annotations is None:
        return _split(layout, layout.held)
    index = {name: label for label, name in enumerate(layout.classes)}
    rows = _annotated(layout.annotations)
    unknown = [wnid for wnid in rows.values() if wnid not in index]
    if unknown:
        raise UserError(
            f"{layout.annotations}: class {unknown[0]} has no folder in {layout.root / 'train'}"
        )
    names = [f"val/images/{name}" for name in rows]
    return from_files(layout.root, names, [index[wnid] for wnid in rows.values()])


def _annotated(path: Path) -> dict[str, str]:
    """The class of each image that annotations name, in their order."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged or no text: {error}") from None
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror}") from None
    rows: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *more = line.split("\t")
        if not more or os.path.basename(name) != name or name == "..":
            raise UserError(f"{path}: expected 'name<tab>class', got {name[:80]!r}")
        if name in rows:
            raise UserError(
                f"{path}, line {number}: {name} is named twice (classes {rows[name]} and "
                f"{more[0]}): keep one"
            )
        rows[name] = more[0]
    return rows


def images(
    root: Path, top: str, skipped: Counter[str] | None = None
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Images below `top`, at any depth, by their names relative to `root`, in no order.

    A link to an image is one; a link to a folder below `top` is not followed, since it may lead
    back. What is hidden is none. `skipped` counts files of other types.
    """
    cut = len(os.path.join(root, ""))
    folders = [os.path.join(root, top)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        continue
                    if _is_folder(entry):
                        folders += [] if entry.is_symlink() else [entry.path]
                    elif entry.name.lower().endswith(IMAGE_NAMES):
                        yield entry.path[cut:], entry
                    elif skipped is not None:
                        skipped[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
        except FileNotFoundError:
            continue  # a class without test images, which `open_source` says
        except OSError as error:
            raise files.kind(error)(f"cannot read {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link in a circle


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a link that leads nowhere: quarantined, with the reason


def _refuse_odd(root: Path, names: Iterable[str]) -> None:
    """Names go into a table of text, one a line."""
    for name in names:
        try:
            name.encode()
            odd = len(name.splitlines()) != 1
        except UnicodeEncodeError:
            odd = True
        if odd:
            shown = os.fsencode(name)
            raise UserError(f"{root}: the file name {shown!r} is not one line of UTF-8: rename it")
