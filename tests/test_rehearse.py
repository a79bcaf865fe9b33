"""The rehearsal at ImageNet-LT's size, small: the tool that a user runs before the real thing."""

import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment, image_folder


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_and_says_what_it_took(tmp_path):
    image_folder(tmp_path / "some", {"a": 3}, size=40)

    def rehearse(*more):
        command = [sys.executable, ROOT / "tools/rehearse.py", "--out", tmp_path / "out", *more]
        return subprocess.run(
            [
                str(c)
                for c in [*command, "--classes", 12, "--scale", 0.05, "--ipc", 3, "--nproc", 1]
            ],
            capture_output=True,
            text=True,
            env=clean_environment(),
        )

    done = rehearse("--images", tmp_path / "some", "--set", "recover.iterations=1")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out/ipc3.md").read_text()
    # a twentieth of 50, 250, 516, 352, 143, 92, 47, 45, 150, 50, 34 and 55, rounded
    assert table.startswith("89 training images of 12 classes, 26 … 2; IPC 3, 36 images.")
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:]
        for line in table.splitlines()
        if "|" in line
    }
    for stage in (
        "shard",
        "observer",
        "teacher",
        "calibrate",
        "initialize",
        "recover",
        "relabel",
        "evaluate",
    ):
        assert float(rows[stage][0]) >= 0 and float(rows[stage][6].replace(",", "")) > 100
        if stage not in ("teacher", "evaluate"):  # the teacher is the observer: a file is copied
            assert float(rows[stage][4]) > 0, "cores work on every image"
    assert rows["shard"][3].strip() == "89" and rows["recover"][3].strip() == "36"
    again = rehearse("--images", tmp_path / "some", "--set", "recover.iterations=1")
    assert again.returncode == 0 and (tmp_path / "out/ipc3.md").read_text() == table
