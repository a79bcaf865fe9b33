"""What a user meets at the command line: help, results, and errors that say how to mend."""

import json
import os
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT, TINY, cli, image_folder, said_plainly
from torchvision.datasets import ImageFolder


def variant(tmp_path, text, **sections):
    """The tiny config with some sections laid over it."""
    values = yaml.safe_load(text)
    for section, settings in sections.items():
        values[section] = settings
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_help_helps():
    said = cli("--help").stdout
    for word in ("run", "train", "calibrate", "status", "verify", "fit", "ablation", "config"):
        assert word in said
    assert (
        "configs/quickstart.yaml" in cli("run", "--help").stdout
        and "teacher" in cli("train", "--help").stdout
    )
    assert "recover.iterations = " in cli("config").stdout


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["reocver.lr=1"], ["unknown config key 'reocver'"]),
        (["ipc=0"], ["ipc", "at least 1"]),
        (["teacher.lr=fast"], ["teacher.lr", "float"]),
        (["teacher.batch_size=9999"], ["teacher.batch_size=9999", "training images", "lower it"]),
        (["observer.norm=instance"], ["no BatchNorm layer"]),
        (["observer.net=resnet51"], ["unknown net 'resnet51'", "resnet50"]),
        (["data.imbalance_factor=5000"], ["class 4 would have no training images"]),
        (["data.source=folder", "data.path=/nowhere/at/all"], ["data.path", "no such folder"]),
        (["ipc"], ["expected a.b=value"]),
        (["recover.betas=[0.5,", "0.9]"], ["is not a value", "leave no blanks"]),
    ],
)
def test_a_wrong_setting_is_one_line(tiny, tmp_path, sets, words):
    said_plainly(cli("run", tiny, "--out", tmp_path / "r", "--nproc", 1, "--set", *sets), *words)
    assert (
        not list((tmp_path / "store").glob("*/*/stage.json"))
        or "batch_size" in sets[0]
        or "observer" in sets[0]
    )


def test_a_missing_config_and_a_foreign_folder(tiny, tmp_path):
    said_plainly(cli("run", tmp_path / "no.yaml"), "cannot read the config")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    said_plainly(cli("run", tiny, "--out", tmp_path / "full"), "not empty and is not a run folder")
    assert (tmp_path / "full" / "thesis.tex").exists()
    said_plainly(cli("status", tmp_path / "full"), "not a run folder")
    said_plainly(cli("verify", tmp_path / "full"), "nothing to verify")
    said_plainly(cli("verify", tmp_path / "no"), "no such path")
    said_plainly(cli("fit", tmp_path / "full"), "not a distilled set")


def test_a_run_folder_of_another_config(finished, tmp_path):
    _, run = finished
    other = tmp_path / "other.yaml"
    other.write_text(TINY)
    said_plainly(
        cli("run", other, "--out", run), "holds a run of the config 'tiny', not 'other'", "--out"
    )


def test_bad_lists_and_folders(tmp_path):
    image_folder(tmp_path / "real", {"a": 12, "b": 12})
    image_folder(tmp_path / "real", {"a": 2, "b": 2}, "test")
    names = [f"train/{c}/{k:03d}.png {i}" for i, c in enumerate("ab") for k in range(12)]
    held = [f"test/{c}/{k:03d}.png {i}" for i, c in enumerate("ab") for k in range(2)]
    base = {
        "source": "list",
        "path": str(tmp_path / "real"),
        "train_list": "train.txt",
        "test_list": "test.txt",
        "profile": "full",
        "resolution": 8,
    }
    path = variant(tmp_path, TINY, data=base)

    def attempt(train, test, *words):
        (tmp_path / "real" / "train.txt").write_text("\n".join(train))
        (tmp_path / "real" / "test.txt").write_text("\n".join(test))
        said_plainly(cli("shard", path, "--out", tmp_path / "r", "--nproc", 1), *words)
        assert not list((tmp_path / "store").rglob("stage.json"))

    attempt([], held, "the list is empty")
    attempt([*names, "train/a/777.png 0"], held, "1 of 25 files are not under", "train/a/777.png")
    attempt(names, [*held, "test/a/000.png 2"], "label 2")
    attempt([n for n in names if n.endswith("0")], held, "label 1")
    for k in range(12):
        (tmp_path / "real" / "train" / "b" / f"{k:03d}.png").write_bytes(b"not an image")
    attempt(names, held, "class 1 (b) has no image that decodes")


def test_a_single_bad_image_is_quarantined_and_the_run_goes_on(tmp_path):
    image_folder(tmp_path / "real", {"a": 12, "b": 12})
    image_folder(tmp_path / "real", {"a": 2, "b": 2}, "test")
    (tmp_path / "real" / "train" / "a" / "003.png").write_bytes(b"broken")
    path = variant(
        tmp_path, TINY, data={"source": "folder", "path": str(tmp_path / "real"), "resolution": 8}
    )
    done = cli("shard", path, "--out", tmp_path / "r", "--nproc", 1)
    assert done.returncode == 0 and "1 images do not decode" in done.stderr
    (quarantine,) = (tmp_path / "store").rglob("quarantine.json")
    (row,) = json.loads(quarantine.read_text())
    assert row["name"].endswith("003.png") and "UnidentifiedImageError" in row["reason"]
    assert cli("verify", quarantine.parent).returncode == 0


def test_more_ranks_than_chunks(finished, tmp_path):
    config, run = finished
    done = cli(
        "recover",
        config,
        "--out",
        tmp_path / "r",
        "--store",
        run.parent / "store",
        "--nproc",
        2,
        "--set",
        "recover.batch_size=40",
        "recover.chunk_classes=0",
    )
    said_plainly(done, "recover has 1 chunk for 2 ranks", "--nproc 1", "recover.batch_size=20")


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=180k", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root to mount a small tmpfs")
    try:
        command = ("train", "teacher", tiny, "--out", disk / "r", "--nproc", 1)
        said_plainly(cli(*command), "no space left")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        done = cli(*command)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_finished_command_does_nothing_again(finished):
    config, run = finished
    before = {
        p: p.stat().st_mtime_ns
        for p in run.parent.rglob("*")
        if p.is_file() and p.name not in ("run.json", "config.yaml")
    }
    done = cli("run", config, "--out", run)
    assert done.returncode == 0 and "…" not in done.stdout
    assert {
        p: p.stat().st_mtime_ns
        for p in run.parent.rglob("*")
        if p.is_file() and p.name not in ("run.json", "config.yaml")
    } == before


def test_what_scripts_rely_on(finished):
    _, run = finished
    results = json.loads((run / "results.json").read_text())
    assert {r["set"] for r in results["rows"]} == {"distilled", "random"} and "summary" in results
    for row in results["rows"]:
        assert (
            set(row)
            >= {"set", "net", "ipc", "seed", "top1", "top5", "class_std", "many", "medium", "few"}
            and 0 <= row["top1"] <= 100
        )
    distilled = ImageFolder(run / "distilled" / "images")
    assert (
        distilled.classes == [str(d) for d in range(10)]
        and len(distilled) == 40
        and distilled[0][0].size == (8, 8)
    )
    page = (run / "report.html").read_text()
    assert (
        "<svg" in page
        and "data:image/png;base64," in page
        and "http://" not in page
        and "https://" not in page
    )
    assert (run / "distilled" / "README.md").read_text().count(
        "Normalisation"
    ) == 1 and "| distilled" in (run / "results.md").read_text()
    assert cli("verify", run).returncode == 0 and cli("verify", run / "distilled").returncode == 0


def test_damage_is_found_by_verify_and_refused_by_the_next_stage(finished, tmp_path):
    config, run = finished
    store = tmp_path / "store"
    shutil.copytree(run.parent / "store", store)
    weights = store / json.loads((run / "run.json").read_text())["stages"]["teacher"] / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = cli("verify", weights.parent)
    assert done.returncode == 1 and "weights.pt: damaged" in done.stdout
    said_plainly(
        cli(
            "initialize",
            config,
            "--out",
            tmp_path / "r",
            "--store",
            store,
            "--nproc",
            1,
            "--set",
            "ipc=3",
        ),
        "weights.pt: damaged",
        "delete the folder",
    )


def test_training_on_the_distilled_set_alone(finished, tmp_path):
    _, run = finished
    moved = tmp_path / "moved"
    shutil.copytree(run / "distilled", moved)
    done = cli("fit", moved, "--epochs", 2, "--test", moved / "images", "--save", tmp_path / "s.pt")
    assert done.returncode == 0 and "top-1" in done.stdout and (tmp_path / "s.pt").exists(), (
        done.stderr
    )
    assert cli("verify", moved).returncode == 0


def test_ablation_is_one_command(finished, tmp_path):
    config, run = finished
    done = cli(
        "ablation",
        config,
        "--out",
        tmp_path / "a",
        "--store",
        run.parent / "store",
        "--nproc",
        1,
        "--set",
        "evaluate.epochs=2",
        "observer.epochs=2",
        "teacher.epochs=2",
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "a" / "ablation.md").read_text()
    for variant_name in ("full method", "no debiasing", "no fair calibration", "no confident init"):
        assert variant_name in table


def test_the_readme_names_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    assert "make quickstart" in readme and "make test" in readme
