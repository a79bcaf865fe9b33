"""The distilled set as it leaves the house: images, labels, teacher, a card, and hashes of all.

``write`` makes it from the stages of a run, ``rewrite`` from one that was exported before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data import whitening
from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.settings import Location
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.models import frozen
from ltdd_scale.publish import kept
from ltdd_scale.publish.card import card
from ltdd_scale.publish.encode import Encoding, decode
from ltdd_scale.publish.formats import WRITERS
from ltdd_scale.publish.material import FOLDER, Material
from ltdd_scale.publish.opened import SOFT, Opened, numbered
from ltdd_scale.publish.settings import FORMATS, IMAGEFOLDER, Publish
from ltdd_scale.results import SOFTMAX
from ltdd_scale.runtime import files
from ltdd_scale.settings import parse

FORMAT = 3
TEACHER = "teacher.safetensors"
TEACHERS = (TEACHER, "teacher.pt")  # the second before format 3
THREADS = 4  # that encode images
AWKWARD = re.compile(r"[:?#*\\\x00-\x1f\x7f]")  # of a folder's name, in patterns and addresses


def write(material: Material, split: ShardSplit, results: dict[str, Any], out: Path) -> None:
    """Write ``out/distilled`` beside its place, then swap it in.

    Raises `UserError` where the disk is full; what was there before is then still there.
    """
    with swapped_in(out / FOLDER) as fresh:
        _fill(fresh, material, split, results)


def rewrite(
    opened: Opened,
    out: Path,
    formats: Iterable[str],
    encoding: Encoding,
    publish: Publish,
    change: dict[str, Any] | None = None,
) -> None:
    """Write the set again as `out`, in `formats` (``imagefolder`` and names of `WRITERS`), with
    images of `encoding` and the licence of `publish`. `change`: what that costs in accuracy, as
    `card.change_text` takes it.

    Raises `UserError` where images of another encoding are asked of a set whose own have lost
    something already.
    """
    if encoding != opened.encoding and opened.encoding.lossy:
        raise UserError(
            f"{opened.folder}: its images are {opened.encoding.title} and have lost something "
            "already: export from a set with lossless ones"
        )
    with swapped_in(out) as fresh:
        told = dict(opened.told)
        told["config"] = {**told["config"], "publish": publish.model_dump(mode="json")}
        told["images"] = _recode(opened, fresh, encoding)
        if change:
            told["images"]["change"] = change
        for name in ("hints.json", "results.json", whitening.FILE):
            if (opened.folder / name).exists():
                shutil.copyfile(opened.folder / name, fresh / name)
        _rename_provenance(opened.folder / "provenance.json", fresh, encoding.suffix)
        _copy_labels(opened.folder / "labels", fresh)
        teacher = find_teacher(opened.folder)
        if teacher is not None:
            _put_teacher([teacher], fresh)
        results = fresh / "results.json"
        _finish(fresh, told, formats, files.read_json(results) if results.exists() else None)


def damage(folder: Path) -> list[str]:
    """What of a distilled set is not as its ``files.json`` records, a line each."""
    wrong = []
    for name, digest in files.read_json(folder / "files.json").items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{path}: missing")
        elif files.sha256(path) != digest:
            wrong.append(f"{path}: damaged (its hash does not match)")
    return wrong


def folder_names(classes: list[str]) -> list[str]:
    """Class folders whose sorted order is the label order: that of names, which ImageFolder uses,
    and that of paths (``cat-fish/`` comes before ``cat/``). Where names do not sort so, or where
    Hugging Face's `datasets` would pass over one of them or take it for a pattern, they are
    numbered."""
    plain = [c.replace("/", "_").replace(" ", "_") or "_" for c in classes]
    safe = [AWKWARD.sub("_", c) for c in plain]
    sort = all(sorted(plain, key=key) == plain for key in (str, lambda c: f"{c}/"))
    hidden = any(c.startswith((".", "__")) for c in plain)
    if sort and safe == plain and not hidden and len(set(plain)) == len(plain):
        return plain
    return [f"{numbered(k, len(safe))}_{c}" for k, c in enumerate(safe)]


def find_teacher(folder: Path) -> Path | None:
    """The teacher's weights in a distilled set, of any format."""
    return next((folder / name for name in TEACHERS if (folder / name).exists()), None)


def _fill(fresh: Path, material: Material, split: ShardSplit, results: dict[str, Any]) -> None:
    names = folder_names(split.classes)
    publish = parse(Publish, material.config.get("publish", {}), "publish.")
    encoding = Encoding(publish.images, publish.quality)
    held = Distilled(material.kept, len(names))
    told = description(material, split, names)
    if chosen := kept.record(results["summary"]):
        told["chosen"] = chosen
    told["images"] = _put_images(
        fresh, encoding, ((name, held.load(label)) for label, name in enumerate(names))
    )
    provenance = []
    for label, name in enumerate(names):
        rows = held.provenance(label)
        for k, row in enumerate(rows):
            file = f"images/{name}/{numbered(k, len(rows))}.{encoding.suffix}"
            provenance.append({"file": file, **row})
    files.write_json(fresh / "provenance.json", provenance)
    if hints := held.hints():
        files.write_json(fresh / "hints.json", hints)
    if zca := material.find("zca"):
        shutil.copyfile(zca / whitening.FILE, fresh / whitening.FILE)
    _copy_labels(material.kept_labels, fresh)
    if material.teachers:
        _put_teacher(material.teachers, fresh)
    without = {name: value for name, value in results.items() if name != "loss_curves"}
    files.write_json(fresh / "results.json", without)
    _finish(fresh, told, (IMAGEFOLDER, *publish.formats), results)


def description(material: Material, split: ShardSplit, names: list[str]) -> dict[str, Any]:
    """``set.json``: all that somebody needs to train on the set without a config."""
    return {
        "format": FORMAT,
        "name": material.name,
        "ipc": material.ipc,
        "classes": split.classes,
        "folders": names,
        "train_counts": split.counts.tolist(),
        "resolution": material.resolution,
        "mean": split.mean,
        "std": split.std,
        # Networks see whitened images, and mean and std above do not apply.
        "zca": whitening.FILE if material.find("zca") else "",
        "labels": material.labels,
        # Of the labels of images that CutMix mixes, see docs/labels.md.
        "mixed": SOFTMAX if material.config["evaluate"]["soft_loss"] == "kl" else "logits",
        "student": material.student,
        "config": _elsewhere(material.config),
    }


def _elsewhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the paths of the machine that the set was made on."""
    data = dict(config["data"])
    for name in Location.model_fields:
        if name in data:
            data[name] = "" if name == "path" else Path(data[name]).name
    experts = {
        role: {**config[role], "weights": Path(config[role]["weights"]).name}
        for role in ("observer", "teacher")
        if config.get(role, {}).get("weights")
    }
    train = dict(config["train"])
    train["deepspeed"] = Path(train.get("deepspeed", "")).name
    return {**config, **experts, "data": data, "train": train}


def _finish(
    fresh: Path, told: dict[str, Any], formats: Iterable[str], results: dict[str, Any] | None
) -> None:
    """What is written from the images and labels that lie there: the other formats, ``set.json``,
    the card, the hashes."""
    wanted = [name for name in (IMAGEFOLDER, *FORMATS) if name in set(formats)]
    provenance = fresh / "provenance.json"
    told = {
        **told,
        "format": FORMAT,
        "formats": wanted,
        "teacher": find_teacher(fresh) is not None,
        "soft_labels": next((n for n in SOFT if (fresh / "labels" / n).exists()), ""),
        "provenance": provenance.exists() and bool(files.read_json(provenance)),
    }
    files.write_json(fresh / "set.json", told)  # who opens the set reads it
    opened = Opened(fresh)
    opened.told["image_counts"] = opened.image_counts
    files.write_json(fresh / "set.json", opened.told)
    for name in wanted:
        if name in WRITERS:
            WRITERS[name](opened, fresh / name)
    if IMAGEFOLDER not in wanted:
        shutil.rmtree(fresh / "images")
    files.write_text(fresh / "README.md", card(opened, results))
    put_hashes(fresh)


def put_hashes(folder: Path) -> None:
    """Write ``files.json``: the SHA-256 of every other file."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): files.sha256(p) for p in found}
    files.write_json(folder / "files.json", hashes)


def _put_images(
    fresh: Path,
    encoding: Encoding,
    classes: Iterable[tuple[str, Sequence[np.ndarray] | np.ndarray]],
) -> dict[str, Any]:
    """``images/<class>/00000.png`` …, class after class; what ``set.json`` says of them."""
    png, total, lossless = Encoding("png"), 0, 0

    def put(path: Path, pixels: np.ndarray) -> tuple[int, int]:
        content = encoding.encode(pixels)
        path.write_bytes(content)
        as_png = len(content) if encoding.name == "png" else len(png.encode(pixels))
        return len(content), as_png

    with ThreadPoolExecutor(THREADS, "images") as pool:
        for name, images in classes:
            folder = fresh / "images" / name
            folder.mkdir(parents=True)
            waiting = [
                pool.submit(put, folder / f"{numbered(k, len(images))}.{encoding.suffix}", pixels)
                for k, pixels in enumerate(images)
            ]
            for future in waiting:
                written, as_png = future.result()
                total, lossless = total + written, lossless + as_png
    told = {"format": encoding.name, "bytes": total, "png_bytes": lossless}
    return told | ({"quality": encoding.quality} if encoding.lossy else {})


def _recode(opened: Opened, fresh: Path, encoding: Encoding) -> dict[str, Any]:
    """The images of a set with another encoding, or their own bytes; what to say of them."""
    named = zip(opened.told["folders"], opened.paths, strict=True)
    if encoding != opened.encoding:
        return _put_images(
            fresh,
            encoding,
            ((name, [decode(p.read_bytes(), p) for p in found]) for name, found in named),
        )
    total = 0
    for name, found in named:
        (fresh / "images" / name).mkdir(parents=True)
        for path in found:
            shutil.copyfile(path, fresh / "images" / name / path.name)
            total += path.stat().st_size
    return opened.told.get("images") or {"format": "png", "bytes": total, "png_bytes": total}


def _rename_provenance(source: Path, fresh: Path, suffix: str) -> None:
    """``provenance.json`` with the names that the images have now."""
    if source.exists():
        rows = files.read_json(source)
        for row in rows:
            row["file"] = f"{row['file'].rpartition('.')[0]}.{suffix}"
        files.write_json(fresh / source.name, rows)


def _copy_labels(source: Path, fresh: Path) -> None:
    (fresh / "labels").mkdir()
    for path in sorted(source.iterdir()):
        result = path.suffix in (".npy", ".json") and not path.name.startswith(".")
        if result and path.name != "stage.json":
            shutil.copyfile(path, fresh / "labels" / path.name)


def _put_teacher(weights: Sequence[Path], fresh: Path) -> None:
    """Who labels, one file of one network or of several that are averaged, without what only their
    own training needed."""
    recipe, model = frozen.read_mean(weights)
    frozen.write(fresh / TEACHER, recipe, model)


@contextmanager
def swapped_in(place: Path) -> Generator[Path]:
    """A new folder beside `place`, which becomes `place` when all went well. What was there before
    is replaced."""
    fresh, old = (place.with_name(f".{place.name}.{part}") for part in ("new", "old"))
    try:
        if old.exists() and not place.exists():  # something ended between two renames
            os.rename(old, place)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        _swap(fresh, place)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise files.explain(error, place) from error
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _swap(fresh: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    os.rename(fresh, place)
    shutil.rmtree(old, ignore_errors=True)
