"""What leaves the house where images were chosen, and what everybody is told of it."""

import json

import numpy as np
import pytest
from report_tools import IPC, images_of, make_store, material, plain, result, sealed
from set_tools import header_of

from ltdd_scale.data import distilled, shards
from ltdd_scale.launch.export import Options
from ltdd_scale.launch.export import export as run_export
from ltdd_scale.publish import course, gallery, kept, lrs, message, page, report, tables
from ltdd_scale.publish import set as published
from ltdd_scale.publish.opened import Opened
from ltdd_scale.publish.pictures import canvas
from ltdd_scale.runtime import files

TRIED = {"distilled": 40.0, "initial": 41.0, "random": 39.0}
REASON = (
    "By short students on validation images: {} (balanced accuracy in per cent, 3 students of 30 "
    "epochs each)."
)
FIRST = REASON.format("initial images 41.0, distilled 40.0, random real 39.0")


def chosen(**sets) -> dict:
    """Results in which `sets` were chosen: label kind → set; the first kind is the configured one.
    The students of the chosen set are those of the set itself."""
    kind = next(iter(sets))
    found = result(kind, baseline=kind, plain=[plain("plain, whole set", 60.0)])
    summary = found["summary"]
    tried = {s: {"balanced": v, "num_seeds": 3} for s, v in TRIED.items()}
    kinds = {k: {"set": which, "tried": tried} for k, which in sets.items()}
    summary["choice"] = {"kinds": kinds, "epochs": 30}
    cells = {(e["set"], e["labels"]): e for e in summary["students"]}
    summary["students"] += [{**cells[s, k], "set": "chosen"} for k, s in sets.items()]
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """With a folder of each set that may be chosen, as the stage `choose` leaves it, and labels."""
    store = make_store(tmp_path_factory.mktemp("store"))
    images_of(store / "kept-initial", 10, "choose")
    labels = sealed(store / "kept_labels", "relabel")
    files.write_json(labels / "labels.json", {"kind": "single"})
    distilled.save(labels / "single.npy", np.full((20, 10), 7, np.float32))
    folder = sealed(store / "kept-random", "choose")
    for c in range(10):
        pixels = np.full((IPC, 3, 8, 8), 30 + c, np.uint8)
        rows = [{"image": 100 + k, "source": f"digits/{c}/{k}"} for k in range(IPC)]
        distilled.write_class(folder, c, pixels, rows)
    return store


def made(store, results, which: str = ""):
    """The material of a run that chose `which`."""
    more = {"kept": store / f"kept-{which}", "kept_labels": store / "kept_labels"}
    out = material(store, results, **(more if which else {}))
    out.config["publish"] |= {"pictures": False, "formats": ["parquet"]}
    return out


def test_the_reason_has_the_numbers_of_all_trials_the_kept_set_first():
    summary = chosen(single="initial", hard="random")["summary"]
    assert kept.reason(kept.record(summary)) == FIRST
    assert kept.lines(summary) == [
        f"Chosen for single labels: initial images. {FIRST}",
        "Chosen for hard labels: random real images. "
        + REASON.format("random real 39.0, initial images 41.0, distilled 40.0"),
    ]
    one = kept.record(chosen(hard="distilled")["summary"])
    one["tried"] = {"distilled": {"balanced": 40.04, "num_seeds": 1}}
    assert "distilled 40.0 (balanced accuracy in per cent, 1 student of 30" in kept.reason(one)
    silent = result()["summary"]
    assert kept.lines(silent) == [] and kept.record(silent) == {} and kept.kept(silent) == ""


def test_the_chosen_set_has_a_row_beside_the_distilled_one():
    results = {**chosen(single="initial", hard="random"), "matrix": [1]}
    titles = [row[0] for row in tables.rows(results)[1:]]
    assert titles[:3] == ["distilled", "chosen (initial images)", "random real"]
    rows = {row[0]: row for row in tables.rows(results)}
    initial = next(
        e
        for e in results["summary"]["students"]
        if (e["set"], e["labels"]) == ("initial", "single")
    )
    assert rows["chosen (initial images)"][4] == tables.cell(initial, "top1")
    matrix = {row[0]: row[1:] for row in tables.matrix_rows(results)}
    assert matrix["images"][2:4] == ["single", "hard"]
    assert matrix["chosen"][:4] == [
        "–", "–", "50.0 ± 0.5 (initial images)", "47.0 ± 0.5 (random real)",
    ]  # fmt: skip
    text = tables.table(results)
    assert all(f"\n\n{said}\n" in text for said in kept.lines(results["summary"]))
    same = {row[0] for row in tables.matrix_rows(chosen(single="initial", hard="initial"))}
    assert "chosen (initial images)" in same and "chosen" not in same
    assert "chosen" not in tables.table({**result(), "matrix": [1]})


def test_one_sentence_says_that_other_images_are_exported():
    def said(results):
        return message.message(results["summary"], "n", 20, 200)

    before = said({**chosen(single="distilled")})
    *same, last = said(chosen(single="initial"))
    assert same == before and all("exported" not in s for s in before)
    assert last == (
        "The exported set has the images that the method starts from instead, which short students "
        "on validation images preferred: 50.0 ± 0.5 % with single labels, 8.0 more than on the "
        "distilled ones."
    )
    (worse,) = (s for s in said(chosen(single="random")) if "exported" in s)
    assert "has random real images instead" in worse and worse.endswith("distilled ones.")


def test_the_score_is_that_of_the_exported_images():
    """In `result`: distilled 40 to 43, random 44 to 47, initial 48 to 51; the whole set 60."""
    found = {which: chosen(single=which) for which in TRIED}
    scores = {which: lrs.of_results(r)["n"] for which, r in found.items()}
    assert scores["distilled"] == lrs.of_results({**result("single", plain=[plain("plain, whole set", 60.0)])})["n"] == lrs.Accuracies(0.6, 0.43, 0.42, 0.46)  # fmt: skip
    assert scores["initial"] == lrs.Accuracies(0.6, 0.51, 0.5, 0.46)
    assert scores["random"] == lrs.Accuracies(0.6, 0.47, 0.46, 0.46)
    assert "minus exported set (initial images), both" in lrs.text(found["initial"])
    assert "exported" not in lrs.text(found["distilled"])
    hard = lrs.of_results(chosen(hard="initial"))["n"]
    assert hard.distilled_hard == hard.distilled_own == 0.51


@pytest.mark.parametrize("which", ["initial", "random"])
def test_the_exported_set_is_the_chosen_one_and_says_so(store, tmp_path, which, capsys):
    import pyarrow.parquet as pq

    results = {**chosen(single=which), "matrix": [1]}
    report.write(made(store, results, which), tmp_path)
    out = tmp_path / "distilled"
    opened = Opened(out)
    assert published.damage(out) == [] and opened.kept == which
    value = {"initial": 10, "random": 30}[which]
    assert [int(np.asarray(decoded)[0, 0, 0]) for decoded in pixels(opened)] == [
        value + c for c in range(10) for _ in range(IPC)
    ]
    assert np.load(out / "labels" / "single.npy").mean() == 7
    rows = json.loads((out / "provenance.json").read_text())
    assert [set(row) for row in rows] == [{"file", "image", "source"}] * 20
    (path,) = (out / "parquet").glob("*.parquet")
    table = pq.read_table(path).to_pylist()
    assert len(table) == 20 and table[0]["soft_label"] == [7.0] * 10

    card, header = (out / "README.md").read_text(), header_of(out / "README.md")
    title = f"chosen ({kept.CALLED[which]})"
    assert "# a \\<set\\>: a small, class-balanced image set of real images" in card
    assert "**These images are not distilled.** They are real images" in card
    assert "a distilled, class" not in card and "distilled from" not in card
    assert "whose distilled images are not in this set" in card
    assert kept.reason(opened.told["chosen"]) in card and card.count("By short students") == 1
    assert f"This set is the row `{title}`" in card and f"| {title} " in card
    assert ("drawn anew" in card) == (which == "random")
    assert "dataset-distillation" not in header["tags"]
    assert ("rldd" in header["tags"]) == (which == "initial")
    assert "started from" not in card

    text = (tmp_path / "report.html").read_text()
    assert text.count("The exported set has") == 1 and "Chosen for single labels" in text
    assert f'<tr class="strong"><th scope="row">{title}</th>' in text
    assert ("Real, initial, distilled and random real images" in text) == (which == "random")
    assert "Chosen for single labels" in (tmp_path / "results.md").read_text()

    assert run_export(Options(out, "ddranking", tmp_path / "tensors")) == 0
    readme = (tmp_path / "tensors" / "README.md").read_text()
    assert "**These images are not distilled.**" in readme
    assert f"not the distilled images: {title}" in capsys.readouterr().out


def pixels(opened):
    from ltdd_scale.publish.encode import decode

    return [decode(sample.content) for sample in opened.samples()]


def test_the_methods_own_images_are_said_to_be_chosen_too(store, tmp_path):
    """And where nothing was chosen, nothing is said."""
    cards = []
    for name, results in (("own", chosen(single="distilled")), ("none", result())):
        out = tmp_path / name
        out.mkdir()
        report.write(made(store, results), out)
        cards.append((out / "distilled" / "README.md").read_text())
        assert Opened(out / "distilled").kept == "distilled"
        text = (out / "report.html").read_text() + (out / "results.md").read_text()
        assert ("short students" in text) == ("chosen (distilled)" in text) == (name == "own")
    own, none = cards
    reason = REASON.format("distilled 40.0, initial images 41.0, random real 39.0")
    assert f"The images are those that the method made. {reason}" in own
    for words in ("validation", "chosen", "not distilled", "This set is the row"):
        assert words not in none
    assert "not distilled" not in own and "This set is the row" not in own
    for card in cards:
        assert ": a distilled, class-balanced image set\n" in card


def test_pictures_have_the_chosen_images_where_they_are_others(store):
    split = shards.ShardSplit(store / "shard", "train")
    curves = [
        {"set": s, "labels": "single", "net": "n", "seed": 0, "loss": [2.0, 1.0]}
        for s in ("distilled", "chosen", "random")
    ]
    for which, series in (("initial", True), ("random", False), ("distilled", False)):
        results = {**chosen(single=which), "loss_curves": curves}
        shown = gallery.Gallery(made(store, results, which), split, results)
        title = f"chosen ({kept.CALLED[which]})"
        assert (title in shown.accuracies) == series
        assert ("chosen single" in course._student_losses(results, "n")) == series
        assert (
            f"{title} {tables.cell(shown.cells['chosen', 'single'], 'top1')}"
            in shown.message().said
        )
    nothing = gallery.Gallery(made(store, result()), split, result())
    assert "chosen" not in nothing.message().said


def test_trials_have_a_row_of_their_own_among_the_stages(store):
    results = chosen(single="random")
    found = made(store, results, "random")
    names = ("trial/random-single-n-s0", "student/chosen-single-n-s0", "student/random-single-n-s0")
    for name in names:
        sealed(store / name, "student", **({"note": "as"} if "chosen" in name else {"top1": 1.0}))
    found.stages[:] = [(name, store / name) for name in names]
    split = shards.ShardSplit(store / "shard", "train")
    rows = {row[0]: row[3] for row in page._Page(found, split, results, {}, {})._stages()}
    assert rows == {
        "stage": "facts",
        "trials": "1 short students, judged on validation images",
        "students": "1 students in 1 cells",
    }
    drawn = canvas.svg(course.timeline(found))
    assert ">the choice<" in drawn and ">students<" in drawn
