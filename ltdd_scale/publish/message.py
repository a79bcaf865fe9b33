"""What a run says, in a sentence: the set against random real images and the whole set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scipy import special

from ltdd_scale.publish import kept
from ltdd_scale.publish.tables import HEADINGS, KINDS, PUBLISHED, cell, numbers
from ltdd_scale.results import CHOSEN, is_adjusted, labels_of, plain_name

Entry = Mapping[str, Any]
CONFIDENCE = 0.95  # of the two-sided test (Welch's) by which a difference is more than noise
LEAST = 0.05  # of a difference that is shown with one decimal


def message(summary: Entry, net: str, images: int, total: int) -> list[str]:
    """The sentence of the configured labels, and one for each other kind that was run: all of the
    images that the method made. Then one on those that are exported, where they are others.

    `net`: the students' network; `images` of the distilled set, `total` of the whole set.
    """
    number = numbers(dict(summary))[0]
    cells = {(e["set"], e["labels"]): e for e in summary["students"] if e["net"] == net}
    kind = summary["labels"]
    own = cells.get(("distilled", kind))
    if own is None or own.get(number) is None:
        return []
    what = _number_said(number)
    said = (
        f"Trained on {images:,} distilled images with {kind} labels a student reaches "
        f"{cell(dict(own), number)} %{what}"
    )
    baseline = labels_of("random", summary)
    parts = []
    random = cells.get(("random", baseline))
    if random is not None:
        parts.append(_against_random(own, random, number, baseline if baseline != kind else ""))
    whole = adjusted(summary, net)
    if whole is not None:
        parts.append(_against_whole(own, whole, number, total))
    out = [f"{said}: {', and '.join(parts)}." if parts else f"{said}."]
    others = [k for s, k in cells if s == "distilled" and k != kind]
    for other in sorted(others, key=lambda k: KINDS.index(k) if k in KINDS else len(KINDS)):
        distilled, beside = cells["distilled", other], cells.get(("random", other))
        if distilled.get(number) is None or beside is None:
            continue
        against = _against_random(distilled, beside, number, "")
        out.append(f"With {other} labels: {cell(dict(distilled), number)} %{what}, {against}.")
    return out + _choice(summary, own, cells.get((CHOSEN, kind)), number)


def two_stages(results: Entry) -> list[str]:
    """A sentence on the published pair of stages, where it was trained; the pair is given, not
    chosen by its result."""
    number = numbers(dict(results["summary"]))[0]
    found = results.get("two_stage", {}).get("rows", [])
    cells = {(e["first"], e["second"]): e for e in found if e["routing"] in (None, "hard")}
    own, one = cells.get(PUBLISHED), cells.get((None, "distilled"))
    if own is None or one is None:
        return []
    more, noise = difference(own, one, number)
    said = f"{_amount(more)} than in one stage{_doubt(own, one, number, noise)}"
    if abs(more) < LEAST:
        said = "no better than in one stage"
    return [
        f"In two stages, the group by a classifier of the whole set and the class by students of "
        f"the distilled set: {cell(dict(own), number)} %{_number_said(number)}, {said}."
    ]


def adjusted(summary: Entry, net: str) -> Entry | None:
    """The plain network on the whole set after logit adjustment: of `net`, or what stands in."""
    found = [e for e in summary.get("plain", []) if is_adjusted(e["title"])]
    return next((e for e in found if e["net"] == net), found[0] if found else None)


def _number_said(number: str) -> str:
    return "" if number == "top1" else f" ({HEADINGS[number]} accuracy)"


def _choice(summary: Entry, own: Entry, chosen: Entry | None, number: str) -> list[str]:
    """The sentence on the images that were chosen instead of the distilled ones, if any were."""
    which = kept.kept(summary)
    if which in ("", kept.OWN) or chosen is None or chosen.get(number) is None:
        return []
    images = {"initial": "the images that the method starts from", "random": "random real images"}
    than = _against(chosen, own, number, "the distilled ones")
    return [
        f"The exported set has {images[which]} instead, which short students on validation images "
        f"preferred: {cell(dict(chosen), number)} %{_number_said(number)} with "
        f"{summary['labels']} labels, {than}."
    ]


def _against_random(own: Entry, other: Entry, number: str, labels: str) -> str:
    labelled = f" with {labels} labels" if labels else ""
    return _against(own, other, number, f"random real images{labelled}")


def _against(own: Entry, other: Entry, number: str, than: str) -> str:
    more, noise = difference(own, other, number)
    if abs(more) < LEAST:
        return f"no better than on {than}"
    if more < 0 and noise is False:
        return f"not better but worse than on {than}, by {abs(more):.1f}"
    return f"{_amount(more)} than on {than}{_doubt(own, other, number, noise)}"


def _against_whole(own: Entry, whole: Entry, number: str, total: int) -> str:
    what = f"{plain_name(whole['title'])} on all {total:,} images after logit adjustment"
    more, noise = difference(own, whole, number)
    if abs(more) < LEAST:
        return f"as much as {what}"
    return f"{_amount(more)} than {what}{_doubt(own, whole, number, noise)}"


def _amount(more: float) -> str:
    return f"{abs(more):.1f} {'more' if more > 0 else 'less'}"


def _doubt(one: Entry, other: Entry, number: str, noise: bool | None) -> str:
    """What stands behind a difference that is not proven. Such a one may still be real: with few
    seeds only a large one is proven."""
    if noise is False:
        return ""
    counts = [count for _, count in _spreads(one, other, number)]
    if not counts:
        return " (one seed each: the noise is not known)"
    seeds = min(counts)
    if noise is None:
        return f" (the same over {seeds} seeds: the noise is not known)"
    if seeds == 2:
        return ", which 2 seeds cannot tell from noise"
    return f", within the noise of {seeds} seeds"


def _spreads(one: Entry, other: Entry, number: str) -> list[tuple[float, int]]:
    """(standard deviation, number of seeds) of those of the two that have several seeds."""
    return [
        (e[f"{number}_std"], e["num_seeds"])
        for e in (one, other)
        if e.get(f"{number}_std") is not None and e.get("num_seeds", 1) > 1
    ]


def difference(one: Entry, other: Entry, number: str) -> tuple[float, bool | None]:
    """(how much more `one` has as both are shown, whether that may be the noise of seeds).

    Welch's test at `CONFIDENCE`, on the numbers before they are rounded. Where only one of them
    has several seeds, the other is taken for a draw of the same spread. Where neither has, or where
    no seed differs from another, the noise is not known: None.
    """
    more = float(f"{one[number]:.1f}") - float(f"{other[number]:.1f}")  # as they are shown
    known = _spreads(one, other, number)
    if len(known) == 2:
        shares = [spread**2 / count for spread, count in known]
        square = sum(shares)
        weights = sum(v**2 / (n - 1) for v, (_, n) in zip(shares, known, strict=True))
        freedom = square**2 / weights if weights else 1.0
    elif known:
        ((spread, count),) = known
        square, freedom = spread**2 * (1 + 1 / count), count - 1.0
    else:
        return more, None
    if square == 0:
        return more, None
    limit = float(special.stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(square)
    return more, abs(one[number] - other[number]) <= limit
