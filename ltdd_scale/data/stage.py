"""The records of the stages "shard" and "whiten", and how others read what these write."""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.settings import Chosen, Seen
from ltdd_scale.stage import Division, Place, Resources, Section, Stage, places

SHARD, WHITEN = "shard", "whiten"


def stage(source: str) -> Stage:
    """`source` is the digest of the images (`data.digest`), hashed instead of their path."""
    return Stage(
        name=SHARD,
        kind="shard",
        version=5,  # 5: transparent images are shown on white, turned ones upright
        run="ltdd_scale.data.sharding:run",
        reads={"chosen": Section("data", Chosen)},
        given={"source": source},
        smaller="data.max_per_class or data.store_resolution",
        division=Division.ONE,
        resources=Resources.CPU,
        cost="ltdd_scale.data.sharding:cost",
        help="write the WebDataset shards of the real set",
    )


def whiten(config: Any) -> tuple[Stage, ...]:
    """The stage that fits the whitening, where the config wants one."""
    if not config.data.zca:
        return ()
    code = "ltdd_scale.data.whitening"
    stage = Stage(
        name=WHITEN,
        kind="zca",
        version=1,
        run=f"{code}:run",
        reads=places("data.resolution", "data.zca_eps"),
        inputs={SHARD: SHARD},
        division=Division.ONE,
        cost=f"{code}:cost",
        check=f"{code}:check",
        help="fit the ZCA whitening on the real set",
        smaller="data.resolution",
    )
    return (stage,)


def seen(config: Any) -> dict[str, Place]:
    """What a stage reads that shows images to networks: `images`, and `zca` where it is on."""
    return {"images": Section("data", Seen), **(places("data.zca") if config.data.zca else {})}


def real(config: Any) -> dict[str, str]:
    """The inputs of a stage that shows images to networks, for `loader.prepare`: the shards, and
    the whitening where there is one."""
    return {SHARD: SHARD, **({"zca": WHITEN} if config.data.zca else {})}
