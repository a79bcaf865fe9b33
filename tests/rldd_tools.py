"""Stages of the method by hand, each in a folder of its own: no pipeline, no trained experts."""

from __future__ import annotations

from pathlib import Path

import torch

from ltdd_scale.config.root import Config
from ltdd_scale.data import digest
from ltdd_scale.data.settings import Data, Location
from ltdd_scale.data.stage import stage as shard
from ltdd_scale.methods.rldd.method import RLDD
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import function, settings_of

ALONE = Ranks(0, 1, torch.device("cpu"), None)


def config(size: int = 8, largest: int = 12, **sections):
    """A config of a few long-tailed digits, `largest` of the first class; `sections` as `Config`
    takes them."""
    data = Data(
        source="digits",
        resolution=size,
        mirror=False,
        max_per_class=largest,
        imbalance_factor=4,
        val_per_class=2,
        test_per_class=2,
    )
    return Config(**{"name": "by-hand", "ipc": 3, "data": data, **sections})


def expert(folder: Path, seed: str, net: str, norm: str, size: int = 8, train=None) -> None:
    """An untrained network of width 8 as a finished expert in `folder`. `train(model)` is called
    with it before it is saved."""
    folder.mkdir(parents=True)
    model = registry.seeded(
        lambda: registry.TwoHeads(registry.backbone(net, 8, norm, size), 10, 0), seed
    )
    if train is not None:
        train(model)
    frozen.save(folder / "weights.pt", frozen.recipe(net, 8, norm, size, 10), model)


def run(name: str, of, store: Path, ranks: Ranks = ALONE, out: Path | None = None, part=None):
    """The stage `name` of the config `of`, in ``store/<name>`` or `out`; its facts."""
    stage = {s.name: s for s in (shard(digest.of(of.data)), *RLDD.stages(of))}[name]
    out = out or store / name
    out.mkdir(parents=True, exist_ok=True)
    inputs = {role: store / source for role, source in stage.inputs.items()}
    context = Context(ranks, out, inputs, "by hand", 3600, 0, True, part, Location())
    return function(stage.run)(settings_of(stage, of), context)
