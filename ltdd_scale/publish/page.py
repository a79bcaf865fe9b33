"""The report page: one HTML file that needs no network. Pictures and images are inline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.publish import kept, lrs
from ltdd_scale.publish.blocks import (
    Block,
    Code,
    Drawing,
    Note,
    Section,
    Sheet,
    Table,
    environment,
)
from ltdd_scale.publish.course import TRIAL, kind_of
from ltdd_scale.publish.gallery import Gallery, spread
from ltdd_scale.publish.material import Material
from ltdd_scale.publish.message import message, two_stages
from ltdd_scale.publish.pictures import images
from ltdd_scale.publish.pictures.canvas import FOLDER, Picture, inline, svg
from ltdd_scale.publish.tables import (
    HEADINGS,
    STAGES_SAID,
    chosen_title,
    exported,
    matrix_rows,
    numbers,
    rows,
    stage_rows,
    warnings,
)
from ltdd_scale.runtime import files
from ltdd_scale.runtime.progress import duration

SMALL = 64  # pixels at most of an image in the sheet
ONLINE = (
    "With online labels the teacher sees every view, so almost any images will do: "
    "read this column beside the others."
)
UNBALANCED = (
    "The judged images are not balanced, so top-1 tells mostly of the head: "
    "balanced, the mean over classes, comes first."
)


def render(
    material: Material,
    split: ShardSplit,
    results: dict[str, Any],
    pictures: Sequence[Picture] | None = None,
    drawn: Mapping[str, str] | None = None,
) -> str:
    """The page as HTML. `split` is the real training set, `results` the verdict's record.

    `pictures` are those of `Gallery.all`, `drawn` their SVGs by name, as `canvas.save` gives them;
    both are made here where they are not given.
    """
    if pictures is None:
        pictures = Gallery(material, split, results).all()
    if drawn is None:
        drawn = {p.name: inline(svg(p)) for p in pictures}
    page = _Page(material, split, results, {p.name: p for p in pictures}, drawn)
    sections = [s for s in page.sections() if s.blocks]
    lead = message(page.summary, material.student["net"], page.num_images, int(split.counts.sum()))
    lead += two_stages(results)
    return (
        environment()
        .get_template("page.html")
        .render(
            title=material.name,
            lead=[s.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%") for s in lead],
            warnings=warnings(page.summary),
            about=page.about(),
            first=page.drawing("message"),
            sections=sections,
        )
    )


class _Page:
    """The sections of one page, in reading order; one without blocks is left out."""

    def __init__(
        self,
        material: Material,
        split: ShardSplit,
        results: dict[str, Any],
        pictures: Mapping[str, Picture],
        drawn: Mapping[str, str],
    ):
        self.material, self.split, self.results = material, split, results
        self.summary = results["summary"]
        self.pictures, self.drawn = pictures, drawn
        self.num_images = len(Distilled(material.folder("distilled"), len(split.classes)))

    def sections(self) -> list[Section]:
        two = bool(stage_rows(self.results))
        confusions = self.drawing("confusions")
        return [
            Section("results", "Results", self._results()),
            Section("stages-two", "Two stages", self._two_stages(confusions if two else [])),
            Section("labels", "Labels", self._labels()),
            Section("classes", "Classes", self._classes([] if two else confusions)),
            Section("features", "Features", self.drawing("embeddings")),
            Section("images", "Images", [*self.drawing("pairs"), *self._sheets()]),
            Section("work", "The work", self._work()),
            Section("config", "Config", self._config()),
        ]

    def drawing(self, *names: str) -> list[Block]:
        found = [self.pictures[name] for name in names if name in self.pictures]
        return [
            Drawing(
                p.title,
                Markup(self.drawn[p.name]),  # made by matplotlib, which escapes texts
                p.caption,
                [f"{FOLDER}/{p.name}.{kind}" for kind in ("svg", "png")],
            )
            for p in found
        ]

    def about(self) -> str:
        """What was done, in small letters."""
        counts, material = self.split.counts, self.material
        seeds = material.config["evaluate"]["seeds"]
        return (
            f"{material.ipc} images a class for {len(counts)} classes, from {counts.sum():,} "
            f"long-tailed images ({counts.max()} … {counts.min()} a class); "
            f"{material.resolution} px; method {material.config['method']}, {material.labels} "
            f"labels; judged on {self.summary['split']} images, per cent, mean ± standard "
            f"deviation over {seeds} seed{'s' * (seeds != 1)}. If Welch's test (95 %) finds no "
            "difference, we write “within the noise”. Where one side has a single seed, it is "
            "taken to vary as the other does."
        )

    def _results(self) -> list[Block]:
        table = Table(
            "The set beside random real images, the whole set and the experts, per cent",
            rows(self.results),
            strong=exported(self.summary),
        )
        notes = kept.lines(self.summary)
        notes += [ONLINE] if self.material.labels == "online" else []
        notes += [] if self.summary.get("balanced_test", True) else [UNBALANCED]
        notes += [line.replace("**", "") for line in lrs.text(self.results).splitlines() if line]
        return [table, *map(Note, notes)]

    def _two_stages(self, confusions: list[Block]) -> list[Block]:
        found = stage_rows(self.results)
        if not found:
            return []
        short = stage_rows(self.results, published=True)
        tables: list[Block] = [Table("One stage beside the published pair, per cent", short)]
        if len(found) > len(short):
            tables.append(Table("One stage and all pairs, per cent", found, closed=True))
        said = Note(STAGES_SAID.replace("`", "") + ".")
        return [said, *tables, *self.drawing("pairs_of_stages"), *confusions]

    def _labels(self) -> list[Block]:
        if not self.results["matrix"]:
            return self.drawing("bytes")
        number = HEADINGS[numbers(self.summary)[0]]
        said = (
            "The label matrix: students trained on each kind of image with each kind of label, "
            f"{number}"
        )
        strong = chosen_title(self.summary) if kept.kept(self.summary) else kept.OWN
        return [Table(said, matrix_rows(self.results), strong=strong), *self.drawing("bytes")]

    def _classes(self, confusions: list[Block]) -> list[Block]:
        out = self.drawing("classes", "counts")
        series = Gallery(self.material, self.split, self.results).accuracies
        if series:
            heading = ["class", "training images", *series]
            table = [heading] + [
                [
                    self.split.classes[c],
                    f"{self.split.counts[c]:,}",
                    *("–" if v[c] is None else f"{v[c]:.1f}" for v in series.values()),
                ]
                for c in np.argsort(-self.split.counts, kind="stable")
            ]
            out.append(Table("Accuracy of each class as numbers, per cent", table, closed=True))
        return [*out, *confusions, *self.drawing("tree")]

    def _sheets(self) -> list[Block]:
        """A sheet of real, initial (if there are such) and distilled images, and of random real
        ones where these are exported."""
        size = min(self.material.resolution, SMALL)
        shown = spread(self.split.counts, 12)
        n = min(self.material.ipc, 8 if size <= SMALL // 2 else 4)
        kinds = {"real": [self._real(c, n, size) for c in shown]}
        for role in ("initial", "distilled"):
            folder = self.material.find(role)
            if folder is not None:
                kinds[role] = self._made(folder, shown, n, size)
        chosen = kept.kept(self.summary)
        if chosen == "random":
            kinds[kept.CALLED[chosen]] = self._made(self.material.kept, shown, n, size)
        names = ", ".join(f"{self.split.classes[c]} ({self.split.counts[c]:,})" for c in shown)
        *first, last = kinds
        title = f"{', '.join(first)} and {last} images".capitalize()
        said = f"A row a class, from head to tail: {names}. Left to right: {', '.join(kinds)}."
        if chosen:
            said += f" The {kept.CALLED[chosen].removesuffix(' images')} ones are exported."
        if self.material.resolution > SMALL:
            said += f" Shrunk to {SMALL} pixels."
        source, width = images.contact_sheet(list(kinds.values()), n)
        scale = max(1, round(960 / width))
        return [Sheet(title, source, width * scale, said)]

    def _made(self, folder: Path, shown: Sequence[int], n: int, size: int) -> list[np.ndarray]:
        """The first `n` images of each class that is shown, of a set of a stage."""
        held = Distilled(folder, len(self.split.classes))
        return [images.shrunk(np.asarray(held.load(c)[:n]), size) for c in shown]

    def _real(self, label: int, n: int, size: int) -> np.ndarray:
        members = np.flatnonzero(self.split.labels == label)[:n]
        found = [np.asarray(square(self.split.image(int(i)), size)) for i in members]
        return np.stack(found).transpose(0, 3, 1, 2)

    def _work(self) -> list[Block]:
        losses: list[Block] = self.drawing("losses")
        if not losses and self.material.config["publish"]["pictures"]:
            losses = [Note("No losses were kept.")]
        software = files.read_json(self.material.folder("verdict") / "stage.json")["software"]
        table = Table("Stages, what they took and made", self._stages())
        return [
            *losses,
            *self.drawing("timeline"),
            table,
            Note(", ".join(f"{k} {v}" for k, v in software.items())),
        ]

    def _stages(self) -> list[list[str]]:
        """Rows of the table of stages; all students share one, and so do all trials."""
        out: dict[str, list[str]] = {"": ["stage", "time", "on", "facts"]}
        seconds: dict[str, list[float]] = {"students": [], "trials": []}
        cells = set()
        for name, folder in self.material.stages:
            record = files.read_json(folder / "stage.json")
            if kind_of(folder) == "student":
                if record["facts"].keys() == {"note"}:  # another student stands for it
                    continue
                row, facts = "trials", "short students, judged on validation images"
                if not name.startswith(TRIAL):
                    cells.add(name.rpartition("-s")[0])
                    row, facts = "students", f"students in {len(cells)} cells"
                seconds[row].append(record["seconds"])
                time = f"{duration(sum(seconds[row]))} of one rank"
                out[row] = [row, time, "", f"{len(seconds[row])} {facts}"]
                continue
            facts = ", ".join(f"{k} {v}" for k, v in record["facts"].items())
            where = f"{record['ranks']} × {record['device']}"
            out[name] = [name, duration(record["seconds"]), where, facts]
        return list(out.values())

    def _config(self) -> list[Block]:
        return [Code("All settings", self.material.config_yaml)]
