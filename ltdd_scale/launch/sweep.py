"""Sweeps: a grid of settings over one config, or points of several, as one campaign."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ltdd_scale.config import load as configuration
from ltdd_scale.config.root import Config
from ltdd_scale.errors import UserError
from ltdd_scale.settings import Number, Settings, Text, option, parse
from ltdd_scale.stage import look_up

_DEFAULT = Config()
KINDS = {
    "config": str,
    "set": dict,
    "grid": dict,
    "points": list,
    "max_jobs": int,
    "published": list,
}


class Published(Settings):
    """A published number, to stand beside ours."""

    where: dict[str, Any] = option({}, "settings of the points that it is for; empty: all")
    method: Text = option("", "whose it is")
    net: Text = option("", "network of the students; empty: the first of evaluate.nets")
    labels: Text = option(
        "",
        "kind of its labels: it has a row of its own in the table of images and labels then, "
        "beside no point, since it was made in another way than all of them",
    )
    top1: Number | None = option(None, "top-1, per cent")
    class_std: Number | None = option(None, "spread over the classes")
    experts: Number | None = option(None, "seconds that the experts took")
    synthesis: Number | None = option(None, "seconds that the synthesis took")
    source: Text = option("", "where it is printed, and what differs from our points")

    def fits(self, config: Any) -> bool:
        """Whether it is for a point of that config."""
        return not self.labels and all(look_up(config, k) == v for k, v in self.where.items())


@dataclass
class Sweep:
    """`points`: name → settings laid over the config, in the file's order. `configs`: the config
    of a point that has one of its own. `data_root`: the folder in which the data sets of the points
    lie, each under the last name of its ``data.path``; none: paths are taken as they are."""

    name: str
    config: Path
    points: dict[str, dict[str, Any]]
    max_jobs: int = 0
    published: list[Published] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, Path] = field(default_factory=dict)
    data_root: Path | None = None

    def load_points(self, sets: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The configs of the points, and why others have none: one bad point does not stop its
        neighbours."""
        good, bad = {}, {}
        for name, settings in self.points.items():
            try:
                texts = [f"{k}={_in_a_line(v)}" for k, v in {**self.common, **settings}.items()]
                config = self.configs.get(name, self.config)
                good[name] = self._placed(configuration.load(config, [*texts, *sets]))
            except UserError as error:
                bad[name] = str(error)
        return good, bad

    def _placed(self, config: Any) -> Any:
        """`config` with its images in `data_root`; a path that is absolute stays as it is."""
        path = Path(config.data.path)
        if self.data_root is None or not path.name or path.is_absolute():
            return config
        return configuration.changed(config, {"data.path": str(self.data_root / path.name)})


def _in_a_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).splitlines()[0]


def point_name(settings: Mapping[str, Any]) -> str:
    """``data.imbalance_factor=10,ipc=50`` as a name for folders and jobs:
    ``imbalance_factor10-ipc50``."""
    parts = (f"{k.split('.')[-1]}{v}" for k, v in settings.items())
    return re.sub(r"[^A-Za-z0-9_.+-]+", "", "-".join(parts)) or "all"


def load(path: Path) -> Sweep:
    """Read a sweep file. Raises `UserError` where it is not one.

    ``config``: the config that all points start from; ``set``: settings of all; ``grid``: setting →
    values, all combinations; ``points``: single points, each its settings, with a ``name`` and a
    ``config`` of its own where it wants one; ``max_jobs``: jobs at a time; ``published``: numbers
    to show beside ours (`Published`). Paths of configs start from the file's folder.
    """
    values = _read(path)
    points: dict[str, dict[str, Any]] = {}
    configs: dict[str, Path] = {}
    for settings in [*_grid(path, values.get("grid", {})), *values.get("points", [])]:
        settings = dict(settings)
        own = settings.pop("config", None)
        name = str(settings.pop("name", "")) or point_name(settings)
        if name in points:
            raise UserError(f"{path}: two points are called {name}: give them a 'name'")
        if own:
            configs[name] = (path.parent / str(own)).resolve()
        points[name] = settings
    if not points:
        raise UserError(f"{path}: neither 'grid' nor 'points' has a point")
    return Sweep(
        name=path.stem,
        config=(path.parent / values["config"]).resolve(),
        points=points,
        max_jobs=values.get("max_jobs", 0),
        published=_published(path, values.get("published", [])),
        common=values.get("set", {}),
        configs=configs,
    )


def _read(path: Path) -> dict[str, Any]:
    """The file's values, each of its kind."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "config" not in values or set(values) - set(KINDS):
        got = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
        raise UserError(
            f"{path}: a sweep has the keys {', '.join(KINDS)}, 'config' at least; got {got}"
        )
    for key, kind in KINDS.items():
        if not isinstance(values.get(key, kind()), kind):
            raise UserError(f"{path}: {key}: expected a {kind.__name__}, got {values[key]!r}")
    for point in values.get("points", []):
        if not isinstance(point, dict):
            raise UserError(f"{path}: points: expected settings, got {point!r}")
    return values


def _grid(path: Path, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """All combinations."""
    for key, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{path}: grid.{key}: expected a list of values, got {choices!r}")
    combinations = itertools.product(*grid.values()) if grid else []
    return [dict(zip(grid, combination, strict=True)) for combination in combinations]


def _published(path: Path, rows: list[Any]) -> list[Published]:
    out = []
    for k, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}: published[{k}]: expected a row such as {{method: X, top1: 1}}"
            )
        found = parse(Published, row, f"{path}: published[{k}].")
        if not found.method:
            raise UserError(f"{path}: published[{k}]: say whose number it is with 'method'")
        for key in found.where:
            try:
                look_up(_DEFAULT, key)
            except AttributeError:
                raise UserError(f"{path}: published[{k}].where: no setting '{key}'") from None
        out.append(found)
    return out
