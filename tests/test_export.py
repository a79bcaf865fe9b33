"""What loads an exported set, trains on it, and writes it again."""

import dataclasses
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import cli, said_plainly
from set_tools import (
    ALONE,
    CLASSES,
    IPC,
    SIZE,
    blocks,
    export,
    header_of,
    pixels_of,
)

from ltdd_scale import fit
from ltdd_scale.errors import UserError
from ltdd_scale.judging import training
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.launch.export import Options
from ltdd_scale.launch.export import export as run_export
from ltdd_scale.models import frozen
from ltdd_scale.publish import ddranking, formats
from ltdd_scale.publish import set as published
from ltdd_scale.publish.encode import decode
from ltdd_scale.publish.opened import Opened
from ltdd_scale.publish.settings import NAMED_SETS
from ltdd_scale.runtime import files

# datasets

LOAD = """
import json, os, sys
import numpy as np
{code}
found = {{}}
for name, variable, image, label, soft in {wanted}:
    t = globals()[variable]
    told = {{"n": len(t), "label": list(t[label])}}
    told["pixels"] = [np.asarray(r[image].convert("RGB")).transpose(2, 0, 1).tolist() for r in t]
    told["soft"] = [list(map(float, r[soft])) for r in t] if soft else None
    told["names"] = getattr(t.features[label], "names", None)
    found[name] = told
whole = load_dataset(os.getcwd())["train"]
found["default"] = [len(whole), sorted(whole.features)]
json.dump(found, open(sys.argv[1], "w"))
"""


def loaded(folder: Path, tmp_path: Path, wanted: list[tuple]) -> dict:
    """What Hugging Face's `datasets` makes of the lines in the card, in a process without network,
    in which the set is the current folder."""
    (code, _) = blocks(folder / "README.md")
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    script = LOAD.format(code=code, wanted=wanted)
    command = [sys.executable, "-c", script, str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "found.json").read_text())


def test_datasets_loads_all_three_by_the_lines_in_the_card(house, online, tmp_path):
    wanted = [
        ("parquet", "rows", "image", "class_id", "soft_label"),
        ("webdataset", "samples", "png", "cls", "npy"),
        ("imagefolder", "folder", "image", "label", ""),
    ]
    found = loaded(online, tmp_path, wanted)
    pixels, classes = pixels_of(house), np.repeat(np.arange(CLASSES), IPC)
    table = np.load(online / "labels" / "single.npy")
    for name in ("parquet", "imagefolder"):
        assert np.array_equal(found[name]["pixels"], pixels)
        assert found[name]["label"] == classes.tolist()
        assert found[name]["names"] == [str(c) for c in range(CLASSES)]
    assert np.array_equal(np.asarray(found["parquet"]["soft"], np.float32), table)
    # Round after round: the first ten are one of each class.
    samples = found["webdataset"]
    assert samples["label"] == list(range(CLASSES)) * IPC
    order = np.argsort(samples["label"], kind="stable")
    assert np.array_equal(np.asarray(samples["pixels"])[order], pixels)
    assert np.array_equal(np.asarray(samples["soft"], np.float32)[order], table)
    assert found["default"] == [IPC * CLASSES, ["class_id", "image", "soft_label"]]


def test_a_set_of_many_shards_with_classes_called_train_and_test(house, tmp_path):
    """Names that `datasets` takes for splits; WebP images; shards of a few samples."""
    folder = export(house, tmp_path, "learned", images="webp", formats=[])
    names = ["dev", "eval", *"klmnop", "test", "train"]
    told = files.read_json(folder / "set.json")
    for old, new in zip(told["folders"], names, strict=True):
        os.rename(folder / "images" / old, folder / "images" / new)
    files.write_json(folder / "set.json", {**told, "classes": names, "folders": names})
    opened = Opened(folder)
    formats.write_parquet(opened, folder / "parquet", shard_bytes=600)
    formats.write_webdataset(opened, folder / "webdataset", shard_bytes=600)
    for suffix in ("parquet", "tar"):
        shown = sorted(p.name for p in folder.rglob(f"train-*.{suffix}"))
        assert (
            len(shown) > 2
            and shown[-1] == f"train-{len(shown) - 1:05d}-of-{len(shown):05d}.{suffix}"
        )
    assert not [p for p in folder.rglob("*.tmp")]
    opened.told["formats"] = ["imagefolder", "parquet", "webdataset"]
    (folder / "README.md").write_text(published.card(opened, None))
    wanted = [
        ("parquet", "rows", "image", "class_id", "soft_label"),
        ("webdataset", "samples", "webp", "cls", "npy"),
        ("imagefolder", "folder", "image", "label", ""),
    ]
    found = loaded(folder, tmp_path, wanted)
    assert {found[name]["n"] for name in ("parquet", "webdataset", "imagefolder")} == {20}
    assert np.array_equal(found["parquet"]["pixels"], pixels_of(house))
    assert found["imagefolder"]["names"] == found["parquet"]["names"] == names
    assert np.array_equal(found["imagefolder"]["pixels"], pixels_of(house))


def test_datasets_finds_classes_of_any_name(house, tmp_path):
    """Names that sort otherwise as paths, and names that `datasets` passes over or takes for
    patterns, in the folder that a run writes."""
    names = sorted(
        [".hid", "100%", "__bg__", "a::b", "cat", "cat-fish", "q?", "x#y", "[z]", "é\"'<b>`|"]
    )
    folder = export(house, tmp_path, "learned", formats=["parquet"])
    told = files.read_json(folder / "set.json")
    folders = published.folder_names(names)
    for old, new in zip(told["folders"], folders, strict=True):
        os.rename(folder / "images" / old, folder / "images" / new)
    files.write_json(folder / "set.json", {**told, "classes": names, "folders": folders})
    opened = Opened(folder)
    out = tmp_path / "out"
    published.rewrite(opened, out, ["imagefolder", "parquet"], opened.encoding, opened.publish)
    wanted = [
        ("parquet", "rows", "image", "class_id", "soft_label"),
        ("imagefolder", "folder", "image", "label", ""),
    ]
    found = loaded(out, tmp_path, wanted)
    for name, shown in (("parquet", names), ("imagefolder", folders)):
        assert np.array_equal(found[name]["pixels"], pixels_of(house))
        assert found[name]["names"] == shown
    # The rows of the labels, as the card pairs them with images.
    assert "sorted(glob(" in (out / "README.md").read_text()
    paths = sorted(str(p.relative_to(out)) for p in (out / "images").glob("*/*"))
    by_row = np.stack([decode((out / p).read_bytes()) for p in paths])
    assert np.array_equal(by_row, pixels_of(house))


def test_a_webdataset_sample_has_what_the_library_expects(online):
    """Read by `webdataset` itself; members of one sample stand together."""
    import webdataset

    (path,) = (online / "webdataset").glob("*.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it leaves the file to the garbage collector
        rows = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
        gc.collect()
    assert len(rows) == IPC * CLASSES
    assert {row["cls"] for row in rows} == set(range(CLASSES)) and rows[0]["npy"].shape == (10,)
    with tarfile.open(path) as tar:
        assert tar.getnames()[:3] == [f"00000_00000.{s}" for s in ("png", "cls", "npy")]


def test_a_set_without_soft_labels_has_classes_only(sets):
    import pyarrow.parquet as pq

    (path,) = (sets["hard"] / "parquet").glob("*.parquet")
    assert pq.read_schema(path).names == ["image", "class_id"]
    assert "soft_label" not in (sets["hard"] / "README.md").read_text()
    assert not (sets["hard"] / "teacher.safetensors").exists()


# The ten lines

CHECK = """
import importlib.util, sys
sys.path.insert(0, {site!r})
for name in ("ltdd_scale", "torch"):
    assert importlib.util.find_spec(name) is None, name
{code}
rows = np.arange({n})
student = np.random.default_rng(3).normal(0, 2, ({n}, {classes})).astype(np.float32)
np.savez(sys.argv[1], p=p, loss=loss(student, rows), student=student)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_ten_lines_are_what_fit_learns_from(sets, kind, tmp_path, same_threads):
    """In a process that has NumPy and nothing else."""
    (_, code) = blocks(sets[kind] / "README.md")
    assert len(code.strip().splitlines()) <= 10 and "ltdd" not in code
    site = tmp_path / "site"
    site.mkdir()
    packages = Path(np.__file__).parent.parent
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (site / name).symlink_to(packages / name)
    n = IPC * CLASSES
    script = CHECK.format(site=str(site), code=code, n=n, classes=CLASSES)
    out = tmp_path / "found.npz"
    command = [sys.executable, "-I", "-S", "-c", script, str(out)]
    done = subprocess.run(command, cwd=sets[kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    told = fit.describe(sets[kind])
    other = "single" if kind in ("online", "stored") else None
    setup = fit.load(sets[kind], told, ALONE, 1, "t", labels=other)
    drawn = dataclasses.make_dataclass("Drawn", ["partners", "lam"])(
        np.arange(n), np.ones(n, np.float32)
    )
    classes, soft = setup.labels.targets(0, drawn, np.arange(n), None, ALONE)
    p = classes if soft is None else soft.softmax(1)
    assert np.allclose(found["p"], p.numpy(), atol=1e-6)
    student = torch.from_numpy(found["student"])
    loss = training.epoch_loss(student, classes, soft, told.training, "both")
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-5)


def told_otherwise(source: Path, out: Path, mixed: str = "", **sections) -> Path:
    """The set in `source` written again, as if it had been made with these settings, its labels
    `mixed` so."""
    opened = Opened(source)
    if mixed:
        opened.told["mixed"] = mixed
    for section, values in sections.items():
        opened.told["config"][section] |= values
    published.rewrite(opened, out, ["imagefolder"], opened.encoding, opened.publish)
    return out


@pytest.mark.parametrize("soft", ["mse", "kl"])
@pytest.mark.parametrize("order", ["both", "soft_hard_soft"])
def test_the_ten_lines_have_the_loss_that_students_had(sets, soft, order, tmp_path, monkeypatch):
    asked = {"soft_loss": soft, "temperature": 4.0, "order": order, "kappa_mse": 0.5}
    folder = told_otherwise(sets["single"], tmp_path / "set", evaluate=asked)
    (_, code) = blocks(folder / "README.md")
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(folder)
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # files that the ten lines leave open
        exec(code, found)
    n = IPC * CLASSES
    student = np.random.default_rng(3).normal(0, 2, (n, CLASSES)).astype(np.float32)
    told = fit.describe(folder)
    setup = fit.load(folder, told, ALONE, 1, "t")
    drawn = dataclasses.make_dataclass("Drawn", ["partners", "lam"])(
        np.arange(n), np.ones(n, np.float32)
    )
    classes, labels = setup.labels.targets(0, drawn, np.arange(n), None, ALONE)
    assert np.allclose(found["p"], labels.softmax(1).numpy(), atol=1e-6)
    text = (folder / "README.md").read_text()
    assert ("KL at temperature 4" in text) == (soft == "kl") and ("MSE" in text) == (soft == "mse")
    assert ("in the middle half the class alone" in text) == (order != "both")
    parts = {"both": {}} if order == "both" else {"soft": {}, "hard": {"hard": True}}
    for source, more in parts.items():
        ours = training.epoch_loss(
            torch.from_numpy(student), classes, labels, told.training, source
        )
        theirs = found["loss"](student, np.arange(n), **more)
        assert theirs == pytest.approx(float(ours), rel=1e-5)


@pytest.mark.parametrize("soft", ["mse", "kl"])
def test_the_card_says_what_mixed_images_learn(sets, soft, tmp_path, monkeypatch):
    asked = {"soft_loss": soft, "temperature": 4.0}
    mixed_so = {"kl": "softmax", "mse": "logits"}[soft]
    folder = told_otherwise(sets["single"], tmp_path / "set", evaluate=asked, mixed=mixed_so)
    (_, code) = blocks(folder / "README.md")
    monkeypatch.chdir(folder)
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        exec(code, found)
    n, share = IPC * CLASSES, 0.3
    drawn = dataclasses.make_dataclass("Drawn", ["partners", "lam"])(
        np.arange(n)[::-1].copy(), np.full(n, share, np.float32)
    )
    setup = fit.load(folder, fit.describe(folder), ALONE, 1, "t")
    classes, ours = setup.labels.targets(0, drawn, np.arange(n), None, ALONE)

    def mixed(rows):
        return share * rows + (1 - share) * rows[::-1]

    text = (folder / "README.md").read_text()
    assert np.allclose(mixed(found["classes"]), classes.numpy(), atol=1e-6)
    if soft == "mse":
        assert "mix `classes` and `logits` alike by the two images' shares" in text
        theirs = mixed(found["logits"])
    else:
        assert "mix `classes` by the two images' shares w and 1 - w. Of logits a and b" in text
        (line,) = re.findall(r"`(4 \* np\.logaddexp\(.*?)`", text)
        rows = {"a": found["logits"], "b": found["logits"][::-1], "w": share}
        theirs = eval(line, {**found, **rows})
    assert np.allclose(theirs, ours.numpy(), atol=1e-4)


def test_a_set_from_before_labels_were_mixed_so_is_as_it_was_judged(sets, tmp_path):
    """Its logits are mixed, whatever the loss, and its card goes on to say so."""
    folder = shutil.copytree(sets["single"], tmp_path / "old")
    told = files.read_json(folder / "set.json")
    assert told.pop("mixed") == "softmax" and fit.describe(folder).temperature == 1.0
    files.write_json(folder / "set.json", told)
    again = told_otherwise(folder, tmp_path / "new")
    for old in (folder, again):
        assert fit.describe(old).temperature is None
    assert "mix `classes` and `logits` alike" in (again / "README.md").read_text()


def test_a_card_says_how_single_labels_were_made(sets, tmp_path):
    def said(kind, name, **relabel):
        folder = told_otherwise(sets[kind], tmp_path / name, relabel=relabel)
        return (folder / "README.md").read_text()

    whole = "`single.npy` has the teacher's logits of every whole image"
    assert f"{whole}. Students learn" in said("single", "plain")
    text = said("single", "views", views=4, class_share=0.25, adjust=True)
    assert (
        whole not in text
        and (
            "`single.npy` has the mean of the teacher's logits of every whole image and 3 views of it, "
            "adjusted for the long tail (τ · log π), as the logits of 0.75 · softmax + 0.25 · class. "
        )
        in text
    )
    assert "two networks" not in text
    text = said("online", "both", labeller="both")
    assert '"The teacher" is two networks here' in text and "convnet3 + convnet3" in text
    assert "two networks" not in said("hard", "hard", labeller="both")
    text = said("online", "online", class_share=0.25)
    assert "(`online`). The class of an image has a share of 0.25 in these labels." in text
    assert f"{whole}, as the logits of 0.75" in text


def test_a_card_of_an_older_set_tells_of_the_squared_error(sets):
    opened = Opened(sets["single"])
    opened.told["config"]["evaluate"]["soft_loss"] = "mse"
    del opened.told["mixed"]
    before = published.card(opened, None)
    for section, names in (
        ("evaluate", ("soft_loss", "temperature", "order")),
        ("relabel", ("views", "class_share")),
    ):
        for name in names:
            del opened.told["config"][section][name]
    assert published.card(opened, None) == before and "(MSE)" in before


def test_fit_with_other_labels_than_the_sets_own(online, sets, tmp_path, same_threads):
    saved = {kind: tmp_path / f"{kind}.safetensors" for kind in ("online", "single", "hard")}
    for kind, path in saved.items():
        fit.run(online, None, None, 0, None, path, kind)
    fit.run(sets["single"], None, None, 0, None, tmp_path / "own.safetensors")
    weights = {k: frozen.read(path)[1] for k, path in saved.items()}
    own = frozen.read(tmp_path / "own.safetensors")[1]
    assert all(torch.equal(value, own[name]) for name, value in weights["single"].items())
    name = next(iter(own))
    assert not torch.equal(weights["online"][name], own[name])
    assert not torch.equal(weights["hard"][name], own[name])
    for kind in ("learned", "stored", "none"):
        said_plainly(cli("fit", online, "--labels", kind), "--labels", kind)
    said_plainly(cli("fit", sets["hard"], "--labels", "online"), "--labels online")


def test_export_measures_what_other_images_cost(online, tmp_path, same_threads):
    out = tmp_path / "jpeg"
    asked = ["--images", "jpeg", "--quality", 30, "--license", "cc-by-4.0", "--seeds", 2]
    done = cli("export", online, "--out", out, *asked, "--measure", online / "images")
    assert done.returncode == 0, done.stderr
    assert "licence" not in done.stdout
    change = files.read_json(out / "set.json")["images"]["change"]
    lines = re.findall(r"(lossless|exported), seed (\d): ([\d.]+)", done.stdout)
    assert [line[:2] for line in lines] == [
        (which, seed) for which in ("lossless", "exported") for seed in "01"
    ]
    values = [float(line[2]) for line in lines]
    assert change["lossless"] == pytest.approx(np.mean(values[:2]), abs=0.01)
    assert change["exported"] == pytest.approx(np.mean(values[2:]), abs=0.01)
    assert change["difference"] == pytest.approx(change["exported"] - change["lossless"], abs=0.01)
    assert (change["seeds"], change["test_images"]) == (2, IPC * CLASSES)
    card = (out / "README.md").read_text()
    assert "JPEG of quality 30" in card and "2 seeds, 20 test images" in card
    assert header_of(out / "README.md")["license"] == "cc-by-4.0"
    assert published.damage(out) == [] and not list(tmp_path.glob(".*"))
    rows = files.read_json(out / "provenance.json")
    assert all((out / row["file"]).exists() for row in rows)
    # The results are those of the lossless images, and go along.
    assert files.read_json(out / "results.json") == files.read_json(online / "results.json")
    said_plainly(cli("export", out, "--images", "png", "--out", tmp_path / "x"), "lost something")


# export


def test_export_of_each_format_alone(online, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    files.write_json(run / "run.json", {})
    said_plainly(cli("export", run), "no distilled set yet")
    shutil.copytree(online, run / "distilled")
    wanted = {"imagefolder": "images", "parquet": "parquet", "webdataset": "webdataset"}
    for name, folder in wanted.items():
        done = cli("export", run, "--format", name)
        assert done.returncode == 0, done.stderr
        assert "publish.license" in done.stdout
        out = run / f"distilled-{name}"
        there = {p.name for p in out.iterdir() if p.is_dir()}
        assert there == {folder, "labels"} and published.damage(out) == []
        (config,) = header_of(out / "README.md")["configs"]
        assert config["data_files"][0]["path"].startswith(folder)
        assert len(blocks(out / "README.md")[0].strip().splitlines()) == 3
    monkeypatch.chdir(run / "distilled")  # as the card says it
    assert cli("export", ".", "--license", "mit").returncode == 0
    assert header_of(run / "distilled-set" / "README.md")["license"] == "mit"
    done = cli("export", run / "distilled-parquet", "--format", "webdataset")
    said_plainly(done, "needs a set with its folder of images")
    said_plainly(cli("export", tmp_path / "none"), "not a distilled set")
    said_plainly(cli("export", online, "--out", online), "the set itself")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    said_plainly(cli("export", online, "--out", tmp_path / "mine"), "not empty", "thesis.tex")
    said_plainly(cli("export", online, "--images", "jpeg", "--quality", 101), "publish.quality")
    assert not (online.parent / "distilled-set").exists()


def refused(words: str, path: Path, **asked) -> None:
    with pytest.raises(UserError, match=words) as error:
        run_export(Options(path, **asked))
    assert "\n" not in str(error.value)


def test_an_export_replaces_exports_alone(sets, tmp_path, monkeypatch):
    """Nothing of anybody else's is lost."""
    source, out = sets["hard"], tmp_path / "out"
    parquet = {"format": "parquet", "out": out}
    assert run_export(Options(source, **parquet)) == 0
    assert run_export(Options(source, format="webdataset", out=out)) == 0  # in its place
    assert (out / "webdataset").exists() and not (out / "parquet").exists()
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("mine")
    refused(r"not empty, and \.git/HEAD there is not of an export", source, **parquet)
    assert (out / ".git" / "HEAD").read_text() == "mine" and published.damage(out) == []
    for content in ("{}", "[]", "{", '{"x": ""}', "3"):
        foreign = tmp_path / "foreign"
        foreign.mkdir(exist_ok=True)
        (foreign / "files.json").write_text(content)
        (foreign / "thesis.tex").write_text("mine")
        refused("thesis.tex there", source, out=foreign)
    assert (foreign / "thesis.tex").read_text() == "mine"
    (tmp_path / "afile").write_text("")
    refused("is a file", source, out=tmp_path / "afile")
    refused("in the set itself", source, out=source / "inside")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert run_export(Options(source, out=Path())) == 0
    assert published.damage(empty) == []


def test_what_is_wrong_is_one_line_and_said_first(sets, tmp_path, monkeypatch):
    source, bad = sets["hard"], tmp_path / "bad"
    monkeypatch.setattr(published, "rewrite", lambda *_: pytest.fail("it wrote a set"))
    bad.mkdir()
    for content in ('{"classes": ["a"], "folders": ["a"]}', "[]"):
        (bad / "set.json").write_text(content)
        refused("does not say all of a distilled set", bad)
    refused("--quality goes with", source, quality=50)
    refused("--quality goes with", source, quality=50, images="webp")
    refused("do not go with", source, quality=50, format="ddranking")
    asked = {"images": "jpeg", "out": tmp_path / "no" / "such"}
    refused("no such folder", source, measure=tmp_path / "typo", **asked)
    refused("no images of class 0", source, measure=tmp_path, **asked)
    refused("--seeds 0", source, measure=source / "images", seeds=0, **asked)


def test_a_licence_goes_along(house, sets, tmp_path, capsys):
    link = {"license": "Own terms", "license_link": "https://example.org/own_terms"}
    own = export(house, tmp_path, "hard", **link)
    for name, asked in {
        "Own terms, https://example.org/own_terms.": {},
        "mit.": {"license": " mit "},
    }.items():
        run_export(Options(own, format="ddranking", out=tmp_path / "dd", **asked))
        readme = (tmp_path / "dd" / "README.md").read_text()
        assert f"Licence of the source images: {name}" in readme
        run_export(Options(own, out=tmp_path / "set", **asked))
        header = yaml.safe_load((tmp_path / "set" / "README.md").read_text().split("---")[1])
        assert (header["license"], header.get("license_link")) == (
            ("mit", None) if asked else ("other", link["license_link"])
        )
    assert "not stated" not in capsys.readouterr().out
    run_export(Options(sets["hard"], format="ddranking", out=tmp_path / "dd", license="  "))
    assert "images: not stated." in (tmp_path / "dd" / "README.md").read_text()
    assert "is not stated" in capsys.readouterr().out


def test_a_disk_that_fills_while_tensors_are_written_is_said(sets, tmp_path, monkeypatch):
    path = tmp_path / "set"
    with pytest.raises(UserError, match="is the disk full"):
        ddranking._save(torch.zeros(10**5), Path("/dev/full"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused("no space left", sets["hard"], format="ddranking", out=path)
    assert not list(tmp_path.iterdir())


def test_classes_of_one_name_are_judged_on_their_own_images(sets, tmp_path):
    told = fit.describe(sets["hard"])
    folders = [f"{k:05d}_x" for k in range(CLASSES)]
    told = dataclasses.replace(told, classes=["x", "x", *told.classes[2:]], folders=folders)
    for name in ("x", *folders, told.classes[2]):
        (tmp_path / name).mkdir()
    wanted = [*folders[:2], told.classes[2], *folders[3:]]
    assert fit.judged_folders(tmp_path, told) == wanted


def test_the_tensors_that_ddranking_reads(house, online, sets, tmp_path):
    done = cli(
        "export", online, "--format", "ddranking", "--dataset", "CIFAR10", "--out", tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    images, labels = (torch.load(tmp_path / "a" / n) for n in ("images.pt", "labels.pt"))
    assert images.shape == (20, 3, SIZE, SIZE) and images.dtype == labels.dtype == torch.float32
    mean, std = (np.asarray(v)[:, None, None] for v in ddranking.DATASETS["CIFAR10"][1:])
    assert np.allclose(images, (pixels_of(house) / 255 - mean) / std, atol=1e-5)
    assert np.array_equal(labels, np.load(online / "labels" / "single.npy"))
    assert published.damage(tmp_path / "a") == [] and not list((tmp_path / "a").glob("*.tmp"))
    readme = (tmp_path / "a" / "README.md").read_text()
    assert "LabelRobustScoreSoft" in readme and 'dataset="CIFAR10"' in readme
    ddranking.write(Opened(sets["hard"]), tmp_path / "b", None)
    assert not (tmp_path / "b" / "labels.pt").exists()
    assert "LabelRobustScoreHard" in (tmp_path / "b" / "README.md").read_text()
    told = files.read_json(online / "set.json")
    shown = (pixels_of(house) / 255 - np.asarray(told["mean"])[:, None, None]) / np.asarray(
        told["std"]
    )[:, None, None]
    assert np.allclose(torch.load(tmp_path / "b" / "images.pt"), shown, atol=1e-5)
    assert tuple(ddranking.DATASETS) == NAMED_SETS
    wrong = cli(
        "export", online, "--format", "ddranking", "--dataset", "CIFAR100", "--out", tmp_path / "c"
    )
    said_plainly(wrong, "100 classes")
    uneven = shutil.copytree(sets["hard"], tmp_path / "uneven")
    next((uneven / "images").rglob("*.png")).unlink()
    said_plainly(
        cli("export", uneven, "--format", "ddranking", "--out", tmp_path / "d"), "equally many"
    )


DDRANKING = """
import sys, torch
from ddranking.utils import TensorDataset
from ddranking.loss import SoftCrossEntropyLoss
images, labels = torch.load("images.pt"), torch.load("labels.pt")
rows = TensorDataset(images, labels)
x, y = next(iter(torch.utils.data.DataLoader(rows, batch_size=20)))
assert torch.equal(x, images) and torch.equal(y, labels)
loss = SoftCrossEntropyLoss(temperature=1.0)(labels, y)
p = labels.softmax(1)
assert torch.allclose(loss, -(p * p.log()).sum(1).mean(), atol=1e-5), "it takes logits"
"""


@pytest.mark.skipif(find_spec("ddranking") is None, reason="the package ddranking is not installed")
def test_the_package_ddranking_takes_the_tensors(online, tmp_path):
    ddranking.write(Opened(online), tmp_path, "CIFAR10")
    done = subprocess.run(
        [sys.executable, "-c", DDRANKING], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
