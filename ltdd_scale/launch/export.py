"""``ltdd-scale export``: an exported set again, in one format, with other images or a licence."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltdd_scale.errors import UserError
from ltdd_scale.publish import hub, kept
from ltdd_scale.publish.material import FOLDER
from ltdd_scale.publish.opened import Opened
from ltdd_scale.publish.settings import DDRANKING, IMAGEFOLDER, SET, Publish
from ltdd_scale.runtime import files
from ltdd_scale.settings import parse

if TYPE_CHECKING:
    from ltdd_scale.data.named import Named
    from ltdd_scale.publish.encode import Encoding


@dataclass(frozen=True)
class Options:
    """What the command was given. `path` is a run folder or an exported set; `format` one of
    `settings.EXPORTS`; `measure` a folder <class>/<image>, to judge students of lossless and of
    other images on, of `seeds` seeds each."""

    path: Path
    format: str = SET
    out: Path | None = None
    images: str | None = None
    quality: int | None = None
    license: str | None = None
    dataset: str | None = None
    measure: Path | None = None
    seeds: int = 3


def export(options: Options) -> int:
    """Write it, and say where it is. Returns the exit code."""
    opened = _open(options.path)
    place = opened.folder.resolve()  # it may be "."
    shown = options.out or place.with_name(f"{place.name}-{options.format}")
    out = shown.resolve()
    if place in (out, *out.parents):
        raise UserError(f"{shown} is in the set itself: choose another folder with --out")
    _check_free(out, shown)
    if options.license is not None:
        options = dataclasses.replace(options, license=options.license.strip())
    if options.format == DDRANKING:
        _ddranking(opened, options, out)
    else:
        _set(opened, options, out)
    print(f"written  {shown}")
    if opened.kept != kept.OWN:
        print(f"         not the distilled images: {kept.title(opened.kept)}")
    if not (opened.publish.license if options.license is None else options.license):
        print(hub.ASKS)
    return 0


def _check_free(out: Path, shown: Path) -> None:
    """Raise `UserError` unless `out` is not there, is empty, or is an export of ours and nothing
    else: it is replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{shown} is a file: choose another folder with --out")
    there = {p for p in out.rglob("*") if p.is_symlink() or not p.is_dir()}
    if not there:
        return
    try:
        listed = {out / name for name in files.read_json(out / "files.json")}
    except (UserError, TypeError):
        listed = set()
    if foreign := sorted(there - listed - {out / "files.json"}):
        raise UserError(
            f"{shown} is not empty, and {foreign[0].relative_to(out)} there is not of an export of "
            "ours: choose another --out"
        )


def _open(path: Path) -> Opened:
    """The set in `path`, or of the run there."""
    if (path / "run.json").exists():
        if not (path / FOLDER / "set.json").exists():
            raise UserError(f"{path} has no distilled set yet: run 'ltdd-scale run' first")
        path = path / FOLDER
    return Opened(path)


def _ddranking(opened: Opened, options: Options, out: Path) -> None:
    from ltdd_scale.publish import ddranking
    from ltdd_scale.publish import set as published

    if options.images or options.measure or options.quality is not None:
        raise UserError(
            "--images, --quality and --measure do not go with --format ddranking: it is tensors"
        )
    with published.swapped_in(out) as fresh:
        ddranking.write(opened, fresh, options.dataset, options.license)
        published.put_hashes(fresh)


def _set(opened: Opened, options: Options, out: Path) -> None:
    from ltdd_scale.publish import set as published
    from ltdd_scale.publish.encode import Encoding

    if options.dataset:
        raise UserError("--dataset goes with --format ddranking")
    values: dict[str, Any] = opened.publish.model_dump()
    asked = {"images": options.images, "quality": options.quality, "license": options.license}
    if options.license and values["license"] and options.license != values["license"]:
        values["license_link"] = ""  # it is where the other licence can be read
    values |= {name: value for name, value in asked.items() if value is not None}
    if options.images is None:
        values |= {"images": opened.encoding.name}
    publish = parse(Publish, values, "publish.")
    encoding = Encoding(publish.images, publish.quality)
    if not encoding.lossy:
        if options.quality is not None:
            raise UserError("--quality goes with --images webp-lossy or jpeg: others lose nothing")
        encoding = Encoding(publish.images)
    formats = [IMAGEFOLDER, *publish.formats] if options.format == SET else [options.format]
    change = None
    if options.measure:
        if encoding == opened.encoding:
            raise UserError("--measure compares with other images: choose some with --images")
        change = _measured(opened, out, options.measure, options.seeds, encoding, publish)
    published.rewrite(opened, out, formats, encoding, publish, change)


def _measured(
    opened: Opened, out: Path, test: Path, seeds: int, encoding: Encoding, publish: Publish
) -> dict[str, Any]:
    """`measure` with a set that is written beside `out` for it. What is wrong with the test images
    or with the seeds is said before."""
    from ltdd_scale import fit
    from ltdd_scale.publish import set as published

    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1")
    if not test.is_dir():
        raise UserError(f"--measure {test}: no such folder")
    judged = fit.read_test(test, fit.describe(opened.folder))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".measure-") as folder:
            other = Path(folder) / "set"
            published.rewrite(opened, other, [IMAGEFOLDER], encoding, publish)
            return measure(opened.folder, other, judged, seeds)
    except OSError as error:
        raise files.explain(error, out) from error


def measure(lossless: Path, other: Path, test: Named, seeds: int) -> dict[str, Any]:
    """Students as the set was judged, on both sets, with the same seeds: what the other images
    change, in points. ``difference_std`` is that of the difference over seeds, None for one."""
    import numpy as np

    from ltdd_scale import fit

    told = fit.describe(lossless)
    peers = fit.join(told)
    found: list[list[float]] = []
    images = 0
    for folder in (lossless, other):
        row: list[float] = []
        for seed in range(seeds):
            student = fit.fit(folder, told, peers, seed=seed)
            result = fit.judge(student, test, peers)
            # The mean over classes: the same as top-1 where the test images are balanced.
            row.append(result["balanced"])
            images = result["images"]
            print(f"{'lossless' if folder == lossless else 'exported'}, seed {seed}: {row[-1]:.2f}")
        found.append(row)
    differences = [after - before for before, after in zip(*found, strict=True)]
    return {
        "number": "balanced",
        "lossless": _mean(found[0]),
        "exported": _mean(found[1]),
        "difference": _mean(differences),
        "difference_std": round(float(np.std(differences, ddof=1)), 3) if seeds > 1 else None,
        "seeds": seeds,
        "net": told.net,
        "epochs": told.epochs,
        "labels": Opened(lossless).told["labels"],
        "test_images": images,
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)
