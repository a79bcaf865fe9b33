import dataclasses
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_tools import (
    IPC,
    SIZE,
    entry,
    make_store,
    material,
    plain,
    result,
    sealed,
    with_pictures,
)
from torchvision.datasets import ImageFolder

from ltdd_scale.data import distilled, shards
from ltdd_scale.errors import UserError
from ltdd_scale.publish import message, page, report, tables
from ltdd_scale.publish import set as distilled_set
from ltdd_scale.runtime import files


def rows_of(text):
    """First cell → all cells of a Markdown table."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return {cells[0]: cells for cells in lines if cells and not cells[0].startswith("--")}


def test_the_table_shows_the_set_beside_random_real_images():
    rows = rows_of(tables.table(result()))
    titles = ["set", "distilled", "random real", "random real, plain labels", "teacher"]
    assert list(rows) == titles
    assert rows["random real, plain labels"][1:5] == ["hard", "n", "10", "47.0 ± 0.5"]
    assert rows["distilled"][4:6] == ["42.0 ± 0.5", "42.0 ± 0.5"]
    assert rows["random real"][4] == "46.0 ± 0.5" and rows["distilled"][10] == "–"
    assert rows["set"][4:6] == ["top-1", "balanced"]


def test_random_images_with_classes_stand_once_where_the_labels_are_classes():
    text = tables.table(result("hard", experts={}))
    assert text.count("random real") == 1 and text.count("plain labels") == 0
    assert rows_of(text)["random real"][1] == "hard"


def test_balanced_accuracy_comes_first_where_the_test_images_are_not_balanced():
    rows = rows_of(tables.table(result(balanced_test=False)))
    assert rows["set"][4:6] == ["balanced", "top-1"]


def test_plain_networks_come_after_the_whole_set():
    results = result(plain=[plain("plain network", 30.0), plain("with logit adjustment", 35.0)])
    results["summary"]["students"].append(entry("full", "online", 50.0))
    rows = rows_of(tables.table(results))
    titles = ["whole long-tailed set", "plain network", "with logit adjustment", "teacher"]
    assert list(rows)[2:] == ["random real", "random real, plain labels", *titles]
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
    for words in ("method rldd, learned labels", "distilled 60.0 ± 0.5", "random real 47.0 ± 0.5"):
        assert words in text
    assert "13.0 more than on random real images with hard labels" in text
    assert "random hard (2 epochs)" in text and "random single (" not in text


def test_class_folders_sort_in_label_order():
    assert distilled_set.folder_names(["a", "b", "c"]) == ["a", "b", "c"]
    unsorted = (["b", "a"], ["10", "9"], ["a", "a"], ["x/y", "a b"], ["cat", "cat-fish"])
    for classes in (*unsorted, [".a", "b"], ["__a", "b"], ["a::b", "c"], ["q?"], ["x#y", "y*"]):
        names = distilled_set.folder_names(classes)
        assert names == sorted(names) and len(set(names)) == len(classes)
        assert [f"{n}/" for n in names] == sorted(f"{n}/" for n in names)
        assert not any(sign in n for n in names for sign in "/:?#*")
        assert not any(n.startswith((".", "__")) for n in names)
    assert distilled_set.folder_names(["cat", "cat2"]) == ["cat", "cat2"]
    many = distilled_set.folder_names([str(k) for k in range(100_001)])
    assert many[9] == "000009_9" and many == sorted(many)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


def test_a_report_of_everything(store, tmp_path):
    balanced = result(plain=[plain("plain network", 30.0)], balanced_test=False)
    made = material(store, {**balanced, "matrix": [1]})
    report.write(made, tmp_path)
    out = tmp_path / "distilled"
    assert distilled_set.damage(out) == []
    described = json.loads((out / "set.json").read_text())
    assert described["format"] == 3 and described["config"] == made.config
    assert described["student"] == {"net": "n", "width": 64, "norm": "instance"}
    assert described["labels"] == "single" and sum(described["train_counts"]) == 200
    found = ImageFolder(out / "images")
    assert len(found) == 10 * IPC and found.classes == described["folders"]
    assert np.unique(np.asarray(Image.open(found.samples[-1][0]))).tolist() == [109]
    rows = json.loads((out / "provenance.json").read_text())
    assert len(rows) == 20 and rows[-1]["source"] == "digits/9/1"
    assert rows[-1]["file"].endswith("/00001.png") and (out / rows[-1]["file"]).exists()
    assert (out / "teacher.safetensors").exists()
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["labels.json", "single.npy"]
    readme = (out / "README.md").read_text()
    assert "`teacher.safetensors`" in readme and "where every image started from" in readme
    text = (tmp_path / "report.html").read_text()
    for words in ("a &lt;set&gt;", "Real, initial and distilled images", "plain network"):
        assert words in text
    for words in ("The label matrix", "2 students", "teacher (2 epochs)", "single (3 epochs)"):
        assert words in text
    assert "<set>" not in text and "http" not in text.replace("http-equiv", "")
    assert text.index('"col">balanced') < text.index('"col">top-1')
    assert "plain network" in (tmp_path / "results.md").read_text()


WARNED = "the teacher (51.0) is worse than the teacher's <head> (52.0): its labels cost accuracy"


def test_a_warning_stands_by_the_message_and_in_the_card(store, tmp_path):
    """The sentence of the page stays as it is. Results of before there were warnings have none."""
    silent, warned = ({}, {"warnings": [WARNED]})
    pages = []
    for name, more in (("silent", silent), ("warned", warned)):
        out = tmp_path / name
        out.mkdir()
        made = material(store, result(**more))
        made.config["publish"] |= {"pictures": False, "formats": []}
        report.write(made, out)
        pages.append((out / "report.html").read_text())
        for file in ("results.md", "distilled/README.md"):
            text = (out / file).read_text()
            assert text.count(f"Warning: {WARNED}.") == (name == "warned"), file
            assert text.find("Warning") < text.index("| set ")
    before, text = pages
    assert 'class="warning"' not in before
    escaped = WARNED.replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;")
    start, end = text.index('<div class="warning" role="note"'), text.index("</div>")
    assert f"<p>Warning: {escaped}.</p>" in text[start:]
    lead = re.search(r'<p class="lead">.*?</p>', before).group()
    assert lead in text and text.index(lead) < start < text.index("<figure>")
    assert start < end < text.index("<table>")


def test_a_report_without_initial_images_and_without_a_teacher(store, tmp_path):
    results = result("hard", experts={})
    made = material(store, results, initial=None, teacher=None)
    report.write(made, tmp_path)
    assert not (tmp_path / "distilled" / "teacher.safetensors").exists()
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
    (tmp_path / "pictures" / "classes.png").unlink()
    assert not report.is_current(made, tmp_path)
    report.write(made, tmp_path)
    assert report.is_current(made, tmp_path)
    (tmp_path / "results.md").unlink()
    assert not report.is_current(made, tmp_path)


def test_a_report_that_ends_in_the_middle_is_current_for_nobody(store, tmp_path, monkeypatch):
    """The set is the new config's then, and the mark may not be the old one's."""
    made = material(store, result())
    report.write(made, tmp_path)
    other = dataclasses.replace(made, config={**made.config, "publish": {"license": "mit"}})

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("ltdd_scale.publish.gallery.Gallery.all", killed)
    with pytest.raises(KeyboardInterrupt):
        report.write(other, tmp_path)
    assert "license: mit" in (tmp_path / "distilled" / "README.md").read_text()
    assert not report.is_current(made, tmp_path) and not report.is_current(other, tmp_path)


def test_a_set_comes_back_where_a_swap_ended_in_the_middle(tmp_path):
    place = tmp_path / "distilled"
    old = tmp_path / ".distilled.old"
    old.mkdir()
    (old / "a").write_text("mine")
    with pytest.raises(KeyboardInterrupt), distilled_set.swapped_in(place):
        raise KeyboardInterrupt
    assert (place / "a").read_text() == "mine" and not old.exists()


def test_a_set_that_is_written_again_leaves_nothing_of_the_old_one(store, tmp_path):
    made = material(store, result())
    report.write(made, tmp_path)
    (tmp_path / "distilled" / "left.txt").write_text("old")
    (tmp_path / "distilled" / "labels" / "single.npy").write_bytes(b"damaged")
    (tmp_path / "distilled" / "teacher.safetensors").unlink()
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


def said(summary: dict, net: str = "n") -> list[str]:
    return message.message(summary, net, 100, 2478)


def of(
    labels: str, distilled: float, random: float | None, whole: float | None, seeds=3, spread=0.4
):
    """A summary of one kind of labels."""
    more = {"num_seeds": seeds, "top1_std": spread if seeds > 1 else None}
    students = [entry("distilled", labels, distilled, **more)]
    students += [] if random is None else [entry("random", labels, random, **more)]
    found = result(labels)["summary"] | {"students": students}
    rows = [] if whole is None else [{**plain("plain, logit-adjusted", whole), "num_seeds": 1}]
    return found | {"plain": [plain("plain, whole set", 1.0), *rows]}


def test_the_first_sentence_says_what_the_set_is_worth():
    """As in the README: 45.4 ± 0.4 beside 40.0 and 52.5."""
    assert said(of("single", 45.4, 40.0, 52.5)) == [
        "Trained on 100 distilled images with single labels a student reaches 45.4 ± 0.4 %: 5.4 more "
        "than on random real images, and 7.1 less than the plain network on all 2,478 images after "
        "logit adjustment."
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            (40.5, 40.0, None),
            "%: 0.5 more than on random real images, within the noise of 3 seeds.",
        ),
        (
            (39.5, 40.0, None),
            "%: 0.5 less than on random real images, within the noise of 3 seeds.",
        ),
        ((40.0, 40.0, None), "%: no better than on random real images."),
        ((35.0, 40.0, None), "%: not better but worse than on random real images, by 5.0."),
        ((45.0, None, 45.0), "%: as much as the plain network on all 2,478 images after"),
        (
            (45.0, None, 44.6),
            "%: 0.4 more than the plain network on all 2,478 images after logit adjustment, within the noise of 3 seeds.",
        ),
        ((55.0, None, 45.0), "%: 10.0 more than the plain network on all"),
        ((45.0, None, None), "with hard labels a student reaches 45.0 ± 0.4 %."),
    ],
)
def test_a_set_that_is_not_better_is_said_to_be_so(values, words):
    assert words in said(of("hard", *values))[0]


def test_without_seeds_the_noise_is_not_known():
    text = said(of("hard", 45.0, 40.0, 50.0, seeds=1))[0]
    assert "reaches 45.0 %:" in text
    assert text.count("(one seed each: the noise is not known)") == 2


def test_a_difference_that_was_not_proven_is_not_told_as_equality():
    """Two seeds: the limit is wide, and a large difference lies within it."""
    text = said(of("hard", 45.0, 42.0, 53.4, seeds=2, spread=0.8))[0]
    assert "3.0 more than on random real images, which 2 seeds cannot tell from noise" in text
    assert text.endswith(
        "8.4 less than the plain network on all 2,478 images after logit "
        "adjustment, which 2 seeds cannot tell from noise."
    )
    # Seeds that do not differ prove nothing.
    text = said(of("hard", 45.0, 42.0, None, seeds=2, spread=0.0))[0]
    assert text.endswith("images (the same over 2 seeds: the noise is not known).")


def test_the_noise_is_judged_before_numbers_are_rounded():
    """Shown as 50.4 and 50.0; the limit of the test is 0.33."""
    one, other = (
        {"top1": v, "top1_std": 0.146, "num_seeds": 3, "title": "x"} for v in (50.36, 50.04)
    )
    more, noise = message.difference(one, other, "top1")
    assert more == pytest.approx(0.4) and noise is True


def test_one_seed_of_two_stages_is_no_fact():
    def found(top1):
        rows = [(None, "distilled", None, 40.0), (*tables.PUBLISHED, "hard", top1)]
        names = ("first", "second", "routing", "balanced")
        rows = [{**dict(zip(names, r, strict=True)), "num_seeds": 1} for r in rows]
        (text,) = message.two_stages(
            {"summary": {"balanced_test": False}, "two_stage": {"rows": rows}}
        )
        return text.partition("distilled set: ")[2]

    doubt = "(one seed each: the noise is not known)"
    assert found(44.0) == f"44.0 % (balanced accuracy), 4.0 more than in one stage {doubt}."
    assert found(40.0) == "40.0 % (balanced accuracy), no better than in one stage."


def test_each_kind_of_labels_has_a_sentence():
    summary = of("online", 50.0, 49.9, None)
    summary["students"] += of("single", 45.0, 40.0, None)["students"]
    summary["students"] += [entry("distilled", "hard", 44.0)]
    assert said(summary)[1:] == [
        "With single labels: 45.0 ± 0.4 %, 5.0 more than on random real images."
    ]
    again = said({**summary, "balanced_test": False})
    assert again[1].startswith("With single labels: 45.0 ± 0.5 % (balanced accuracy), ")


def test_the_noise_is_that_of_welchs_test():
    """Against the test of SciPy on samples that have just these means and spreads."""
    from scipy import stats

    def sample(mean, spread, n):
        values = np.arange(n) - (n - 1) / 2
        return mean + spread * values / values.std(ddof=1)

    seen = set()
    for gap in (0.2, 0.8, 1.0, 1.5, 2.0, 3.0):
        for (s, n), (t, m) in (((0.4, 3), (1.2, 3)), ((0.5, 5), (0.5, 2)), ((0.1, 2), (0.9, 4))):
            one = {"top1": 40 + gap, "top1_std": s, "num_seeds": n}
            other = {"top1": 40.0, "top1_std": t, "num_seeds": m}
            found = stats.ttest_ind(sample(40 + gap, s, n), sample(40.0, t, m), equal_var=False)
            more, noise = message.difference(one, other, "top1")
            assert more == pytest.approx(gap) and noise == (found.pvalue >= 0.05), (
                gap,
                s,
                t,
                found,
            )
            seen.add(noise)
    assert seen == {True, False}


def test_two_stages_have_a_table_pictures_and_a_sentence(store, tmp_path):
    counts = shards.ShardSplit(store / "shard", "train").counts.tolist()
    results = result("hard", plain=[plain("plain, logit-adjusted", 45.0)]) | with_pictures(
        store, 10, counts
    )
    places = {role: store / role for role in ("grouping", "embedding")}
    made = material(store, results, **places)
    report.write(made, tmp_path)
    short, long = (tmp_path / "results.md").read_text().split("Two stages:")[1].split("All pairs")
    found = [
        [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
        for text in (short, long)
    ]
    assert [len(t) for t in found] == [2 + 4, 2 + 6] and "top-5" not in found[0][0]
    for heading, _, one, _, pair, soft, *_ in found:
        assert heading[:4] == ["first stage", "second stage", "routing", "net"]
        assert one[:3] == ["– (one stage)", "distilled", "–"]
        assert pair[2:5] == ["hard", "n", "44.0 ± 0.5"]
        assert heading[7:9] == ["group", "in group"]
        assert soft[7:9] == ["44.5 ± 0.5", "44.5 ± 0.5"]
    text = (tmp_path / "report.html").read_text()
    assert "4.0 more than in one stage." in text
    there = {p.name for p in (tmp_path / "pictures").iterdir()}
    wanted = {"message", "pairs_of_stages", "confusions", "classes", "counts", "tree", "embeddings"}
    wanted |= {"pairs", "losses", "timeline"}
    assert there == {f"{name}.{kind}" for name in wanted for kind in ("svg", "png")}
    for name in wanted:
        assert text.count(f'id="{name}-title"') == 1
    assert (
        text.index('id="stages-two"')
        < text.index('id="confusions-title"')
        < text.index('id="classes"')
    )
    (store / "verdict" / "confusion.npz").unlink()
    report.write(material(store, result()), tmp_path)  # another protocol: their pictures go
    assert not (tmp_path / "pictures" / "tree.svg").exists()
    assert (tmp_path / "pictures" / "classes.svg").exists()
    assert "stages-two" not in (tmp_path / "report.html").read_text()
