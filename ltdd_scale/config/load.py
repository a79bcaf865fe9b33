"""Reading a config: YAML ← its ``base`` ← ``--set a.b=c``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ltdd_scale.config.root import Config, check
from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import Brought, Expert, usual_padding
from ltdd_scale.settings import lay_over, parse

# Settings that have another name now: whoever has an old config is told the new one.
MOVED = {
    "strategies.debias": "observer.reweight_power and observer.resample_power (0 for false)",
    "train.debias": "observer.reweight_power and observer.resample_power (0 for false)",
    "strategies.calibrate": "calibrate.fair",
    "strategies.confident_init": "initialize.select (confident; random for false)",
    "initialize.confident": "initialize.select (confident; random for false)",
}


def load(path: str | Path, sets: Sequence[str] = ()) -> Any:
    """The config in `path` with ``a.b=c`` settings laid over it. What none of them says of the
    teacher is as the observer's, and the experts' random shift is as large as the images ask for.

    Raises `UserError` naming the key of whatever is unknown, of the wrong type or out of range.
    """
    path = Path(path)
    values = _said(Config())
    layers = [*_read_yaml(path), *map(_nested, sets)]
    for layer in layers:
        _refuse_moved(layer)
        values = lay_over(values, layer, Config)
    values["name"] = values["name"] or path.stem
    config = _filled(values)
    if not any("crop_padding" in (layer.get("observer") or {}) for layer in layers):
        padding = usual_padding(config.data.resolution)
        config = changed(config, {"observer.crop_padding": padding})
    check(config)
    return config


def from_text(text: str) -> Any:
    """The config that `to_yaml` gave."""
    return _filled(yaml.safe_load(text))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(_said(config), sort_keys=False, allow_unicode=True)


def _said(config: Any) -> dict[str, Any]:
    """`config` as values, less what the teacher has of the observer."""
    values = config.model_dump()
    observer, teacher = values["observer"], values["teacher"]
    own = {n: v for n, v in teacher.items() if n in Brought.model_fields or v != observer[n]}
    return {**values, "teacher": own}


def _filled(values: dict[str, Any]) -> Any:
    """The config of `values`, with the observer's settings where the teacher has none of its
    own. Images that grow are for networks that take any size: another one does not inherit them."""
    observer = {n: values["observer"][n] for n in Expert.model_fields}
    if values["teacher"].get("net", observer["net"]) != observer["net"]:
        del observer["begin_resolution"]
    return parse(Config, {**values, "teacher": {**observer, **values["teacher"]}})


def changed(config: Any, settings: dict[str, Any]) -> Any:
    """`config` with ``a.b`` → value laid over it."""
    values = _said(config)
    for key, value in settings.items():
        values = lay_over(values, _at(key, value), Config)
    return _filled(values)


def _at(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _nested(item: str) -> dict[str, Any]:
    """``a.b=c`` as nested dictionaries."""
    key, sep, text = item.partition("=")
    if not sep:
        raise UserError(f"--set {item}: expected a.b=value")
    try:
        value: Any = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise UserError(
            f"--set {item}: {text!r} is not a value (quote lists, and leave no blanks in them: "
            "'a.b=[1,2]')"
        ) from None
    return _at(key, value)


def _refuse_moved(layer: dict[str, Any]) -> None:
    for old, new in MOVED.items():
        section, _, name = old.partition(".")
        if isinstance(layer.get(section), dict) and name in layer[section]:
            raise UserError(f"{old} is called {new} now")


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> list[dict]:
    """The layers of a config file, its ``base`` first."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: 'base' leads back to itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {said}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines")
    base = values.pop("base", None)
    below = _read_yaml(path.parent / str(base), (*seen, path)) if base else []
    return [*below, values]
