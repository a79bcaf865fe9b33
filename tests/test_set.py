"""The exported set: what lies in it, its weights and images, its card and its score."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import cli
from PIL import Image
from set_tools import (
    ALONE,
    config_of,
    export,
    header_of,
    pixels_of,
    results_of,
)

from ltdd_scale import fit, recipe
from ltdd_scale.config.root import check
from ltdd_scale.data import shards
from ltdd_scale.errors import UserError
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.stage import stage as relabel_stage
from ltdd_scale.models import frozen, safe
from ltdd_scale.pipeline import graph
from ltdd_scale.publish import card, formats, hub, lrs
from ltdd_scale.publish import set as published
from ltdd_scale.publish.encode import Encoding, decode
from ltdd_scale.publish.opened import Opened
from ltdd_scale.runtime import files

# What is in it


@pytest.mark.parametrize("kind", ["online", "stored", "single"])
def test_a_set_that_a_teacher_labelled_has_single_logits(house, sets, kind):
    table = np.load(sets[kind] / "labels" / "single.npy")
    teacher = frozen.load(house / "teacher" / "weights.pt", ALONE)
    split = shards.ShardSplit(house / "shard", "train")
    mean, std = (torch.tensor(v)[:, None, None] for v in (split.mean, split.std))
    shown = (torch.from_numpy(pixels_of(house)).float() / 255 - mean) / std
    assert table.dtype == np.float32
    assert np.allclose(table, teacher.logits(shown).numpy(), atol=1e-4)
    assert (sets[kind] / "labels" / "epoch-00000-values.npy").exists() == (kind == "stored")


def test_only_labels_of_views_are_made_anew_for_that():
    """Sets with other labels keep their fingerprints."""
    versions = {kind: relabel_stage(config_of(kind), "recover").version for kind in KINDS}
    assert versions == {"online": 4, "stored": 4, "single": 3, "hard": 3, "learned": 3}


def test_nothing_of_publish_is_hashed_into_a_stage():
    plain = config_of("online")
    other = config_of("online", license="mit", images="jpeg", quality=3, tags=["x"], formats=[])
    prints = [
        {name: node.fingerprint for name, node in graph.build(recipe.stages(c, "x"), c).items()}
        for c in (plain, other)
    ]
    assert prints[0] == prints[1]


def test_settings_without_effect_are_said():
    said = check(config_of("online", quality=3, license_link="x"))
    assert [w for w in said if w.startswith("publish.quality has no effect")]
    assert [w for w in said if w.startswith("publish.license_link has no effect")]


def test_everything_is_hashed(online, tmp_path):
    moved = shutil.copytree(online, tmp_path / "moved")
    assert published.damage(moved) == []
    hashes = files.read_json(moved / "files.json")
    there = {p.relative_to(moved).as_posix() for p in moved.rglob("*") if p.is_file()}
    assert there - {"files.json"} == set(hashes)
    for name in ("parquet/train-00000-of-00001.parquet", "teacher.safetensors", "README.md"):
        with open(moved / name, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
    assert len(published.damage(moved)) == 3
    done = cli("verify", moved)
    assert done.returncode == 1 and "3 damaged" in done.stdout


def test_no_path_of_the_machine_goes_along(house, tmp_path, monkeypatch):
    before = config_of("hard")
    data = before.data.model_copy(update={"path": "/home/me/x", "train_list": "/home/me/a.txt"})
    monkeypatch.setattr("set_tools.config_of", lambda *_: before.model_copy(update={"data": data}))
    told = (export(house, tmp_path, "hard") / "set.json").read_text()
    assert "/home" not in told and '"train_list": "a.txt"' in told


def test_two_exports_are_the_same_bytes(house, online, tmp_path):
    again = export(house, tmp_path, "online")
    assert files.read_json(again / "files.json") == files.read_json(online / "files.json")


# Weights


def test_the_teacher_is_a_safetensors_file_with_its_recipe(house, online):
    from safetensors import safe_open

    assert not (online / "teacher.pt").exists()
    with safe_open(online / "teacher.safetensors", "np") as opened:
        told, names = opened.metadata(), set(opened.keys())
    before = frozen.load(house / "teacher" / "weights.pt", ALONE)
    assert json.loads(told["recipe"]) == before.recipe
    assert not any(name.startswith(frozen.TRAINING_ONLY) for name in names)
    after = frozen.load(online / "teacher.safetensors", ALONE)
    ours, theirs = before.model.state_dict(), after.model.state_dict()
    assert ours.keys() == theirs.keys() == names
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_damaged_and_foreign_weights_are_refused(online, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="cannot read"):
        frozen.load(path, ALONE)
    whole = (online / "teacher.safetensors").read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="its hash does not match"):
        frozen.load(path, ALONE)
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="is damaged"):
        frozen.load(path, ALONE)
    path.write_bytes(whole.replace(b"convnet3", b"convnet4"))  # the recipe is hashed too
    with pytest.raises(UserError, match="its hash does not match"):
        frozen.load(path, ALONE)
    weights = {"w": torch.zeros(2)}
    for made_of, words in (('{"net"', "its recipe"), ("{}", "")):  # the hash is as it was at first
        told = {"recipe": made_of, "sha256": safe._digest(weights, "")}
        save_file(weights, path, told)
        if words:
            with pytest.raises(UserError, match=words):
                safe.load(path)
        else:
            assert safe.load(path)[0] == {}
    save_file(weights, path)
    with pytest.raises(UserError, match="not from ltdd_scale"):
        frozen.load(path, ALONE)


def test_fit_reads_sets_of_the_format_before_and_saves_safetensors(
    house, online, tmp_path, same_threads
):
    old = shutil.copytree(online, tmp_path / "old")
    for name in ("parquet", "webdataset"):
        shutil.rmtree(old / name)
    for name in ("teacher.safetensors", "results.json"):
        (old / name).unlink()
    shutil.copyfile(house / "teacher" / "weights.pt", old / "teacher.pt")
    told = files.read_json(old / "set.json")
    for name in ("images", "formats", "teacher", "soft_labels", "provenance", "image_counts"):
        del told[name]
    del told["config"]["publish"]
    files.write_json(old / "set.json", {**told, "format": 2})
    saved = [tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "new.pt"]
    for folder, path in zip((old, online, online), saved, strict=True):
        assert fit.run(folder, None, None, 0, None, path) == 0
    first, *others = (frozen.load(path, ALONE).model.state_dict() for path in saved)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    done = cli("export", old, "--out", tmp_path / "written")
    assert done.returncode == 0, done.stderr
    written = tmp_path / "written"
    assert files.read_json(written / "set.json")["format"] == published.FORMAT
    assert (written / "teacher.safetensors").exists() and not (written / "teacher.pt").exists()
    assert "## Results" not in (written / "README.md").read_text()


# Images


@pytest.mark.parametrize("name", ["png", "webp", "webp-lossy", "jpeg"])
def test_images_of_each_format(house, tmp_path, name):
    folder = export(house, tmp_path, "hard", images=name, quality=80)
    told, opened = files.read_json(folder / "set.json")["images"], Opened(folder)
    real = pixels_of(house)
    shown = np.stack([decode(s.content) for s in opened.samples()])
    assert opened.encoding == Encoding(name, 80 if opened.encoding.lossy else 90)
    difference = np.abs(shown.astype(int) - real)
    assert (difference.max() == 0) == (name in ("png", "webp"))
    assert difference.mean() < 8
    assert told["bytes"] == sum(p.stat().st_size for p in (folder / "images").rglob("*.*"))
    assert told["png_bytes"] == sum(len(Encoding("png").encode(x)) for x in real)
    assert ("quality" in told) == (name in ("webp-lossy", "jpeg"))
    card = (folder / "README.md").read_text()
    assert opened.encoding.title in card
    assert ("has not been measured" in card) == opened.encoding.lossy
    assert (" as PNG)" in card) == (name != "png")
    rows = files.read_json(folder / "provenance.json")
    assert all((folder / row["file"]).exists() for row in rows) and len(rows) == len(real)


# The score


def test_the_label_robust_score_by_hand():
    perfect = lrs.Accuracies(1.0, 1.0, 1.0, 0.0)
    assert perfect.score(1.0) == pytest.approx(1.0) and perfect.score(0.0) < 1
    worst = lrs.Accuracies(1.0, 0.0, 0.0, 1.0)
    assert worst.score() == pytest.approx(0.0)
    found = lrs.of_results(results_of("online"))["convnet3"]
    assert found == lrs.Accuracies(0.7, 0.4, 0.6, 0.5)
    alpha = 0.5 * 0.1 - 0.5 * 0.3
    assert found.score() == pytest.approx((np.exp(alpha) - np.exp(-1)) / (np.e - np.exp(-1)))


def test_the_score_is_shown_only_where_all_of_it_was_run(sets, house, tmp_path):
    card = (sets["online"] / "README.md").read_text()
    assert "Label-robust score (convnet3): **0.228** of 1, from HLR +30.0 and IOR +10.0" in card
    assert "online against online labels" in card
    for change in ("plain", "hard", "random"):
        results = results_of("online")
        summary = results["summary"]
        if change == "plain":
            summary["plain"] = summary["plain"][:0]
        else:
            summary["students"] = [
                e for e in summary["students"] if change not in (e["set"], e["labels"])
            ]
        assert lrs.text(results) == ""
    assert lrs.of_results(results_of("hard"))["convnet3"].distilled_own == 0.6


# The card


def test_the_header_is_as_hugging_face_reads_it(sets, online, tmp_path):
    header = header_of(online / "README.md")
    assert header["pretty_name"] == "a set" and header["size_categories"] == ["n<1K"]
    assert header["task_categories"] == ["image-classification"]
    assert header["tags"] == ["dataset-distillation", "long-tailed", "image", "rldd"]
    (config,) = header["configs"]
    assert config["data_files"] == [{"split": "train", "path": "parquet/*.parquet"}]
    sizes = (999, 1000, 50_000, 100_000, 2_000_000)
    wanted = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    assert [hub.size_category(n) for n in sizes] == wanted


def test_a_licence_is_asked_for_and_never_made_up(house, online, tmp_path):
    card = online / "README.md"
    assert "license" not in header_of(card)
    assert "**not stated**" in card.read_text() and "`publish.license`" in card.read_text()
    other = export(
        house,
        tmp_path,
        "hard",
        license="Terms of the ImageNet",
        license_link="https://example.org/terms",
        source="ImageNet-LT",
        tags=["imagenet"],
    )
    header, text = header_of(other / "README.md"), (other / "README.md").read_text()
    assert header["license"] == "other" and header["license_name"] == "terms-of-the-imagenet"
    assert (
        header["license_link"] == "https://example.org/terms" and header["tags"][-1] == "imagenet"
    )
    assert "not stated" not in text and "Terms of the ImageNet, https" in text
    assert "ImageNet-LT" in text


def test_names_in_a_card_are_words_and_no_markup(online, house, tmp_path):
    assert card.words("a <b>\n `c` *d* _e_ [f](g) | \\") == (
        r"a \<b\> \`c\` \*d\* \_e\_ \[f\](g) \| \\"
    )
    assert card.words("https://a.org/b_c*d see_it") == r"https://a.org/b_c*d see\_it"
    folder = shutil.copytree(online, tmp_path / "set")
    told = files.read_json(folder / "set.json")
    told |= {"classes": [f"<{k}>\n# x" for k in range(10)], "name": "a\n# b"}
    told["config"]["publish"] |= {"license": "  ", "source": "*all*\n---"}
    files.write_json(folder / "set.json", told)
    text = published.card(Opened(folder), None).split("---", 2)[2]
    assert r"\<0\> # x, \<1\> # x" in text and "# a # b: a distilled" in text
    assert "\n# x" not in text and r"\*all\* ---" in text
    assert "**not stated**" in text  # a licence of spaces says nothing


def test_a_card_tells_of_tables_that_are_there(online, tmp_path):
    """Sets of format 2 with online labels have no `single.npy`."""
    for formats_, words in (
        (["webdataset"], "A sample has the key `CLASS_K`"),
        (["parquet"], "Row i of the labels belongs to row i of the parquet files,"),
        (["imagefolder", "parquet"], '`sorted(glob("images/*/*"))`, class after class, which is'),
    ):
        opened = Opened(online)
        opened.told["formats"] = formats_
        text = published.card(opened, None)
        assert words in text and ("glob(" in text) == ("imagefolder" in formats_)
        assert "`single.npy` has the teacher's logits of every whole image" in text
    opened = Opened(shutil.copytree(online, tmp_path / "set"))
    (opened.folder / "labels" / "single.npy").unlink()
    published.rewrite(
        opened, tmp_path / "new", ["imagefolder", "parquet"], opened.encoding, opened.publish
    )
    text = (tmp_path / "new" / "README.md").read_text()
    assert "single.npy" not in text and "no table of soft labels" in text


def test_the_card_of_a_thousand_classes_is_short(online, tmp_path):
    folder = shutil.copytree(online, tmp_path / "set")
    told = files.read_json(folder / "set.json")
    names = [f"n{k:08d}" for k in range(1000)]
    told |= {"classes": names, "folders": names, "train_counts": [5] * 1000, "ipc": 50}
    files.write_json(folder / "set.json", {**told, "image_counts": [50] * 1000})
    text = published.card(Opened(folder), results_of("online"))
    assert len(text) < 6000 and "… (1000 in all, in set.json)" in text
    assert yaml.safe_load(text.split("---")[1])["size_categories"] == ["10K<n<100K"]


def test_no_list_of_samples_is_held_in_memory(house, tmp_path):
    """Shards are written while images are read: never more open than a group of rows."""
    folder = export(house, tmp_path, "hard", formats=[])
    opened, held, most = Opened(folder), [0], [0]

    class Counted(bytes):
        def __new__(cls, content):
            held[0] += 1
            most[0] = max(most[0], held[0])
            return super().__new__(cls, content)

        def __del__(self):
            held[0] -= 1

    read = opened._sample
    opened._sample = lambda *at: dataclasses.replace(read(*at), content=Counted(read(*at).content))
    formats.write_webdataset(opened, tmp_path / "tar")
    assert 0 < most[0] <= 3


# What a student of an exported set is tried on


def test_fit_says_what_is_wrong_with_its_files_before_it_trains(
    online, tmp_path, monkeypatch, same_threads
):
    monkeypatch.setattr(fit, "fit", lambda *a, **k: pytest.fail("training has begun"))
    names = fit.describe(online).classes
    test = tmp_path / "test"
    for name in names:
        deep = test / name / "images"
        deep.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(deep / "a.png")
        (deep / "._a.png").write_bytes(b"what a Mac leaves")
    assert fit.read_test(test, fit.describe(online)).labels.tolist() == list(range(len(names)))
    with pytest.raises(UserError, match="that is a folder; say the file too"):
        fit.run(online, None, None, 0, test, tmp_path)
    (deep / "b.png").write_bytes((deep / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"b\.png: not an image that can be read"):
        fit.run(online, None, None, 0, test, None)


def test_a_student_that_diverges_is_an_error_at_once(online, monkeypatch, same_threads):
    told = fit.describe(online)
    wild = dataclasses.replace(told, training=told.training.model_copy(update={"lr": 1e30}))
    with pytest.raises(UserError, match=r"the loss is nan after \d epochs; lower evaluate\.lr"):
        fit.fit(online, wild, fit.join(told), epochs=50)
