"""Made-up results in real folders: what the tests of the report share."""

import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.cluster import hierarchy

from ltdd_scale.config.root import Config
from ltdd_scale.data import distilled, sharding, sources
from ltdd_scale.data.settings import Data
from ltdd_scale.judging.settings import Evaluate
from ltdd_scale.labels.settings import Relabel
from ltdd_scale.models import frozen, registry
from ltdd_scale.publish import gallery
from ltdd_scale.publish.material import Material
from ltdd_scale.results import NUMBERS
from ltdd_scale.runtime import files

SIZE, IPC = 8, 2
BEGUN = 1_795_000_000  # when the made-up stages began, seconds since 1970


def entry(which, labels, top1, **more):
    numbers = dict.fromkeys(NUMBERS, top1)
    spread = {f"{n}_std": 0.5 for n in numbers}
    where = {"set": which, "labels": labels, "net": "n", "ipc": 10, "num_seeds": 2}
    return {**where, **numbers, **spread, "few": None, "per_class": [top1] * 10, **more}


def plain(title, top1):
    numbers = dict.fromkeys(NUMBERS, top1)
    return {"title": title, "net": "n", "num_seeds": 2, **numbers, "per_class": [top1] * 10}


def result(kind="single", **more):
    cells = [
        (which, labels)
        for which in ("distilled", "random", "initial")
        for labels in ("online", "stored", "single", "hard")
    ]
    summary = {
        "labels": kind,
        "split": "test",
        "balanced_test": True,
        "students": [entry(s, y, 40 + k) for k, (s, y) in enumerate(cells)],
        "experts": {"teacher": {"net": "n", **dict.fromkeys(NUMBERS, 51.0)}},
    }
    curves = [
        {"set": "distilled", "labels": kind, "net": "n", "seed": s, "loss": [3.0, 2.0, 1.0]}
        for s in (0, 1)
    ]
    return {"rows": [], "matrix": [], "summary": {**summary, **more}, "loss_curves": curves}


def sealed(folder: Path, kind: str, finished: float = BEGUN + 61, **facts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": kind,
        "facts": facts,
        "seconds": 61.0,
        "ranks": 2,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(finished)),
        "device": "a CPU",
        "software": {"torch": "9"},
    }
    files.write_json(folder / "stage.json", record)
    return folder


def images_of(folder: Path, value: int, kind: str) -> Path:
    sealed(folder, kind, images=20)
    for c in range(10):
        pixels = np.full((IPC, 3, SIZE, SIZE), value + c, np.uint8)
        rows = [{"image": k, "source": f"digits/{c}/{k}"} for k in range(IPC)]
        distilled.write_class(folder, c, pixels, rows)
    return folder


def make_store(store: Path) -> Path:
    """What the stages of a run leave, written by hand."""
    shard = sealed(store / "shard", "shard", train=100)
    data = Data(source="digits", resolution=SIZE, max_per_class=20, test_per_class=5)
    sharding.write(shard, "digits", sources.open_source(data), data, workers=1)
    images_of(store / "initial", 10, "initialize")
    images_of(store / "distilled", 100, "recover")
    teacher = sealed(store / "teacher", "experts")
    shape = (4, "instance", SIZE)

    def made():
        return registry.TwoHeads(registry.backbone("convnet3", *shape), 10, projection=4)

    network = registry.seeded(made, "t")
    frozen.save(teacher / "weights.pt", frozen.recipe("convnet3", *shape, 10), network)
    files.write_json(teacher / "log.json", [{"loss": 2.0}, {"loss": 1.0}])
    labels = sealed(store / "labels", "relabel")
    files.write_json(labels / "labels.json", {"kind": "single"})
    distilled.save(labels / "single.npy", np.zeros((20, 10), np.float32))
    for seed in (0, 1):
        sealed(store / f"student-{seed}", "student")
    sealed(store / "verdict", "evaluate")
    return store


def material(store: Path, results: dict, **folders) -> Material:
    files.write_json(store / "verdict" / "results.json", results)
    config = Config(
        name="a <set>",
        ipc=IPC,
        data=Data(resolution=SIZE),
        relabel=Relabel(labels=results["summary"]["labels"]),
        evaluate=Evaluate(nets=["n"], width=64, seeds=2),
    ).model_dump(mode="json")
    roles = ("shard", "distilled", "initial", "labels", "teacher", "verdict")
    places = {role: store / role for role in roles} | folders
    names = [("shard", "shard"), ("teacher", "teacher"), ("student/0", "student-0")]
    names += [("student/1", "student-1"), ("evaluate", "verdict")]
    there = [(name, store / folder) for name, folder in names if places.get(folder, True)]
    stages = [(name, folder) for name, folder in there if (folder / "stage.json").exists()]
    prints = {role: role * 2 for role, place in places.items() if place}
    return Material("a <set>", config, "name: a <set>\n", prints, places, stages)


def two_stages(groups: list[list[int]]) -> dict:
    """The record of pairs, as `results.json` has it under the protocol of two stages."""
    pairs = [
        (None, "distilled", None, 40.0),
        (None, "plain, logit-adjusted", None, 45.0),
        ("group classifier, whole set", "in-group students, distilled", "hard", 44.0),
        ("group classifier, whole set", "in-group students, distilled", "soft", 44.5),
        ("summed, plain, whole set", "in-group students, distilled", "hard", 43.0),
        ("summed, plain, whole set", "restricted, distilled", "hard", 42.0),
    ]
    rows = []
    for first, second, how, top1 in pairs:
        numbers = {n: top1 for n in (*NUMBERS, "group_acc", "in_group_acc")}
        spreads = {f"{n}_std": 0.5 for n in numbers}
        titles = {"first": first, "second": second, "routing": how, "net": "n", "num_seeds": 2}
        rows.append({**titles, **numbers, **spreads, "per_class": []})
    return {"network": "plain, whole set", "criterion": "ward", "groups": groups, "rows": rows}


def with_pictures(store: Path, num_classes: int, counts: list[int]) -> dict:
    """Folders of grouping and embedding and the confusions of a verdict, in their formats; what is
    to be added to the results."""
    rng = np.random.default_rng(0)
    names = [f"<{c}> $x_{c}$" for c in range(num_classes)]
    linkage = hierarchy.linkage(rng.normal(size=(num_classes, 3)), "ward")
    of = hierarchy.fcluster(linkage, 2, "maxclust")
    groups = [np.flatnonzero(of == g).tolist() for g in (1, 2)]
    record = {
        "classes": names,
        "counts": counts,
        "network": "plain, whole set",
        "criterion": "ward",
        "groups": groups,
        "linkage": linkage.tolist(),
        "score": 1.0,
        "best": [],
    }
    files.write_json(sealed(store / "grouping", "grouping") / "grouping.json", record)
    labels = np.repeat(np.arange(num_classes), 3)
    arrays = {}
    for k in range(2):
        centres = rng.normal(0, 30, (num_classes, 2)).astype(np.float32)
        arrays[f"centres_{k}"] = centres
        arrays[f"xy_{k}"] = centres[labels] + rng.normal(size=(len(labels), 2)).astype(np.float32)
    folder = sealed(store / "embedding", "embedding")
    np.savez(folder / "embedding.npz", labels=labels, **arrays)
    titles = ["plain, whole set", "distilled"]
    said = {"titles": titles, "perplexity": 50.0, "classes": names}
    files.write_json(folder / "embedding.json", said)
    shape = (num_classes, num_classes)
    counted = {
        t: (rng.integers(0, 3, shape) + 20 * np.eye(num_classes)).astype(np.int32)
        for t in ("distilled", "random", "plain", "plain, logit-adjusted", "two stages")
    }
    np.savez(store / "verdict" / "confusion.npz", **counted)
    return {"two_stage": two_stages(groups)}


def budgeted(results: dict, num_classes: int = 10) -> dict:
    """`results` with the bytes of each cell's labels, and all classes' accuracies."""
    taken = {"online": None, "stored": 120_000, "single": 4_000, "hard": 0}
    rng = np.random.default_rng(1)
    for e in results["summary"]["students"]:
        e["label_bytes"] = taken[e["labels"]]
        e["per_class"] = np.clip(rng.normal(60, 20, num_classes), 0, 100).round(2).tolist()
    return results


def make_wide_store(store: Path, num_classes: int, size: int) -> Path:
    """As `make_store`, with many classes of noise, which no PNG makes smaller: one real image of
    each, and four distilled ones of those that are shown."""
    rng = np.random.default_rng(0)
    folders = {role: sealed(store / role, role) for role in ("initial", "distilled")}
    equal = np.ones(num_classes, int)
    pictured = {*gallery.spread(equal, 12), *gallery.spread(equal, 8)}
    for c in range(num_classes):
        count, side = (4, size) if c in pictured else (1, 2)
        for split in ("train", "test"):
            folder = store / "real" / split / f"c{c:04d}"
            folder.mkdir(parents=True)
            noise = rng.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(noise).save(folder / "0.png")
        for role in folders:
            noise = rng.integers(0, 256, (count, 3, size, size), np.uint8)
            distilled.write_class(folders[role], c, noise, None)
    data = Data(source="folder", path=str(store / "real"), resolution=size, mirror=False)
    shard = sealed(store / "shard", "shard", train=num_classes)
    sharding.write(shard, "noise", sources.open_source(data), data, workers=1)
    sealed(store / "labels", "relabel")
    sealed(store / "verdict", "evaluate")
    return store
