"""Stage "evaluate": all students' results and the judged networks in one ``results.json``, their
confusion matrices in ``confusion.npz``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ltdd_scale.data.images import Images
from ltdd_scale.data.loader import open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.experts import recipes
from ltdd_scale.judging import choice, ladder, pairs
from ltdd_scale.judging.metrics import logit_adjusted, mean_of, metrics, summarize
from ltdd_scale.judging.saved import Saved, save_arrays
from ltdd_scale.judging.student import PLAIN
from ltdd_scale.labels.catalog import KINDS, baseline
from ltdd_scale.labels.cost import stored_bytes
from ltdd_scale.models import frozen
from ltdd_scale.results import (
    BOTH,
    CHOSEN,
    OBSERVER,
    RANDOM_PLAIN,
    TEACHER,
    WHOLE_SETS,
    labels_of,
)
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks

Row = dict[str, Any]


def run(settings: Any, context: Context) -> dict[str, Any]:
    """Write ``results.json``: rows of the configured labels and of random real images with classes,
    the summary over seeds with the ladder and its warnings (`ladder.py`), the matrix, and the loss
    curves of the first seed's students; where classes are grouped, all pairs of two stages
    (`pairs.py`). And ``confusion.npz``: int32 [C, C], rows are the true classes."""
    if not context.ranks.is_main:
        return {}
    saved = Saved(context.inputs, settings.labels)
    rows, test = saved.rows, _test(settings, context)
    judged = {
        title: frozen.load(context.input(title) / file, context.ranks)
        for title, (_, file) in settings.judged.items()
    }
    plain = [r for r in rows if r["set"] == PLAIN]
    small = [r for r in rows if r["set"] != PLAIN]
    summary = {
        "split": settings.split,
        "labels": settings.labels,
        "baseline": baseline(settings.labels),
        "balanced_test": is_balanced(test.labels, test.num_classes),
        "students": [{**e, "label_bytes": _bytes(e, settings, test)} for e in summarize(small)],
        "experts": {},
    }
    # Logits of all test images are large: nobody holds what nobody reads again.
    kept = {TEACHER} if "grouping" in context.inputs else set()
    kept |= {TEACHER, OBSERVER} if settings.labeller == "both" else set()
    logits: dict[str, Tensor] = {}
    first: dict[str, str] = {}  # file → title: the observer may be the teacher too
    for title, network in judged.items():
        file = files.sha256(context.input(title) / settings.judged[title][1])
        if file in first and title not in kept:
            same = first[file]
            summary["experts"][title] = {**summary["experts"][same], "same_as": same}
            continue
        first.setdefault(file, title)
        numbers, found = test.judge(network)
        summary["experts"][title] = {"net": network.recipe["net"], **numbers}
        if title in kept:
            logits[title] = found
        del found
    if settings.labeller == "both" and {TEACHER, OBSERVER} <= set(logits):
        mean = (logits[TEACHER] + logits[OBSERVER]) / 2
        nets = " + ".join(judged[title].recipe["net"] for title in (TEACHER, OBSERVER))
        summary["experts"][BOTH] = {"net": nets, **metrics(mean, test.labels, test.groups)}
    if plain:
        summary["plain"] = plain_students(plain)
    elif settings.plain == "expert" and TEACHER in judged:
        summary["plain"] = _stand_in(judged[TEACHER], settings, test)
    if "choose" in context.inputs:
        summary["choice"] = choice.read(context.input("choose"))
        summary["students"] += choice.entries(summary)
    summary["ladder"] = ladder.rungs(summary)
    summary["warnings"] = ladder.warnings(summary["ladder"], _labelled(settings, small))
    for warning in summary["warnings"]:
        context.say(f"warning: {warning}")
    results = {
        "rows": [r for r in rows if _is_shown(r, summary)],
        "summary": summary,
        "matrix": small if settings.matrix else [],
        "loss_curves": [_curve(f) for f in saved.found if f["row"]["seed"] == settings.seed],
    }
    confusions = _confusions(saved, settings.seed, test)
    if "grouping" in context.inputs:
        told = files.read_json(context.input("grouping") / "grouping.json")
        table = pairs.Table(
            saved, logits, test.labels, test.train_counts, test.groups, told["groups"]
        )
        results["two_stage"] = {
            **{key: told[key] for key in ("network", "criterion", "groups")},
            "rows": pairs.rows(table, settings.first, settings.second),
        }
        scores = pairs.paper_scores(table, settings.seed)
        if scores is not None:
            confusions["two stages"] = pairs.confusion(scores, test.labels)
    save_arrays(context.out / "confusion.npz", confusions)
    files.write_json(context.out / "results.json", results)
    return {}


def _confusions(saved: Saved, seed: int, test: _Test) -> dict[str, np.ndarray]:
    """Of the first net and the first seed, with the labels of the result: title → int32 [C, C]."""
    out = {}
    for which in ("distilled", "random", PLAIN):
        logits = saved.logits(which, seed)
        if logits is None:
            continue
        out[which] = pairs.confusion(logits, test.labels)
        if which == PLAIN:
            adjusted = logit_adjusted(logits, test.train_counts)
            out["plain, logit-adjusted"] = pairs.confusion(adjusted, test.labels)
    return out


def _bytes(entry: Row, settings: Any, test: _Test) -> int | None:
    """Bytes of the labels of a cell of the summary; None where the teacher itself is needed."""
    whole = entry["set"] in WHOLE_SETS
    epochs = settings.label_epochs or (settings.full_epochs if whole else settings.epochs)
    images = int(test.train_counts.sum()) if whole else settings.ipc * test.num_classes
    return stored_bytes(entry["labels"], images, test.num_classes, epochs, settings.topk)


def is_balanced(labels: np.ndarray, num_classes: int) -> bool:
    """Whether `labels` int64 [N] has equally many images of each class."""
    return len(set(np.bincount(labels, minlength=num_classes).tolist())) == 1


def plain_students(rows: list[Row]) -> list[Row]:
    """The plain networks as they are, and after logit adjustment: means over seeds."""
    out = []
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        adjusted = [row["adjusted"] for row in own]
        out.append({"title": "plain, whole set", "net": net, **mean_of(own)})
        out.append({"title": "plain, logit-adjusted", "net": net, **mean_of(adjusted)})
    return out


@dataclass(frozen=True)
class _Test:
    """The images that networks are judged on, and the training images of each class, int [C]."""

    images: Images
    labels: np.ndarray
    groups: list[str]
    train_counts: np.ndarray
    normalize: Callable[[Tensor], Tensor]
    ranks: Ranks

    @property
    def num_classes(self) -> int:
        return len(self.train_counts)

    def judge(self, network: Any) -> tuple[Row, Tensor]:
        """(metrics, logits float32 [N, C]) of what `frozen.predict` takes."""
        logits = frozen.predict(network, self.images, self.normalize, self.ranks)
        return metrics(logits, self.labels, self.groups), logits


def _test(settings: Any, context: Context) -> _Test:
    device, shard = context.ranks.device, context.input("shard")
    split, held = ShardSplit(shard, "train"), ShardSplit(shard, settings.split)
    return _Test(
        images=open_images(held, settings.images, device, context.workers),
        labels=held.labels,
        groups=split.manifest["groups"],
        train_counts=split.counts,
        normalize=prepare(split, device, context.inputs.get("zca")),
        ranks=context.ranks,
    )


def _stand_in(teacher: frozen.Frozen, settings: Any, test: _Test) -> list[Row]:
    """The teacher as a plain network: by its plain head; or, of the recipe "balanced", with the
    prior put back that training took out of its logits. With all of the prior out of them, the
    adjusted network is the teacher itself, and has no row of its own."""
    net, counts = teacher.recipe["net"], test.train_counts
    if settings.recipe == "balanced":
        title, own = "teacher, prior put back", settings.trained
        _, logits = test.judge(teacher.logits)
        # What is left in them is of the images that training showed.
        shown = recipes.prior(counts, (own.sample_power, own.paste_power), own.cutmix)
        adjusted, itself = logit_adjusted(logits, shown, 1 - own.prior), own.prior == 1
        plain = logit_adjusted(adjusted, counts, -1)
    else:
        title, itself = "teacher's plain head", False
        _, plain = test.judge(teacher.plain_logits)
        adjusted = logit_adjusted(plain, counts)
    named = {title: plain, **({} if itself else {f"{title}, logit-adjusted": adjusted})}
    numbers = {name: metrics(z, test.labels, test.groups) for name, z in named.items()}
    return [{"title": name, "net": net, **mean_of([found])} for name, found in numbers.items()]


def _labelled(settings: Any, rows: list[Row]) -> bool:
    """Whether anyone learns labels of a teacher."""
    return any(KINDS[kind].teacher for kind in {settings.labels, *(r["labels"] for r in rows)})


def _is_shown(row: Row, summary: dict[str, Any]) -> bool:
    """Whether a row belongs to the result, and not to the label matrix alone."""
    configured = row["labels"] == labels_of(row["set"], summary)
    if (row["set"], row["labels"]) == RANDOM_PLAIN or row["set"] in WHOLE_SETS:
        return True
    return configured and row["set"] in ("distilled", "random", CHOSEN)


def _curve(found: dict[str, Any]) -> Row:
    row = found["row"]
    return {**{k: row[k] for k in ("set", "labels", "net", "seed")}, "loss": found["loss"]}
