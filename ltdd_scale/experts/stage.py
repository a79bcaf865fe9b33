"""The records of the stages "observer" and "teacher"."""

from __future__ import annotations

import json
from typing import Any

from ltdd_scale.data.settings import Seen
from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import (
    OWN,
    TORCHVISION,
    Architecture,
    Engine,
    Expert,
    Head,
    Train,
    Weights,
    is_observer,
    options_of,
)
from ltdd_scale.stage import Division, Resources, Section, Stage, places

ROLES = ("observer", "teacher")


def stage(role: str, config: Any) -> Stage:
    """The expert of `role`: trained, or with weights from elsewhere. What is in a file, DeepSpeed's
    options or weights, is hashed, and not its name.

    Raises `UserError` where a file that is wanted cannot be read, or has options that are not JSON.
    """
    weights = getattr(config, role).weights
    if role == "teacher" and is_observer(config):
        return _shared()
    if weights and weights != OWN:
        return _brought(role, config)
    return Stage(
        name=role,
        kind="experts",
        version=3,
        run="ltdd_scale.experts.train:run",
        reads={
            "expert": Section(role, Expert),
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


def _shared() -> Stage:
    return Stage(
        name="teacher",
        kind="shared",
        version=1,
        run="ltdd_scale.experts.shared:run",
        inputs={"observer": "observer"},
        resources=Resources.CPU,
        division=Division.ONE,
        help="take the observer as the teacher",
    )


def _brought(role: str, config: Any) -> Stage:
    from ltdd_scale.experts import layouts  # torch is behind it: only where weights are brought

    place, code = getattr(config, role).weights, "ltdd_scale.experts.brought"
    try:
        weights = Weights(place=place, digest=layouts.digest(place))
    except OSError as error:
        raise UserError(
            f"{role}.weights: cannot read {place}: {error.strerror}; it must be a file, or "
            f"{TORCHVISION}NAME"
        ) from None
    own = {"head": Section(role, Head)} if getattr(config, role).head_epochs else {}
    return Stage(
        name=role,
        kind="brought",
        version=2,  # 2: a last layer has no rate of SGD
        run=f"{code}:run",
        reads={
            "net": Section(role, Architecture),
            **own,
            "images": Section("data", Seen),
            **places("seed", "runtime.precision"),
        },
        given={"role": role, "weights": weights},
        inputs={"shard": "shard"},
        resources=Resources.NODES,
        cost=f"{code}:cost",
        check=f"{code}:check",
        help=f"take the {role} from {role}.weights",
        smaller="data.memory_gb or data.resolution",
    )


def _deepspeed(train: Train) -> dict[str, Any]:
    """DeepSpeed's options, empty where another engine trains."""
    if train.engine != "deepspeed":
        return {}
    try:
        options = json.loads(options_of(train.deepspeed).read_text())
    except OSError as error:
        raise UserError(
            f"train.deepspeed: cannot read {train.deepspeed}: {error.strerror}"
        ) from None
    except ValueError as error:
        raise UserError(f"train.deepspeed: {train.deepspeed} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"train.deepspeed: {train.deepspeed} holds no settings: expected {{…}}")
    return options
