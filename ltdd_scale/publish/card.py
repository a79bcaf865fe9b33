"""The README of an exported set: what is in it, how good it is, how to load it. Written from what
lies in the set alone, so that it can be written again wherever the set has gone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ltdd_scale.publish import hub, kept, lrs
from ltdd_scale.publish.opened import Opened
from ltdd_scale.publish.tables import table
from ltdd_scale.results import SOFTMAX

SHOWN_CLASSES = 20
LOADING = {
    "parquet": '{0} = load_dataset("parquet", data_files="parquet/*.parquet", split="train")',
    "webdataset": '{0} = load_dataset("webdataset", data_files="webdataset/*.tar", split="train")',
    "imagefolder": '{0} = load_dataset("imagefolder", data_files="images/**", split="train")',
}
SHORT = {"parquet": "rows", "webdataset": "samples", "imagefolder": "folder"}
TOLD_CODE = """import json, numpy as np
told = json.load(open("set.json", encoding="utf-8"))
own = np.repeat(np.arange(len(told["classes"])), told["image_counts"])  # class of each image, [N]
"""
CLASSES = 'classes = np.eye(len(told["classes"]), dtype=np.float32)[own]\n'
SOFT_CODE = """{told}logits = np.load("labels/{file}")  # float32 [N, C]
p = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))  # soft labels: softmax
def loss(student, rows{more}):
    log_q = student - np.logaddexp.reduce(student, 1, keepdims=True)
    ce = -({target}[rows] * log_q).sum(1).mean()
    return {value}"""
KL_CODE = """{told}logits = np.load("labels/{file}")  # float32 [N, C]
def log_p(z, t=1): return z / t - np.logaddexp.reduce(z / t, 1, keepdims=True)  # log softmax
p = np.exp(log_p(logits))  # soft labels
def loss(student, rows{more}):
    log_pt, log_qt = log_p(logits[rows], {t}), log_p(student, {t})
    return {value}"""
KL_CE = "-(classes[rows] * log_p(student)).sum(1).mean()"
HARD_CODE = f"""{TOLD_CODE}p = np.eye(len(told["classes"]), dtype=np.float32)[own]
def loss(student, rows):
    log_q = student - np.logaddexp.reduce(student, 1, keepdims=True)
    return -(p[rows] * log_q).sum(1).mean()"""
# Of a set's labels. {single}: what `single.npy` has; {share}: that of the class in labels of views;
# {learned}: what students minimise.
MEANING = {
    "single": "`single.npy` has {single}. {learned}",
    "online": "The students above were labelled by the teacher on every view that they saw "
    "(`online`).{share} `single.npy` has {single}: labels that need no teacher. {learned}",
    "stored": "The students above learned from the teacher's logits of the views of every epoch "
    "(`epoch-*.npy`, with `ltdd-scale fit`).{share} `single.npy` has {single}. {learned}",
    "learned": "`learned.npy` has logits that were learned together with the images; students "
    "minimise the cross-entropy with their softmax.",
    "hard": "The labels are the classes; students minimise the cross-entropy with them.",
}
KINDS_OF_TEACHER = {"single", "online", "stored"}
BOTH_LABEL = (
    '"The teacher" is two networks here, the teacher and the observer, and its logits are the mean '
    "of theirs. "
)
# What the images are, where they are not distilled; where each comes from.
ARE = {
    "initial": "**These images are not distilled.** They are real images, or parts of such: those "
    "that method `{method}` starts from.",
    "random": "**These images are not distilled.** They are real images, drawn at random.",
}
FROM = {
    "distilled": "where every image started from",
    "initial": "where every image was taken from",
    "random": "the name of every real image",
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
        teacher=_teacher(told) if told["teacher"] else "",
        method=told["config"]["method"],
        kept=opened.kept,
        choice=_choice(opened),
        row=_row(summary, opened.kept),
        start=FROM[opened.kept],
        student=told["student"]["net"],
        provenance=told["provenance"],
        table=table(results, reasons=False) if results else "",
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
        return SOFT_CODE.format(told=TOLD_CODE, file=file, target="p", value="ce", more="")
    judged = told["config"]["evaluate"]
    soft, ce = f"{judged['kappa_mse']} * ((student - logits[rows]) ** 2).mean()", "ce"
    kl, t = judged.get("soft_loss", "mse") == "kl", judged.get("temperature", 1.0)
    if kl:
        divergence = "(np.exp(log_pt) * (log_pt - log_qt)).sum(1).mean()"
        soft, ce = f"{judged['kappa_mse']} * {t}**2 * {divergence}", KL_CE
    ordered = judged.get("order", "both") != "both"
    return (KL_CODE if kl else SOFT_CODE).format(
        told=TOLD_CODE + CLASSES,
        file=file,
        target="classes",
        t=t,
        more=", hard=False" if ordered else "",
        value=f"{ce} if hard else {soft}" if ordered else f"{judged['kappa_ce']} * {ce} + {soft}",
    )


def what_images_are(opened: Opened) -> str:
    """What the images of a set are, in Markdown; nothing where they are distilled ones."""
    return ARE.get(opened.kept, "").format(method=opened.told["config"]["method"])


def _choice(opened: Opened) -> str:
    """What the images are, and why just these; nothing where none were chosen."""
    if "chosen" not in opened.told:
        return ""
    are = what_images_are(opened) or "The images are those that the method made."
    return f"{are} {kept.reason(opened.told['chosen'])}"


def _row(summary: dict[str, Any], which: str) -> str:
    """Which row of the results is this set, where it is not the distilled one."""
    if which == kept.OWN or not summary:
        return ""
    title = kept.title(which)
    said = f"This set is the row `{title}`; the images of the row `distilled` are not in it."
    cells = {(e["set"], e["labels"]) for e in summary["students"]}
    if which == "random" and ("random", summary["labels"]) in cells:
        said += " The students of each seed had images drawn anew; the set has those of the first."
    return said


def _meaning(told: dict[str, Any]) -> str:
    """What the labels are. Of a kind that nothing is said of here: what lies there."""
    kind, file = told["labels"], told["soft_labels"]
    if not file and kind != "hard":
        return (
            f"The students above learned from `{kind}` labels, with `ltdd-scale fit`. The set has "
            "no table of soft labels: the lines below take the classes."
        )
    relabel = told["config"]["relabel"]
    share = relabel.get("class_share", 0.0)
    both = kind in KINDS_OF_TEACHER and relabel.get("labeller", "teacher") == "both"
    return (BOTH_LABEL if both else "") + MEANING.get(kind, f"`{file}` has logits.").format(
        single=_single(relabel),
        share=f" The class of an image has a share of {share:g} in these labels." if share else "",
        learned=_learned(told["config"]["evaluate"]),
    )


def _teacher(told: dict[str, Any]) -> str:
    """The networks that label."""
    both = told["config"]["relabel"].get("labeller", "teacher") == "both"
    roles = ("teacher", "observer") if both else ("teacher",)
    nets = " + ".join(told["config"][role]["net"] for role in roles)
    return f"{nets} (the mean of their logits)" if both else nets


def _single(relabel: dict[str, Any]) -> str:
    """What ``single.npy`` has. Older sets were made without these settings."""
    views, share = relabel.get("views", 1), relabel.get("class_share", 0.0)
    said = "the teacher's logits of every whole image"
    if views > 1:
        also = "a view" if views == 2 else f"{views - 1} views"
        said = f"the mean of the teacher's logits of every whole image and {also} of it"
    if relabel.get("adjust"):
        said += ", adjusted for the long tail (τ · log π)"
    if share:
        said += f", as the logits of {1 - share:g} · softmax + {share:g} · class"
    return said


def _learned(judged: dict[str, Any]) -> str:
    """What students of soft labels of the teacher minimise, in words."""
    soft = "the logits (MSE)"
    if judged.get("soft_loss", "mse") == "kl":
        soft = f"the labels (KL at temperature {judged.get('temperature', 1.0):g})"
    if judged.get("order", "both") != "both":
        return (
            f"Students learn {soft} in the first and the last quarter of their epochs, and in the "
            "middle half the class alone (CE, `hard=True`)."
        )
    ce = judged["kappa_ce"]
    return f"Students learn {soft}" + (f" and, with weight {ce:g}, the class (CE)." if ce else ".")


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
    judged = told["config"]["evaluate"]
    if told.get("mixed") != SOFTMAX or judged["soft_loss"] == "mse":
        return f"{said} `classes` and `logits` alike by the two images' shares."
    t = judged["temperature"]
    parts = (f"log_p({z}, {t:g}) + np.log({share})" for z, share in (("a", "w"), ("b", "1 - w")))
    return (
        f"{said} `classes` by the two images' shares w and 1 - w. Of logits a and b, the mixed "
        f"image has `{t:g} * np.logaddexp({', '.join(parts)})`: their softmax is mixed."
    )


def size(num_bytes: int) -> str:
    """``12.3 MB``."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
