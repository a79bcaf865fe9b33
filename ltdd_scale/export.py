"""Stage "report": the distilled set with its card, results.json, a Markdown table, the page."""

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

from ltdd_scale import config as configuration
from ltdd_scale import page, report
from ltdd_scale.config import Config
from ltdd_scale.data import arrays
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.runtime import files


def folder_names(classes: list[str]) -> list[str]:
    """Class folders whose sorted order, which ImageFolder uses, is the label order."""
    plain = [c.replace("/", "_").replace(" ", "_") or "_" for c in classes]
    return (
        plain
        if plain == sorted(plain) and len(set(plain)) == len(plain)
        else [f"{k:05d}_{c}" for k, c in enumerate(plain)]
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _distilled(
    config: Config, nodes: dict, store: Path, split: ShardSplit, out: Path, results: dict[str, Any]
) -> None:
    """Write the distilled set beside its place, then swap it in."""
    fresh = out / ".distilled.new"
    shutil.rmtree(fresh, ignore_errors=True)
    names, recovered, relabelled = (
        folder_names(split.classes),
        nodes["recover"].folder(store),
        nodes["relabel"].folder(store),
    )
    digests: dict[str, str] = {}

    def put(name: str, content: bytes) -> None:
        path = fresh / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()

    provenance = []
    for c, name in enumerate(names):
        for k, pixels in enumerate(arrays.load(arrays.class_file(recovered, c))):
            put(f"images/{name}/{k:05d}.png", _png(pixels))
        rows = files.read_json(nodes["initialize"].folder(store) / f"{c:05d}.json")
        provenance += [{"image": f"images/{name}/{k:05d}.png", **row} for k, row in enumerate(rows)]
    for path in sorted(relabelled.glob("*.npy")):
        put(f"labels/{path.name}", path.read_bytes())
    put("labels/labels.json", (relabelled / "labels.json").read_bytes())
    put("teacher.pt", (nodes["teacher"].folder(store) / "weights.pt").read_bytes())
    put("provenance.json", (json.dumps(provenance, indent=0) + "\n").encode())
    description = {
        "format": 1,
        "name": config.name,
        "ipc": config.ipc,
        "classes": split.classes,
        "folders": names,
        "train_counts": split.counts.tolist(),
        "resolution": config.data.resolution,
        "mean": split.mean,
        "std": split.std,
        "labels": config.relabel.labels,
        "config": configuration.to_dict(config),
    }
    put("set.json", (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())
    put("README.md", _card(config, split, names, results).encode())
    files.write_json(fresh / "files.json", digests)
    old = out / ".distilled.old"
    shutil.rmtree(old, ignore_errors=True)
    if (out / "distilled").exists():
        os.rename(out / "distilled", old)
    os.rename(fresh, out / "distilled")
    shutil.rmtree(old, ignore_errors=True)


def _card(config: Config, split: ShardSplit, names: list[str], results: dict[str, Any]) -> str:
    listed = ", ".join(names[:20]) + (
        f", … ({len(names)} in all, in set.json)" if len(names) > 20 else ""
    )
    mean, std = ([round(v, 4) for v in values] for values in (split.mean, split.std))
    counts = split.counts
    return f"""# {config.name}: a distilled, class-balanced image set

{config.ipc} images for each of {len(names)} classes, {config.data.resolution} × {config.data.resolution} pixels, distilled from {counts.sum():,} long-tailed
training images ({counts.max()} … {counts.min()} a class) by `ltdd_scale`.

- **Classes**, in label order: {listed}
- **Normalisation**: mean {mean}, std {std} (of the real training images, pixels in [0, 1])
- **Labels**: {config.relabel.labels}. Teacher: {config.teacher.net}, in `teacher.pt`; `labels/labels.json` says how the labels were made.
- **Recipe**: observer {config.observer.net}; recovery {config.recover.iterations} steps of Adam at {config.recover.lr} (CE {config.recover.ce}, alignment {config.recover.alignment}).
  All settings are in `set.json`; where every image started from is in `provenance.json`; hashes are in `files.json`.

## Results

Accuracies in per cent on {results["summary"]["split"]} images, mean ± standard deviation over seeds.

{report.table(results)}

## Use

With torchvision: `torchvision.datasets.ImageFolder("images")` has the classes in the order above.

With the labels, and no script: `ltdd-scale fit . --net {config.teacher.net} --save student.pt [--test FOLDER]`.
"""


def write(config: Config, nodes: dict, store: Path, out: Path) -> None:
    """Write everything into the run folder; the mark last."""
    results = files.read_json(nodes["evaluate"].folder(store) / "results.json")
    split = ShardSplit(nodes["shard"].folder(store), "train")
    try:
        _distilled(config, nodes, store, split, out, results)
    except OSError as error:
        shutil.rmtree(out / ".distilled.new", ignore_errors=True)
        raise files.explain(error, out / "distilled") from error
    files.write_json(out / "results.json", results)
    files.write_text(out / "results.md", f"# {config.name}\n\n{report.table(results)}\n")
    matrix = report.matrix_table(results) if results["matrix"] else ""
    files.write_text(out / "report.html", page.render(config, nodes, store, split, results, matrix))
    files.write_text(out / ".report", report.mark(config, nodes))
