"""Stage "grouping": classes in groups, by what a trained network says of training images."""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.loader import prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.judging import criteria
from ltdd_scale.judging.criteria import Cut, Described, Wanted
from ltdd_scale.judging.features import Shown, describe
from ltdd_scale.judging.settings import CRITERIA, Grouping
from ltdd_scale.models import frozen
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import function

FILE = "grouping.json"


def run(settings: Any, context: Context) -> dict[str, Any]:
    """Write ``grouping.json``: the groups, the tree of classes, the criterion's best cuts."""
    asked, ranks = settings.grouping, context.ranks
    split = ShardSplit(context.input("shard"), "train")
    normalize = prepare(split, ranks.device, context.inputs.get("zca"))

    def shown(of: ShardSplit) -> Shown:
        return Shown(of, settings.images, normalize, ranks.device, context.workers)

    criterion = CRITERIA[asked.criterion]
    described = describe(
        frozen.load(context.input("network") / "weights.pt", ranks),
        shown(split),
        asked.features_per_class,
        asked.centres if criterion.centres else 0,
        shown(_held_out(split, settings.split)) if criterion.confusion else None,
    )
    cuts = group(described, wanted_of(asked, settings.seed), criterion.name)
    found = {
        "classes": split.classes,
        "counts": split.counts.tolist(),
        "network": settings.title,
        "criterion": criterion.name,
        "groups": cuts[0].groups,
        "linkage": tree_of(described).tolist(),
        "score": cuts[0].score,
        "best": [{"groups": cut.groups, "score": cut.score} for cut in cuts],
    }
    files.write_json(context.out / FILE, found)
    return {"groups": len(cuts[0].groups), "sizes": [len(g) for g in cuts[0].groups]}


def wanted_of(asked: Grouping, seed: int) -> Wanted:
    groups = len(asked.given) if asked.criterion == "given" else asked.groups
    return Wanted(groups, asked.smallest, seed, asked.given)


def group(described: Described, wanted: Wanted, criterion: str) -> list[Cut]:
    """The best cuts by the criterion of that name, the best first."""
    return function(CRITERIA[criterion].function)(described, wanted)


def tree_of(described: Described) -> Any:
    """The tree of the classes: by their confusion where it is known, else by their means."""
    if described.confusion is not None:
        return criteria.tree(criteria.confusion_distances(described.confusion))
    return criteria.tree(criteria.mean_distances(described.means))


def _held_out(train: ShardSplit, judged: str) -> ShardSplit:
    """Validation images, where the set has some of each class and nobody is judged on them, else
    the training images."""
    if judged == "val" or "val" not in train.manifest["splits"]:
        return train
    held = ShardSplit(train.folder, "val")
    return held if held.counts.all() else train
