"""The report of a run: the distilled set, results.json, a Markdown table, pictures, the page.

Asking whether there is one imports neither torch nor NumPy: `status` asks.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ltdd_scale.publish import lrs
from ltdd_scale.publish.material import FOLDER, Material
from ltdd_scale.publish.tables import markdown, stage_rows, table
from ltdd_scale.runtime import files

VERSION = 5  # raised when a report looks different for the same material
MARK = ".report"
WHOLE = (MARK, "results.json", "results.md", "report.html", f"{FOLDER}/files.json")


def write(material: Material, out: Path) -> None:
    """Write everything into the run folder `out`; the mark last. The old mark goes first: a report
    that ends in the middle is nobody's.

    Raises `UserError` where the disk is full or a folder of `material` lacks a file.
    """
    from ltdd_scale.data.shards import ShardSplit
    from ltdd_scale.publish import page
    from ltdd_scale.publish import set as distilled_set
    from ltdd_scale.publish.gallery import Gallery
    from ltdd_scale.publish.pictures import canvas

    results = files.read_json(material.folder("verdict") / "results.json")
    split = ShardSplit(material.folder("shard"), "train")
    try:
        (out / MARK).unlink(missing_ok=True)
    except OSError as error:
        raise files.explain(error, out / MARK) from error
    distilled_set.write(material, split, results, out)
    files.write_json(out / "results.json", results)
    pairs = stage_rows(results)
    every = f"All pairs of stages:\n\n{markdown(pairs)}" if pairs else ""
    parts = (f"# {material.name}", table(results), lrs.text(results), every)
    shown = "\n\n".join(filter(None, parts))
    files.write_text(out / "results.md", f"{shown}\n")
    wanted = material.config.get("publish", {}).get("pictures", True)
    pictures = Gallery(material, split, results).all() if wanted else []
    drawn = canvas.save(pictures, out)
    files.write_text(out / "report.html", page.render(material, split, results, pictures, drawn))
    names = [f"{canvas.FOLDER}/{name}.{kind}" for name in drawn for kind in ("svg", "png")]
    files.write_text(out / MARK, "\n".join([mark(material), *names]) + "\n")


def is_current(material: Material, out: Path) -> bool:
    """Whether `out` holds the report of just this material."""
    if not all((out / p).exists() for p in WHOLE):
        return False
    lines = (out / MARK).read_text().splitlines()
    return lines[:1] == [mark(material)] and all((out / p).exists() for p in lines[1:])


def mark(material: Material) -> str:
    """What a report was written for: the results, the images, the labels, the config."""
    made_of = [VERSION, dict(material.fingerprints), material.config]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
