"""One look for all pictures; a figure as SVG and PNG files, and as SVG inside the page.

Bytes are the same for the same arrays. Colours are those of light paper in the files; inside the
page they are CSS variables, so that a dark page has light ink.
"""

from __future__ import annotations

import functools
import html
import io
import os
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ltdd_scale.runtime import files

P = ParamSpec("P")
FOLDER = "pictures"  # in a run folder, and in a sweep's
INK, MUTED, GRID, PAPER = "#1e293a", "#475568", "#d5dbe3", "#fefeff"
# After Okabe and Ito, whose colours people tell apart who do not see all of them; darker, so that
# each has a contrast of 3 on white. `templates/page.css` has their pairs for dark pages.
SERIES = ("#0071b1", "#c44e01", "#00795b", "#a9518b", "#8a6d01", "#4a6fe4", "#b3263f", "#57697f")
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "*")
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",  # of letters on a bar
    **{colour: f"var(--s{k})" for k, colour in enumerate(SERIES)},
}
LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "figure.dpi": 100,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "text.color": INK,
    "text.parse_math": False,  # the name of a class may have a $
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}
PNG_DPI = 130
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Picture:
    """A figure and what is said of it. `said` is for who cannot see it, `caption` for all."""

    name: str  # of its files
    title: str
    said: str
    figure: Figure
    caption: str = ""


@contextmanager
def look(name: str = "") -> Generator[None]:
    """The settings under which figures are made and written. `name`: what ids in an SVG are made
    of, so that those of two pictures on one page differ."""
    settings: dict[Any, Any] = {**LOOK, **({"svg.hashsalt": name} if name else {})}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Class names may be in any script; browsers have the letters that DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that draws, under `look`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with look():
            return function(*args, **kwargs)

    return wrapped


def sheet(width: float, height: float) -> Figure:
    """An empty figure of so many inches; no state of pyplot is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = sheet(width, height)
    return figure, figure.subplots()


def row(count: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """`count` panels side by side."""
    figure = sheet(width, height)
    return figure, list(figure.subplots(1, count, squeeze=False, **kwargs)[0])


def legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    """The legend of `axes` over the whole figure: what has error bars first."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda k: not isinstance(handles[k], ErrorbarContainer))
    handles, labels = [handles[k] for k in order], [labels[k] for k in order]
    if labels:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def plain_ticks(axis: Any, values: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Ticks at just these values, also on a logarithmic axis."""
    axis.set_ticks(list(values), labels=list(labels or [f"{v:g}" for v in values]))
    axis.set_ticks([], minor=True)


def svg(picture: Picture) -> str:
    """The picture as SVG: white paper, title and description, nothing that depends on the day."""
    buffer = io.StringIO()
    with look(picture.name):
        if isinstance(picture.figure.get_layout_engine(), ConstrainedLayoutEngine):
            # Everything is placed once, not again for each file.
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")
        # Without these, the day and matplotlib's address are in it.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.figure.savefig(buffer, format="svg", facecolor="white", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # of no use, and not unique on a page
    text = re.sub(r"(<image [^>]*?) id=\"[^\"]*\"", r"\1", text)
    text = re.sub(r"\n\s*", "\n", text)
    name, (head, body) = picture.name, text.split(">", 1)
    said = (
        f'\n<title id="{name}-title">{html.escape(picture.title)}</title>'
        f'\n<desc id="{name}-desc">{html.escape(picture.said)}</desc>'
    )
    labelled = f' role="img" aria-labelledby="{name}-title {name}-desc"'
    joins = ' stroke-linejoin="round" stroke-linecap="butt"'
    # The name of a class may have a sign that XML does not know.
    return CONTROL.sub("", f"{head}{labelled}{joins}>{said}{body}")


def inline(text: str) -> str:
    """An SVG of `svg` as it stands in a page: no paper, the page's colours, no namespaces, which
    HTML knows."""
    head, body = text.split(">", 1)
    head = re.sub(r' xmlns(:xlink)?="[^"]*"', "", head)
    size = re.search(r'width="([\d.]+)pt"', head)
    width = round(float(size[1]) * 96 / 72) if size else 640
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    # The first patch is the paper.
    body = re.sub(
        r'(<g>\s*<path d="[^"]*"\s+style=")fill: #ffffff"', r'\1fill: none"', body, count=1
    )
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    # Narrower than `least` its letters are too small to read: it is scrolled instead.
    least = min(round(0.68 * width), 600)
    style = f'style="width:100%;max-width:{round(1.15 * width)}px;min-width:{least}px"'
    return f"{head} {style}>{body}"


def save(pictures: Sequence[Picture], out: Path) -> dict[str, str]:
    """Write ``out/pictures/<name>.svg`` and ``.png``, and nothing else is left there; the SVGs for
    the page by name.

    Raises `UserError` where the disk is full; what was there before is then still there.
    """
    fresh, place, inside = out / f".{FOLDER}.new", out / FOLDER, {}
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for picture in pictures:
            text = svg(picture)
            (fresh / f"{picture.name}.svg").write_text(_standalone(text), encoding="utf-8")
            with look(picture.name):
                picture.figure.savefig(
                    fresh / f"{picture.name}.png",
                    dpi=PNG_DPI,
                    facecolor="white",
                    metadata={"Software": None},
                )
            inside[picture.name] = inline(text)
        _swap(fresh, place)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise files.explain(error, place) from error
    return inside


def _standalone(text: str) -> str:
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text


def _swap(fresh: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    if any(fresh.iterdir()):
        os.rename(fresh, place)
    else:
        fresh.rmdir()
    shutil.rmtree(old, ignore_errors=True)
