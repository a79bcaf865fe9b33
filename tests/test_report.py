import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from ltdd_scale.data import distilled, sharding, shards, sources
from ltdd_scale.data.settings import Data
from ltdd_scale.errors import UserError
from ltdd_scale.publish import page, pictures, report, tables
from ltdd_scale.publish import set as distilled_set
from ltdd_scale.publish.material import Material
from ltdd_scale.results import NUMBERS
from ltdd_scale.runtime import files, tensors

SIZE, IPC = 8, 2


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


def rows_of(text):
    """First cell → all cells of a Markdown table."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return {cells[0]: cells for cells in lines if cells and not cells[0].startswith("--")}


def test_the_table_shows_the_set_beside_random_real_images():
    rows = rows_of(tables.table(result()))
    assert list(rows) == ["set", "distilled", "random real", "teacher"]
    assert rows["distilled"][4:6] == ["42.0 ± 0.5", "42.0 ± 0.5"]
    assert rows["random real"][4] == "46.0 ± 0.5" and rows["distilled"][10] == "–"
    assert rows["set"][4:6] == ["top-1", "balanced"]


def test_balanced_accuracy_comes_first_where_the_test_images_are_not_balanced():
    rows = rows_of(tables.table(result(balanced_test=False)))
    assert rows["set"][4:6] == ["balanced", "top-1"]


def test_plain_networks_come_after_the_whole_set():
    results = result(plain=[plain("plain network", 30.0), plain("with logit adjustment", 35.0)])
    results["summary"]["students"].append(entry("full", "online", 50.0))
    rows = rows_of(tables.table(results))
    titles = ["whole long-tailed set", "plain network", "with logit adjustment", "teacher"]
    assert list(rows)[3:] == titles
    assert rows["with logit adjustment"][1:5] == ["hard", "n", "–", "35.0"]
    assert "plain network" not in rows_of(tables.table(result()))


def test_the_matrix_has_every_cell_and_no_more():
    lines = tables.matrix_table(result()).splitlines()
    assert len(lines) == 5
    assert [c.strip() for c in lines[4].split("|")[2:6]] == [f"{v}.0 ± 0.5" for v in range(40, 44)]
    assert "The label matrix (top-1)" in tables.table({**result(), "matrix": [1]})
    few = result()
    few["summary"]["students"] = [entry("distilled", "hard", 1.0), entry("full", "online", 2.0)]
    assert list(rows_of(tables.matrix_table(few))) == ["images", "distilled"]


def test_a_set_with_learned_labels_stands_beside_real_images_with_classes():
    """Also where other label kinds are there: the row of random images is the one with classes."""
    results = result("learned", baseline="hard")
    results["summary"]["students"].insert(0, entry("distilled", "learned", 60.0))
    rows = rows_of(tables.table(results))
    assert rows["distilled"][1:5] == ["learned", "n", "10", "60.0 ± 0.5"]
    assert rows["random real"][1:5] == ["hard", "n", "10", "47.0 ± 0.5"]
    matrix = rows_of(tables.matrix_table(results))
    assert matrix["images"] == ["images", "online", "stored", "single", "hard", "learned", "net"]
    assert matrix["distilled"][4:6] == ["43.0 ± 0.5", "60.0 ± 0.5"]
    assert matrix["random real"][5] == matrix["initial images"][5] == "–"


def test_the_page_of_a_set_with_learned_labels(store):
    results = result("learned", baseline="hard")
    results["summary"]["students"].insert(0, entry("distilled", "learned", 60.0))
    curve = {"net": "n", "seed": 0, "loss": [2.0, 1.0]}
    results["loss_curves"] = [
        {"set": s, "labels": y, **curve}
        for s, y in (("distilled", "learned"), ("random", "hard"), ("random", "single"))
    ]
    made = material(store, {**results, "matrix": [1]}, teacher=None)
    text = page.render(
        made, shards.ShardSplit(store / "shard", "train"), {**results, "matrix": [1]}
    )
    for words in ("method rldd, learned labels", "random real 47.0 %", "distilled 60.0 %"):
        assert words in text
    assert "random hard n (2 epochs)" in text and "random single n" not in text


def test_class_folders_sort_in_label_order():
    assert distilled_set.folder_names(["a", "b", "c"]) == ["a", "b", "c"]
    for classes in (["b", "a"], ["10", "9"], ["a", "a"], ["x/y", "a b"]):
        names = distilled_set.folder_names(classes)
        assert names == sorted(names) and len(set(names)) == len(classes)
        assert not any("/" in n for n in names)


def test_charts_and_sheets_are_drawn_for_one_class_and_for_a_thousand():
    for n in (1, 10, 1000):
        counts = np.arange(n, 0, -1)
        svg = pictures.bars([f"<{k}>" for k in range(n)], counts, {"distilled": [50.0] * n})
        assert svg.count("<rect") == n + 1 and "<0>" not in svg
    held = pictures.bars(["a", "b", "c"], np.asarray([3, 2, 1]), {"distilled": [50.0, None, 1.0]})
    assert held.count("<title>") == 2 and "b: distilled" not in held
    assert pictures.curves({"a": [1.0]}, "epochs") == ""
    drawn = pictures.curves({"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0]}, "epochs")
    assert drawn.count("<polyline") == 2
    images = [np.zeros((2, 3, 4, 4), np.uint8)] * 3
    assert "data:image/png;base64," in pictures.contact_sheet([images, images, images], 2)


def sealed(folder: Path, kind: str, **facts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": kind,
        "facts": facts,
        "seconds": 61.0,
        "ranks": 2,
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


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """What the stages of a run leave, written by hand."""
    store = tmp_path_factory.mktemp("store")
    shard = sealed(store / "shard", "shard", train=100)
    data = Data(source="digits", resolution=SIZE, max_per_class=20, test_per_class=5)
    sharding.write(shard, "digits", sources.open_source(data), data, workers=1)
    images_of(store / "initial", 10, "initialize")
    images_of(store / "distilled", 100, "recover")
    teacher = sealed(store / "teacher", "experts")
    tensors.save(teacher / "weights.pt", {"w": torch.ones(2)})
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
    config = {
        "name": "a <set>",
        "method": "rldd",
        "ipc": IPC,
        "data": {"resolution": SIZE},
        "teacher": {"net": "tn"},
        "relabel": {"labels": results["summary"]["labels"]},
        "evaluate": {"nets": ["n"], "width": 64, "norm": "instance", "seeds": 2},
    }
    roles = ("shard", "distilled", "initial", "labels", "teacher", "verdict")
    places = {role: store / role for role in roles} | folders
    names = [("shard", "shard"), ("teacher", "teacher"), ("student/0", "student-0")]
    names += [("student/1", "student-1"), ("evaluate", "verdict")]
    stages = [(name, store / folder) for name, folder in names if places.get(folder, True)]
    prints = {role: role * 2 for role, place in places.items() if place}
    return Material("a <set>", config, "name: a <set>\n", prints, places, stages)


def test_a_report_of_everything(store, tmp_path):
    balanced = result(plain=[plain("plain network", 30.0)], balanced_test=False)
    made = material(store, {**balanced, "matrix": [1]})
    report.write(made, tmp_path)
    out = tmp_path / "distilled"
    assert distilled_set.damage(out) == []
    described = json.loads((out / "set.json").read_text())
    assert described["format"] == 2 and described["config"] == made.config
    assert described["student"] == {"net": "n", "width": 64, "norm": "instance"}
    assert described["labels"] == "single" and sum(described["train_counts"]) == 200
    found = ImageFolder(out / "images")
    assert len(found) == 10 * IPC and found.classes == described["folders"]
    assert np.unique(np.asarray(Image.open(found.samples[-1][0]))).tolist() == [109]
    rows = json.loads((out / "provenance.json").read_text())
    assert len(rows) == 20 and rows[-1]["source"] == "digits/9/1"
    assert rows[-1]["file"].endswith("/00001.png") and (out / rows[-1]["file"]).exists()
    assert (out / "teacher.pt").read_bytes() == (store / "teacher" / "weights.pt").read_bytes()
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["labels.json", "single.npy"]
    readme = (out / "README.md").read_text()
    assert "`teacher.pt`" in readme and "where every image started from" in readme
    text = (tmp_path / "report.html").read_text()
    for words in ("a &lt;set&gt;", "Real, initial and distilled images", "plain network"):
        assert words in text
    for words in ("The label matrix", "2 students", "teacher (2 epochs)", "single n (3 epochs)"):
        assert words in text
    assert "<set>" not in text and "http" not in text.replace("http-equiv", "")
    assert text.index("<th>balanced") < text.index("<th>top-1")
    assert "plain network" in (tmp_path / "results.md").read_text()


def test_a_report_without_initial_images_and_without_a_teacher(store, tmp_path):
    results = result("hard", experts={})
    made = material(store, results, initial=None, teacher=None)
    report.write(made, tmp_path)
    assert not (tmp_path / "distilled" / "teacher.pt").exists()
    assert "eacher" not in (tmp_path / "distilled" / "README.md").read_text()
    text = (tmp_path / "report.html").read_text()
    assert "Real and distilled images" in text and "teacher" not in text


def test_a_card_is_silent_on_a_start_that_is_not_known(store, tmp_path):
    for label in range(10):
        pixels = np.zeros((IPC, 3, SIZE, SIZE), np.uint8)
        distilled.write_class(sealed(tmp_path / "means", "average"), label, pixels, None)
    report.write(material(store, result(), distilled=tmp_path / "means"), tmp_path)
    readme = (tmp_path / "distilled" / "README.md").read_text()
    assert "provenance" not in readme and "hashes are in `files.json`" in readme


def test_a_report_is_current_for_its_own_material_alone(store, tmp_path):
    made = material(store, result())
    assert not report.is_current(made, tmp_path)
    report.write(made, tmp_path)
    assert report.is_current(made, tmp_path)
    other = dataclasses.replace(made, fingerprints={**made.fingerprints, "labels": "new"})
    assert not report.is_current(other, tmp_path)
    assert not report.is_current(
        dataclasses.replace(made, config={**made.config, "ipc": 3}), tmp_path
    )
    (tmp_path / "results.md").unlink()
    assert not report.is_current(made, tmp_path)


def test_a_set_that_is_written_again_leaves_nothing_of_the_old_one(store, tmp_path):
    made = material(store, result())
    report.write(made, tmp_path)
    (tmp_path / "distilled" / "left.txt").write_text("old")
    (tmp_path / "distilled" / "labels" / "single.npy").write_bytes(b"damaged")
    (tmp_path / "distilled" / "teacher.pt").unlink()
    wrong = distilled_set.damage(tmp_path / "distilled")
    assert len(wrong) == 2 and any("missing" in w for w in wrong)
    report.write(made, tmp_path)
    assert distilled_set.damage(tmp_path / "distilled") == []
    assert not (tmp_path / "distilled" / "left.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if "distilled" in p.name] == ["distilled"]


def test_a_full_disk_is_said_and_the_old_set_stays(store, tmp_path, monkeypatch):
    made = material(store, result())
    report.write(made, tmp_path)

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left"):
        report.write(made, tmp_path)
    monkeypatch.undo()
    assert distilled_set.damage(tmp_path / "distilled") == []
    assert not (tmp_path / ".distilled.new").exists()


def test_asking_for_a_report_imports_no_torch():
    code = "import sys; from ltdd_scale.publish import report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_role_that_no_stage_has_is_said(store):
    made = material(store, result(), teacher=None)
    assert made.find("teacher") is None
    with pytest.raises(UserError, match="no stage of this run makes 'teacher'"):
        made.folder("teacher")


def test_the_page_of_a_set_without_losses_says_so(store):
    made = material(store, {**result("hard", experts={}), "loss_curves": []}, teacher=None)
    made = dataclasses.replace(made, stages=made.stages[-1:])
    results = files.read_json(store / "verdict" / "results.json")
    text = page.render(made, shards.ShardSplit(store / "shard", "train"), results)
    assert "No losses were kept" in text
