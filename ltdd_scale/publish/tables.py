"""Result tables in Markdown: mean ± standard deviation over seeds, in per cent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ltdd_scale.publish import kept
from ltdd_scale.results import CHOSEN, RANDOM_PLAIN, RANDOM_PLAIN_TITLE, labels_of

SHOWN = {**kept.CALLED, CHOSEN: CHOSEN, "full": "whole long-tailed set"}
# The rows of students in their order; the plain network comes after them.
ORDER = ("distilled", CHOSEN, "random", RANDOM_PLAIN_TITLE, "full")
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


def table(results: dict[str, Any], reasons: bool = True) -> str:
    """All tables as Markdown, after the warnings: the results, the label matrix and the published
    pair of stages, where there are such. `reasons`: with what was chosen and why, if anything."""
    first = HEADINGS[numbers(results["summary"])[0]]
    text = "".join(f"{said}\n\n" for said in warnings(results["summary"]))
    text += markdown(rows(results))
    if reasons:
        text += "".join(f"\n\n{said}" for said in kept.lines(results["summary"]))
    if results["matrix"]:
        text += f"\n\nThe label matrix ({first}):\n\n" + matrix_table(results)
    if pairs := stage_rows(results, published=True):
        text += f"\n\n{STAGES_SAID}:\n\n{markdown(pairs)}"
    return text


def warnings(summary: dict[str, Any]) -> list[str]:
    """What the verdict warns of, each a sentence of its own. Older results warn of nothing."""
    return [f"Warning: {text}." for text in summary.get("warnings", [])]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The distilled set beside the chosen one, random real images with the same labels and with
    classes, the whole long-tailed set and the experts."""
    summary = results["summary"]
    shown = numbers(summary)
    out = [["set", "labels", "net", "IPC", *(HEADINGS[n] for n in shown), "seeds"]]
    for title, e in [*_students(summary), *summary["experts"].items()]:
        if "same_as" in e:
            title = f"{title} (the {e['same_as']} itself)"
        start = [title, e.get("labels", "–"), e["net"], str(e.get("ipc") or "–")]
        out.append([*start, *(cell(e, n) for n in shown), str(e.get("num_seeds", 1))])
    return out


def _students(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, entry) of the students of a result, net by net: in `ORDER`, then the plain network on
    the whole set. Those of the label matrix alone are left out."""
    nets = {e["net"] for e in summary["students"]}
    found = []
    for e in summary["students"]:
        if place := _place(e, summary):
            title = exported(summary) if place == CHOSEN else SHOWN.get(place, place)
            found.append((title, ORDER.index(place), e))
    for e in summary.get("plain", []):
        found.append((e["title"], len(ORDER), {"labels": "hard", **e}))
    found.sort(key=lambda item: (item[2]["net"] not in nets, item[2]["net"], item[1]))
    return [(title, e) for title, _, e in found]


def _place(entry: dict[str, Any], summary: dict[str, Any]) -> str:
    """Which row of `ORDER` a student has; nothing where it stands in the label matrix alone."""
    which, labels = entry["set"], entry["labels"]
    if which == "full" or (which in ORDER and labels == labels_of(which, summary)):
        return which
    return RANDOM_PLAIN_TITLE if (which, labels) == RANDOM_PLAIN else ""


def exported(summary: dict[str, Any]) -> str:
    """The title of the row of the images that are exported."""
    return kept.title(which) if (which := kept.kept(summary)) else SHOWN[kept.OWN]


def chosen_title(summary: dict[str, Any]) -> str:
    """The title of the chosen sets of all kinds of labels; it names the set where it is one."""
    sets = {found["set"] for found in summary.get("choice", {"kinds": {}})["kinds"].values()}
    return kept.title(sets.pop()) if len(sets) == 1 else SHOWN[CHOSEN]


def matrix_table(results: dict[str, Any]) -> str:
    """`matrix_rows` as Markdown."""
    return markdown(matrix_rows(results))


def matrix_rows(results: dict[str, Any]) -> list[list[str]]:
    """Images × labels, the number that counts; what nobody trained on is left out. A dash where a
    set has no such labels: real images have no learned ones. Where other images were chosen for
    other labels, each cell of the chosen ones names its own."""
    summary = results["summary"]
    title = chosen_title(summary)
    number = numbers(summary)[0]
    cells = {(e["set"], e["labels"], e["net"]): e for e in summary["students"]}
    order = ("random", "initial", "distilled", CHOSEN)
    sets = [s for s in order if any(s == k[0] for k in cells)]
    there = list(dict.fromkeys(kind for which, kind, _ in cells if which in sets))
    kinds = [k for k in KINDS if k in there] + [k for k in there if k not in KINDS]
    out = [["images", *kinds, "net"]]
    for net in sorted({k[2] for k in cells if k[0] in sets}):
        for which in sets:
            values = [cell(cells.get((which, kind, net), {}), number) for kind in kinds]
            if which == CHOSEN and title == SHOWN[CHOSEN]:
                sets_of = [kept.CALLED.get(kept.kept(summary, kind), "") for kind in kinds]
                values = [
                    v if v == "–" else f"{v} ({s})" for v, s in zip(values, sets_of, strict=True)
                ]
            out.append([title if which == CHOSEN else SHOWN[which], *values, net])
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
