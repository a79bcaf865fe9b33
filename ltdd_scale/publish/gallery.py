"""Which pictures a run has: from its files to arrays, and what is said of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.publish import course
from ltdd_scale.publish.kept import kept
from ltdd_scale.publish.material import Material
from ltdd_scale.publish.message import adjusted
from ltdd_scale.publish.pictures import budget, classes, images, points
from ltdd_scale.publish.pictures.canvas import Picture
from ltdd_scale.publish.tables import (
    HEADINGS,
    KINDS,
    SHOWN,
    cell,
    chosen_title,
    exported,
    numbers,
)
from ltdd_scale.results import CHOSEN, LABELLERS, labels_of
from ltdd_scale.runtime import files

SMALL = ("distilled", "random", "initial")
TWO = "two stages"  # a title of `confusion.npz`
PAIR = 112  # pixels at most of an image of a pair


class Gallery:
    """The pictures of one run, each made where the files that it needs are there."""

    def __init__(self, material: Material, split: ShardSplit, results: Mapping[str, Any]):
        self.material, self.split, self.results = material, split, results
        self.summary: dict[str, Any] = results["summary"]
        self.net: str = material.student["net"]
        self.number = numbers(self.summary)[0]
        self.cells = {
            (e["set"], e["labels"]): e for e in self.summary["students"] if e["net"] == self.net
        }

    def all(self) -> list[Picture]:
        makers = (
            self.message,
            self.pairs_of_stages,
            self.confusions,
            self.label_bytes,
            self.from_head_to_tail,
            self.by_count,
            self.tree,
            self.embeddings,
            self.pairs,
        )
        found = [
            *(make() for make in makers),
            *course.pictures(self.material, self.results, self.net),
        ]
        return [picture for picture in found if picture is not None]

    def _point(self, entry: Mapping[str, Any] | None) -> budget.Point | None:
        if entry is None or entry.get(self.number) is None:
            return None
        return entry[self.number], entry.get(f"{self.number}_std")

    def _lines(self) -> dict[str, budget.Point]:
        """The plain network after logit adjustment, and as it is."""
        out = {}
        found = adjusted(self.summary, self.net)
        plain = [e for e in self.summary.get("plain", []) if found and e["net"] == found["net"]]
        for entry in (found, *(e for e in plain if e is not found)):
            point = self._point(entry)
            if entry is not None and point is not None:
                out[entry["title"]] = point
        return out

    @cached_property
    def _named(self) -> dict[str, str]:
        """Set → title of those whose points are shown: the chosen ones come last."""
        return {s: SHOWN[s] for s in SMALL} | {CHOSEN: chosen_title(self.summary)}

    def _spoken(self, kind: str) -> str:
        said = [
            f"{title} {cell(dict(self.cells[s, kind]), self.number)}"
            for s, title in self._named.items()
            if (s, kind) in self.cells
        ]
        return f"With {kind} labels: {', '.join(said)}. " if said else ""

    def message(self) -> Picture | None:
        there = {k for s, k in self.cells if s in SMALL}
        kinds = [k for k in KINDS if k in there] + sorted(there - set(KINDS))
        if not kinds:
            return None
        series = {
            title: [self._point(self.cells.get((s, k))) for k in kinds]
            for s, title in self._named.items()
            if any((s, k) in self.cells for k in kinds)
        }
        named = [self._budget(k) for k in kinds]
        lines, number = self._lines(), HEADINGS[self.number]
        said = "".join(map(self._spoken, kinds))
        said += "".join(f"{name}: {mean:.1f}. " for name, (mean, _) in lines.items())
        caption = f"{self.net}; points are means over seeds, bars their standard deviation."
        if lines:
            caption += f" Lines: networks on the whole long-tailed set ({'; '.join(lines)})."
        return Picture(
            "message",
            "The distilled set against random real images and the whole set",
            f"{number} in per cent of a {self.net} at each kind of labels. {said}",
            budget.message(named, series, lines, number),
            caption,
        )

    def _budget(self, kind: str) -> str:
        """A kind of labels and their bytes, where they are known."""
        entry = self.cells.get(("distilled", kind)) or self.cells.get(("random", kind)) or {}
        if "label_bytes" not in entry:
            return kind
        count = entry["label_bytes"]
        if count is None:
            return f"{kind}\nneeds the\nteacher"
        return f"{kind}\n{budget.size(count) if count else 'no bytes'}"

    def label_bytes(self) -> Picture | None:
        series: dict[str, list[tuple[str, int | None, budget.Point]]] = {}
        for which in SMALL:
            for (s, kind), entry in self.cells.items():
                point = self._point(entry)
                if s == which and "label_bytes" in entry and point is not None:
                    found = series.setdefault(SHOWN[which], [])
                    found.append((kind, entry["label_bytes"], point))
        if len({b for found in series.values() for _, b, _ in found}) < 2:
            return None
        number = HEADINGS[self.number]
        said = "; ".join(
            f"{name}, {kind}: {'the teacher' if b is None else budget.size(b)}, {p[0]:.1f}"
            for name, found in series.items()
            for kind, b, p in found
        )
        return Picture(
            "bytes",
            "Accuracy against bytes of labels",
            f"{number} in per cent over the bytes that the labels of a set take. {said}.",
            budget.label_bytes(series, self._lines(), number),
            "What the labels of a set take on a disk. Hard labels take none: the folders of the "
            "images tell them. Online labels need the teacher itself while a student is trained.",
        )

    def pairs_of_stages(self) -> Picture | None:
        found = [
            e
            for e in self.results.get("two_stage", {}).get("rows", [])
            if e["routing"] == "hard" and e["net"] == self.net and e.get(self.number) is not None
        ]
        if not found:
            return None
        firsts = list(dict.fromkeys(e["first"] for e in found))
        seconds = list(dict.fromkeys(e["second"] for e in found))
        values = np.full((len(firsts), len(seconds)), np.nan)
        for e in found:
            values[firsts.index(e["first"]), seconds.index(e["second"])] = e[self.number]
        number = HEADINGS[self.number]
        best = max(found, key=lambda e: e[self.number])
        return Picture(
            "pairs_of_stages",
            "Two stages: every first with every second",
            f"{number} in per cent of each pair, hard routing; the highest is "
            f"{best[self.number]:.1f}: first {best['first']}, second {best['second']}. "
            "The table has all of them.",
            budget.pairs_of_stages(firsts, seconds, values, number),
            "With hard routing the first stage chooses the most likely group, and the second stage "
            "chooses a class of that group.",
        )

    @cached_property
    def grouping(self) -> dict[str, Any] | None:
        folder = self.material.find("grouping")
        return files.read_json(folder / "grouping.json") if folder else None

    def confusions(self) -> Picture | None:
        path = self.material.folder("verdict") / "confusion.npz"
        if not path.exists():
            return None
        with np.load(path) as kept:
            found = {title: kept[title] for title in kept.files}
        wanted = ("distilled", TWO) if TWO in found else ("distilled", "plain, logit-adjusted")
        shown = {title: found[title] for title in wanted if title in found}
        if not shown:
            return None
        order, bounds, by = np.argsort(-self.split.counts, kind="stable"), [], "from head to tail"
        if self.grouping is not None and self.grouping.get("linkage"):
            order = classes.leaves(np.asarray(self.grouping["linkage"]))
            bounds = classes.bounds(order, self.grouping["groups"])
            by = "in the order of the tree of classes"
        titles = {t: _confused(t, m) for t, m in shown.items()}
        num_classes = len(self.split.classes)
        shared = ""
        if num_classes > classes.BLOCKS:
            shared = f" {num_classes:,} classes share {classes.BLOCKS} rows and columns."
        stages = "One stage beside two." if TWO in shown else ""
        return Picture(
            "confusions",
            "Which classes are taken for which",
            f"Confusion matrices, classes {by}. {'; '.join(titles.values())}.",
            classes.confusions(
                self.split.classes,
                {titles[t]: m for t, m in shown.items()},
                order,
                bounds,
            ),
            f"Classes {by}; a row is a true class. {stages}{shared}".strip(),
        )

    @cached_property
    def accuracies(self) -> dict[str, list[float | None]]:
        """Series by class: students of the first net, plain networks, the teacher."""
        # The chosen set where it is none of the others.
        labels, which = self.summary["labels"], kept(self.summary)
        apart = which and (which == "initial" or (which, labels) not in self.cells)
        sets = ("distilled", *([CHOSEN] if apart else []), "random")
        wanted = [(s, labels_of(s, self.summary)) for s in sets]
        wanted += [("full", "online"), ("full", "hard")]
        titles = {**SHOWN, CHOSEN: exported(self.summary)}
        out = {titles[s]: self.cells[s, y]["per_class"] for s, y in wanted if (s, y) in self.cells}
        named = [(e["title"], e) for e in self.summary.get("plain", [])]
        named += [(t, e) for t, e in self.summary["experts"].items() if t in LABELLERS]
        return out | {title: e["per_class"] for title, e in named if e.get("per_class")}

    def from_head_to_tail(self) -> Picture | None:
        if not self.accuracies:
            return None
        names, counts = self.split.classes, self.split.counts
        many = len(names) > classes.FEW
        return Picture(
            "classes",
            "Accuracy of each class, from head to tail",
            f"Accuracy in per cent of {len(names)} classes for {', '.join(self.accuracies)}. "
            "The table of classes has the numbers.",
            classes.from_head_to_tail(names, counts, self.accuracies),
            "Each dot is a class; lines are running means over classes." if many else "",
        )

    def by_count(self) -> Picture | None:
        if not self.accuracies:
            return None
        return Picture(
            "counts",
            "Accuracy of a class against its training images",
            f"The same accuracies over the training images of a class, {self.split.counts.max():,} "
            f"to {self.split.counts.min():,}, on a logarithmic axis.",
            classes.by_count(self.split.counts, self.accuracies),
            "The head is at the left.",
        )

    def tree(self) -> Picture | None:
        found = self.grouping
        if found is None or not found.get("linkage"):
            return None
        groups = "; ".join(
            f"group {k + 1}: {', '.join(found['classes'][c] for c in members[:40])}"
            for k, members in enumerate(found["groups"])
        )
        return Picture(
            "tree",
            "The tree of classes",
            f"Dendrogram of {len(found['classes'])} classes; {groups}.",
            classes.tree(
                found["classes"],
                np.asarray(found["counts"]),
                np.asarray(found["linkage"]),
                found["groups"],
            ),
            f"From {found['network']}, groups by {found['criterion']}. At the leaves: training "
            "images of the class.",
        )

    def embeddings(self) -> Picture | None:
        folder = self.material.find("embedding")
        if folder is None:
            return None
        panels, record = read_embedding(folder)
        return Picture(
            "embeddings",
            "Features of the judged images (t-SNE)",
            "Features of the judged images in the plane, one panel for each network: "
            f"{', '.join(panels)}. Dots are images, triangles centres of classes.",
            points.embeddings(panels, record["classes"]),
            f"t-SNE of penultimate features, perplexity {record['perplexity']:g}: colours are "
            "classes, triangles their centres. Distances between far clusters mean little.",
        )

    def pairs(self) -> Picture | None:
        first, last = self.material.find("initial"), self.material.find("distilled")
        if first is None or last is None or first == last:
            return None
        names = self.split.classes
        before, after = Distilled(first, len(names)), Distilled(last, len(names))
        if before.resolution != after.resolution:
            return None
        shown = spread(self.split.counts, 8 if after.resolution <= 64 else 6)
        initial, recovered = (
            images.shrunk(np.stack([np.asarray(kept.load(c)[0]) for c in shown]), PAIR)
            for kept in (before, after)
        )
        times = images.amplification(initial, recovered)
        said = "Images before and after recovery, and their difference"
        small = f" Shrunk to {PAIR} pixels." if after.resolution > PAIR else ""
        return Picture(
            "pairs",
            "Initial and recovered images, enlarged",
            f"{said}, for {', '.join(names[c] for c in shown)}.",
            images.pairs([names[c] for c in shown], initial, recovered, times),
            f"The first image of a class, from head to tail. The difference is amplified {times:g} "
            f"times; grey is none.{small}",
        )


def read_embedding(folder: Path) -> tuple[dict[str, points.Cloud], dict[str, Any]]:
    """(title → points, labels and centres, the record) of an ``embedding`` folder."""
    record = files.read_json(folder / "embedding.json")
    with np.load(folder / "embedding.npz") as kept:
        panels: dict[str, points.Cloud] = {
            title: (kept[f"xy_{k}"], kept["labels"], kept[f"centres_{k}"])
            for k, title in enumerate(record["titles"])
        }
    return panels, record


def spread(counts: np.ndarray, most: int) -> list[int]:
    """At most `most` classes, evenly from head to tail."""
    order = np.argsort(-counts, kind="stable")
    every = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).astype(int))
    return [int(c) for c in order[every]]


def _confused(title: str, counted: np.ndarray) -> str:
    share = 100 * np.trace(counted) / max(counted.sum(), 1)
    return f"{title}: {share:.1f} % right"
