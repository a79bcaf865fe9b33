"""A distilled set, exported as a run exports it: what its tests share."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ltdd_scale.config.load import changed
from ltdd_scale.config.root import Config
from ltdd_scale.data import distilled, sharding, shards, sources
from ltdd_scale.data.settings import Data
from ltdd_scale.judging.settings import Evaluate
from ltdd_scale.labels import relabel
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.stage import stage as relabel_stage
from ltdd_scale.models import frozen, registry
from ltdd_scale.publish import set as published
from ltdd_scale.publish.material import Material
from ltdd_scale.results import NUMBERS
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import settings_of

ALONE = Ranks(0, 1, torch.device("cpu"), None)
SIZE, IPC, CLASSES = 8, 2, 10


def config_of(kind: str, **publish):
    made = Config(
        name="a set",
        ipc=IPC,
        data=Data(resolution=SIZE, mirror=False),
        evaluate=Evaluate(width=4, epochs=2, seeds=1, batch_size=8, crop_scale=[1.0, 1.0]),
    )
    values = {f"publish.{key}": value for key, value in publish.items()}
    method = {"method": "damed", "evaluate.plain": "none"} if kind == "learned" else {}
    return changed(made, {"relabel.labels": kind, **method, **values})


def make_house(folder: Path) -> Path:
    """Shards of digits, a teacher with an expert's projector, distilled images: smooth ones, which
    lossy formats can hold, with learned labels."""
    data = Data(
        resolution=SIZE, mirror=False, max_per_class=20, imbalance_factor=4, test_per_class=6
    )
    for name in ("shard", "teacher", "images"):
        (folder / name).mkdir()
    sharding.write(folder / "shard", "digits", sources.open_source(data), data, workers=1)

    def made():
        return registry.TwoHeads(
            registry.backbone("convnet3", 4, "instance", SIZE), CLASSES, projection=4
        )

    told = frozen.recipe("convnet3", 4, "instance", SIZE, CLASSES)
    frozen.save(folder / "teacher" / "weights.pt", told, registry.seeded(made, "t"))
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        ramp = np.linspace(0, 200, SIZE)[:, None] + np.linspace(0, 5 * c, SIZE)
        pixels = ramp + rng.integers(0, 30, (IPC, 3, 1, 1))
        rows = [{"source": f"digits/{c}/{k}"} for k in range(IPC)]
        distilled.write_class(folder / "images", c, pixels.astype(np.uint8), rows)
    distilled.write_learned(folder / "images", rng.normal(0, 3, (IPC * CLASSES, CLASSES)))
    return folder


def relabelled(house: Path, config, out: Path) -> Path:
    """The folder of the stage relabel, run."""
    stage = relabel_stage(config, "recover")
    folders = {
        "shard": house / "shard",
        "distilled": house / "images",
        "teacher": house / "teacher",
    }
    out.mkdir(parents=True)
    inputs = {name: folders[name] for name in stage.inputs}
    relabel.run(settings_of(stage, config), Context(ALONE, out, inputs, "w", quiet=True))
    return out


def results_of(kind: str) -> dict:
    def entry(which, labels, value):
        return {"set": which, "labels": labels, "net": "convnet3", "ipc": IPC, "num_seeds": 1} | {
            n: value for n in NUMBERS
        }

    rows = [entry("distilled", kind, 60.0), entry("random", kind, 50.0)]
    if kind != "hard":
        rows.append(entry("distilled", "hard", 40.0))
    plain = {"title": "plain, whole set", "net": "convnet3", "num_seeds": 1}
    summary = {"labels": kind, "split": "test", "balanced_test": True, "students": rows}
    summary |= {"experts": {}, "plain": [{**plain, **dict.fromkeys(NUMBERS, 70.0)}]}
    return {"rows": [], "matrix": [], "summary": summary, "loss_curves": [{"loss": [1.0]}]}


def export(house: Path, out: Path, kind: str, **publish) -> Path:
    """``out/distilled``, written as a run writes it."""
    config = config_of(kind, **publish)
    labels = relabelled(house, config, out / "labels")
    teacher = house / "teacher" if KINDS[kind].teacher else None
    folders = {"shard": house / "shard", "distilled": house / "images", "labels": labels}
    material = Material(
        name=config.name,
        config=config.model_dump(mode="json"),
        config_yaml="",
        fingerprints={},
        folders={**folders, "teacher": teacher},
        stages=[],
    )
    split = shards.ShardSplit(house / "shard", "train")
    published.write(material, split, results_of(kind), out)
    return out / "distilled"


def pixels_of(house: Path) -> np.ndarray:
    held = distilled.Distilled(house / "images", CLASSES)
    return np.concatenate([held.load(c) for c in range(CLASSES)])


def blocks(card: Path) -> list[str]:
    """The pieces of Python in a card."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def header_of(card: Path) -> dict:
    return yaml.safe_load(card.read_text().split("---")[1])


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    return make_house(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def online(house, tmp_path_factory) -> Path:
    """A set with online labels. Do not change it."""
    return export(house, tmp_path_factory.mktemp("online"), "online")


@pytest.fixture(scope="module")
def sets(house, online, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    kinds = ("stored", "single", "learned", "hard")
    return {"online": online} | {kind: export(house, folder / kind, kind) for kind in kinds}
