"""A sweep's table over data sets: a column for each point, the same rows for all of them.

It stands where the table of images × labels (`sweep_matrix`) would have a row of its own for
everything on every set. Published rows that are beside no point (`Published.labels`) are of one
set, and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ltdd_scale.publish.tables import SHOWN, cell, markdown
from ltdd_scale.results import LABELLERS

if TYPE_CHECKING:
    from ltdd_scale.launch.sweep_table import Finished

SETS = ("full", "random", "initial", "distilled", "chosen")
LABELS = ("hard", "single", "online", "stored", "learned")  # the cheapest first; others come after
PLAIN = "hard"  # the labels of the plain network
SPLITS = {"test": "test", "val": "validation"}

Row = tuple[str, str]  # images or network, labels


def differ(sources: Iterable[str]) -> bool:
    """Whether points have images of several sources, whose numbers no other table can compare.

    Long tails of one source are no such sets. `sources`: the digest of each point's images.
    """
    return len(set(sources)) > 1


def tables(found: Sequence[Finished]) -> str:
    """Markdown: balanced accuracy, then the spread over classes; nothing without points.

    Rows are networks on the whole set (plain, after logit adjustment, the experts), then {random,
    initial, distilled, chosen} × labels. Further networks of the students have tables of their own.
    """
    if not found:
        return ""
    splits = dict.fromkeys(SPLITS[p.summary.get("split", "test")] for p in found)
    text = (
        "\nThe sets beside each other: balanced accuracy, the mean over classes of the accuracy in "
        f"each, on {' and '.join(splits)} images, in per cent (mean ± standard deviation over "
        "students). First the networks that have the whole set; then what was trained on few "
        "images of each class.\n"
    )
    nets = list(dict.fromkeys(e["net"] for p in found for e in p.summary["students"]))
    for net in nets:
        columns = {point.name: _students(point.summary, net) for point in found}
        if net == nets[0]:
            columns = {p.name: {**_whole(p.summary), **columns[p.name]} for p in found}
        rows = _order(columns.values())
        title = f"\n{net}:\n" if len(nets) > 1 else ""
        text += f"{title}\n{markdown(_cells(columns, rows, 'balanced'))}\n"
        text += (
            "\nThe spread of each: standard deviation over the classes of the accuracy in a class."
            f"\n\n{markdown(_cells(columns, rows, 'class_std'))}\n"
        )
    return text


def _whole(summary: Mapping[str, Any]) -> dict[Row, Mapping[str, Any]]:
    """The plain network and the experts."""
    plain = {(e["title"], PLAIN): e for e in summary.get("plain", [])}
    return {**plain, **{(title, "–"): e for title, e in summary["experts"].items()}}


def _students(summary: Mapping[str, Any], net: str) -> dict[Row, Mapping[str, Any]]:
    there = [e for e in summary["students"] if e["net"] == net and e["set"] in SETS]
    return {(e["set"], e["labels"]): e for e in there}


def _order(columns: Iterable[Mapping[Row, Any]]) -> list[Row]:
    """The rows of all columns, each once. Titles that are no set keep the order they came in."""
    rows = list(dict.fromkeys(row for column in columns for row in column))
    titles = {title: k for k, title in enumerate(dict.fromkeys(title for title, _ in rows))}
    kinds = dict.fromkeys((*LABELS, *(kind for _, kind in rows)))
    ranks = {kind: k for k, kind in enumerate(kinds)}

    def place(row: Row) -> tuple[int, int, int]:
        title, kind = row
        if title in SETS:
            return 3, SETS.index(title), ranks[kind]
        part = 0 if kind == PLAIN else 1 if title in LABELLERS else 2
        return part, titles[title], 0

    return sorted(rows, key=place)


def _cells(
    columns: Mapping[str, Mapping[Row, Mapping[str, Any]]], rows: Sequence[Row], number: str
) -> list[list[str]]:
    out = [["images", "labels", *columns]]
    for title, kind in rows:
        values = [cell(dict(of.get((title, kind), {})), number) for of in columns.values()]
        out.append([SHOWN.get(title, title), kind, *values])
    return out
