"""What a user meets at the command line: help, results, and errors that say how to mend."""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
import yaml
from conftest import ROOT, TINY, cli, folder_of, image_folder, process, said_plainly
from torchvision.datasets import ImageFolder

from ltdd_scale import arguments
from ltdd_scale.config import load
from ltdd_scale.launch import guard, sweep


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
    for word in ("run", "train", "calibrate", "status", "verify", "fit", "sweep", "config"):
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
    assert not list((tmp_path / "store").glob("*/*/stage.json"))


def test_what_only_a_stage_can_know_is_said_when_it_begins(tiny, tmp_path):
    done = cli(
        "run", tiny, "--out", tmp_path / "r", "--nproc", 1, "--set", "teacher.batch_size=9999"
    )
    said_plainly(done, "teacher.batch_size=9999", "training images", "lower it")


def test_a_missing_config_and_a_foreign_folder(tiny, tmp_path):
    said_plainly(cli("run", tmp_path / "no.yaml"), "cannot read the config")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    said_plainly(
        cli("run", tiny, "--out", tmp_path / "full", "--nproc", 1),
        "not empty and is not a run folder",
    )
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
    attempt(names, held, "class 1 (b) has no train image that can be read")


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


@pytest.mark.slow
def test_more_ranks_than_chunks(finished, tmp_path):
    config, run = finished
    place = ("--out", tmp_path / "r", "--store", run.parent / "store", "--nproc", 2)
    one_chunk = ("--set", "recover.batch_size=40", "recover.chunk_classes=0")
    done = cli("recover", config, *place, *one_chunk)
    assert done.returncode == 0, done.stderr
    assert "recover has 1 chunk for 2 ranks: the others have nothing to do" in done.stdout


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
        said_plainly(cli(*command), "of disk", "--force")
        said_plainly(cli(*command, "--force"), "no space left")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        done = process(*command)
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
    assert {r["set"] for r in results["rows"]} == {
        "distilled",
        "random",
        "plain",
    } and "summary" in results
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


def test_verify_goes_on_where_a_stage_is_not_there(finished, tmp_path):
    _, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = json.loads((copy / "run.json").read_text())
    record["store"], store = str(tmp_path / "store"), tmp_path / "store"
    (copy / "run.json").write_text(json.dumps(record))
    shutil.copytree(run.parent / "store", store)
    shutil.rmtree(store / record["stages"]["calibrate"])
    (store / record["stages"]["recover"] / "stage.json").unlink()
    done = cli("verify", copy)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {line.partition(": ")[0]: line.partition(": ")[2] for line in done.stdout.splitlines()}
    assert said[str(store / record["stages"]["calibrate"])] == "not there any more"
    assert said[str(store / record["stages"]["recover"])] == "not finished"
    assert said[str(store / record["stages"]["evaluate"])] == "as recorded"


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user one must be root")
def test_another_users_run_is_looked_at():
    code = (
        "import os, sys; from pathlib import Path; from ltdd_scale.pipeline import store\n"
        "os.setuid(65534)\n"
        "sys.exit(3 + store.is_running(Path(sys.argv[1])))"
    )

    def looked() -> int:
        return subprocess.run([sys.executable, "-c", code, folder]).returncode

    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/.lock", "w") as held:
        os.chmod(folder, 0o755)
        fcntl.flock(held, fcntl.LOCK_EX)
        assert looked() == 4, "somebody is at work"
        fcntl.flock(held, fcntl.LOCK_UN)
        assert looked() == 3
        os.chmod(folder, 0o700)
        assert looked() == 3, "who may not look cannot tell"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "X", "--nproc", "0"], "from 1 up"),
        (["run", "X", "--max-restarts", "-1"], "from 0 up"),
        (["sweep", "X", "--max-jobs", "-1"], "from 0 up"),
        (["logs", "X", "--lines", "0"], "from 1 up"),
        (["status", "X", "--watch", "-1"], "expected seconds"),
        (["run", "X", "--cluster", "slurm", "--nproc", "2"], "the profile says how many"),
        (["sweep", "X", "--cluster", "slurm", "--nproc", "2"], "the profile says how many"),
        (["run", "X", "--cluster", "local", "--max-restarts", "2"], "of jobs (retries)"),
        (["status", "X", "--json", "--watch"], "do not go together"),
    ],
)
def test_options_that_make_no_sense(words, said, tiny, tmp_path):
    done = cli(*(tiny if w == "X" else w for w in words))
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


def test_training_on_the_distilled_set_alone(finished, tmp_path):
    _, run = finished
    moved = tmp_path / "moved"
    shutil.copytree(run / "distilled", moved)
    done = cli("fit", moved, "--epochs", 2, "--test", moved / "images", "--save", tmp_path / "s.pt")
    assert done.returncode == 0 and "top-1" in done.stdout and (tmp_path / "s.pt").exists(), (
        done.stderr
    )
    assert cli("verify", moved).returncode == 0


DOCS = sorted([ROOT / "README.md", ROOT / "slurm/README.md", *(ROOT / "docs").glob("*.md")])


def commands_of(text: str) -> list[list[str]]:
    """The commands in blocks of code, each without its comment."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^(?: {4})?ltdd-scale (.*)$", joined, re.MULTILINE)
    return [shlex.split(line.partition(" # ")[0]) for line in lines]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_commands_of_the_documents_are_such(path):
    """They parse, their configs are there, and their settings are known."""
    text = path.read_text()
    for words in commands_of(text):
        words = [w.strip("[]") for w in words]
        args = arguments.parser().parse_args(words)
        if "config" in args and str(args.config) == "mine.yaml":
            assert "cp configs/own_images.yaml mine.yaml" in text
            args.config = ROOT / "configs/own_images.yaml"
        if "config" in args and (ROOT / args.config).exists():
            load.load(ROOT / args.config, ["data.path=x", *args.set])
        elif "config" in args:
            assert args.config.name == "X.yaml", words
        if args.command == "sweep" and args.file.name != "X.yaml":
            good, bad = sweep.load(ROOT / args.file).load_points(args.set)
            assert good and not bad, words
    if path.parent == ROOT:
        assert len(commands_of(text)) > 10
        assert "make quickstart" in text and "make test" in text


@pytest.mark.slow
def test_more_ranks_than_the_machine_has(tiny, tmp_path):
    """Nothing starts: not one of 500 processes."""
    cores = len(os.sched_getaffinity(0))
    begin = time.monotonic()
    done = cli("run", tiny, "--out", tmp_path / "r", "--nproc", 500, "--set", "runtime.device=cpu")
    said_plainly(done, "--nproc 500", f"{cores} cores", "--force")
    assert time.monotonic() - begin < 60 and not list((tmp_path / "store").glob("*/*"))
    done = cli("shard", tiny, "--out", tmp_path / "r", "--nproc", cores + 1)
    assert done.returncode == 0 and f"warning: {cores + 1} ranks on {cores} cores" in done.stderr


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["ipc=100000000", "evaluate.random=false"], ["disk", "lower ipc", "--force"]),
        (["ipc=100000000"], ["student/random", "memory", "lower ipc", "--force"]),
        (["recover.batch_size=100000000", "ipc=10000000"], ["recover", "memory"]),
        (["teacher.width=1000000"], ["teacher", "memory"]),
    ],
)
def test_more_than_the_machine_has(tiny, tmp_path, sets, words):
    done = cli("run", tiny, "--out", tmp_path / "r", "--nproc", 1, "--set", *sets)
    said_plainly(done, *words)
    assert not list((tmp_path / "store").glob("*/*"))


def test_a_net_that_cannot_take_the_resolution(tiny, tmp_path):
    """Known before anything starts, not after the experts."""
    for key in ("evaluate.nets=[alexnet]", "observer.net=alexnet"):
        done = cli("run", tiny, "--out", tmp_path / "r", "--nproc", 1, "--set", key)
        said_plainly(done, "alexnet", "8 pixels")
    assert not list((tmp_path / "store").glob("*/*"))


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """bash leaves the ~ of --set data.path=~/images alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder(tmp_path / "images", {"a": 4, "b": 3}, ".")
    path = variant(tmp_path, TINY, data={"source": "folder", "path": "~/images", "profile": "full"})
    done = cli("shard", path, "--out", tmp_path / "r", "--set", "data.test_fraction=0.3")
    assert done.returncode == 0, done.stderr


def test_data_that_moved_and_data_that_changed(tmp_path):
    """A moved set is the same set. A set that was changed in place is another one."""
    for split, count in (("train", 12), ("test", 2)):
        image_folder(tmp_path / "real", {"a": count, "b": count}, split)
    path = variant(tmp_path, TINY, data={"source": "folder", "resolution": 8, "path": "PATH"})
    path.write_text(path.read_text().replace("PATH", str(tmp_path / "real")))
    where = ("--out", tmp_path / "r", "--nproc", 1)
    assert cli("shard", path, *where).returncode == 0
    before = folder_of(tmp_path / "r", "shard")
    (tmp_path / "real").rename(tmp_path / "elsewhere")
    done = cli("shard", path, *where, "--set", f"data.path={tmp_path / 'elsewhere'}")
    assert done.returncode == 0 and "shard …" not in done.stdout, done.stdout
    assert folder_of(tmp_path / "r", "shard") == before
    assert "done" in cli("status", tmp_path / "r").stdout
    image_folder(tmp_path / "elsewhere", {"a": 13}, "train", seed=1)
    done = cli("shard", path, *where, "--set", f"data.path={tmp_path / 'elsewhere'}")
    assert done.returncode == 0 and "shard …" in done.stdout, done.stdout
    assert folder_of(tmp_path / "r", "shard") != before


def test_a_list_that_is_wrong_is_no_set_that_is_away(tmp_path):
    """What was made before is not shown as what the config says now."""
    image_folder(tmp_path / "real", {"a": 12, "b": 12}, "train")
    image_folder(tmp_path / "real", {"a": 2, "b": 2}, "test")
    for split, count in (("train", 12), ("test", 2)):
        lines = [f"{split}/{c}/{k:03d}.png {i}" for i, c in enumerate("ab") for k in range(count)]
        (tmp_path / "real" / f"{split}.txt").write_text("\n".join(lines))
    names = {"train_list": "train.txt", "test_list": "test.txt", "path": str(tmp_path / "real")}
    path = variant(tmp_path, TINY, data={"source": "list", "resolution": 8, **names})
    where = ("--out", tmp_path / "r", "--nproc", 1)
    assert cli("shard", path, *where).returncode == 0
    said_plainly(cli("shard", path, *where, "--set", "data.train_list=other.txt"), "other.txt")
    with open(tmp_path / "real" / "train.txt", "a") as f:
        f.write("\ntrain/a/000.png O\n")
    said_plainly(cli("shard", path, *where), "train.txt, line 25")
    (tmp_path / "real").rename(tmp_path / "away")
    done = cli("shard", path, *where)
    assert done.returncode == 0 and "what was made of them counts" in done.stderr, done.stderr
    said_plainly(cli("shard", path, *where, "--set", "data.path=/nowhere"), "/nowhere")


def test_a_run_that_was_interrupted_can_be_looked_at(tmp_path, tiny):
    where = ("--out", tmp_path / "r", "--nproc", 1)
    assert cli("shard", tiny, *where).returncode == 0
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    record["stages"] = {}  # as the first command leaves it until it ends
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    assert "digits" in cli("inspect", tmp_path / "r").stdout
    done = cli("verify", tmp_path / "r")
    assert done.returncode == 0 and "as recorded" in done.stdout
    for folder in (tmp_path / "store" / "shard").iterdir():
        shutil.rmtree(folder)
    said_plainly(cli("verify", tmp_path / "r"), "nothing to verify")


def test_what_works_is_not_done_where_nobody_reads():
    def cut():
        raise BrokenPipeError

    assert guard.guarded(cut, looks=True) == 0 and guard.guarded(cut) == guard.CUT


def test_what_was_resolved_stays(finished):
    """The decoder is decided once, and the run folder says which it is."""
    _, run = finished
    record = json.loads((run / "run.json").read_text())
    assert record["resolved"]["data.loader"] in ("dali", "torch") and record["source"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["loader"] == record["resolved"]["data.loader"]


def test_status_for_programs(finished):
    _, run = finished
    said = json.loads(cli("status", run, "--json").stdout)
    assert said["done"] and said["config"] == "tiny"
    states = {line["name"]: line["state"] for line in said["stages"]}
    assert set(states.values()) == {"done"} and {"shard", "recover", "students"} <= set(states)


def test_status_is_quick(finished):
    """It needs no torch: half a second, of which the interpreter takes a part."""
    _, run = finished
    program = "import sys; from ltdd_scale import cli; cli.main(sys.argv[1:]); "
    program += "assert 'torch' not in sys.modules, 'status imports torch'"
    done = subprocess.run(
        [sys.executable, "-c", program, "status", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_parts_of_what_has_none(tiny, tmp_path):
    done = cli("calibrate", tiny, "--out", tmp_path / "r", "--nproc", 1, "--part", "0/2")
    said_plainly(done, "calibrate cannot be done in parts", "recover and students")


def test_training_logs_are_lines(finished):
    """A line an epoch, written while training goes on."""
    _, run = finished
    lines = (folder_of(run, "observer") / "log.jsonl").read_text().splitlines()
    assert len(lines) == 6 and all("loss" in json.loads(line) for line in lines)


def test_a_refused_command_leaves_the_run_as_it_was(finished):
    config, run = finished
    before = (run / "config.yaml").read_text()
    said_plainly(cli("run", config, "--out", run, "--set", "ipc=100000000"), "memory")
    said_plainly(cli("shard", config, "--out", run, "--part", "0/2"), "in parts")
    assert (run / "config.yaml").read_text() == before


def test_data_that_is_away_hinders_nothing_that_does_not_read_it(tmp_path):
    """The shards are there: a changed setting of a later stage does not ask for the images."""
    for split, count in (("train", 24), ("test", 2)):
        image_folder(tmp_path / "real", {"a": count, "b": count}, split)
    path = variant(
        tmp_path, TINY, data={"source": "folder", "resolution": 8, "path": str(tmp_path / "real")}
    )
    where = ("--out", tmp_path / "r", "--nproc", 1)
    assert cli("shard", path, *where).returncode == 0
    (tmp_path / "real").rename(tmp_path / "away")
    done = cli("train", "teacher", path, *where, "--set", "teacher.epochs=2")
    assert done.returncode == 0, done.stderr
    changed = cli("shard", path, *where, "--set", "data.imbalance_factor=2")
    said_plainly(changed, "data.path", "no such folder")
