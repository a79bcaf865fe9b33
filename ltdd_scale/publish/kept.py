"""Which images leave the house, in words: the method's own, those that it starts from, or random
real ones. The verdict's summary says which, as short students on validation images chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CALLED = {"distilled": "distilled", "initial": "initial images", "random": "random real"}
OWN = "distilled"  # the images that the method made


def kept(summary: Mapping[str, Any], kind: str = "") -> str:
    """The set (a key of `CALLED`) that was chosen for labels of `kind`, by default the configured
    ones: those images are exported. Nothing where none were chosen: then the method's own are."""
    found = summary.get("choice", {}).get("kinds", {})
    return found.get(kind or summary["labels"], {}).get("set", "")


def title(which: str) -> str:
    """What the row of the set `which` is called as the chosen one: ``chosen (initial images)``."""
    return f"chosen ({CALLED[which]})" if which else "chosen"


def record(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What ``set.json`` tells of the choice of its images: "set", "tried" (set → numbers of its
    short students) and "epochs" of these. Empty where nothing was chosen."""
    if not kept(summary):
        return {}
    return {**summary["choice"]["kinds"][summary["labels"]], "epochs": summary["choice"]["epochs"]}


def reason(found: Mapping[str, Any]) -> str:
    """The sentence on the trials of a `record`, the kept set first."""
    tried, which = found["tried"], found["set"]
    order = sorted(tried, key=lambda s: (s != which, -tried[s]["balanced"]))
    said = ", ".join(f"{CALLED[s]} {tried[s]['balanced']:.1f}" for s in order)
    seeds, epochs = tried[which]["num_seeds"], found["epochs"]
    of = f"{seeds} student{'s' * (seeds != 1)} of {epochs} epoch{'s' * (epochs != 1)} each"
    behind = which == OWN and any(
        numbers["balanced"] > tried[which]["balanced"] for numbers in tried.values()
    )
    noise = " What is above the kept ones is so within the noise." if behind else ""
    numbers = f"{said} (balanced accuracy in per cent, {of})"
    return f"By short students on validation images: {numbers}.{noise}"


def lines(summary: Mapping[str, Any]) -> list[str]:
    """What was chosen and why, a line for each kind of label; the configured kind first. None where
    nothing was chosen."""
    choice = summary.get("choice", {"kinds": {}, "epochs": 0})
    out = []
    for kind, found in choice["kinds"].items():
        why = reason({**found, "epochs": choice["epochs"]})
        which = CALLED[found["set"]]
        images = which if which.endswith("images") else f"{which} images"
        out.append(f"Chosen for {kind} labels: {images}. {why}")
    return out
