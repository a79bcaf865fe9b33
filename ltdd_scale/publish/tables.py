"""Result tables in Markdown: mean ± standard deviation over seeds, in per cent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ltdd_scale.results import labels_of

SHOWN = {
    "distilled": "distilled",
    "initial": "initial images",
    "random": "random real",
    "full": "whole long-tailed set",
}
ORDER = {"distilled": 0, "initial": 1, "random": 2, "full": 3, "plain": 4}
HEADINGS = {
    "top1": "top-1",
    "balanced": "balanced",
    "top5": "top-5",
    "class_std": "std over classes",
    "many": "many",
    "medium": "medium",
    "few": "few",
}
KINDS = (
    "online",
    "stored",
    "single",
    "hard",
    "learned",
)  # the columns of the matrix; others come after
# First and second stage of the Two-stage paper, as a result calls them.
PUBLISHED = ("group classifier, whole set", "in-group students, distilled")
STAGES_SAID = (
    "Two stages: the first decides the group, the second the class in it. `group`: how often the "
    "group is right; `in group`: how often the class is, where the group is given"
)


def numbers(summary: dict[str, Any]) -> list[str]:
    """The numbers that a table shows, the one that counts first.

    Where the judged images are not balanced, top-1 tells mostly of the head: the mean over
    classes comes first there.
    """
    first = ["top1", "balanced"] if summary.get("balanced_test", True) else ["balanced", "top1"]
    return [*first, *(n for n in HEADINGS if n not in first)]


def cell(entry: dict[str, Any], number: str) -> str:
    """``41.2 ± 0.4``, without the spread of a single seed; a dash where there is no such number."""
    if entry.get(number) is None:
        return "–"
    spread = entry.get(f"{number}_std")
    return f"{entry[number]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def table(results: dict[str, Any]) -> str:
    """All tables as Markdown: the results, the label matrix and the published pair of stages, where
    there are such."""
    first = HEADINGS[numbers(results["summary"])[0]]
    text = markdown(rows(results))
    if results["matrix"]:
        text += f"\n\nThe label matrix ({first}):\n\n" + matrix_table(results)
    if pairs := stage_rows(results, published=True):
        text += f"\n\n{STAGES_SAID}:\n\n{markdown(pairs)}"
    return text


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The set beside random real images, the whole long-tailed set and the experts."""
    summary = results["summary"]
    shown = numbers(summary)
    out = [["set", "labels", "net", "IPC", *(HEADINGS[n] for n in shown), "seeds"]]
    for title, e in [*_students(summary), *summary["experts"].items()]:
        start = [title, e.get("labels", "–"), e["net"], str(e.get("ipc") or "–")]
        out.append([*start, *(cell(e, n) for n in shown), str(e.get("num_seeds", 1))])
    return out


def _students(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, entry) of the students with the configured labels (`results.labels_of`), net by net:
    the set, random real images, the whole long-tailed set, the plain network on it."""
    nets = {e["net"] for e in summary["students"]}
    found = [
        (SHOWN[e["set"]], ORDER[e["set"]], e)
        for e in summary["students"]
        if e["set"] == "full" or (e["set"] in ("distilled", "random") and _configured(e, summary))
    ]
    for e in summary.get("plain", []):
        found.append((e["title"], ORDER["plain"], {"labels": "hard", **e}))
    found.sort(key=lambda item: (item[2]["net"] not in nets, item[2]["net"], item[1]))
    return [(title, e) for title, _, e in found]


def _configured(entry: dict[str, Any], summary: dict[str, Any]) -> bool:
    return entry["labels"] == labels_of(entry["set"], summary)


def matrix_table(results: dict[str, Any]) -> str:
    """`matrix_rows` as Markdown."""
    return markdown(matrix_rows(results))


def matrix_rows(results: dict[str, Any]) -> list[list[str]]:
    """Images × labels, the number that counts; what nobody trained on is left out. A dash where a
    set has no such labels: real images have no learned ones."""
    summary = results["summary"]
    number = numbers(summary)[0]
    cells = {(e["set"], e["labels"], e["net"]): e for e in summary["students"]}
    sets = [s for s in ("random", "initial", "distilled") if any(s == k[0] for k in cells)]
    there = list(dict.fromkeys(kind for which, kind, _ in cells if which in sets))
    kinds = [k for k in KINDS if k in there] + [k for k in there if k not in KINDS]
    out = [["images", *kinds, "net"]]
    for net in sorted({k[2] for k in cells if k[0] in sets}):
        for which in sets:
            values = [cell(cells.get((which, kind, net), {}), number) for kind in kinds]
            out.append([SHOWN[which], *values, net])
    return out


def stage_rows(results: dict[str, Any], published: bool = False) -> list[list[str]]:
    """Networks of one stage, and all pairs of stages or the `published` one alone; nothing where
    the protocol is another."""
    pairs = results.get("two_stage", {}).get("rows", [])
    if published:
        pairs = [e for e in pairs if e["first"] is None or (e["first"], e["second"]) == PUBLISHED]
    if not pairs:
        return []
    shown = [n for n in numbers(results["summary"]) if n != "top5"]
    first, last = shown[:3], shown[3:]
    heading = [*(HEADINGS[n] for n in first), "group", "in group", *(HEADINGS[n] for n in last)]
    out = [["first stage", "second stage", "routing", "net", *heading, "seeds"]]
    for e in pairs:
        start = [e["first"] or "– (one stage)", e["second"], e["routing"] or "–", e["net"]]
        cells = [cell(e, n) for n in (*first, "group_acc", "in_group_acc", *last)]
        out.append([*start, *cells, str(e.get("num_seeds", 1))])
    return out


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too. The first row is the heading."""
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
