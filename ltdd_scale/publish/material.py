"""What a report is written from: folders of finished stages by role, and the config as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltdd_scale.errors import UserError

FOLDER = "distilled"  # of the set, in a run folder


@dataclass(frozen=True)
class Material:
    """`config` is the whole config as plain values, `config_yaml` the same as people read it.

    Roles of `folders`: shard, distilled, initial, labels, teacher, verdict; observer, where it
    labels together with the teacher; kept and kept_labels, where images were chosen: those that
    leave the house, while distilled and labels stay the method's own. `initial`, `teacher`,
    `observer` and the kept ones may be None or left out. `fingerprints` has those of the same
    roles. `stages` are (name, folder) of all stages of the run in their order,
    students included.
    """

    name: str
    config: Mapping[str, Any]
    config_yaml: str
    fingerprints: Mapping[str, str]
    folders: Mapping[str, Path | None]
    stages: Sequence[tuple[str, Path]]

    def folder(self, role: str) -> Path:
        """The folder of a role. Raises `UserError` where the run has none such."""
        found = self.folders.get(role)
        if found is None:
            raise UserError(f"{self.name}: no stage of this run makes '{role}'")
        return found

    def find(self, role: str) -> Path | None:
        return self.folders.get(role)

    @property
    def teachers(self) -> list[Path]:
        """The weights of the networks that label, and are averaged where there are several."""
        found = [self.find(role) for role in ("teacher", "observer")]
        return [folder / "weights.pt" for folder in found if folder is not None]

    @property
    def kept(self) -> Path:
        """The images that are exported."""
        return self.find("kept") or self.folder("distilled")

    @property
    def kept_labels(self) -> Path:
        """The labels that are exported: of `kept`."""
        return self.find("kept_labels") or self.folder("labels")

    @property
    def ipc(self) -> int:
        return self.config["ipc"]

    @property
    def resolution(self) -> int:
        return self.config["data"]["resolution"]

    @property
    def labels(self) -> str:
        """The kind of labels."""
        return self.config["relabel"]["labels"]

    @property
    def student(self) -> dict[str, Any]:
        """The network that the set was judged with first: net, width, norm."""
        judged = self.config["evaluate"]
        return {"net": judged["nets"][0], "width": judged["width"], "norm": judged["norm"]}
