"""The README of an exported set: what is in it, how good it is, how to load it. Written from what
lies in the set alone, so that it can be written again wherever the set has gone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ltdd_scale.publish import hub, lrs
from ltdd_scale.publish.opened import Opened
from ltdd_scale.publish.tables import table

SHOWN_CLASSES = 20
LOADING = {
    "parquet": '{0} = load_dataset("parquet", data_files="parquet/*.parquet", split="train")',
    "webdataset": '{0} = load_dataset("webdataset", data_files="webdataset/*.tar", split="train")',
    "imagefolder": '{0} = load_dataset("imagefolder", data_files="images/**", split="train")',
}
SHORT = {"parquet": "rows", "webdataset": "samples", "imagefolder": "folder"}
SOFT_CODE = """import json, numpy as np
told = json.load(open("set.json", encoding="utf-8"))
own = np.repeat(np.arange(len(told["classes"])), told["image_counts"])  # class of each image, [N]
classes = np.eye(len(told["classes"]), dtype=np.float32)[own]
logits = np.load("labels/{file}")  # float32 [N, C]
p = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))  # soft labels: softmax
def loss(student, rows):
    log_q = student - np.logaddexp.reduce(student, 1, keepdims=True)
    ce = -({target}[rows] * log_q).sum(1).mean()
    return {value}"""
HARD_CODE = """import json, numpy as np
told = json.load(open("set.json", encoding="utf-8"))
own = np.repeat(np.arange(len(told["classes"])), told["image_counts"])  # class of each image, [N]
p = np.eye(len(told["classes"]), dtype=np.float32)[own]
def loss(student, rows):
    log_q = student - np.logaddexp.reduce(student, 1, keepdims=True)
    return -(p[rows] * log_q).sum(1).mean()"""
MEANING = {
    "single": "`single.npy` has the teacher's logits of every whole image; students learn the "
    "logits (MSE) and, a little, the class (CE).",
    "online": "The students above were labelled by the teacher on every view that they saw "
    "(`online`). `single.npy` has the teacher's logits of every whole image: labels that need no "
    "teacher.",
    "stored": "The students above learned from the teacher's logits of the views of every epoch "
    "(`epoch-*.npy`, with `ltdd-scale fit`). `single.npy` has the teacher's logits of every whole "
    "image.",
    "learned": "`learned.npy` has logits that were learned together with the images; students "
    "minimise the cross-entropy with their softmax.",
    "hard": "The labels are the classes; students minimise the cross-entropy with them.",
}


def card(opened: Opened, results: dict[str, Any] | None) -> str:
    """The whole file. `results` is what the set was judged with; None where that is not known."""
    import jinja2

    told = opened.told
    formats, counts = told["formats"], np.asarray(told["train_counts"])
    summary = results["summary"] if results else {}
    labels, code = told["labels"], label_code(told)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ltdd_scale.publish"),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["words"] = words
    text = environment.get_template("card.md.j2").render(
        header=hub.header(opened, formats, sum(told["image_counts"])),
        name=told["name"],
        ipc=told["ipc"],
        num_classes=len(told["classes"]),
        size=told["resolution"],
        total=int(counts.sum()),
        largest=int(counts.max()),
        smallest=int(counts.min()),
        source=opened.publish.source,
        license=opened.publish.license,
        license_link=opened.publish.license_link,
        classes=_listed(opened.names),
        images=_images(opened),
        mean=[round(v, 4) for v in told["mean"]],
        std=[round(v, 4) for v in told["std"]],
        zca=told.get("zca", ""),
        labels=labels,
        teacher=told["config"]["teacher"]["net"] if told["teacher"] else "",
        method=told["config"]["method"],
        student=told["student"]["net"],
        provenance=told["provenance"],
        table=table(results) if results else "",
        lrs=lrs.text(results) if results else "",
        split=summary.get("split"),
        balanced=summary.get("balanced_test", True),
        formats=formats,
        loading="\n".join(LOADING[f].format(SHORT[f]) for f in LOADING if f in formats),
        columns=_columns(opened, formats),
        rows=_rows(told, formats),
        meaning=_meaning(told),
        code=code,
        mixing=_mixing(told),
        alternative="single" if labels in ("online", "stored") and told["soft_labels"] else "",
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def label_code(told: dict[str, Any]) -> str:
    """The labels and the students' loss in NumPy, for a set that tells `told`."""
    file = told["soft_labels"]
    if not file:
        return HARD_CODE
    if file == "learned.npy":
        return SOFT_CODE.format(file=file, target="p", value="ce").replace(
            'classes = np.eye(len(told["classes"]), dtype=np.float32)[own]\n', ""
        )
    judged = told["config"]["evaluate"]
    mse = "((student - logits[rows]) ** 2).mean()"
    value = f"{judged['kappa_ce']} * ce + {judged['kappa_mse']} * {mse}"
    return SOFT_CODE.format(file=file, target="classes", value=value)


def _meaning(told: dict[str, Any]) -> str:
    """What the labels are. Of a kind that nothing is said of here: what lies there."""
    kind, file = told["labels"], told["soft_labels"]
    if not file and kind != "hard":
        return (
            f"The students above learned from `{kind}` labels, with `ltdd-scale fit`. The set has "
            "no table of soft labels: the lines below take the classes."
        )
    return MEANING.get(kind, f"`{file}` has logits.")


def _rows(told: dict[str, Any], formats: list[str]) -> str:
    """Which image a row of the labels belongs to, in the formats that are there."""
    if "imagefolder" in formats:
        also = ", which is row i of the parquet files" if "parquet" in formats else ""
        return (
            'Row i of the labels belongs to the i-th image of `sorted(glob("images/*/*"))`, class '
            f"after class{also}."
        )
    if "parquet" in formats:
        return "Row i of the labels belongs to row i of the parquet files, class after class."
    return (
        "The labels stand class after class. A sample has the key `CLASS_K`, such as "
        '`00003_00001`: its row is `sum(told["image_counts"][:CLASS]) + K`.'
    )


def words(text: str) -> str:
    """`text` as one line of Markdown that says just these letters. Addresses stay whole."""
    said = []
    for word in text.split():
        signs = r"[<>`|\\]" if "://" in word else r"[<>`*_\[\]|\\]"
        said.append(re.sub(signs, r"\\\g<0>", word))
    return " ".join(said)


def _listed(names: list[str]) -> str:
    listed = ", ".join(map(words, names[:SHOWN_CLASSES]))
    if len(names) > SHOWN_CLASSES:
        listed += f", … ({len(names)} in all, in set.json)"
    return listed


def _images(opened: Opened) -> dict[str, Any]:
    told, encoding = opened.told["images"], opened.encoding
    change = told.get("change")
    return {
        "title": encoding.title,
        "size": size(told["bytes"]),
        "png_size": "" if encoding.name == "png" else size(told["png_bytes"]),
        "lossy": encoding.lossy,
        "change": change_text(change)
        if change
        else "What that costs in accuracy has not been measured (`ltdd-scale export --measure`).",
    }


def change_text(change: dict[str, Any]) -> str:
    """What other images cost, in words: see `launch.export.measure`."""
    n, spread = change["seeds"], change["difference_std"]
    said = f"{change['difference']:+.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    return (
        f"Against the lossless images that changes {change['number']} accuracy by {said} points: "
        f"{change['exported']:.2f} against {change['lossless']:.2f} %, {change['net']}, "
        f"{change['labels']} labels, {change['epochs']} epochs, {n} seed{'s' * (n > 1)}, "
        f"{change['test_images']} test images."
    )


def _columns(opened: Opened, formats: list[str]) -> str:
    said, soft = [], bool(opened.told["soft_labels"])
    image = opened.encoding.suffix
    if "parquet" in formats:
        also = " and `soft_label` (logits)" if soft else ""
        said.append(f"`rows` has `image`, `class_id`{also}")
    if "webdataset" in formats:
        also = " and `npy` (logits)" if soft else ""
        said.append(f"`samples` has `{image}`, `cls`{also}, round after round over the classes")
    if "imagefolder" in formats:
        said.append("`folder` has `image` and `label`, the class only")
    return "; ".join(said) + "."


def _mixing(told: dict[str, Any]) -> str:
    said = "Where CutMix pastes a part of another image, mix"
    if not told["soft_labels"] or told["soft_labels"] == "learned.npy":
        return f"{said} `p` by the two images' shares."
    return f"{said} `classes` and `logits` alike by the two images' shares."


def size(num_bytes: int) -> str:
    """``12.3 MB``."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
