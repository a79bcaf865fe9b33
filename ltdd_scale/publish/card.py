"""The README of a published set: what is in it, how good it is, how to use it."""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.publish.material import Material
from ltdd_scale.publish.tables import table

CARD = """# {name}: a distilled, class-balanced image set

{ipc} images for each of {num_classes} classes, {size} × {size} pixels, distilled from {total:,}
long-tailed training images ({largest} … {smallest} a class) by `ltdd_scale`.

- **Classes**, in label order: {classes}
- **Normalisation**: mean {mean}, std {std} (of the real training images, pixels in [0, 1])
- **Labels**: {labels}. {teacher}`labels/labels.json` says how the labels were made.
- **Recipe**: method `{method}`, judged with {student}. All settings are in `set.json`;
  {provenance}hashes are in `files.json`.

## Results

Accuracies in per cent on {split} images, mean ± standard deviation over seeds.{note}

{table}

## Use

With torchvision: `torchvision.datasets.ImageFolder("images")` has the classes in the order above.

With the labels, and no script:
`ltdd-scale fit . --net {student} --save student.pt [--test FOLDER]`.
"""
PROVENANCE = "where every image started from is in `provenance.json`; "
UNBALANCED = (
    " These images are not balanced:\n`balanced`, the mean over classes, is the number to compare."
)


def card(
    material: Material,
    split: ShardSplit,
    names: list[str],
    results: dict[str, Any],
    provenance: bool,
) -> str:
    """`split` is the real training set, `names` are the class folders in label order, `provenance`
    says whether it is known where the images started from."""
    listed = ", ".join(names[:20])
    if len(names) > 20:
        listed += f", … ({len(names)} in all, in set.json)"
    teacher = ""
    if material.find("teacher"):
        teacher = f"Teacher: {material.config['teacher']['net']}, in `teacher.pt`; "
    summary = results["summary"]
    return CARD.format(
        name=material.name,
        ipc=material.ipc,
        num_classes=len(names),
        size=material.resolution,
        total=split.counts.sum(),
        largest=split.counts.max(),
        smallest=split.counts.min(),
        classes=listed,
        mean=[round(v, 4) for v in split.mean],
        std=[round(v, 4) for v in split.std],
        labels=material.labels,
        teacher=teacher,
        provenance=PROVENANCE if provenance else "",
        method=material.config["method"],
        student=material.student["net"],
        split=summary["split"],
        note="" if summary.get("balanced_test", True) else UNBALANCED,
        table=table(results),
    )
