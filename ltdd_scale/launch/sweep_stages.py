"""A sweep's table of two stages: all pairs of all points, beside one stage and published pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ltdd_scale.launch.sweep import Published
from ltdd_scale.publish.tables import HEADINGS, cell, markdown

if TYPE_CHECKING:
    from ltdd_scale.launch.sweep_table import Finished

Pair = tuple[str | None, str, str | None]  # first stage, second stage, routing


def table(
    found: Sequence[Finished],
    pairs: Mapping[str, Sequence[Mapping[str, Any]]],
    published: Sequence[Published],
    number: str,
) -> str:
    """Markdown; nothing where no point was judged in two stages.

    `pairs`: point → rows of its ``two_stage`` (`judging/pairs.py`). `number`: the one that is
    shown, with the spread over classes. Published rows are those that stand by themselves.
    """
    names = [point.name for point in found if pairs.get(point.name)]
    if not names:
        return ""
    cells: dict[Pair, dict[str, str]] = {}
    for name in names:
        for row in pairs[name]:
            key = (row["first"], row["second"], row["routing"])
            shown = f"{cell(dict(row), number)} / {cell(dict(row), 'class_std')}"
            cells.setdefault(key, {})[name] = shown
    rows = [["first stage", "second stage", "routing", *names]]
    one = [key for key in cells if key[0] is None]
    for key in (*one, *(key for key in cells if key[0] is not None)):
        start = [key[0] or "– (one stage)", key[1], key[2] or "–"]
        rows.append([*start, *(cells[key].get(name, "–") for name in names)])
    said = [
        f"{row.method} {row.top1:g}" + ("" if row.class_std is None else f" / {row.class_std:g}")
        for row in published
        if row.labels and row.top1 is not None
    ]
    beside = f"\nPublished (made with other students): {'; '.join(said)}.\n" if said else ""
    return (
        f"\nTwo stages: the first decides the group, the second the class in it. "
        f"{HEADINGS[number]} / spread over classes.\n\n{markdown(rows)}\n{beside}"
    )
