"""``ltdd-scale export``: an exported set again, in one format, with other images or a licence."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.publish import hub
from ltdd_scale.publish.material import FOLDER
from ltdd_scale.publish.opened import Opened
from ltdd_scale.publish.settings import DDRANKING, IMAGEFOLDER, SET, Publish
from ltdd_scale.settings import parse


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
    out = options.out or place.with_name(f"{place.name}-{options.format}")
    if out.resolve() == place:
        raise UserError(f"{out} is the set itself: choose another folder with --out")
    if out.exists() and not (out / "files.json").exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty, and no export of ours: choose another --out")
    if options.format == DDRANKING:
        _ddranking(opened, options, out)
    else:
        _set(opened, options, out)
    print(f"written  {out}")
    if not opened.publish.license and not options.license:
        print(hub.ASKS)
    return 0


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

    if options.images or options.measure:
        raise UserError("--images and --measure do not go with --format ddranking: it is tensors")
    with published.swapped_in(out) as fresh:
        ddranking.write(opened, fresh, options.dataset)
        published.put_hashes(fresh)


def _set(opened: Opened, options: Options, out: Path) -> None:
    from ltdd_scale.publish import set as published
    from ltdd_scale.publish.encode import Encoding

    if options.dataset:
        raise UserError("--dataset goes with --format ddranking")
    values: dict[str, Any] = opened.publish.model_dump()
    asked = {"images": options.images, "quality": options.quality, "license": options.license}
    values |= {name: value for name, value in asked.items() if value is not None}
    if options.images is None:
        values |= {"images": opened.encoding.name}
    publish = parse(Publish, values, "publish.")
    encoding = Encoding(publish.images, publish.quality)
    if not encoding.lossy:
        encoding = Encoding(publish.images)
    formats = [IMAGEFOLDER, *publish.formats] if options.format == SET else [options.format]
    change = None
    if options.measure:
        if encoding == opened.encoding:
            raise UserError("--measure compares with other images: choose some with --images")
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".measure-") as folder:
            other = Path(folder) / "set"
            published.rewrite(opened, other, [IMAGEFOLDER], encoding, publish)
            change = measure(opened.folder, other, options.measure, options.seeds)
    published.rewrite(opened, out, formats, encoding, publish, change)


def measure(lossless: Path, other: Path, test: Path, seeds: int) -> dict[str, Any]:
    """Students as the set was judged, on both sets, with the same seeds: what the other images
    change, in points. ``difference_std`` is that of the difference over seeds, None for one."""
    import numpy as np

    from ltdd_scale import fit

    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1")
    told = fit.describe(lossless)
    peers = fit.join(told)
    found: list[list[float]] = []
    images = 0
    for folder in (lossless, other):
        row: list[float] = []
        for seed in range(seeds):
            student = fit.fit(folder, told, peers, seed=seed)
            result = fit.judge(student, test, told, peers)
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
