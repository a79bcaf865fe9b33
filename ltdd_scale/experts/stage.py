"""The records of the stages "observer" and "teacher"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ltdd_scale.data.settings import Seen
from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import Engine, Train
from ltdd_scale.stage import Resources, Section, Stage, places

ROLES = ("observer", "teacher")


def stage(role: str, config: Any) -> Stage:
    """The expert of `role`. DeepSpeed's options are hashed, not the name of their file.

    Raises `UserError` where the file of these options is wanted, and missing or not JSON.
    """
    return Stage(
        name=role,
        kind="experts",
        version=3,
        run="ltdd_scale.experts.train:run",
        reads={
            "expert": role,
            "train": Section("train", Engine),
            "images": Section("data", Seen),
            **places("seed", "runtime.precision"),
        },
        given={"role": role, "deepspeed": _deepspeed(config.train)},
        inputs={"shard": "shard"},
        resources=Resources.NODES,
        cost="ltdd_scale.experts.cost:cost",
        check="ltdd_scale.experts.train:check",
        help=f"train the {role}",
        smaller=f"train.micro_batch, {role}.batch_size, data.memory_gb or data.resolution",
    )


def _deepspeed(train: Train) -> dict[str, Any]:
    """DeepSpeed's options, empty where another engine trains."""
    if train.engine != "deepspeed":
        return {}
    try:
        options = json.loads(Path(train.deepspeed).read_text())
    except OSError as error:
        raise UserError(
            f"train.deepspeed: cannot read {train.deepspeed}: {error.strerror}"
        ) from None
    except ValueError as error:
        raise UserError(f"train.deepspeed: {train.deepspeed} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"train.deepspeed: {train.deepspeed} holds no settings: expected {{…}}")
    return options
