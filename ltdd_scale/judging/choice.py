"""Stage "choose": which images are kept, for each kind of label, by short students on validation
images. Writes ``choice.json`` and, as a distilled set, the images for the configured labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data import chosen, distilled
from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.loader import some_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.judging.saved import LOGITS
from ltdd_scale.results import CHOSEN
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context

FILE = "choice.json"
CALLED = {"distilled": "distilled", "initial": "initial", "random": "random real"}
OWN = "distilled"  # the method's own
TOGETHER = 4096  # random real images that are held at a time: a set may be larger than memory
NUMBER = "balanced"  # what is best is best by: the mean over classes

# The numbers of the tried sets: set → what `_means` gives, and "noise", how far it has to be ahead
# of the method's own.
Tried = Mapping[str, Mapping[str, Any]]


def best(tried: Tried) -> str:
    """The method's own set; or, of those that are ahead of it by more than the noise, the one with
    the highest mean."""
    ahead = [which for which in tried if OWN not in tried or _is_ahead(tried, which)]
    return max(ahead, key=lambda which: tried[which][NUMBER], default=OWN)


def _is_ahead(tried: Tried, which: str) -> bool:
    return tried[which][NUMBER] - tried[OWN][NUMBER] > tried[which]["noise"]


def table(
    rows: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    right: Sequence[np.ndarray] = (),
    labels: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Label kind → {"set": the best one, "tried": the numbers of each set, means over seeds}, out
    of the `rows` of short students.

    The noise is two standard errors of the difference to the method's own: of the students' seeds
    and, with `right` bool [N] of each row, the images of classes `labels` int [N] that it is right
    on, of these images being few. Of one seed no spread is known, so what it says counts.
    """
    hits = right if len(right) else [None] * len(rows)
    out = {}
    for kind in kinds:
        own = [(row, hit) for row, hit in zip(rows, hits, strict=True) if row["labels"] == kind]
        tried, shares = {}, {}
        for which in dict.fromkeys(row["set"] for row, _ in own):
            of_set = [(row, hit) for row, hit in own if row["set"] == which]
            tried[which] = _means([row for row, _ in of_set])
            shares[which] = np.mean([hit for _, hit in of_set], 0) if len(right) else None
        for which, numbers in tried.items():
            errors = _over_seeds(numbers) + _over_seeds(tried.get(OWN, {}))
            if labels is not None and OWN in tried:
                errors += _over_images(shares[which] - shares[OWN], labels)
            numbers["noise"] = round(2 * math.sqrt(errors), 3)
        out[kind] = {"set": best(tried), "tried": tried}
    return out


def _over_seeds(numbers: Mapping[str, Any]) -> float:
    """The squared standard error of a mean over seeds; 0 where a spread is not known."""
    return (numbers.get(f"{NUMBER}_std") or 0.0) ** 2 / numbers.get("num_seeds", 1)


def _over_images(ahead: np.ndarray, labels: np.ndarray) -> float:
    """The squared standard error of a difference of balanced accuracies, in per cent, that is due
    to the images: `ahead` float [N] is how much more often one is right on each than the other,
    `labels` int [N] their classes. Classes share one variance: many have a single image."""
    counts = np.bincount(labels)
    means = np.bincount(labels, ahead) / np.maximum(counts, 1)
    within = ahead - means[labels]
    spare = np.maximum(counts - 1, 0).sum()
    variance = (within**2).sum() / spare if spare else ahead.var()
    there = counts[counts > 0]
    return float(100**2 * variance * (1 / there).sum() / len(there) ** 2)


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over seeds: the means of the numbers, the standard deviation of the one that counts."""
    values = np.asarray([row[NUMBER] for row in rows])
    return {
        NUMBER: round(float(values.mean()), 3),
        f"{NUMBER}_std": round(float(values.std(ddof=1)), 3) if len(rows) > 1 else None,
        "class_std": round(float(np.mean([row["class_std"] for row in rows])), 3),
        "num_seeds": len(rows),
    }


def entries(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was chosen for labels that are not the configured ones, as entries of the verdict's
    `summary`: those of the chosen sets, where there are such."""
    kinds = {k: c["set"] for k, c in summary["choice"]["kinds"].items() if k != summary["labels"]}
    return [
        {**entry, "set": CHOSEN}
        for entry in summary["students"]
        if kinds.get(entry["labels"]) == entry["set"]
    ]


def said(kind: str, choice: Mapping[str, Any]) -> str:
    """A sentence on the choice for a kind of label."""
    tried, kept = choice["tried"], choice["set"]
    numbers = ", ".join(f"{CALLED[s]} {tried[s][NUMBER]:.1f}" for s in tried)
    highest = max(numbers[NUMBER] for numbers in tried.values())
    noise = "; the difference is within the noise" if tried[kept][NUMBER] < highest else ""
    return f"{kind} labels: {CALLED[kept]} images are kept ({numbers}{noise})"


def read(folder: Path) -> dict[str, Any]:
    """What ``choice.json`` says: "kinds" (see `table`), "epochs" of a short student."""
    return files.read_json(folder / FILE)


def chosen_for(folder: Path, kind: str) -> str:
    """The set that was chosen for labels of `kind`."""
    return read(folder)["kinds"][kind]["set"]


def run(settings: Any, context: Context) -> dict[str, Any]:
    """Choose, and put the images that were chosen for the configured labels together."""
    if not context.ranks.is_main:
        return {}
    trials = [folder for name, folder in context.inputs.items() if name.startswith("trial/")]
    results = [files.read_json(folder / "result.json") for folder in trials]
    held = ShardSplit(context.input("shard"), "val")
    right = [np.argmax(distilled.load(f / LOGITS), 1) == held.labels for f in trials]
    found = table([result["row"] for result in results], settings.kinds, right, held.labels)
    for kind, choice in found.items():
        context.say(f"choose: {said(kind, choice)}")
    which = found[settings.kinds[0]]["set"]
    split = ShardSplit(context.input("shard"), "train")
    if which == "random":
        _put_random(split, settings, context)
    else:
        _copy(Distilled(context.input(which), len(split.classes)), context.out)
    files.write_json(context.out / FILE, {"kinds": found, "epochs": len(results[0]["loss"])})
    return {"chosen": which}


def _put_random(split: ShardSplit, settings: Any, context: Context) -> None:
    """The random real images that the student of the config's seed has."""
    ipc, num_classes, names = settings.ipc, len(split.classes), split.names
    drawn = chosen.random_real(split.labels, num_classes, ipc, settings.seed)
    how = settings.images, context.ranks.device, context.workers
    for first in range(0, num_classes, step := max(1, TOGETHER // ipc)):
        block = drawn[first * ipc : (first + step) * ipc].reshape(-1, ipc)
        pixels = some_images(split, block.flatten(), *how)
        for k, members in enumerate(block):
            rows = [{"image": int(i), "source": names[i]} for i in members]
            own = pixels[k * ipc : (k + 1) * ipc]
            distilled.write_class(context.out, first + k, own, rows)


def _copy(source: Distilled, folder: Path) -> None:
    for label in range(source.num_classes):
        rows = source.provenance(label) or None
        distilled.write_class(folder, label, np.asarray(source.load(label)), rows)
    if hints := source.hints():
        distilled.write_hints(folder, hints)
