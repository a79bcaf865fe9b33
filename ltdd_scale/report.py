"""What a run leaves for people: the distilled set with its card, results.json, a Markdown table, one self-contained page."""

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
from ltdd_scale import page
from ltdd_scale.config import Config
from ltdd_scale.data import arrays
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.runtime import files

VERSION = 1
SHOWN = {"distilled": "distilled", "initial": "initial (confident crops)", "random": "random real", "full": "whole long-tailed set"}


def _cell(entry: dict[str, Any], number: str) -> str:
    if entry.get(number) is None:
        return "–"
    spread = entry.get(f"{number}_std")
    return f"{entry[number]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def table(results: dict[str, Any]) -> str:
    """The Markdown result table: mean ± standard deviation over seeds, per cent."""
    summary = results["summary"]
    rows = [["set", "labels", "net", "IPC", "top-1", "top-5", "std over classes", "many", "medium", "few", "seeds"]]
    order = {"distilled": 0, "initial": 1, "random": 2, "full": 3}
    kind = summary["labels"]
    shown = [e for e in summary["students"] if e["set"] == "full" or (e["labels"] == kind and e["set"] != "initial")]
    for e in sorted(shown, key=lambda e: (e["net"], order[e["set"]])):
        rows.append([SHOWN[e["set"]], e["labels"], e["net"], str(e["ipc"] or "–"), *(_cell(e, n) for n in ("top1", "top5", "class_std", "many", "medium", "few")), str(e["num_seeds"])])
    for role, e in summary["experts"].items():
        rows.append([role, "–", e["net"], "–", *(_cell(e, n) for n in ("top1", "top5", "class_std", "many", "medium", "few")), "1"])
    text = _markdown(rows)
    if results["matrix"]:
        text += "\n\nThe label matrix (top-1):\n\n" + matrix_table(results)
    return text


def matrix_table(results: dict[str, Any]) -> str:
    """Images × labels, top-1 mean ± standard deviation over seeds."""
    cells = {(e["set"], e["labels"], e["net"]): e for e in results["summary"]["students"]}
    nets = sorted({k[2] for k in cells})
    kinds = ("online", "stored", "single", "hard")
    rows = [["images", *kinds, "net"]]
    for net in nets:
        for which in ("random", "initial", "distilled"):
            rows.append([SHOWN[which], *(_cell(cells[which, y, net], "top1") if (which, y, net) in cells else "–" for y in kinds), net])
    return _markdown(rows)


def ablation_table(config: Config, rows: list[tuple[str, dict[str, Any]]]) -> str:
    """One line a variant: the distilled set's numbers."""
    out = [["variant", "top-1", "std over classes", "many", "medium", "few", "teacher", "random real, same teacher"]]
    for title, results in rows:
        kind, cells = results["summary"]["labels"], {(e["set"], e["labels"]): e for e in results["summary"]["students"]}
        e, random = cells["distilled", kind], cells.get(("random", kind), {})
        teacher = results["summary"]["experts"]["teacher"]
        out.append([title, *(_cell(e, n) for n in ("top1", "class_std", "many", "medium", "few")), f"{teacher['top1']:.1f}", _cell(random, "top1")])
    kind = rows[0][1]["summary"]["labels"]
    return f"# Ablation of {config.name}\n\nIPC {config.ipc}, {kind} labels, {config.evaluate.seeds} seeds, {config.evaluate.split} images, per cent.\n\n{_markdown(out)}\n"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)) + " |" for r in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def folder_names(classes: list[str]) -> list[str]:
    """Class folders whose sorted order, which ImageFolder uses, is the label order."""
    plain = [c.replace("/", "_").replace(" ", "_") or "_" for c in classes]
    return plain if plain == sorted(plain) and len(set(plain)) == len(plain) else [f"{k:05d}_{c}" for k, c in enumerate(plain)]


def damage(folder: Path) -> list[str]:
    """What of a distilled set is not as its ``files.json`` records."""
    wrong = []
    for name, digest in files.read_json(folder / "files.json").items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{path}: missing")
        elif files.sha256(path) != digest:
            wrong.append(f"{path}: damaged (its hash does not match)")
    return wrong


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _distilled(config: Config, nodes: dict, store: Path, split: ShardSplit, out: Path, results: dict[str, Any]) -> None:
    """Write the distilled set beside its place, then swap it in."""
    fresh = out / ".distilled.new"
    shutil.rmtree(fresh, ignore_errors=True)
    names, recovered, relabelled = folder_names(split.classes), nodes["recover"].folder(store), nodes["relabel"].folder(store)
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
    listed = ", ".join(names[:20]) + (f", … ({len(names)} in all, in set.json)" if len(names) > 20 else "")
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

{table(results)}

## Use

With torchvision: `torchvision.datasets.ImageFolder("images")` has the classes in the order above.

With the labels, and no script: `ltdd-scale fit . --net {config.teacher.net} --save student.pt [--test FOLDER]`.
"""


def write(config: Config, nodes: dict, store: Path, out: Path) -> None:
    """Write everything into the run folder, unless it is there for just these results."""
    inputs = [nodes[n].fingerprint for n in ("evaluate", "recover", "relabel", "initialize")]
    mark = hashlib.sha256(json.dumps([VERSION, inputs, configuration.to_dict(config)]).encode()).hexdigest()[:16]
    whole = ("results.json", "results.md", "report.html", "distilled/files.json")
    if (out / ".report").exists() and (out / ".report").read_text() == mark and all((out / p).exists() for p in whole):
        return
    results = files.read_json(nodes["evaluate"].folder(store) / "results.json")
    split = ShardSplit(nodes["shard"].folder(store), "train")
    try:
        _distilled(config, nodes, store, split, out, results)
    except OSError as error:
        shutil.rmtree(out / ".distilled.new", ignore_errors=True)
        raise files.explain(error, out / "distilled") from error
    files.write_json(out / "results.json", results)
    files.write_text(out / "results.md", f"# {config.name}\n\n{table(results)}\n")
    files.write_text(out / "report.html", page.render(config, nodes, store, split, results, matrix_table(results) if results["matrix"] else ""))
    files.write_text(out / ".report", mark)
