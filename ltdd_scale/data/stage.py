"""The record of the stage "shard"."""

from __future__ import annotations

from ltdd_scale.data.settings import Chosen
from ltdd_scale.stage import Division, Resources, Section, Stage


def stage(source: str) -> Stage:
    """`source` is the digest of the images (`data.digest`), hashed instead of their path."""
    return Stage(
        name="shard",
        kind="shard",
        version=3,
        run="ltdd_scale.data.sharding:run",
        reads={"chosen": Section("data", Chosen)},
        given={"source": source},
        smaller="data.max_per_class or data.store_resolution",
        division=Division.ONE,
        resources=Resources.CPU,
        cost="ltdd_scale.data.sharding:cost",
        help="write the WebDataset shards of the real set",
    )
