import subprocess
import sys

import pytest
from conftest import ROOT, cli, image_folder, said_plainly

from ltdd_scale.data import profile, sharding, sources
from ltdd_scale.data.settings import Data


def test_the_plot_falls_with_the_counts():
    lines = profile.plot([1000, 100, 10, 1] * 3, height=9).splitlines()
    bars = [
        sum(line[8 + k] == "█" for line in lines[:9] if len(line) > 8 + k) for k in range(0, 60, 5)
    ]
    assert (
        bars == sorted(bars, reverse=True)
        and bars[0] == 9
        and bars[3] == 6
        and bars[6] == 3
        and bars[-1] == 0
    )
    assert "1000" in lines[0] and "(12)" in lines[-1]
    assert profile.plot([5]) and profile.plot([1, 1])


def test_inspect_shows_a_set_and_a_run(tmp_path, finished):
    image_folder(tmp_path / "real", {"cat": 30, "dog": 3}, size=9)
    image_folder(tmp_path / "real", {"cat": 1, "dog": 2}, "test", size=9)
    (tmp_path / "real" / "train" / "dog" / "torn.png").write_bytes(b"x")
    (tmp_path / "s").mkdir()
    data = Data(source="folder", path=str(tmp_path / "real"), profile="full", shard_images=8)
    sharding.write(tmp_path / "s", "pets", sources.open_source(data), data, 1)
    done = cli("inspect", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    for words in (
        "pets, 2 classes",
        "imbalance factor 10 (30 … 3",
        "quarantined: 1",
        "train/cat/000.png",
        "9 × 9",
        "medium 1 classes, 30 images; few 1 classes, 3 images",
    ):
        assert words in done.stdout, (words, done.stdout)
    of_run = cli("inspect", finished[1])
    assert of_run.returncode == 0 and "digits, 10 classes" in of_run.stdout
    said_plainly(cli("inspect", tmp_path / "real"), "no shard set there")


@pytest.mark.slow
def test_the_tool_writes_imagenet_lt_and_a_run_takes_it(tmp_path):
    """The official form of lists over an ILSVRC tree with flat val images, by the tool; then a stage reads the set."""
    root = tmp_path / "ilsvrc"
    image_folder(root, {"n01440764": 9, "n01443537": 4}, size=12)
    image_folder(root, {"": 4}, "val", size=12)
    train = [
        f"train/{w}/{k:03d}.png {label}\n"
        for label, (w, n) in enumerate((("n01440764", 9), ("n01443537", 4)))
        for k in range(n)
    ]
    for split, lines in (
        ("train", train),
        ("val", train[:2] + train[9:11]),
        (
            "test",
            [f"val/n0144{'0764' if k < 2 else '3537'}/{k:03d}.png {k // 2}\n" for k in range(4)],
        ),
    ):
        (root / f"ImageNet_LT_{split}.txt").write_text("".join(lines))
    out = tmp_path / "shards"
    command = [
        sys.executable,
        str(ROOT / "tools" / "shard_imagenet_lt.py"),
        str(root),
        "--out",
        str(out),
        "--shard-images",
        "5",
        "--workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 0
        and "2 classes" in done.stdout
        and sorted(p.name for p in out.glob("*train*.tar"))
        == [f"imagenet_lt-train-00000{k}.tar" for k in range(3)]
    ), done.stderr
    (tmp_path / "c.yaml").write_text(f"data: {{source: shards, path: {out}, resolution: 12}}\n")
    taken = cli("shard", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert taken.returncode == 0 and "13 training images of 2 classes" in taken.stderr, taken.stderr
    assert cli("verify", tmp_path / "run").returncode == 0
    (root / "train" / "n01440764" / "000.png").unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        again.returncode == 1
        and "1 of 13 files are not under" in again.stderr
        and "Traceback" not in again.stderr
    )
