"""Stage "shard": writes the WebDataset shards of the real set (their format: `data.shards`)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from webdataset.writer import TarWriter

from ltdd_scale.data import digest, shards, sources
from ltdd_scale.data.admit import Colours, admit, strict_about_size
from ltdd_scale.data.longtail import GROUPS, shot_groups
from ltdd_scale.data.settings import Chosen, Data, Location
from ltdd_scale.data.split import Source, Split
from ltdd_scale.errors import PassingError, UserError
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.ahead import ahead
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.stage import Cost, Facts

# Bytes of an image as its source has it, where nothing is known yet: for the estimate of the disk.
DECODED_BYTES = 110e3  # of the images whose decoding was timed (`launch.devices`)
ORIGINAL = {"digits": 2.5e3, "list": 110e3, "folder": 12e3, "shards": 0.0}

# What a source notes of what it did not take → how that is said.
LEFT_OUT = {
    "skipped": "files that are no images of a known type are left out",
    "small classes": "classes with too few images are left out",
    "classes without training images": "classes without training images are left out",
    "unused folder": "a folder that is not used (data.val_folder=val validates on it)",
}

TOLD = 16  # images between two words on a shard that is under way

Report = Callable[[str, int, str], Progress]  # of a title, a total and its unit


def run(settings: Any, context: Any) -> dict[str, Any]:
    """Write the shards, or take over those that lie at data.path.

    Raises `UserError` where the images are others than when the run was started or submitted.
    """
    data = Data.of(settings.chosen, context.location or Location())
    if digest.of(data) != settings.source:
        raise UserError(
            f"the images at {data.path} have changed since this was started or submitted: run the "
            "same command again"
        )
    if data.source == "shards":
        manifest = adopt(Path(data.path), context.out, context.quiet)
    else:
        name = "set" if data.source != "digits" else "digits"
        source = sources.open_source(data)
        manifest = write(context.out, name, source, data, report=context.progress)
    counts = manifest["splits"]["train"]["counts"]
    context.say(
        f"shard: {sum(counts)} training images of {len(counts)} classes, {max(counts)} … "
        f"{min(counts)} a class"
    )
    if manifest["notes"].get("official ImageNet-LT") == "yes":
        context.say("shard: the training list is the official one of ImageNet-LT")
    for note, said in LEFT_OUT.items():
        if names := manifest["notes"].get(note):
            context.say(f"shard: {said}: {names}")
    if manifest["quarantined"]:
        context.say(
            f"shard: {manifest['quarantined']} images do not decode and are left out: see "
            f"{context.out / 'quarantine.json'}"
        )
    return {
        "train": sum(counts),
        "largest": max(counts),
        "smallest": min(counts),
        "quarantined": manifest["quarantined"],
    }


def cost(settings: Any, facts: Facts) -> Cost:
    """Disk by an image's bytes, as found or guessed, memory for one image in each worker. Images
    that are larger than those whose decoding was timed take as much longer."""
    chosen: Chosen = settings.chosen
    one = original = facts.image_bytes or ORIGINAL.get(chosen.source, 12e3)
    if chosen.store_resolution and one:
        one = chosen.store_resolution**2 * (0.4 if chosen.store_quality else 2.0)
    held = facts.num_classes * chosen.val_per_class
    held += facts.num_images * chosen.val_fraction / (1 - chosen.val_fraction)
    images = facts.num_images + facts.judged + held
    decodes = images * max(1.0, original / DECODED_BYTES) if original else 0.0
    return Cost(memory=_workers() * 32e6, disk=images * one, decodes=decodes)


def shown(title: str, total: int, unit: str) -> Progress:
    """A line of progress, for those who write shards without a run."""
    return Progress(title, total, unit, pause=signals.check)


def write(
    folder: Path,
    name: str,
    source: Source,
    chosen: Chosen,
    workers: int | None = None,
    report: Report = shown,
) -> dict[str, Any]:
    """Write all splits of `source` into `folder`, stored as `chosen` says; return the manifest.

    A run after a kill keeps the finished shards. Images that do not decode go to
    ``quarantine.json`` with the reason. Raises `UserError` where quarantine leaves a class without
    images.
    """
    manifest: dict[str, Any] = {
        "format": 1,
        "name": name,
        "stored": {"side": chosen.store_resolution, "jpeg_quality": chosen.store_quality}
        if chosen.store_resolution
        else "original bytes",
        "classes": source.classes,
        "notes": source.notes,
        "splits": {},
    }
    quarantine: list[dict] = []
    for key, split in (("train", source.train), ("val", source.val), ("test", source.test)):
        if split is None:
            continue
        stem = folder / f"{name}-{key}"
        progress = report(f"shard {stem.name}", len(split.names), "images")
        parts = _write_shards(stem, split, chosen, workers or _workers(), progress)
        info = _write_tables(stem, split, parts)
        bad = [{"split": stem.name, **b} for p in parts for b in p["bad"]]
        labels = np.asarray([row[1] for p in parts for row in p["rows"]], np.int64)
        info["counts"] = np.bincount(labels, minlength=len(source.classes)).tolist()
        info["listed"] = np.bincount(split.labels, minlength=len(source.classes)).tolist()
        if 0 in info["counts"] and key != "val":
            c = info["counts"].index(0)
            own = [b for b in bad if b["label"] == c]
            first = f": {own[0]['name']}, {own[0]['reason']}" if own else ""
            raise UserError(
                f"class {c} ({source.classes[c]}) has no {key} image that can be read{first} "
                f"({len(own)} such images): mend them, or take the class out"
            )
        quarantine += bad
        manifest["splits"][key] = info
    files.write_json(folder / "quarantine.json", quarantine)
    manifest["quarantined"] = len(quarantine)
    counts = manifest["splits"]["train"]["counts"]
    manifest["groups"] = [GROUPS[g] for g in shot_groups(counts)]
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def adopt(there: Path, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Take a shard set that lies elsewhere into `folder`: verified, then linked (copied where the
    file system has no links). Returns its manifest."""
    manifest = files.read_json(shards.manifest_file(there))
    wrong = shards.verify(there, quiet)
    if wrong:
        raise UserError(wrong[0])
    for path in sorted(there.iterdir()):
        wanted = path.suffix in (".tar", ".idx", ".npy", ".txt", ".json")
        if not wanted or path.name in ("stage.json", "manifest.json") or path.name[0] == ".":
            continue
        (folder / path.name).unlink(missing_ok=True)
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def _workers() -> int:
    """One decodes while another waits for the disk."""
    return min(len(os.sched_getaffinity(0)) + 1, 16)


def _write_shards(
    stem: Path, split: Split, chosen: Chosen, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Write the shards of a split that are not there yet; return what describes each."""
    global _SPLIT
    _SPLIT = split
    starts = range(0, len(split.names), chosen.shard_images)
    parts: dict[int, dict] = {}
    todo = []
    for k, first in enumerate(starts):
        last = min(first + chosen.shard_images, len(split.names))
        path = stem.with_name(f"{stem.name}-{k:06d}.tar")
        found = _reuse(path, _made(split, first, last, chosen))
        if found:
            parts[k] = found
        else:
            todo.append((k, (str(path), first, last, chosen)))
    done = sum(len(p["rows"]) + len(p["bad"]) for p in parts.values())
    # Few shards: each is written on several cores.
    threads = max(1, workers // max(len(todo), 1))
    with closing(_worked(todo, workers, threads, lambda n: progress.update(done + n))) as finished:
        for k, part in finished:
            parts[k] = part
            progress.update(done := done + len(part["rows"]) + len(part["bad"]))
    return [parts[k] for k in range(len(starts))]


def _worked(
    todo: list[tuple[int, tuple]], workers: int, threads: int, tell: Callable[[int], None]
) -> Generator[tuple[int, dict], None, None]:
    """Each finished shard with its number, in their order. `tell` hears of the images of one that
    is under way here."""
    if workers == 1 or len(todo) <= 1:
        for k, arguments in todo:
            yield k, _write_shard(*arguments, threads, tell)
        return
    with ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=get_context("fork"), initializer=signals.helper
    ) as pool:
        write_shard = partial(_write_shard, threads=threads)
        jobs = [(k, pool.submit(write_shard, *arguments)) for k, arguments in todo]
        try:
            for k, job in jobs:
                while not wait([job], timeout=0.5).done:
                    signals.check()
                yield k, job.result()
        except BaseException:
            # Asked to stop, or a full disk: the shards under way are ended, no others begun.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# The split that worker processes read from; inherited by fork, since readers are closures over
# files or arrays.
_SPLIT: Split | None = None


def _write_shard(
    path: str,
    first: int,
    last: int,
    chosen: Chosen,
    threads: int = 1,
    tell: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Write images first … last−1 of the split as one tar with its index; return the rows that
    describe them. Images are decoded by `threads`; `tell` hears how many there are."""
    assert _SPLIT is not None
    split, rows, bad, index, colours = _SPLIT, [], [], [], Colours()
    with ExitStack() as held:
        tar = _Hashing(held.enter_context(files.replacing(path)))
        writer = TarWriter(cast(BinaryIO, tar), mtime=0, encoder=False)
        images = _admitted(split, range(first, last), chosen, threads)
        for i, found in held.enter_context(closing(images)):
            name, label = split.names[i], int(split.labels[i])
            if isinstance(found, Exception):
                # Where in memory the bytes were is nobody's business.
                said = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(found))
                reason = f"{type(found).__name__}: {said}"
                bad.append({"index": i, "name": name, "label": label, "reason": reason})
                continue
            content, ext, size, seen = found
            members = {"cls": b"%05d" % label, ext: content}
            index.append(_index_line(f"{i:08d}", members, writer.tarstream.offset))
            writer.write({"__key__": f"{i:08d}", **members})
            rows.append([i, label, *size])
            colours.add(seen)
            if len(rows) % TOLD == 0:
                tell(len(rows) + len(bad))
        writer.close()
    files.write_text(Path(path).with_suffix(".idx"), "\n".join([f"v1.2 {len(index)}", *index, ""]))
    part = {
        "made": _made(_SPLIT, first, last, chosen),
        "rows": rows,
        "bad": bad,
        "sums": colours.sums.tolist(),
        "squares": colours.squares.tolist(),
        "pixels": colours.pixels,
        "sha256": tar.digest.hexdigest(),
        "bytes": tar.size,
    }
    files.write_json(_part_file(path), part)
    return part


def _admitted(
    split: Split, indices: range, chosen: Chosen, threads: int
) -> Generator[tuple[int, Any], None, None]:
    """Each image with what `admit` makes of it, or with why it does not decode, in their order.
    Raises what is no fault of the image: a passing error of the file system, or memory that has run
    out."""

    def one(i: int) -> Any:
        try:
            return admit(split.read(i), chosen)
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and files.kind(error) is PassingError:
                raise PassingError(f"{split.names[i]}: {error.strerror}") from error
            return error

    with ThreadPoolExecutor(threads, "admit") as pool, strict_about_size():
        yield from ahead(pool, one, indices, 2 * threads)


def _part_file(path: str | Path) -> Path:
    """What describes a finished shard, until all are (`clean`)."""
    return Path(f"{path}.part.tmp")


def clean(folder: Path) -> None:
    """Take away what only the writing needed. Stages do so when they are sealed: a run that is
    killed before finds its shards."""
    for part in folder.glob("*.part.tmp"):
        part.unlink()


def _made(split: Split, first: int, last: int, chosen: Chosen) -> list[int | str]:
    """What the bytes of a shard depend on: its settings, and a hash of its names and labels."""
    listed = json.dumps([split.names[first:last], split.labels[first:last].tolist()])
    said = hashlib.sha256(listed.encode()).hexdigest()
    return [first, last, chosen.store_resolution, chosen.store_quality, said]


def _reuse(path: Path, made: list[int | str]) -> dict[str, Any] | None:
    """What an interrupted run of the same settings left finished of the same images."""
    part = _part_file(path)
    if not (part.exists() and path.exists() and path.with_suffix(".idx").exists()):
        return None
    saved = files.read_json(part)
    return saved if saved["made"] == made and files.sha256(path) == saved["sha256"] else None


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


def _index_line(key: str, members: dict[str, bytes], offset: int) -> str:
    """A sample's line of DALI's index, version 1.2: 'extension offset size name' of each component.
    `offset` is the tar's length so far."""
    parts = []
    for ext in sorted(members):
        size = len(members[ext])
        parts.append(f"{ext} {offset + tarfile.BLOCKSIZE} {size} {key}.{ext}")
        offset += tarfile.BLOCKSIZE * (1 - -size // tarfile.BLOCKSIZE)
    return " ".join(parts)


def _write_tables(stem: Path, split: Split, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the tables of a split whose shards are there; return its entry of the manifest."""
    rows = np.asarray([row for p in parts for row in p["rows"]], np.int64).reshape(-1, 4)
    meta, names = (stem.with_name(f"{stem.name}-{table}") for table in ("meta.npy", "names.txt"))
    buffer = io.BytesIO()
    np.save(buffer, rows[:, 1:].astype(np.int32))
    files.write_bytes(meta, buffer.getvalue())
    files.write_text(names, "".join(f"{split.names[i]}\n" for i in rows[:, 0]))
    pixels = max(sum(p["pixels"] for p in parts), 1)
    mean = np.sum([p["sums"] for p in parts], 0) / pixels
    std = np.sqrt(np.maximum(np.sum([p["squares"] for p in parts], 0) / pixels - mean**2, 1.0))
    written = []
    for k, p in enumerate(parts):
        path = stem.with_name(f"{stem.name}-{k:06d}.tar")
        written.append(
            {
                "file": path.name,
                "num_images": len(p["rows"]),
                "bytes": p["bytes"],
                "sha256": p["sha256"],
                "idx": files.sha256(path.with_suffix(".idx")),
            }
        )
    return {
        "num_images": len(rows),
        "mean": (mean / 255).round(6).tolist(),
        "std": (std / 255).round(6).tolist(),
        "meta": files.sha256(meta),
        "names": files.sha256(names),
        "shards": written,
    }
