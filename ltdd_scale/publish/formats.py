"""Parquet and WebDataset files of an exported set, images and labels inside, shard after shard."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.publish.opened import Opened, Sample, numbered

SHARD_BYTES = 400 * 2**20  # a shard ends with the sample that goes beyond it
ROWS = 100  # of a parquet row group: what a reader holds at once


def write_parquet(opened: Opened, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``train-00000-of-00001.parquet`` …: columns `image` {bytes, path}, `class_id` and,
    where the set has soft labels, `soft_label` list<float32> of logits.

    The schema tells Hugging Face's `datasets` that these are an Image and a ClassLabel with names.
    Rows are in the order of the labels' rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    schema = _schema(opened)
    shards = []
    for samples in _shards(opened.samples(), shard_bytes):
        shards.append(folder / f".{len(shards)}.tmp")
        with pq.ParquetWriter(shards[-1], schema) as writer:
            for group in _groups(samples):
                writer.write_table(pa.Table.from_pylist([_row(s) for s in group], schema))
    _name(shards, folder, "parquet")


def write_webdataset(opened: Opened, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``train-00000-of-00001.tar`` …: of each image ``KEY.png`` (or its other suffix),
    ``KEY.cls`` with the class and, where the set has soft labels, ``KEY.npy`` with logits
    float32 [C].

    Samples come round after round over the classes: every part of the stream is balanced. Equal
    sets give equal bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, most = [], max(opened.image_counts)
    for samples in _shards(opened.rounds(), shard_bytes):
        shards.append(folder / f".{len(shards)}.tmp")
        with tarfile.open(shards[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                key = f"{numbered(sample.label, opened.num_classes)}_{numbered(sample.k, most)}"
                for suffix, content in _members(sample):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    _name(shards, folder, "tar")


WRITERS = {"parquet": write_parquet, "webdataset": write_webdataset}


def _schema(opened: Opened) -> Any:
    import pyarrow as pa

    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("class_id", pa.int64()),
    ]
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "class_id": {"names": opened.names, "_type": "ClassLabel"},
    }
    if opened.soft is not None:
        fields.append(pa.field("soft_label", pa.list_(pa.float32())))
        # Versions of `datasets` before 4 know no List, later ones know Sequence too.
        value = {"dtype": "float32", "_type": "Value"}
        features["soft_label"] = {"feature": value, "_type": "Sequence"}
    told = {"info": {"features": features}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(told)})


def _row(sample: Sample) -> dict[str, Any]:
    row = {
        "image": {"bytes": sample.content, "path": sample.name},
        "class_id": sample.label,
    }
    return row if sample.soft is None else {**row, "soft_label": sample.soft}


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    out = [(sample.suffix, sample.content), ("cls", str(sample.label).encode())]
    if sample.soft is not None:
        buffer = io.BytesIO()
        np.save(buffer, sample.soft)
        out.append(("npy", buffer.getvalue()))
    return out


def _shards(samples: Iterable[Sample], shard_bytes: int) -> Iterator[Iterator[Sample]]:
    """The samples of one shard after the other. Each has to be read to its end."""
    source = iter(samples)

    def one(first: Sample) -> Iterator[Sample]:
        held, sample = 0, first
        while True:
            yield sample
            held += len(sample.content) + (0 if sample.soft is None else sample.soft.nbytes)
            if held >= shard_bytes:
                return
            following = next(source, None)
            if following is None:
                return
            sample = following

    while (first := next(source, None)) is not None:
        yield one(first)


def _groups(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == ROWS:
            yield group
            group = []
    if group:
        yield group


def _name(shards: list[Path], folder: Path, suffix: str) -> None:
    """The number of shards is known at the end only."""
    for k, path in enumerate(shards):
        os.rename(path, folder / f"train-{k:05d}-of-{len(shards):05d}.{suffix}")
