"""The choice between the distilled images, those they started from and random real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY, cli, folder_of, image_folder

from ltdd_scale import recipe
from ltdd_scale.config.root import Config, check
from ltdd_scale.data.distilled import Distilled
from ltdd_scale.errors import UserError
from ltdd_scale.judging import choice, choose, lengths
from ltdd_scale.judging.saved import Saved
from ltdd_scale.launch import perform
from ltdd_scale.publish import kept
from ltdd_scale.publish.encode import decode
from ltdd_scale.publish.kept import CALLED
from ltdd_scale.publish.opened import Opened
from ltdd_scale.runtime import files

HELD = {"data": {"val_per_class": 5}}


def names(config) -> list[str]:
    return [stage.name for stage in recipe.stages(config, "")]


def rows(**numbers):
    """Two seeds of each set, at a distance of 2: two standard errors of a difference are 2.8."""
    return [
        {"set": which, "labels": labels, "balanced": value + d, "class_std": 1.0}
        for labels, sets in numbers.items()
        for which, value in sets.items()
        for d in (-1, 1)
    ]


def test_what_is_ahead_of_the_methods_own_is_kept_for_each_kind_of_label():
    found = choice.table(
        rows(
            single={"distilled": 40.0, "initial": 43.0, "random": 39.0},
            online={"distilled": 40.0, "initial": 42.5, "random": 39.0},
            hard={"distilled": 30.0, "initial": 30.0, "random": 30.0},
        ),
        ["single", "online", "hard"],
    )
    assert found["single"]["set"] == "initial"
    assert found["online"]["set"] == "distilled", "the method's own, within the noise"
    assert found["hard"]["set"] == "distilled", "the method's own, where nothing is better"
    tried = found["single"]["tried"]["random"]
    assert tried["balanced"] == 39 and tried["num_seeds"] == 2
    assert tried["balanced_std"] == pytest.approx(np.sqrt(2), abs=1e-3)
    said = choice.said("single", found["single"])
    assert said == (
        "single labels: initial images are kept (distilled 40.0, initial 43.0, random real 39.0)"
    )
    assert choice.said("online", found["online"]) == (
        "online labels: distilled images are kept (distilled 40.0, initial 42.5, random real 39.0; "
        "the difference is within the noise)"
    )
    why = kept.reason({**found["online"], "epochs": 20})
    assert why.endswith("each). What is above the kept ones is so within the noise.")
    assert kept.reason({**found["single"], "epochs": 20}).endswith("each).")


def test_a_noisy_set_does_not_hide_another_that_is_ahead():
    steady = rows(hard={"distilled": 40.0, "initial": 44.0})
    noisy = [{**row, "set": "random"} for row in rows(hard={"x": 44.5})]
    for row, far in zip(noisy, (-9, 9), strict=True):
        row["balanced"] += far
    found = choice.table([*steady, *noisy], ["hard"])
    assert found["hard"]["set"] == "initial", "random real images are ahead within their noise"


def test_shards_without_validation_images_are_refused_before_anything_starts(tmp_path):
    files.write_json(tmp_path / "manifest.json", {"splits": {"train": {}, "test": {}}})
    data = {"source": "shards", "path": str(tmp_path)}
    asked = {"choose": {"how": "always"}, "evaluate": {"split": "val"}}
    with pytest.raises(UserError, match=r"evaluate\.split=val and choose\.how=always asks for"):
        perform.check_held_out(Config(data=data, **asked))
    perform.check_held_out(Config(data=data))
    files.write_json(tmp_path / "manifest.json", {"splits": {"train": {}, "val": {}}})
    perform.check_held_out(Config(data=data, **asked))


def test_one_student_is_taken_at_its_word():
    found = choice.table(rows(hard={"distilled": 30.0, "random": 30.1})[::2], ["hard"])
    assert found["hard"]["tried"]["random"]["num_seeds"] == 1
    assert found["hard"]["set"] == "random"


def test_images_are_chosen_where_there_are_validation_images():
    assert "choose" not in names(Config())
    listed = {"source": "list", "val_list": "val.txt"}
    beside = {"source": "folder", "val_folder": "val"}
    for data in ({"val_per_class": 5}, {"val_fraction": 0.1}, listed, beside):
        assert "choose" in names(Config(data=data))
    assert "choose" not in names(Config(**HELD, choose={"how": "never"}))
    with pytest.raises(UserError, match=r"choose\.how=always needs validation images"):
        check(Config(choose={"how": "always"}))
    learned = Config(**HELD, method="damed", relabel={"labels": "learned"})
    assert "choose" not in names(learned), "its labels are of its own images"
    with pytest.raises(UserError, match="nothing to choose from"):
        check(learned.model_copy(update={"choose": Config(choose={"how": "always"}).choose}))


def test_trials_are_short_and_judged_on_validation_images():
    config = Config(**HELD, evaluate={"epochs": 300, "matrix": True}, choose={"seeds": 2})
    tried = choose.trials(config, recipe.roles(config))
    kinds = ["online", "stored", "single", "hard"]
    assert len(tried) == 3 * 2 * len(kinds) and choose.kinds(config) == kinds
    for stage in tried:
        assert stage.given["split"] == "val" and "split" not in stage.reads
        assert stage.given["epochs"] == 30 and "labels" not in stage.inputs
        assert (stage.given["least_steps"], stage.given["most"]) == (200, 150)
    without = Config(**HELD, method="mtt", relabel={"labels": "hard"})
    sets = {s.given["student"]["set"] for s in choose.trials(without, recipe.roles(without))}
    assert sets == (
        {"distilled", "random"} | ({"initial"} if recipe.roles(without).initial else set())
    )


@pytest.mark.parametrize(
    ("images", "epochs"), [(10, 150), (50, 100), (100, 50), (1000, 30), (100_000, 30)]
)
def test_trials_of_small_sets_have_more_epochs(images, epochs):
    """200 steps of 25 images at least, never more than half of the epochs of a student."""

    class Read(dict):
        __getattr__ = dict.__getitem__

    own = Read(training=Read(batch_size=25), **choose.length(Config(evaluate={"epochs": 300})))
    assert lengths.epochs_of(own, images) == epochs
    student = Read(training=own.training, epochs=300)
    assert lengths.epochs_of(student, images) == 300


def test_a_student_may_stand_for_the_chosen_one(tmp_path):
    def student(name, **row):
        folder = tmp_path / name
        folder.mkdir()
        row = {"labels": "single", "net": "n", **row}
        (folder / "result.json").write_text(json.dumps({"row": row, "loss": [row["seed"]]}))
        return folder

    inputs = {
        f"student/{k}": student(f"{k}", **row)
        for k, row in enumerate(
            [
                {"set": "distilled", "seed": 0, "balanced": 1.0},
                {"set": "chosen", "seed": 1, "as": "random"},
                {"set": "random", "seed": 0, "balanced": 2.0},
                {"set": "random", "seed": 1, "balanced": 3.0},
            ]
        )
    }
    found = Saved(inputs, "single").rows
    assert found[1] == {**found[3], "set": "chosen"} and found[1]["balanced"] == 3.0


@pytest.mark.slow
def test_what_was_chosen_leaves_the_house(tmp_path):
    """A run whose recovery spoils the images: they are not kept, and the tables say both."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("how: never", "how: auto, share: 1, seeds: 2"))
    sets = ["recover.lr=5", "recover.teacher_ce=0", "recover.settle=0", "recover.iterations=40"]
    sets += [
        "relabel.labels=hard",
        "evaluate.epochs=40",
        "evaluate.lr=0.01",
        "evaluate.batch_size=8",
    ]
    done = cli("run", config, "--out", tmp_path / "run", "--nproc", 1, "--set", *sets)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    kinds = results["summary"]["choice"]["kinds"]
    kept = kinds["hard"]["set"]
    assert kept in ("initial", "random") and set(kinds) == {"hard"}
    assert f"choose: {choice.said('hard', kinds['hard'])}" in done.stderr
    cells = {e["set"]: e for e in results["summary"]["students"]}
    assert cells["chosen"]["balanced"] > cells["distilled"]["balanced"]
    if kept == "random":
        assert cells["chosen"]["balanced"] == cells["random"]["balanced"]
    images = Distilled(folder_of(run, "choose"), 10)
    if kept == "initial":
        first = Distilled(folder_of(run, "initialize"), 10)
        assert all(np.array_equal(images.load(c), first.load(c)) for c in range(10))
    # What is exported, and what is said of it.
    opened = Opened(run / "distilled")
    assert opened.kept == kept
    written = [decode(sample.content) for sample in opened.samples()]
    assert np.array_equal(np.stack(written), np.concatenate([images.load(c) for c in range(10)]))
    rows = json.loads((run / "distilled" / "provenance.json").read_text())
    assert [r["source"] for r in rows] == [
        r["source"] for c in range(10) for r in images.provenance(c)
    ]
    card = (run / "distilled" / "README.md").read_text()
    assert "**These images are not distilled.**" in card and ": a distilled" not in card
    assert "By short students on validation images: " in card
    for file in ("distilled/README.md", "results.md", "report.html"):
        assert f"chosen ({CALLED[kept]})" in (run / file).read_text(), file
    assert "The exported set has" in (run / "report.html").read_text()


@pytest.mark.slow
def test_the_test_images_choose_nothing(tmp_path):
    """The same set with other test images: weights, images and what is chosen are the same bytes;
    only what is said of them is not."""
    counts = {"a": 30, "b": 14, "c": 8}
    data = {"source": "folder", "profile": "full", "val_fraction": 0.3, "resolution": 8}
    values = yaml.safe_load(TINY)
    values |= {"choose": {"how": "always", "steps": 8, "seeds": 2}, "ipc": 2}
    values["evaluate"]["embedding"] = False
    runs = []
    for number in (1, 2):
        folder = tmp_path / f"set{number}"
        image_folder(folder, counts)
        image_folder(folder, dict.fromkeys(counts, 5 * number), "test", seed=number)
        config = tmp_path / "tiny.yaml"
        config.write_text(yaml.safe_dump({**values, "data": {**data, "path": str(folder)}}))
        run = tmp_path / f"run{number}"
        done = cli("run", config, "--out", run, "--store", tmp_path / f"s{number}", "--nproc", 1)
        assert done.returncode == 0, done.stderr
        runs.append(run)
    records = [json.loads((run / "run.json").read_text()) for run in runs]
    judged = ("logits.npy", "result.json", "results.json", "confusion.npz")  # by the test images
    same = 0
    for name in records[0]["stages"]:
        ours, theirs = (Path(r["store"]) / r["stages"][name] for r in records)
        assert ours.name != theirs.name, "another set has other folders"
        if name == "shard":
            continue
        for path in sorted(p for p in ours.iterdir() if p.is_file() and p.suffix != ".jsonl"):
            own = path.name.startswith(".") or path.name in ("stage.json", "log.json")
            if own or (path.name in judged and not name.startswith("trial/")):
                continue
            assert path.read_bytes() == (theirs / path.name).read_bytes(), (name, path.name)
            same += 1
    assert same > 20 and {"choose", "recover", "observer"} <= set(records[0]["stages"])
    results = [json.loads((run / "results.json").read_text())["rows"] for run in runs]
    assert results[0] != results[1]


def test_that_validation_images_are_few_counts_as_noise():
    """The same ten points ahead: of one image of ten by chance, of fifty of five hundred not."""
    tried = [row for row in rows(hard={"distilled": 50.0, "random": 60.0})]
    for row in tried:
        row["balanced"] = {"distilled": 50.0, "random": 60.0}[row["set"]]  # all seeds agree
    for each, kept_set in ((1, "distilled"), (50, "random")):
        labels = np.repeat(np.arange(10), each)
        of_set = {"distilled": labels < 5, "random": labels < 6}
        right = [of_set[row["set"]] for row in tried]
        found = choice.table(tried, ["hard"], right, labels)["hard"]
        assert found["set"] == kept_set
        if each == 1:  # ten differences, nine of 0 and one of 1: variance .09, of their mean .009
            assert found["tried"]["random"]["noise"] == pytest.approx(
                200 * np.sqrt(0.009), abs=0.01
            )
    assert choice.table(tried, ["hard"])["hard"]["set"] == "random", (
        "where nothing is known of them"
    )


def test_the_noise_of_images_is_what_drawing_them_anew_shows():
    """Against many draws of validation images of five classes, 2 to 30 each."""
    draw, counts = np.random.default_rng(0), np.asarray([30, 12, 6, 3, 2])
    labels = np.repeat(np.arange(5), counts)
    differences, errors = [], []
    for _ in range(2000):
        ahead = (draw.random(50 + 3) < 0.6).astype(float) - (draw.random(53) < 0.5)
        per_class = np.bincount(labels, ahead) / counts
        differences.append(100 * per_class.mean())
        errors.append(choice._over_images(ahead, labels))
    assert np.mean(errors) == pytest.approx(np.var(differences), rel=0.1)
