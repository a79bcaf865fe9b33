"""Pictures from plain arrays: what is in them, that bytes repeat, that anybody can read them."""

import base64
import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT
from jobs_tools import make, point
from PIL import Image
from report_tools import budgeted, make_store, material, plain, result, sealed, with_pictures
from scipy.cluster import hierarchy

from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.launch import campaign, sweep, sweep_table
from ltdd_scale.publish.gallery import Gallery, read_embedding
from ltdd_scale.publish.pictures import budget, canvas, classes, images, points, work
from ltdd_scale.publish.pictures.work import Bar
from ltdd_scale.runtime import files

SVG = "{http://www.w3.org/2000/svg}"
WANTED = [
    "message",
    "pairs_of_stages",
    "confusions",
    "bytes",
    "classes",
    "counts",
    "tree",
    "embeddings",
    "pairs",
    "losses",
    "timeline",
]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Gallery:
    """Of a run that has everything: names of classes that are awkward in HTML and in TeX."""
    store = make_store(tmp_path_factory.mktemp("store"))
    split = ShardSplit(store / "shard", "train")
    results = budgeted(
        result(
            "single",
            plain=[
                plain(f"plain, {t}", v) for t, v in (("whole set", 41.0), ("logit-adjusted", 52.0))
            ],
        )
    )
    results |= {"matrix": [1], **with_pictures(store, 10, split.counts.tolist())}
    places = {role: store / role for role in ("grouping", "embedding")}
    split.classes = [f"<{c}> $x_{c}$" for c in range(10)]
    return Gallery(material(store, results, **places), split, results)


@pytest.fixture(scope="module")
def kept(gallery, tmp_path_factory):
    """(folder, SVGs of the page by name) of all pictures."""
    out = tmp_path_factory.mktemp("out")
    pictures = gallery.all()
    assert [p.name for p in pictures] == WANTED
    return out / canvas.FOLDER, canvas.save(pictures, out)


def texts(path) -> list[str]:
    tree = ElementTree.parse(path)
    return ["".join(t.itertext()).strip() for t in tree.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", WANTED)
def test_a_picture_is_two_files_and_a_part_of_the_page(kept, name):
    folder, inside = kept
    root = ElementTree.parse(folder / f"{name}.svg").getroot()
    assert root.get("role") == "img"
    first, second = list(root)[:2]
    assert root.get("aria-labelledby") == f"{first.get('id')} {second.get('id')}"
    assert (first.tag, second.tag) == (f"{SVG}title", f"{SVG}desc") and first.text and second.text
    with Image.open(folder / f"{name}.png") as drawn:
        assert drawn.width > 400 and drawn.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    # In the page: no paper, no colour of the paper's ink, nothing that a network is asked for.
    text = inside[name]
    assert "http" not in text and "fill: none" in text.split("<path", 2)[1]
    for colour, variable in canvas.VARIABLES.items():
        assert colour not in text
        assert (variable in text) == (colour in (folder / f"{name}.svg").read_text())
    assert "var(--ink)" in text and text.startswith("<svg viewBox=")


def test_ids_on_a_page_are_told_apart(kept):
    every = [i for text in kept[1].values() for i in re.findall(r'\bid="([^"]*)"', text)]
    assert len(every) > 2 * len(WANTED) and len(every) == len(set(every))
    for text in kept[1].values():
        own = set(re.findall(r'\bid="([^"]*)"', text))
        used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text))
        assert {a or b for a, b in used} <= own


@pytest.mark.slow
def test_bytes_are_the_same_again_and_in_another_process(kept, gallery, tmp_path):
    folder, _ = kept
    again = [p for p in gallery.all() if p.name in ("message", "embeddings", "tree")]
    canvas.save(again, tmp_path)
    for name in ("message", "embeddings", "tree"):
        for kind in ("svg", "png"):
            one = (tmp_path / "pictures" / f"{name}.{kind}").read_bytes()
            assert one == (folder / f"{name}.{kind}").read_bytes(), (name, kind)
    code = (
        "import hashlib; from ltdd_scale.publish.pictures import budget, canvas\n"
        "f = budget.message(['a'], {'x': [(1.0, .1)]}, {'y': (2.0, None)}, 'top-1')\n"
        "print(hashlib.sha256(canvas.svg(canvas.Picture('n', 't', 's', f)).encode()).hexdigest())"
    )
    said = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "PATH": "", "MPLBACKEND": "agg"}).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(said) == 1 and len(said.pop()) == 65


def test_names_of_classes_are_letters_and_nothing_else(kept):
    """Neither markup nor TeX."""
    found = texts(kept[0] / "confusions.svg")
    assert {f"<{c}> $x_{c}$" for c in range(10)} <= set(found)
    assert "<3>" not in kept[1]["classes"] and "&lt;3&gt; $x_3$" in kept[1]["classes"]


def test_names_in_other_scripts_do_not_warn(tmp_path):
    figure = classes.by_count(np.asarray([3, 1]), {"学生": [1.0, 2.0]})
    canvas.save([canvas.Picture("a", "t", "学", figure)], tmp_path)
    assert "学生" in texts(tmp_path / "pictures" / "a.svg")


def test_the_message_has_every_kind_of_labels_and_the_whole_set(kept):
    found = texts(kept[0] / "message.svg")
    for word in ("online", "single", "teacher", "4 kB", "120 kB", "no bytes"):
        assert word in found
    assert "plain, logit-adjusted: 52.0" in found and "plain, whole set: 41.0" in found
    assert [f"{v}.0" for v in range(40, 44)] == [t for t in found if re.fullmatch(r"4\d\.0", t)][:4]


def points_of(figure) -> dict[str, list[tuple[float, float]]]:
    """Label → places of the points of an error bar."""
    (axes,) = figure.axes
    containers, labels = axes.get_legend_handles_labels()
    return {
        label: [tuple(map(float, p)) for p in c.lines[0].get_xydata()]
        for c, label in zip(containers, labels, strict=True)
        if hasattr(c, "has_yerr")
    }


def test_bytes_of_labels_are_in_their_places():
    """No bytes left of all, the teacher right of all, each with a tick of its own."""
    cells = [("hard", 0, (1.0, 0.1)), ("single", 4000, (2.0, 0.1)), ("online", None, (3.0, None))]
    figure = budget.label_bytes({"distilled": cells}, {"plain": (2.5, None)}, "top-1")
    ((left, _), (middle, _), (right, _)) = points_of(figure)["distilled"]
    assert left == 100 and middle == 4000 and right == 100_000  # a decade beside 1000 … 10000
    ticks = dict(
        zip(
            figure.axes[0].get_xticks(),
            (t.get_text() for t in figure.axes[0].get_xticklabels()),
            strict=True,
        )
    )
    assert ticks[left] == "none" and ticks[right] == "teacher\nneeded" and ticks[1000] == "1 kB"


def test_a_class_that_nobody_judged_has_no_dot():
    counts = np.asarray([1, 3, 2])
    figure = classes.from_head_to_tail(["a", "b", "c"], counts, {"x": [1.0, None, 3.0]})
    ys = figure.axes[0].lines[0].get_ydata()
    assert np.isnan(ys[0]) and ys[1:].tolist() == [3.0, 1.0]  # head first
    assert "b · 3" in [t.get_text() for t in figure.axes[0].get_xticklabels()]
    many = classes.from_head_to_tail(
        [str(k) for k in range(1000)], np.arange(1000, 0, -1), {"x": [None] * 10 + [50.0] * 990}
    )
    smooth = many.axes[0].lines[-1].get_ydata()
    assert np.allclose(smooth[5:], 50) and len(smooth) == 200


def test_confusions_stand_in_the_order_of_the_tree():
    counted = np.asarray([[8, 2, 0], [0, 10, 0], [5, 0, 5]])
    order = np.asarray([2, 0, 1])
    figure = classes.confusions(["a", "b", "c"], {"one": counted}, order, [1])
    shown = figure.axes[0].images[0].get_array()
    assert shown.tolist() == [[50, 50, 0], [0, 80, 20], [0, 0, 100]]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["c", "a", "b"]
    # Where classes share rows, the shares of each row still add up.
    wide = np.random.default_rng(0).integers(0, 9, (1000, 1000)) + np.eye(1000, dtype=int)
    shared = classes.confusions([""] * 1000, {"one": wide}, np.arange(1000)).axes[0].images[0]
    assert shared.get_array().shape == (classes.BLOCKS, classes.BLOCKS)
    assert np.allclose(shared.get_array().sum(1), 100)


def test_groups_are_parted_where_they_stand_together():
    assert classes.bounds(np.asarray([2, 0, 1, 3]), [[0, 2], [1, 3]]) == [2]
    assert classes.bounds(np.asarray([2, 1, 0, 3]), [[0, 2], [1, 3]]) == []


def test_the_tree_shows_its_cut_and_only_a_cut_of_its_own():
    spots = np.asarray([[0.0], [1], [10], [11], [30]])
    linkage = hierarchy.linkage(spots, "average")

    def cut(groups):
        figure = classes.tree("abcde", np.arange(5, 0, -1), linkage, groups)
        (axes,) = figure.axes
        names = [t.get_text() for t in axes.get_yticklabels()]
        assert sorted(names) == [
            f"{c} · {n}" for c, n in zip("abcde", (5, 4, 3, 2, 1), strict=True)
        ]
        lines = [line for line in axes.lines if line.get_label().startswith("cut")]
        return [float(line.get_xdata()[0]) for line in lines]

    (height,) = cut([[0, 1, 2, 3], [4]])
    assert 10 < height < 25  # the upper join is at 24.5, the one below at 10
    assert cut([[0, 1], [2, 3], [4]])[0] < 10
    assert cut([[0, 2], [1, 3, 4]]) == []  # of another rule than the tree's


def test_a_tree_may_be_one_long_chain():
    """Of a thousand classes, each joined to all before it."""
    n = 1500
    joins = [[0, 1, 1.0, 2], *([n + k - 1, k + 1, 1.0 + k, k + 2] for k in range(1, n - 1))]
    before = sys.getrecursionlimit()
    figure = classes.tree([str(k) for k in range(n)], np.ones(n, int), np.asarray(joins), [[0]])
    assert figure.axes and sys.getrecursionlimit() == before


def test_features_keep_their_classes(gallery):
    panels, record = read_embedding(gallery.material.find("embedding"))
    assert list(panels) == ["plain, whole set", "distilled"]
    xy, labels, centres = panels["distilled"]
    figure = points.embeddings(panels, record["classes"])
    dots, triangles = figure.axes[1].collections
    assert np.allclose(dots.get_offsets(), xy) and np.allclose(triangles.get_offsets(), centres)
    colours = points.class_colours(10)
    assert np.allclose(dots.get_facecolors()[:, :3], colours[labels, :3])
    assert len({tuple(c) for c in points.class_colours(12)}) == 12
    assert not set(points.CLASSES) & set(canvas.VARIABLES)  # triangles stay as their dots are


def test_the_difference_of_a_pair_is_amplified_and_grey_where_there_is_none():
    before = np.full((1, 3, 4, 4), 100, np.uint8)
    after = before.copy()
    after[0, 0, 0] = 110
    assert images.amplification(before, after) == 8
    assert images.amplification(before, before) == 16
    figure = images.pairs(["a"], before, after, 8)
    shown = figure.axes[2].images[0].get_array()
    assert shown[0, 0].tolist() == [208, 128, 128] and (shown[1:] == 128).all()


def test_a_sheet_leaves_out_what_is_missing():
    source, width = images.contact_sheet([[np.full((1, 3, 4, 4), 9, np.uint8)]], 2)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    assert sheet.shape == (6, 12, 4) and width == 12
    assert (sheet[1:5, 1:5] == (9, 9, 9, 255)).all() and sheet[..., 3].sum() == 16 * 255


def test_stages_side_by_side_have_lanes_of_their_own():
    bars = [Bar("a", "x", 0, 10, 2), Bar("b", "x", 9.2, 20), Bar("c", "x", 9.5, 30), Bar("d", "x", 20.1, 25)]  # fmt: skip
    assert work.place(bars) == [0, 0, 1, 0]
    # What took less than a second, and ended in the second in which the next began.
    assert work.place([Bar("a", "x", 9.8, 10.0, 2), Bar("b", "x", 9.3, 20, 2)]) == [0, 0]


def test_idle_time_is_cut_out_of_the_timeline():
    bars = [Bar("a", "x", 1000, 1100), Bar("b", "x", 1090, 1200), Bar("c", "x", 9000, 9100)]
    at, idle = work.squeeze(bars)
    assert at(1000) == 0 and at(1200) == 200
    assert at(9000) == pytest.approx(200 + 3) and at(9100) == pytest.approx(303)
    assert [seconds for _, seconds in idle] == [7800]
    assert work.squeeze([Bar("a", "x", 0, 10), Bar("b", "x", 40, 50)])[1] == []


def test_a_run_of_before_has_no_timeline_and_fewer_pictures(tmp_path):
    store = make_store(tmp_path)
    record = files.read_json(store / "shard" / "stage.json")
    files.write_json(
        store / "shard" / "stage.json", {k: v for k, v in record.items() if k != "finished"}
    )
    found = Gallery(material(store, result()), ShardSplit(store / "shard", "train"), result())
    assert [p.name for p in found.all()] == ["message", "classes", "counts", "pairs", "losses"]


def test_a_loss_that_is_not_finite_leaves_a_gap():
    values = [3.0, float("nan"), 2.0, float("inf"), 1.0]
    figure = work.losses({"students": {"a": values, "b": [float("nan")] * 2}})
    low, high = figure.axes[0].get_ylim()
    assert 0.9 < low < 1 and 3 < high < 3.1
    canvas.svg(canvas.Picture("a", "t", "s", figure))
    canvas.svg(canvas.Picture("a", "t", "s", work.losses({"x": {"b": [float("nan")] * 2}})))


def test_signs_that_xml_does_not_know_are_left_out():
    counted = {"one": np.eye(2, dtype=int)}
    figure = classes.confusions(["a\x0bb", "c\x1b\ufffe"], counted, np.arange(2))
    text = canvas.svg(canvas.Picture("a", "t", "said of a\x00", figure))
    root = ElementTree.fromstring(text)
    found = {"".join(t.itertext()).strip() for t in root.iter(f"{SVG}text")}
    assert {"ab", "c"} <= found and root[1].text == "said of a"


def test_lines_are_named_after_what_they_are(gallery):
    assert "(plain, logit-adjusted; plain, whole set)" in gallery.message().caption
    heads = [plain(f"teacher's plain head{t}", 50.0) for t in ("", ", logit-adjusted")]
    results = result("single", plain=heads)
    caption = Gallery(gallery.material, gallery.split, results).message().caption
    assert "teacher's plain head, logit-adjusted" in caption and "plain network" not in caption


def test_a_full_disk_leaves_the_pictures_that_were_there(tmp_path, monkeypatch):
    figure = work.losses({"a": {"b": [2.0, 1.0]}})
    picture = canvas.Picture("a", "t", "s", figure)
    canvas.save([picture], tmp_path)
    before = (tmp_path / "pictures" / "a.svg").read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(UserError, match="no space left"):
            canvas.save([canvas.Picture("b", "t", "s", figure)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]
    assert (tmp_path / "pictures" / "a.svg").read_bytes() == before
    canvas.save([], tmp_path)
    assert not list(tmp_path.iterdir())


def swept(tmp_path, *sets: str, name: str, top1: float) -> None:
    one = {"net": "convnet3", "class_std": 1.0, "top1_std": 0.5, "balanced": top1, "labels": "hard"}
    students = [
        {**one, "set": s, "top1": v} for s, v in (("distilled", top1), ("random", top1 - 5))
    ]
    summary = {
        "labels": "hard",
        "baseline": "hard",
        "balanced_test": True,
        "students": students,
        "experts": {},
    }
    summary["plain"] = [{**one, "title": "plain, logit-adjusted", "top1": 60.0}]
    files.write_json(make(tmp_path / name) / "results.json", {"summary": summary})


def test_a_sweep_has_curves_over_what_varies(tmp_path, gallery):
    grid = {f"f{f}-i{i}": (f, i) for f in (10, 100) for i in (1, 10)}
    made = []
    for name, (factor, ipc) in grid.items():
        swept(tmp_path, name=name, top1=20 + ipc + factor / 10)
        made.append(
            point(
                tmp_path,
                name,
                f"ipc={ipc}",
                f"data.imbalance_factor={factor}",
                "relabel.labels=hard",
            )
        )
    beside = [
        sweep.Published(method="P", top1=55.5, where={"ipc": 10, "data.imbalance_factor": 10})
    ]
    settings = {n: {"ipc": i, "data.imbalance_factor": f} for n, (f, i) in grid.items()}
    found = sweep.Sweep("s", tmp_path / "c.yaml", settings, published=beside)
    shell = campaign.Campaign("s", tmp_path / "jobs", tmp_path / "store", "local", points=made)
    text = sweep_table.write(found, shell, tmp_path, lambda job: "")
    assert text.count("![top-1 over the") == 2 and text == (tmp_path / "sweep.md").read_text()
    for name in re.findall(r"\]\((\S+\.svg)\)", text):
        assert (tmp_path / name).exists()
    shown = texts(tmp_path / "pictures" / "ipc.svg")
    for words in ("imbalance factor 10", "imbalance factor 100", "rldd, hard", "P, published"):
        assert words in shown, shown
    assert "random real, rldd, hard" in shown and "plain, logit-adjusted" in shown
    desc = ElementTree.parse(tmp_path / "pictures" / "ipc.svg").getroot()[1].text
    assert "imbalance factor 10, rldd, hard: 1: 22.0, 10: 31.0" in desc
    # Points of one IPC and one factor: nothing to draw, and what was drawn goes.
    one = sweep.Sweep("s", tmp_path / "c.yaml", {"f10-i1": {}})
    text = sweep_table.write(one, shell, tmp_path, lambda job: "")
    assert "![" not in text and not (tmp_path / "pictures").exists()
    # Features of its networks; one that two points share is shown once.
    two = sweep.Sweep("s", tmp_path / "c.yaml", {"f10-i1": {}, "f10-i10": {}})
    for node in (made[0].nodes["embedding"], made[1].nodes["embedding"]):
        folder = node.folder(tmp_path / "store")
        folder.mkdir(parents=True)
        for name in ("embedding.npz", "embedding.json"):
            (folder / name).write_bytes((gallery.material.find("embedding") / name).read_bytes())
    text = sweep_table.write(two, shell, tmp_path, lambda job: "")
    assert "embeddings.svg" in text
    assert "f10-i1, f10-i10: distilled" in texts(tmp_path / "pictures" / "embeddings.svg")


def test_a_sweep_over_seeds_draws_means(tmp_path):
    for seed, top1 in ((0, 30.0), (1, 34.0)):
        for ipc in (1, 10):
            swept(tmp_path, name=f"s{seed}-i{ipc}", top1=top1 + ipc)
    names = [f"s{s}-i{i}" for s in (0, 1) for i in (1, 10)]
    made = [
        point(tmp_path, n, f"ipc={n.split('i')[1]}", f"seed={n[1]}", "relabel.labels=hard")
        for n in names
    ]
    found = sweep.Sweep("s", tmp_path / "c.yaml", {n: {"ipc": 1, "seed": int(n[1])} for n in names})
    shell = campaign.Campaign("s", tmp_path / "jobs", tmp_path / "store", "local", points=made)
    sweep_table.write(found, shell, tmp_path, lambda job: "")
    desc = ElementTree.parse(tmp_path / "pictures" / "ipc.svg").getroot()[1].text
    assert "rldd, hard: 1: 33.0, 10: 42.0" in desc


def test_a_sweep_of_sets_as_they_are_has_no_imbalance_factor(tmp_path):
    """`profile: full` has a setting of that name, and it says nothing. No curve, no word of it."""
    made = []
    for ipc in (1, 10):
        swept(tmp_path, name=f"i{ipc}", top1=30.0 + ipc)
        told = files.read_json(tmp_path / f"i{ipc}" / "results.json")
        told["summary"]["students"] = told["summary"]["students"][:1]  # no random images
        told["summary"]["plain"][0]["title"] = "teacher's plain head, logit-adjusted"
        files.write_json(tmp_path / f"i{ipc}" / "results.json", told)
        sets = (f"ipc={ipc}", "data.profile=full", "data.imbalance_factor=1")
        made.append(point(tmp_path, f"i{ipc}", *sets, "relabel.labels=hard"))
    found = sweep.Sweep("s", tmp_path / "c.yaml", {f"i{i}": {"ipc": i} for i in (1, 10)})
    shell = campaign.Campaign("s", tmp_path / "jobs", tmp_path / "store", "local", points=made)
    text = sweep_table.write(found, shell, tmp_path, lambda job: "")
    desc = ElementTree.parse(tmp_path / "pictures" / "ipc.svg").getroot()[1].text
    assert desc.startswith("rldd, hard: 1: 31.0, 10: 40.0; teacher's plain head, logit-adjusted: ")
    caption = next(line for line in text.splitlines() if line.startswith("top-1 over"))
    assert "imbalance" not in desc + caption and "random" not in caption
    assert "dotted: the teacher's plain head on the whole set" in caption


def test_asking_for_a_sweeps_table_draws_nothing_without_points():
    code = (
        "import sys; from ltdd_scale.launch import sweep_table; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_stage_records_without_a_kind_are_of_their_stage(tmp_path):
    sealed(tmp_path, "experts")
    record = files.read_json(tmp_path / "stage.json")
    files.write_json(tmp_path / "stage.json", {**record, "kind": None, "stage": "experts"})
    from ltdd_scale.publish.course import kind_of

    assert kind_of(tmp_path) == "experts"
