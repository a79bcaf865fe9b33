"""The distilled set as it leaves the house: PNGs, labels, teacher, a card, and hashes of all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.publish.card import card
from ltdd_scale.publish.material import FOLDER, Material
from ltdd_scale.runtime import files

FORMAT = 2


def write(material: Material, split: ShardSplit, results: dict[str, Any], out: Path) -> None:
    """Write ``out/distilled`` beside its place, then swap it in.

    Raises `UserError` where the disk is full; what was there before is then still there.
    """
    fresh = out / f".{FOLDER}.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        _fill(_Folder(fresh), material, split, results)
        _swap(fresh, out / FOLDER)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise files.explain(error, out / FOLDER) from error


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
    """Class folders whose sorted order, which ImageFolder uses, is the label order."""
    plain = [c.replace("/", "_").replace(" ", "_") or "_" for c in classes]
    if plain == sorted(plain) and len(set(plain)) == len(plain):
        return plain
    return [f"{k:05d}_{c}" for k, c in enumerate(plain)]


class _Folder:
    """A folder being filled, and the hash of each file in it."""

    def __init__(self, path: Path):
        self.path = path
        self.digests: dict[str, str] = {}

    def put(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.digests[name] = hashlib.sha256(content).hexdigest()

    def put_json(self, name: str, value: Any, indent: int = 1) -> None:
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        self.put(name, (text + "\n").encode())


def _fill(folder: _Folder, material: Material, split: ShardSplit, results: dict[str, Any]) -> None:
    names = folder_names(split.classes)
    known = _put_images(folder, Distilled(material.folder("distilled"), len(names)), names)
    for path in sorted(material.folder("labels").iterdir()):
        if path.suffix in (".npy", ".json") and path.name != "stage.json":
            folder.put(f"labels/{path.name}", path.read_bytes())
    teacher = material.find("teacher")
    if teacher is not None:
        folder.put("teacher.pt", (teacher / "weights.pt").read_bytes())
    folder.put_json("set.json", description(material, split, names))
    folder.put("README.md", card(material, split, names, results, known).encode())
    files.write_json(folder.path / "files.json", folder.digests)


def _put_images(folder: _Folder, distilled: Distilled, names: list[str]) -> bool:
    """``images/<class>/00000.png`` …, and ``provenance.json`` with a row for each; whether it has
    any: a method may make images from nothing."""
    provenance = []
    for label, name in enumerate(names):
        for k, pixels in enumerate(distilled.load(label)):
            folder.put(f"images/{name}/{k:05d}.png", _png(pixels))
        for k, row in enumerate(distilled.provenance(label)):
            provenance.append({"file": f"images/{name}/{k:05d}.png", **row})
    folder.put_json("provenance.json", provenance, indent=0)
    if hints := distilled.hints():
        folder.put_json("hints.json", hints)
    return bool(provenance)


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
        "labels": material.labels,
        "student": material.student,
        "config": material.config,
    }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _swap(fresh: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    os.rename(fresh, place)
    shutil.rmtree(old, ignore_errors=True)
