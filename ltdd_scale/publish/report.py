"""The report of a run: the distilled set, results.json, a Markdown table, the page.

Asking whether there is one imports neither torch nor NumPy: `status` asks.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ltdd_scale.publish.material import FOLDER, Material
from ltdd_scale.publish.tables import table
from ltdd_scale.runtime import files

VERSION = 2  # raised when a report looks different for the same material
MARK = ".report"
WHOLE = (MARK, "results.json", "results.md", "report.html", f"{FOLDER}/files.json")


def write(material: Material, out: Path) -> None:
    """Write everything into the run folder `out`; the mark last.

    Raises `UserError` where the disk is full or a folder of `material` lacks a file.
    """
    from ltdd_scale.data.shards import ShardSplit
    from ltdd_scale.publish import page
    from ltdd_scale.publish import set as distilled_set

    results = files.read_json(material.folder("verdict") / "results.json")
    split = ShardSplit(material.folder("shard"), "train")
    distilled_set.write(material, split, results, out)
    files.write_json(out / "results.json", results)
    files.write_text(out / "results.md", f"# {material.name}\n\n{table(results)}\n")
    files.write_text(out / "report.html", page.render(material, split, results))
    files.write_text(out / MARK, mark(material))


def is_current(material: Material, out: Path) -> bool:
    """Whether `out` holds the report of just this material."""
    return all((out / p).exists() for p in WHOLE) and (out / MARK).read_text() == mark(material)


def mark(material: Material) -> str:
    """What a report was written for: the results, the images, the labels, the config."""
    made_of = [VERSION, dict(material.fingerprints), material.config]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
