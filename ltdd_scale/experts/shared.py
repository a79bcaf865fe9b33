"""Stage "teacher" where the teacher is the observer: one training gives both experts."""

from __future__ import annotations

from typing import Any

from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import Given


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write the observer's ``weights.pt`` once more. What is known of it holds for the teacher."""
    source = context.input("observer")
    files.write_bytes(context.out / "weights.pt", (source / "weights.pt").read_bytes())
    known = files.read_json(source / "stage.json")["facts"]
    return {name: value for name, value in known.items() if name != "steps"}
