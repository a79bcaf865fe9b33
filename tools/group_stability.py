"""Are groups of classes stable: over seeds, and over networks of balanced, long-tailed and distilled sets?

    python tools/group_stability.py RUN [RUN ...] [--groups 2] [--smallest 2] [--criteria maxcut linkage confusion random]

RUN is the folder of a finished run, or of a sweep: then all of its points. Networks are the plain one of each seed
(on the run's whole set) and the students of the distilled set of each seed; a run with protocol two_stage has
several plain ones. Each groups the classes, by training images of its run. Printed is the mean adjusted Rand index
(1: the same groups, 0: as alike as chance would have it), within a set over seeds and between sets, beside groups
that are drawn at random (ten for each network). Networks that several runs share count once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ltdd_scale.data.loader import prepare
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.judging.criteria import Described, Groups, Wanted, group_of
from ltdd_scale.judging.features import Shown, describe
from ltdd_scale.judging.grouping import group
from ltdd_scale.judging.settings import CRITERIA
from ltdd_scale.launch.status import load_run
from ltdd_scale.models import frozen
from ltdd_scale.pipeline import store as folders
from ltdd_scale.publish.tables import markdown
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Section, look_up

DRAWS = 10  # of random groups, in the place of each network


@dataclass(frozen=True)
class Network:
    """A trained network of a run: where its weights and the run's shards are."""

    set: str
    name: str
    weights: Path
    shard: Path
    zca: Path | None
    seen: Seen


def runs_of(folder: Path) -> list[Path]:
    """The run itself, or the points of a sweep."""
    if (folder / "run.json").exists():
        return [folder]
    points = sorted(path.parent for path in folder.glob("*/run.json"))
    if not points:
        raise UserError(f"{folder} is neither the folder of a run nor of a sweep")
    return points


def networks_of(run: Path) -> list[Network]:
    """The finished ones."""
    config, nodes, record = load_run(run)
    store = Path(record["store"])
    out = []
    for which, labels in (("plain", "hard"), ("distilled", config.relabel.labels)):
        start = f"student/{which}-{labels}-{config.evaluate.nets[0]}-s"
        for name, node in nodes.items():
            if name.removeprefix(start).isdecimal() and folders.complete(node.folder(store)):
                zca = nodes["whiten"].folder(store) if "whiten" in nodes else None
                seen = look_up(config, Section("data", Seen))
                at = (node.folder(store) / "weights.pt", nodes["shard"].folder(store), zca, seen)
                out.append(Network(f"{which}, {run.name}", name, *at))
    return out


def unique(networks: list[Network]) -> list[Network]:
    """Each folder of weights once."""
    return list({n.weights: n for n in reversed(networks)}.values())[::-1]


def described(network: Network, per_class: int, centres: int) -> Described:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(0, 1, device, None)
    train = ShardSplit(network.shard, "train")
    normalize = prepare(train, device, network.zca)
    held = ShardSplit(network.shard, "val") if "val" in train.manifest["splits"] else train
    held = held if held.counts.all() else train
    shown, confused = (Shown(of, network.seen, normalize, device, 0) for of in (train, held))
    return describe(frozen.load(network.weights, ranks), shown, per_class, centres, confused)


def agreement(these: list[Groups], those: list[Groups] | None, num_classes: int) -> float | None:
    """The mean adjusted Rand index over pairs: of different members of one list, or of two lists."""
    from sklearn.metrics import adjusted_rand_score

    pairs = itertools.combinations(these, 2) if those is None else itertools.product(these, those)
    found = [
        adjusted_rand_score(group_of(a, num_classes), group_of(b, num_classes)) for a, b in pairs
    ]
    return float(np.mean(found)) if found else None


def rows(
    groups: dict[str, dict[str, list[Groups]]], sets: dict[str, int], num_classes: int
) -> list[list[str]]:
    """`groups`: criterion → set → groups of each of its networks, `sets`: set → their number."""
    out = [["sets", "networks", *groups]]
    for a, b in itertools.combinations_with_replacement(sets, 2):
        cells = []
        for by_set in groups.values():
            value = agreement(by_set[a], None if a == b else by_set[b], num_classes)
            cells.append("–" if value is None else f"{value:.2f}")
        counts = [sets[s] for s in dict.fromkeys((a, b))]
        title = f"{a}: over seeds" if a == b else f"{a} : {b}"
        out.append([title, " × ".join(map(str, counts)), *cells])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--groups", type=int, default=2, help="0: by the best silhouette")
    parser.add_argument("--smallest", type=int, default=2, help="classes of a group, at least")
    known = [name for name in CRITERIA if name != "given"]
    parser.add_argument(
        "--criteria", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--per-class", type=int, default=200, help="training images a class")
    parser.add_argument("--centres", type=int, default=5, help="k-means centres a class")
    asked = parser.parse_args()
    try:
        print(report(asked))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def report(asked: argparse.Namespace) -> str:
    runs = [run for folder in asked.runs for run in runs_of(folder)]
    networks = unique([n for run in runs for n in networks_of(run)])
    if not networks:
        raise UserError(
            "no plain network and no student of a distilled set is finished there: "
            "run 'ltdd-scale run' with evaluate.plain=own first"
        )
    if not asked.groups and "random" in asked.criteria:
        raise UserError("--groups 0: random groups need a number; leave random out of --criteria")
    classes = {n.shard: tuple(ShardSplit(n.shard, "train").classes) for n in networks}
    if len(set(classes.values())) > 1:
        raise UserError("these runs are of different classes: compare runs of one set only")
    names = next(iter(classes.values()))
    groups: dict[str, dict[str, list[Groups]]] = {criterion: {} for criterion in asked.criteria}
    shown = []
    for k, network in enumerate(networks):
        print(
            f"[{k + 1} of {len(networks)}] {network.set}: {network.name}",
            file=sys.stderr,
            flush=True,
        )
        about = described(network, asked.per_class, asked.centres)
        for criterion, by_set in groups.items():
            draws = DRAWS if criterion == "random" else 1  # a network decides nothing there
            cuts = [
                group(about, Wanted(asked.groups, asked.smallest, seed=DRAWS * k + d), criterion)[0]
                for d in range(draws)
            ]
            by_set.setdefault(network.set, []).extend(cut.groups for cut in cuts)
            if criterion == "random":
                continue
            text = " | ".join(" ".join(names[c] for c in g) for g in cuts[0].groups)
            shown.append([network.set, network.name.removeprefix("student/"), criterion, text])
    text = f"Mean adjusted Rand index of groups of {len(names)} classes.\n\n"
    text += markdown(rows(groups, Counter(n.set for n in networks), len(names)))
    if shown and len(names) <= 20:
        text += "\n\nThe groups:\n\n" + markdown(
            [["set", "network", "criterion", "groups"], *shown]
        )
    return text


if __name__ == "__main__":
    main()
