"""WebDataset shards: write, index, verify, read.

A shard set is a folder with ``NAME-train-000000.tar`` … (``key.jpg``/``key.png`` and zero-padded ASCII ``key.cls``; byte-identical
on every run), DALI's ``.idx`` beside each, ``NAME-train-meta.npy`` (int32 [N, 3]: label, width, height), ``NAME-train-names.txt`` (where each
image came from), ``manifest.json`` and ``quarantine.json``. Every image is decoded whole at the door: DALI stops for good on one it cannot decode.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import shutil
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset
from PIL import Image

from ltdd_scale.data.longtail import GROUPS, shot_groups
from ltdd_scale.data.sources import Source, Split
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.progress import Progress

# Formats and modes whose bytes are kept. Any other (CMYK, palettes, 16 bits, …) decoders understand each in its own way: it is rewritten as RGB in a PNG.
KEPT = {("JPEG", "RGB"): "jpg", ("JPEG", "L"): "jpg", ("PNG", "RGB"): "png", ("PNG", "L"): "png"}

VALUES = np.arange(256)
SAMPLED = 128  # the mean colour is taken of every k-th pixel of every k-th row, k such that a short side of at least so many remains


def square(image: Image.Image, side: int) -> Image.Image:
    """Short side to `side`, then the centre square."""
    if image.size == (side, side):
        return image
    short = min(image.size)
    left, top = (
        (image.width - short) // 2,
        (image.height - short) // 2,
    )  # whole pixels, as every decoder cuts
    return image.resize(
        (side, side),
        Image.Resampling.BILINEAR,
        box=(left, top, left + short, top + short),
        reducing_gap=3.0,
    )


def _admit(
    content: bytes, store_resolution: int, quality: int
) -> tuple[bytes, str, tuple[int, int], Image.Image]:
    """Bytes to store, their extension, the stored image's width and height, and the decoded RGB image. Raises with the reason where it does not decode.

    Every coefficient of a JPEG is read, which is what can fail; large ones whose bytes are kept are then shown at half their size, which takes half the time.
    With a `store_resolution` the centre square of that side is stored, as JPEG of `quality`, or as PNG where that is 0.
    An EXIF orientation is left as it is: no decoder here turns images, as torchvision does not.
    """
    if not content:
        raise ValueError("zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
        size, ext = image.size, KEPT.get((image.format or "", image.mode))
        if ext and not store_resolution and min(size) >= 2 * SAMPLED:
            image.draft(image.mode, (size[0] // 2, size[1] // 2))  # of JPEGs only
        image.load()
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if store_resolution:
        rgb, ext = square(rgb, store_resolution), None
    if ext is None:
        buffer, as_jpeg = io.BytesIO(), bool(store_resolution and quality)
        rgb.save(buffer, "JPEG", quality=quality) if as_jpeg else rgb.save(buffer, "PNG")
        content, ext, size = buffer.getvalue(), "jpg" if as_jpeg else "png", rgb.size
    return content, ext, size, rgb


# The split that worker processes read from; inherited by fork, since readers are closures over files or arrays.
_SPLIT: Split | None = None


class _Hashing:
    """A file that hashes what is written to it: no second pass over a tar."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        if self.file.closed:  # after an error tarfile writes its rest when it is thrown away
            return len(content)
        self.digest.update(content)
        self.size += len(content)
        return self.file.write(content)


def _write_shard(
    path: str, first: int, last: int, store_resolution: int, quality: int
) -> dict[str, Any]:
    """Write images first … last−1 of the split as one tar with its index; return the rows that describe them."""
    assert _SPLIT is not None
    rows, bad, index = [], [], []
    sums, squares, pixels = np.zeros(3, np.int64), np.zeros(3, np.int64), 0
    with files.replacing(path) as f:
        tar = _Hashing(f)
        writer = webdataset.TarWriter(tar, mtime=0, encoder=False)
        for i in range(first, last):
            name, label = _SPLIT.names[i], int(_SPLIT.labels[i])
            try:
                content, ext, size, rgb = _admit(_SPLIT.read(i), store_resolution, quality)
            except Exception as error:
                bad.append(
                    {
                        "index": i,
                        "name": name,
                        "label": label,
                        "reason": f"{type(error).__name__}: {error}",
                    }
                )
                continue
            members = {"cls": b"%05d" % label, ext: content}
            index.append(_index_line(f"{i:08d}", members, writer.tarstream.offset))
            writer.write({"__key__": f"{i:08d}", **members})
            rows.append([i, label, *size])
            # Integer sums: the mean and deviation do not depend on how the work was shared out.
            step = max(min(rgb.size) // SAMPLED, 1)
            if step > 1:
                rgb = rgb.resize(
                    (rgb.width // step, rgb.height // step),
                    Image.Resampling.NEAREST,
                    box=(0, 0, rgb.width // step * step, rgb.height // step * step),
                )
            counts = np.asarray(rgb.histogram(), np.int64).reshape(3, 256)
            sums, squares, pixels = (
                sums + counts @ VALUES,
                squares + counts @ VALUES**2,
                pixels + rgb.width * rgb.height,
            )
        writer.close()
    files.write_text(Path(path).with_suffix(".idx"), "\n".join([f"v1.2 {len(index)}", *index, ""]))
    part = {
        "made": [first, last, store_resolution, quality],
        "rows": rows,
        "bad": bad,
        "sums": sums.tolist(),
        "squares": squares.tolist(),
        "pixels": pixels,
        "sha256": tar.digest.hexdigest(),
        "bytes": tar.size,
    }
    files.write_json(f"{path}.part.json", part)
    return part


def _index_line(key: str, members: dict[str, bytes], offset: int) -> str:
    """A sample's line of DALI's index, version 1.2: 'extension offset size name' of each component. `offset` is the tar's length so far."""
    parts = []
    for ext in sorted(members):
        size = len(members[ext])
        parts.append(f"{ext} {offset + tarfile.BLOCKSIZE} {size} {key}.{ext}")
        offset += tarfile.BLOCKSIZE * (1 - -size // tarfile.BLOCKSIZE)
    return " ".join(parts)


def _reuse(path: Path, made: list[int]) -> dict[str, Any] | None:
    """What an interrupted run of the same settings left finished."""
    part = Path(f"{path}.part.json")
    if not (part.exists() and path.exists() and path.with_suffix(".idx").exists()):
        return None
    saved = files.read_json(part)
    return saved if saved["made"] == made and files.sha256(path) == saved["sha256"] else None


def _write_split(
    folder: Path,
    name: str,
    split: Split,
    shard_images: int,
    store_resolution: int,
    quality: int,
    workers: int,
    quiet: bool,
) -> tuple[dict, list[dict]]:
    global _SPLIT
    _SPLIT = split
    starts = range(0, len(split.names), shard_images)
    paths = [folder / f"{name}-{k:06d}.tar" for k in range(len(starts))]
    parts: dict[int, dict] = {}
    progress = Progress(f"shard {name}", len(split.names), "images", quiet, pause=signals.check)
    todo = []
    for k, first in enumerate(starts):
        last = min(first + shard_images, len(split.names))
        found = _reuse(paths[k], [first, last, store_resolution, quality])
        if found:
            parts[k] = found
        else:
            todo.append((k, first, last))
    done = sum(len(p["rows"]) + len(p["bad"]) for p in parts.values())
    if workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(
            min(workers, len(todo)), mp_context=get_context("fork"), initializer=signals.helper
        ) as pool:
            jobs = [
                (
                    k,
                    last - first,
                    pool.submit(
                        _write_shard, str(paths[k]), first, last, store_resolution, quality
                    ),
                )
                for k, first, last in todo
            ]
            try:
                for k, n, job in jobs:
                    parts[k] = job.result()
                    progress.update(done := done + n)
            except (
                BaseException
            ):  # asked to stop, or a full disk: the shards under way are ended, no others begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    else:
        for k, first, last in todo:
            parts[k] = _write_shard(str(paths[k]), first, last, store_resolution, quality)
            progress.update(done := done + last - first)
    ordered = [parts[k] for k in range(len(starts))]
    rows = np.asarray([row for p in ordered for row in p["rows"]], np.int64).reshape(-1, 4)
    buffer = io.BytesIO()
    np.save(buffer, rows[:, 1:].astype(np.int32))
    files.write_bytes(folder / f"{name}-meta.npy", buffer.getvalue())
    files.write_text(
        folder / f"{name}-names.txt", "".join(f"{split.names[i]}\n" for i in rows[:, 0])
    )
    pixels = max(sum(p["pixels"] for p in ordered), 1)
    mean = np.sum([p["sums"] for p in ordered], 0) / pixels
    std = np.sqrt(np.maximum(np.sum([p["squares"] for p in ordered], 0) / pixels - mean**2, 1.0))
    info = {
        "num_images": len(rows),
        "mean": (mean / 255).round(6).tolist(),
        "std": (std / 255).round(6).tolist(),
        "meta": files.sha256(folder / f"{name}-meta.npy"),
        "names": files.sha256(folder / f"{name}-names.txt"),
        "shards": [
            {
                "file": path.name,
                "num_images": len(p["rows"]),
                "bytes": p["bytes"],
                "sha256": p["sha256"],
                "idx": files.sha256(path.with_suffix(".idx")),
            }
            for path, p in zip(paths, ordered, strict=True)
        ],
    }
    return info, [{"split": name, **b} for p in ordered for b in p["bad"]]


def write(
    folder: Path,
    name: str,
    source: Source,
    shard_images: int,
    store_resolution: int,
    workers: int | None = None,
    quiet: bool = False,
    quality: int = 0,
) -> dict:
    """Write all splits of `source` into `folder`; return the manifest.

    A run after a kill keeps the finished shards. Images that do not decode go to ``quarantine.json`` with the reason.
    Raises `UserError` where quarantine leaves a class without images.
    """
    workers = workers or min(
        len(os.sched_getaffinity(0)) + 1, 16
    )  # one decodes while another waits for the disk
    splits = {
        k: s
        for k, s in (("train", source.train), ("val", source.val), ("test", source.test))
        if s is not None
    }
    stored = (
        {"side": store_resolution, "jpeg_quality": quality}
        if store_resolution
        else "original bytes"
    )
    manifest: dict[str, Any] = {
        "format": 1,
        "name": name,
        "stored": stored,
        "classes": source.classes,
        "notes": source.notes,
        "splits": {},
    }
    quarantine: list[dict] = []
    for split_name, split in splits.items():
        info, bad = _write_split(
            folder,
            f"{name}-{split_name}",
            split,
            shard_images,
            store_resolution,
            quality,
            workers,
            quiet,
        )
        quarantine += bad
        labels = np.load(folder / f"{name}-{split_name}-meta.npy")[:, 0]
        info["counts"] = np.bincount(labels, minlength=len(source.classes)).tolist()
        info["listed"] = np.bincount(split.labels, minlength=len(source.classes)).tolist()
        if 0 in info["counts"] and split_name != "val":
            c = info["counts"].index(0)
            reason = next((b["reason"] for b in bad if b["label"] == c), "none listed")
            raise UserError(
                f"{split_name}: class {c} ({source.classes[c]}) has no image that decodes (first reason: {reason}); see the images of {name}"
            )
        manifest["splits"][split_name] = info
    files.write_json(folder / "quarantine.json", quarantine)
    manifest["quarantined"] = len(quarantine)
    counts = manifest["splits"]["train"]["counts"]
    manifest["groups"] = [GROUPS[g] for g in shot_groups(counts)]
    files.write_json(folder / "manifest.json", manifest)
    for part in folder.glob("*.part.json"):
        part.unlink()
    return manifest


def adopt(shards: Path, folder: Path, quiet: bool = False) -> dict:
    """Take a shard set that lies elsewhere into `folder`: verified, then linked (copied where the file system has no links). Returns its manifest."""
    if not (shards / "manifest.json").exists():
        raise UserError(
            f"data.path: no shard set in {shards} (no manifest.json); tools/shard_imagenet_lt.py or 'ltdd-scale shard' make one"
        )
    wrong = verify(shards, quiet)
    if wrong:
        raise UserError(wrong[0])
    for path in sorted(
        p
        for p in shards.iterdir()
        if p.suffix in (".tar", ".idx", ".npy", ".txt", ".json")
        and p.name not in ("stage.json", "manifest.json")
    ):
        (folder / path.name).unlink(missing_ok=True)
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    manifest = files.read_json(shards / "manifest.json")
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def verify(folder: str | Path, quiet: bool = True) -> list[str]:
    """Re-hash every shard, index and table against the manifest, on all cores; return what is wrong, one line each.

    SHA-256 because processors hash it at over a gigabyte a second (a disk gives less) and everyone has a tool that checks it.
    """
    folder = Path(folder)
    manifest = files.read_json(folder / "manifest.json")
    expected: list[tuple[Path, str]] = []
    for split, info in manifest["splits"].items():
        for shard in info["shards"]:
            expected += [
                (folder / shard["file"], shard["sha256"]),
                ((folder / shard["file"]).with_suffix(".idx"), shard["idx"]),
            ]
        expected += [
            (folder / f"{manifest['name']}-{split}-{table}", info[key])
            for table, key in (("meta.npy", "meta"), ("names.txt", "names"))
        ]

    def compare(item: tuple[Path, str]) -> str | None:
        path, digest = item
        if not path.exists():
            return f"{path}: missing"
        return (
            None
            if files.sha256(path) == digest
            else f"{path}: its hash does not match the manifest; delete the folder and shard again"
        )

    wrong, progress = [], Progress("verify", len(expected), "files", quiet)
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0))
    ) as pool:  # hashing lets go of the interpreter's lock
        for done, line in enumerate(pool.map(compare, expected), 1):
            wrong += [line] if line else []
            progress.update(done)
    return wrong


class ShardSplit:
    """Random access to the encoded images of one split through memory-mapped tars.

    `labels` int64 [N], `sizes` int64 [N, 2] (width, height), `counts` images of each class. Raises `UserError` where a shard is
    missing or not of the size that the manifest states.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = files.read_json(self.folder / "manifest.json")
        if split not in self.manifest["splits"]:
            raise UserError(
                f"{folder} has no '{split}' split: {', '.join(self.manifest['splits'])} only"
            )
        info = self.manifest["splits"][split]
        stem = f"{self.manifest['name']}-{split}"
        meta = np.load(self.folder / f"{stem}-meta.npy").astype(np.int64)
        self.labels, self.sizes = meta[:, 0], meta[:, 1:]
        self.classes: list[str] = self.manifest["classes"]
        self.counts = np.bincount(self.labels, minlength=len(self.classes))
        self.mean, self.std = (
            self.manifest["splits"]["train"]["mean"],
            self.manifest["splits"]["train"]["std"],
        )
        where = []
        for k, shard in enumerate(info["shards"]):
            path = self.folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                state = (
                    "is missing"
                    if not path.exists()
                    else f"has {path.stat().st_size} bytes, not {shard['bytes']}"
                )
                raise UserError(f"shard {path} {state}; delete {self.folder} and run 'shard' again")
            lines = path.with_suffix(".idx").read_text().splitlines()
            if lines[0] != f"v1.2 {shard['num_images']}" or len(lines) != shard["num_images"] + 1:
                raise UserError(
                    f"the index {path.with_suffix('.idx')} does not match its shard; delete {self.folder} and run 'shard' again"
                )
            for line in lines[1:]:
                fields = line.split(" ")
                image = 4 if fields[0] == "cls" else 0
                where.append((k, int(fields[image + 1]), int(fields[image + 2])))
        self._where = np.asarray(where, np.int64).reshape(-1, 3)
        if len(self._where) != len(self.labels):
            raise UserError(
                f"{self.folder}: {len(self._where)} images in the shards of '{split}', {len(self.labels)} in its table; shard again"
            )
        self._paths = [self.folder / shard["file"] for shard in info["shards"]]
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """Where each image came from."""
        return (
            (self.folder / f"{self.manifest['name']}-{self.split}-names.txt")
            .read_text()
            .splitlines()
        )

    def view(self, i: int) -> np.ndarray:
        """The encoded bytes of image `i`, uint8 [n], not copied: pages are read when they are looked at."""
        k, offset, size = (int(v) for v in self._where[i])
        if k not in self._maps:
            with open(self._paths[k], "rb") as f:
                self._maps[k] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[k], np.uint8, size, offset)

    def encoded(self, i: int) -> bytes:
        return self.view(i).tobytes()

    def image(self, i: int) -> Image.Image:
        """The RGB image. An error names the tar, the offset, the key and the source."""
        try:
            return Image.open(io.BytesIO(self.encoded(i))).convert("RGB")
        except Exception as error:
            raise self.undecodable(i, error) from error

    def undecodable(self, i: int, error: Exception) -> UserError:
        """What to say of an image that decoded once and does no more."""
        k, offset, _ = self._where[i]
        with tarfile.open(self._paths[k]) as tar:
            key = next((m.name for m in tar if m.offset_data == offset), "?")
        return UserError(
            f"{self._paths[k]}, offset {offset}, {key} ({self.names[i]}): {error}; run 'ltdd-scale verify {self.folder}'"
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}
