"""A sweep's tables of images × labels, one for each network: all points in one, each set once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ltdd_scale.launch.parts import Spent
from ltdd_scale.launch.sweep import Published
from ltdd_scale.publish.tables import HEADINGS, KINDS, cell, markdown
from ltdd_scale.results import RANDOM_PLAIN, labels_of

if TYPE_CHECKING:
    from ltdd_scale.launch.sweep_table import Finished

SMALL = ("random", "initial", "distilled")
WHOLE = "hard"  # the labels of the plain network on the whole set
SPENT = ("experts, s", "experts, MB", "synthesis, s", "synthesis, MB")  # see `spent_cells`


@dataclass
class _Row:
    """`cells`: label kind → entry of a summary. `kind`: the labels whose spread is shown."""

    title: str
    kind: str
    cells: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    spent: Mapping[str, Spent] = field(default_factory=dict)
    published: str = ""


def tables(found: Sequence[Finished], published: Sequence[Published], number: str) -> str:
    """The tables as Markdown, or nothing where points have one kind of labels and one network.

    `number`: the one that is shown, top-1 or the mean over classes.
    """
    nets = list(dict.fromkeys(e["net"] for point in found for e in _small(point)))
    # Random real images with classes stand in every result: they alone make no matrix.
    small = [e for point in found for e in _small(point)]
    kinds = {e["labels"] for e in small if (e["set"], e["labels"]) != RANDOM_PLAIN}
    if len(nets) < 2 and len(kinds - {"learned"}) < 2:
        return ""
    text = (
        f"\nImages × labels: {HEADINGS[number]} of students on each kind of image with each kind "
        "of label. Sets that points share have one row. Beside the distilled sets what they took: "
        "seconds of cores or GPUs, summed over ranks, and the largest peak memory of a rank.\n"
    )
    for net in nets:
        own = [r for r in published if r.labels and (r.net or nets[0]) == net]
        rows = [*_rows(found, published, net), *map(_published_row, own)]
        table = markdown(_cells(rows, number))
        text += f"\n{net}:\n\n{table}\n"
    return text


def spent_cells(spent: Mapping[str, Spent]) -> list[str]:
    """Seconds and MB of experts and of synthesis: the cells under `SPENT`."""
    out = []
    for part in ("experts", "synthesis"):
        took = spent.get(part)
        known = took is not None and took.seconds > 0
        out += [f"{took.seconds:,.0f}", f"{took.peak_mb:,}"] if took and known else ["–", "–"]
    return out


def _small(point: Finished) -> list[Mapping[str, Any]]:
    return [e for e in point.summary["students"] if e["set"] in SMALL]


def _of(point: Finished, which: str, net: str) -> dict[str, Mapping[str, Any]]:
    """Label kind → entry of the set `which`."""
    return {e["labels"]: e for e in _small(point) if e["set"] == which and e["net"] == net}


def _rows(found: Sequence[Finished], published: Sequence[Published], net: str) -> list[_Row]:
    there = [point for point in found if any(e["net"] == net for e in _small(point))]
    rows = _shared("random real", there, lambda p: _of(p, "random", net))
    for point in there:
        initial = _of(point, "initial", net)
        if initial:
            kind = labels_of("initial", point.summary)
            rows.append(_Row(f"initial images of {point.name}", kind, initial))
    for point in there:
        beside = [
            f"{r.method} {_number(r.top1)}{_spread(r)}"
            for r in published
            if r.top1 is not None
            and (r.net or point.config.evaluate.nets[0]) == net
            and r.fits(point.config)
        ]
        kind = labels_of("distilled", point.summary)
        if made := _of(point, "distilled", net):
            rows.append(_Row(point.name, kind, made, point.spent, "; ".join(beside)))
    for title in dict.fromkeys(e["title"] for p in there for e in p.summary.get("plain", [])):
        rows += _shared(title, there, lambda p, t=title: _plain(p, t, net))
    return rows


def _published_row(row: Published) -> _Row:
    entry = {"top1": row.top1, "balanced": row.top1, "class_std": row.class_std}
    return _Row(f"{row.method}, published", row.labels, {row.labels: entry})


def _plain(point: Finished, title: str, net: str) -> dict[str, Mapping[str, Any]]:
    for e in point.summary.get("plain", []):
        if e["title"] == title and e["net"] == net:
            return {WHOLE: e}
    return {}


def _shared(title: str, found: Iterable[Finished], cells: Any) -> list[_Row]:
    """A row for all points whose `cells(point)` agree where they have the same labels."""
    rows: list[tuple[_Row, list[str]]] = []
    for point in found:
        mine = cells(point)
        if not mine:
            continue
        for row, names in rows:
            both = [kind for kind in mine if kind in row.cells]
            if both and all(row.cells[kind] == mine[kind] for kind in both):
                row.cells.update(mine)
                names.append(point.name)
                break
        else:
            kind = labels_of("random", point.summary)
            rows.append(
                (_Row(title, kind if kind in mine else next(iter(mine)), mine), [point.name])
            )
    if len(rows) > 1:
        for row, names in rows:
            row.title += f" ({', '.join(names)})"
    return [row for row, _ in rows]


def _cells(rows: list[_Row], number: str) -> list[list[str]]:
    """The rows as text, with their heading. Columns that nobody fills are left out."""
    there = dict.fromkeys(kind for row in rows for kind in row.cells)
    kinds = [k for k in KINDS if k in there] + [k for k in there if k not in KINDS]
    spreads = dict.fromkeys(row.kind for row in rows)
    one = f", {next(iter(spreads))}" if len(spreads) == 1 else ""
    out = [["images", *kinds, f"{HEADINGS['class_std']}{one}", *SPENT, "published"]]
    for row in rows:
        values = [cell(dict(row.cells.get(kind, {})), number) for kind in kinds]
        spread = cell(dict(row.cells.get(row.kind, {})), "class_std")
        spread += f" ({row.kind})" if not one and spread != "–" else ""
        out.append([row.title, *values, spread, *spent_cells(row.spent), row.published or "–"])
    filled = [k for k in range(len(out[0])) if k == 0 or any(r[k] != "–" for r in out[1:])]
    return [[r[k] for k in filled] for r in out]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _spread(row: Published) -> str:
    return "" if row.class_std is None else f" (spread {row.class_std:g})"
