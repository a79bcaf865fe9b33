"""The GPU check, where there is no GPU: the CPU beside the CPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, clean_environment

from ltdd_scale import recipe
from ltdd_scale.pipeline import graph
from ltdd_scale.stage import Resources

sys.path.insert(0, str(ROOT / "tools"))
import gpu_check
import gpu_check_look as look
import gpu_check_work as work


def asked(out: Path, **more) -> argparse.Namespace:
    values = {"device": "cpu", "out": out, "methods": ["dm"], "parts": [], "limits": [9e9, 9e9]}
    return argparse.Namespace(**{**values, **more})


@pytest.mark.slow
def test_every_stage_is_a_row_and_the_same_command_goes_on(tmp_path):
    arguments = ["--device", "cpu", "--methods", "dm", "--out", tmp_path, "--seconds", "150"]
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", *arguments]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=200,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["key"]: row for row in gpu_check.Rows(tmp_path).read()}
    ((_, config),) = work.configs(["dm"])
    nodes = graph.build(recipe.stages(config, "digits-1"), config)
    for node in nodes.values():
        row = rows[f"stages {node.where}"]
        if node.stage.resources is not Resources.CPU:
            # The same device: nothing may differ in float32, and bfloat16 is not float32.
            numbers = [float(part.split()[-1]) for part in row["float32 off by"].split(", ")]
            assert numbers and not any(numbers), row
            assert row["twice the same"] == "yes / yes" and row["seconds"]["bfloat16"] > 0
    assert any(
        float(part.split()[-1]) > 0
        for row in rows.values()
        for part in row.get("bfloat16 off by", "nothing 0").split(", ")
    )
    killed = [row for key, row in rows.items() if key.startswith("kill ")]
    assert {row["stage"].split("/")[0] for row in killed} == {
        "dm: teacher",
        "dm: match",
        "dm: student",
    }
    for row in killed:
        assert row["same bytes"] == "yes" and row["gone on from"].startswith("step "), row
    assert "ranks all_reduce" in rows and "ranks half of dm: teacher" in rows
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout and "dm: match" in report
    begin = time.monotonic()  # all is there: nothing is done again
    again = subprocess.run(list(map(str, command)), capture_output=True, timeout=100)
    assert again.returncode == 0 and time.monotonic() - begin < 60
    assert {row["key"]: row for row in gpu_check.Rows(tmp_path).read()} == rows


def test_a_stage_that_raises_is_a_row_and_what_needs_it_is_left_out(tmp_path, capfd):
    first = work.First(asked(tmp_path))
    match = next(w for w in first.works.values() if w.node.name == "match")
    broken = dataclasses.replace(match.node.stage, run="ltdd_scale.stage:Cost")  # wants keywords
    first.works[match.node.where] = dataclasses.replace(
        match, node=dataclasses.replace(match.node, stage=broken)
    )
    first.run()
    rows = {row["stage"]: row for row in first.rows.read() if "stage" in row}
    assert rows["dm: match"]["error"].startswith("TypeError: ")
    assert rows["dm: relabel"]["error"] == "left out: match failed"
    assert rows["dm: teacher"]["twice the same"] == "yes / yes"
    assert "Traceback" in capfd.readouterr().err
    assert "**TypeError: " in gpu_check.report(first.rows.read(), 1.0)


def test_what_a_process_died_of_is_a_row(tmp_path):
    check = gpu_check.Check(asked(tmp_path), time.time(), time.time() + 30)
    check.rows.begin("stages experts/1")
    dies = "import os, sys; print('the last word'); sys.stdout.flush(); os.abort()"
    with check.log.open("a") as log:
        process = subprocess.Popen([sys.executable, "-c", dies], stdout=log)
    assert check._wait(process) != 0
    (row,) = check.rows.read()
    assert row["key"] == "stages experts/1"
    assert "SIGABRT" in row["error"] and "the last word" in row["error"]


def test_a_row_that_was_left_out_is_made_when_there_is_time(tmp_path):
    first = work.First(asked(tmp_path, limits=[0.0, 0.0], parts=["waits"]))
    first.run()
    errors = [row.get("error") for row in first.rows.read() if row["key"] != "machine"]
    assert errors and set(errors) == {gpu_check.LEFT_OUT}
    assert first.rows.done() == {"machine"}
    first.rows.add(first.rows.read()[1]["key"], stage="done")
    assert len(first.rows.done()) == 2


def test_ranks_of_a_method_without_experts(tmp_path):
    command = [sys.executable, ROOT / "tools" / "gpu_check_work.py", "ranks", "--device", "cpu"]
    command += ["--out", tmp_path, "--methods", "gm"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["key"]: row for row in gpu_check.Rows(tmp_path).read()}
    assert "ranks leave" in rows and not any("half of" in key for key in rows)
    assert not [row for row in rows.values() if row.get("error")]


def test_a_streamed_case_is_of_its_method():
    ((name, config),) = work.configs(["streamed mtt"])
    assert name == "streamed mtt" and config.method == "mtt" and config.data.memory_gb == 0
    assert config.trajectories.experts < 10, "the tiny ones"


def test_waits_are_counted_by_our_line():
    where = ROOT / "ltdd_scale" / "experts" / "loop.py"
    code = compile(f"import warnings\nwarnings.warn('{'called a ' + look.WAIT}')", where, "exec")
    waits, notes = Counter(), set()
    with look.listening(waits, notes, count=False):
        for _ in range(3):
            exec(code)
        warnings.warn("no deterministic implementation", stacklevel=1)
    assert waits == {"experts/loop.py:2": 3}
    assert notes == {"no deterministic implementation"}


def test_how_far_results_are_apart(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, k in ((one, 0), (other, 1)):
        folder.mkdir()
        np.save(folder / "00000.npy", np.full((2, 3, 4, 4), 7 + 2 * k, np.uint8))
        np.save(folder / "logits.npy", np.asarray([3.0, 4.0 + k], np.float32))
        np.save(folder / "classes.npy", np.asarray([1, 2, 3, 4 + k], np.int16))
        row = {"row": {"top1": 50.0 - 5 * k}, "loss": [1.0, 1.0]}
        (folder / "result.json").write_text(json.dumps(row))
        (folder / ".lock").write_text(str(k))
    said = dict(part.rsplit(" ", 1) for part in look.apart(one, other).split(", "))
    assert {k: float(v) for k, v in said.items()} == {
        "grey": 2,
        "values": 0.2,
        "numbers": 0.25,
        "top1": 5,
        "loss": 0,
    }
    assert not look.same(one, other) and look.same(one, one)
    os.remove(other / "logits.npy")
    assert look.apart(one, other) == "not the same files: logits.npy"
