"""The page that tells how to add a method works: its blocks are run as they stand there."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, clean_environment

NAMES = ("settings", "mean", "method")


@pytest.mark.slow
def test_the_method_of_the_page(tmp_path):
    """In a copy of the package, as a reader would add it."""
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == len(NAMES)
    copy = subprocess.run(["cp", "-r", ROOT / "ltdd_scale", tmp_path], check=True)
    assert copy.returncode == 0
    folder = tmp_path / "ltdd_scale" / "methods" / "mean"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, block in zip(NAMES, blocks, strict=True):
        more = "from ltdd_scale.methods.mean.settings import Mean\n" if name == "method" else ""
        (folder / f"{name}.py").write_text(more + block)
    catalog = folder.parent / "catalog.py"
    line = "from ltdd_scale.methods.mean.method import MEAN\n"
    text = catalog.read_text()
    added = re.sub(r"for m in \(([^)]*?),?\)", r"for m in (\1, MEAN)", text)
    assert added != text
    catalog.write_text(added.replace("METHODS: dict", line + "\nMETHODS: dict", 1))
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY + "method: mean\nmean: {noise: 2}\n")
    command = [sys.executable, "-m", "ltdd_scale", "run", str(config), "--nproc", "2"]
    env = clean_environment({"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"})
    out = ("--out", str(tmp_path / "run"), "--set", "relabel.labels=hard")
    done = subprocess.run([*command, *out], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {row["set"] for row in results["rows"]} >= {"distilled", "random"}
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert "average" in stages and "teacher" not in stages and "observer" not in stages
    assert "average each class" in done.stdout or "average …" in done.stdout
