"""What the students of a run have left in their folders: rows, loss curves, logits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import distilled
from ltdd_scale.labels.catalog import baseline
from ltdd_scale.results import CHOSEN, WHOLE_SETS
from ltdd_scale.runtime import files

AS = "as"  # in a row: the set whose student stands for this one
LOGITS = "logits.npy"  # of the judged images, float16 [N, C]


class Saved:
    """The folders of students, in the order of the run. `labels` is the configured kind."""

    def __init__(self, inputs: Mapping[str, Path], labels: str):
        self.labels = labels
        self.folders = [f for name, f in inputs.items() if name.startswith("student/")]
        results = [files.read_json(folder / "result.json") for folder in self.folders]
        self.all = [self._resolved(result, results) for result in results]

    @staticmethod
    def _resolved(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
        """`result`, or that of the student which stands for it."""
        row = result["row"]
        if AS not in row:
            return result
        twin = (row[AS], row["labels"], row["net"], row["seed"])
        for other in results:
            found = other["row"]
            if (found["set"], found["labels"], found["net"], found["seed"]) == twin:
                return {**other, "row": {**found, "set": row["set"]}}
        raise LookupError(f"no student of {twin} among the inputs")

    @cached_property
    def found(self) -> list[dict[str, Any]]:
        """The results of students of all classes."""
        return [f for f in self.all if not f["row"].get("part")]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Their rows."""
        return [f["row"] for f in self.found]

    @property
    def net(self) -> str:
        """The first net."""
        return self.rows[0]["net"]

    def logits(self, which: str, seed: int, part: str = "") -> Tensor | None:
        """Logits float32 [N, C] of the student of the set `which` with the labels that it has in a
        result, of the first net; None where there is none such."""
        for folder, result in zip(self.folders, self.all, strict=True):
            row = result["row"]
            same = (row["set"], row["net"], row["seed"], row.get("part", ""))
            if same == (which, self.net, seed, part) and self._has_its_labels(row):
                return torch.from_numpy(distilled.load(folder / LOGITS)).float()
        return None

    def _has_its_labels(self, row: dict[str, Any]) -> bool:
        if row["set"] in WHOLE_SETS:
            return True
        configured = self.labels if row["set"] in ("distilled", CHOSEN) else baseline(self.labels)
        return row["labels"] == configured


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an ``.npz``. Equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # ty: ignore[invalid-argument-type]
    files.write_bytes(path, buffer.getvalue())
