"""Sweeps over data sets: where these lie, and the table of all of them."""

import itertools
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from jobs_tools import make

from ltdd_scale.config import load
from ltdd_scale.config.root import Config
from ltdd_scale.data import sources
from ltdd_scale.launch import campaign, jobs, sweep, sweep_sets, sweep_table
from ltdd_scale.runtime import files

CONFIGS = ROOT / "configs"
# Where a set's config may differ from the defaults: what it is, and how much of it two cores do.
OWN = {"name", "data", "ipc", "width", "norm", "epochs", "plain_epochs", "batch_size"}


def tables_of(text: str) -> list[dict[tuple[str, str], list[str]]]:
    """Each table over sets: (images, labels) → cells, with the heading."""
    lines = iter(text.splitlines())
    out = []
    for line in lines:
        if line.startswith("| images"):
            rows = [line, *itertools.takewhile(bool, lines)]
            cells = [[c.strip() for c in row.split("|")[1:-1]] for row in rows]
            out.append({tuple(row[:2]): row[2:] for row in cells if "--" not in row[0]})
    return out


def entry(value: float, **more) -> dict:
    """Top-1 is not what these tables show."""
    numbers = {"top1": 99.0, "balanced": value, "class_std": value / 10}
    return {"net": "convnet3", **numbers, "balanced_std": 0.5, **more}


def results(base: float, cells: list[tuple[str, str]], **more) -> dict:
    students = [entry(base + k, set=which, labels=kind) for k, (which, kind) in enumerate(cells)]
    plain = [
        entry(base - 20, title="plain, whole set"),
        entry(base - 10, title="plain, logit-adjusted"),
    ]
    experts = {"observer": entry(base - 5), "teacher": entry(base - 2)}
    summary = {
        "labels": "hard",
        "split": "val",
        "balanced_test": False,
        "students": students,
        "plain": plain,
        "experts": experts,
    }
    return {"summary": {**summary, **more}}


@pytest.fixture
def written(tmp_path):
    """``sweep.md`` of points whose results and sources of images are given."""

    def write(points: dict[str, tuple[str, dict]]) -> str:
        (tmp_path / "tiny.yaml").write_text(TINY)
        made = []
        for k, (name, (source, found)) in enumerate(points.items()):
            config = load.load(tmp_path / "tiny.yaml", [f"data.imbalance_factor={k + 2}"])
            made.append(jobs.Point(name, config, tmp_path / name, source))
            files.write_json(make(tmp_path / name) / "results.json", found)
        asked = sweep.Sweep("s", Path("c.yaml"), {name: {} for name in points})
        shell = campaign.Campaign("s", tmp_path / "jobs", tmp_path, "local", points=made)
        return sweep_table.write(asked, shell, tmp_path, lambda job: "")

    return write


def test_a_column_a_set(written, tmp_path):
    """Networks on the whole set, then images × labels; what a set does not have is a dash."""
    few = [("distilled", "online"), ("distilled", "hard"), ("random", "hard")]
    more = [*few, ("chosen", "single"), ("initial", "stored"), ("full", "online")]
    calibrated = {"teacher": entry(7), "calibrated observer": entry(8)}
    text = written(
        {"a": ("x", results(50, few)), "b": ("y", results(60, more, experts=calibrated))}
    )
    first, spread = tables_of(text)
    assert list(first.items()) == [
        (("images", "labels"), ["a", "b"]),
        (("plain, whole set", "hard"), ["30.0 ± 0.5", "40.0 ± 0.5"]),
        (("plain, logit-adjusted", "hard"), ["40.0 ± 0.5", "50.0 ± 0.5"]),
        (("teacher", "–"), ["48.0 ± 0.5", "7.0 ± 0.5"]),
        (("observer", "–"), ["45.0 ± 0.5", "–"]),
        (("calibrated observer", "–"), ["–", "8.0 ± 0.5"]),
        (("whole long-tailed set", "online"), ["–", "65.0 ± 0.5"]),
        (("random real", "hard"), ["52.0 ± 0.5", "62.0 ± 0.5"]),
        (("initial images", "stored"), ["–", "64.0 ± 0.5"]),
        (("distilled", "hard"), ["51.0 ± 0.5", "61.0 ± 0.5"]),
        (("distilled", "online"), ["50.0 ± 0.5", "60.0 ± 0.5"]),
        (("chosen", "single"), ["–", "63.0 ± 0.5"]),
    ]
    assert list(spread) == list(first) and spread["distilled", "hard"] == ["5.1", "6.1"]
    assert "balanced accuracy" in text and "on validation images" in text
    # What sets share nothing of: rows of images × labels, and curves over the imbalance factor.
    assert "Images × labels" not in text and not (tmp_path / "pictures").exists()


def test_long_tails_of_one_source_keep_their_tables(written, tmp_path):
    cells = [("distilled", "hard"), ("distilled", "single"), ("random", "hard")]
    text = written({name: ("x", results(50, cells)) for name in "ab"})
    assert "Images × labels" in text and "The sets beside each other" not in text
    assert (tmp_path / "pictures").exists()


def test_a_table_a_network(written):
    """Networks on the whole set are told once."""
    found = results(50, [("distilled", "hard")])
    found["summary"]["students"].append(
        {**entry(20, set="distilled", labels="hard"), "net": "resnet32"}
    )
    text = written(
        {"a": ("x", found), "b": ("y", results(60, [("random", "hard"), ("distilled", "hard")]))}
    )
    tables = tables_of(text)
    assert len(tables) == 4 and "\nresnet32:\n" in text and "\nconvnet3:\n" in text
    assert ("teacher", "–") in tables[0]
    assert tables[0]["distilled", "hard"] == ["50.0 ± 0.5", "61.0 ± 0.5"]
    assert list(tables[2].items())[1:] == [(("distilled", "hard"), ["20.0 ± 0.5", "–"])]


def test_points_without_results_are_no_column(written):
    assert sweep_sets.tables([]) == ""
    assert sweep_sets.differ("xy") and not sweep_sets.differ("xx") and not sweep_sets.differ([])


def test_the_folder_of_the_sets(tmp_path):
    """Each under the last name of its path; a path that is absolute, or none, stays as it is."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "s.yaml").write_text(
        "config: tiny.yaml\nset: {data.val_per_class: 0}\npoints:\n"
        "  - {name: digits}\n"
        "  - {name: a, data.source: folder, data.path: data/cifar10}\n"
        "  - {name: b, data.source: folder, data.path: /there/plankton}\n"
    )
    found = sweep.load(tmp_path / "s.yaml")
    for root, a in (
        (None, "data/cifar10"),
        (Path("/mnt"), "/mnt/cifar10"),
        (Path("m"), "m/cifar10"),
    ):
        found.data_root = root
        good, bad = found.load_points([])
        assert [c.data.path for c in good.values()] == ["", a, "/there/plankton"] and not bad


def test_everywhere_has_five_sets_and_validation_images_of_each():
    found = sweep.load(CONFIGS / "sweeps" / "everywhere.yaml")
    found.data_root = Path("/data")
    good, bad = found.load_points(["evaluate.split=val"])
    assert len(good) == 5 and not bad
    paths = {"", "/data/cifar10", "/data/imagenet_lt20", "/data/plankton121"}
    assert {c.data.path for c in good.values()} == paths
    for config in good.values():
        assert config.evaluate.matrix and config.evaluate.plain == "own"
        assert config.evaluate.seeds == 3
        assert set(config.evaluate.matrix_labels) == {"hard", "single", "online"}


@pytest.mark.parametrize("name", ["plankton121_ipc10", "plankton121_third_ipc10"])
def test_nothing_is_tuned_on_plankton(name):
    def differing(mine: dict, default: dict) -> set[str]:
        out = set()
        for key, value in mine.items():
            other = default.get(key)
            if isinstance(value, dict) and key != "data":
                out |= differing(value, other)
            elif value != other:
                out.add(key)
        return out

    config = load.load(CONFIGS / f"{name}.yaml")
    assert differing(config.model_dump(), Config().model_dump()) <= OWN


def test_a_third_of_plankton():
    whole = load.load(CONFIGS / "plankton121_ipc10.yaml").data
    third = load.load(CONFIGS / "plankton121_third_ipc10.yaml").data
    assert third.counts == [-(-n // 3) for n in whole.expected_counts]
    facts = sources.expected(third)
    assert (facts.num_images, max(facts.counts), min(facts.counts)) == (8096, 514, 3)
    facts = sources.expected(whole)
    assert (facts.num_images, max(facts.counts), min(facts.counts)) == (21745, 1386, 6)
