"""A sweep's pictures: accuracy over IPC and over the imbalance factor, features of its networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ltdd_scale.launch.sweep import Published, point_name
from ltdd_scale.publish.tables import HEADINGS

if TYPE_CHECKING:
    from ltdd_scale.launch.sweep_table import Finished
    from ltdd_scale.publish.pictures.canvas import Picture
    from ltdd_scale.publish.pictures.points import Curve, Panel

# What points are drawn over: the setting, the name of the file, the axis, its name in a title.
AXES = (
    ("ipc", "ipc", "images a class (IPC)", "IPC"),
    ("data.imbalance_factor", "imbalance", "imbalance factor", "imbalance factor"),
)
KINDS = {"distilled": "", "random": "random real, "}  # what a curve's name begins with
MOST = 12  # panels of features


def write(
    found: Sequence[Finished],
    published: Sequence[Published],
    embeddings: Mapping[str, Path],
    number: str,
    out: Path,
    curves: bool = True,
) -> str:
    """Write ``out/pictures`` and return the Markdown that shows it; nothing where there is nothing
    to draw: neither IPC nor imbalance factor varies, and there are no features.

    `embeddings`: point → folder of its features. `number`: the one that is shown. `curves`: whether
    points are of one data set, so that a curve can join them.
    """
    axes = AXES if curves else ()
    pictures = [p for axis in axes if (p := _curves(found, published, number, axis)) is not None]
    if (features := _features(embeddings)) is not None:
        pictures.append(features)
    if not pictures and not (out / "pictures").exists():
        return ""
    # matplotlib takes a second to import: only where there is something to draw.
    from ltdd_scale.publish.pictures import canvas

    canvas.save(pictures, out)
    return "".join(
        f"\n{p.title}: {p.caption}\n\n![{p.title}]({canvas.FOLDER}/{p.name}.svg)\n"
        for p in pictures
    )


def _curves(
    found: Sequence[Finished],
    published: Sequence[Published],
    number: str,
    axis: tuple[str, str, str, str],
) -> Picture | None:
    """One panel for each value of the other axis."""
    key, name, label, _ = axis
    (other,) = (a for a in AXES if a is not axis)
    found = [p for p in found if _at(p, key) is not None]
    if len({_at(p, key) for p in found}) < 2:
        return None
    from ltdd_scale.publish.message import plain_name
    from ltdd_scale.publish.pictures import points
    from ltdd_scale.publish.pictures.canvas import Picture

    families = list(dict.fromkeys(map(_family, found)))
    panels = []
    for value in sorted({_at(p, other[0]) for p in found}, key=lambda v: (v is not None, v or 0)):
        own = [p for p in found if _at(p, other[0]) == value]
        if len({_at(p, key) for p in own}) > 1:
            title = "" if value is None else f"{other[3]} {value:g}"
            panels.append(_panel(title, own, published, number, key, families))
    if not panels:
        return None
    drawn = points.sweep_curves(panels, label, HEADINGS[number])
    said = "; ".join(
        f"{', '.join(filter(None, (panel.title, curve.name)))}: "
        + ", ".join(f"{x:g}: {y:.1f}" for x, y, _ in sorted(curve.points))
        for panel in panels
        for curve in panel.curves
    )
    kinds = {curve.kind for panel in panels for curve in panel.curves}
    marks = ["dashed: random real images"] if "random" in kinds else []
    if "plain" in kinds:
        names = dict.fromkeys(plain_name(_plain_title(p)) for p in found if "plain" in p.numbers)
        marks.append(f"dotted: {' or '.join(names)} on the whole set after logit adjustment")
    if any(p.published for p in panels):
        marks.append("hollow: published")
    return Picture(
        name,
        f"{HEADINGS[number]} over the {label}",
        f"{said}.",
        drawn,
        f"{'; '.join(['per cent', *marks])}.",
    )


def _panel(
    title: str,
    own: Sequence[Finished],
    published: Sequence[Published],
    number: str,
    key: str,
    families: Sequence[str],
) -> Panel:
    from ltdd_scale.publish.pictures.points import Panel

    panel = Panel(title)
    for k, family in enumerate(families):
        members = [p for p in own if _family(p) == family]
        for kind in ("distilled", "random"):
            _add(panel.curves, _curve(members, number, key, kind, family, k))
    # Points of several families share the plain network: it is drawn once where it is the same.
    plain = [
        _curve([p for p in own if _family(p) == f], number, key, "plain", f, 0) for f in families
    ]
    if len({str(c.points) for c in plain if c and c.points}) == 1:
        first = next(c for c in plain if c and c.points)
        first.name = _plain_title(own[0])
        plain = [first]
    for curve in plain:
        _add(panel.curves, curve)
    if number == "top1":
        for row in published:
            for point in own:
                net = point.config.evaluate.nets[0]
                if row.top1 is not None and row.net in ("", net) and row.fits(point.config):
                    places = panel.published.setdefault(row.method, [])
                    x = _at(point, key)
                    if x is not None and (x, row.top1) not in places:
                        places.append((x, row.top1))
    return panel


def _add(curves: list[Curve], curve: Curve | None) -> None:
    if curve is not None and curve.points:
        curves.append(curve)


def _curve(
    members: Sequence[Finished], number: str, key: str, kind: str, family: str, k: int
) -> Curve | None:
    """The mean over points of one place (they differ in their seed), with the spread over them, or
    of one point's students."""
    from ltdd_scale.publish.pictures.points import Curve

    places: dict[float, list[Mapping[str, Any]]] = {}
    for point in members:
        entry, x = point.numbers.get(kind), _at(point, key)
        if entry is not None and entry.get(number) is not None and x is not None:
            places.setdefault(x, []).append(entry)
    points: list[tuple[float, float, float | None]] = []
    for x, entries in sorted(places.items()):
        values = [e[number] for e in entries]
        spread = (
            float(np.std(values, ddof=1)) if len(values) > 1 else entries[0].get(f"{number}_std")
        )
        points.append((x, float(np.mean(values)), spread))
    if not points:
        return None
    name = f"{_plain_title(members[0])}, " if kind == "plain" else KINDS[kind]
    return Curve(name + family, points, kind, k)


def _plain_title(point: Finished) -> str:
    """The title of the network on the whole set after logit adjustment."""
    titles = (e["title"] for e in point.summary.get("plain", []))
    return next((t for t in titles if t.endswith("logit-adjusted")), "plain, logit-adjusted")


def _at(point: Finished, key: str) -> float | None:
    """Where the point stands. Classes that no imbalance factor has made have none."""
    if key == "ipc":
        return float(point.config.ipc)
    data = point.config.data
    return float(data.imbalance_factor) if data.profile == "exponential" else None


def _family(point: Finished) -> str:
    """What makes a curve: the method, the labels, and whatever else sets points apart."""
    apart = ("ipc", "data.imbalance_factor", "seed", "method", "relabel.labels")
    rest = {k: v for k, v in point.settings.items() if k not in apart}
    config = point.config
    name = f"{config.method}, {config.relabel.labels}"
    return f"{name}, {point_name(rest)}" if rest else name


def _features(embeddings: Mapping[str, Path]) -> Picture | None:
    """The features of all points' networks, point by point."""
    there = {n: f for n, f in embeddings.items() if (f / "embedding.npz").exists()}
    if not there:
        return None
    from ltdd_scale.publish.gallery import read_embedding
    from ltdd_scale.publish.pictures import points
    from ltdd_scale.publish.pictures.canvas import Picture

    found: dict[tuple[str, bytes], tuple[points.Cloud, list[str]]] = {}
    classes, perplexities = [], []
    for name, folder in there.items():
        own, record = read_embedding(folder)
        if classes and record["classes"] != classes:
            continue  # other classes have other colours
        classes = record["classes"]
        perplexities.append(f"{record['perplexity']:g}")
        for title, panel in own.items():
            # Points share networks: the plain one of the same whole set is shown once.
            found.setdefault((title, panel[0].tobytes()), (panel, []))[1].append(name)
    titled = {f"{', '.join(of)}: {title}": panel for (title, _), (panel, of) in found.items()}
    panels = dict(list(titled.items())[:MOST])
    return Picture(
        "embeddings",
        "Features of the judged images (t-SNE)",
        f"Features of the judged images in the plane: {', '.join(panels)}.",
        points.embeddings(panels, classes),
        f"one panel for each network, perplexity {', '.join(dict.fromkeys(perplexities))}; colours "
        "are classes, triangles their centres.",
    )
