import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, cli

from ltdd_scale.errors import UserError
from ltdd_scale.launch import limits, run
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.settings import Runtime

PROGRAM = """
import os, sys, time, signal, types
from ltdd_scale.launch import run
from ltdd_scale.request import Request
import subprocess
what = sys.argv[1]
real = subprocess.Popen
subprocess.Popen = lambda command, **kw: real([sys.executable, "-c", {child!r}, what], **kw)
sys.exit(run.run_ranks(2, Request("", (), "", "", ""), max_restarts=1))
"""
CHILD = """
import os, sys, time, signal
what, rank = sys.argv[1], os.environ["RANK"]
os.write(1, f"rank {rank} {os.environ['WORLD_SIZE']}\\n".encode())  # in one piece: two ranks share the pipe
if what == "sleep": time.sleep(60)
if rank == "1" and what == "fail": sys.exit(3)
if rank == "1" and what == "die": os.kill(os.getpid(), signal.SIGKILL)
if what in ("fail", "die"): time.sleep(60)
"""


def ranks(what, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(child=CHILD), what],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_ranks_that_share_a_gpu(monkeypatch):
    """Of one that is not there: how many are started, and how many are refused."""
    monkeypatch.setattr(limits, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.default_ranks(Runtime()) == 2 and run.default_ranks(Runtime(ranks_per_gpu=3)) == 6
    limits.check_ranks(6, "auto", False, 3)
    with pytest.raises(UserError, match=r"--nproc 7, but there are 2 GPUs: use --nproc 6"):
        limits.check_ranks(7, "auto", False, 3)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_on_one_gpu_make_the_images_of_one(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    made = []
    for number in (1, 2):
        where = ["--out", tmp_path / f"r{number}", "--store", tmp_path / "store"]
        sets = ["runtime.precision=float32", f"runtime.ranks_per_gpu={number}"]
        done = cli("recover", tmp_path / "tiny.yaml", *where, "--nproc", number, "--set", *sets)
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / "store" / "recover").iterdir()
        made.append({p.name: p.read_bytes() for p in folder.glob("*.npy")})
        shutil.rmtree(folder)  # and again, under the same experts
    assert made[0] == made[1] and made[0]


STARTING = """
import os, signal, sys, time
os.kill(os.getpid(), signal.SIGUSR2)  # while it is still importing
os.kill(os.getpid(), signal.SIGTERM)
from ltdd_scale.runtime import signals
signals.install()
sys.exit(signals.STOP_CODE if signals.requested() else 1)
"""


def test_a_rank_that_is_asked_to_stop_while_it_starts_hears_it_when_it_can():
    command = [sys.executable, "-c", STARTING]
    held = subprocess.run(command, cwd=ROOT, preexec_fn=signals.hold)
    assert held.returncode == signals.STOP_CODE
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGUSR2


def test_all_end_well():
    out, _ = (p := ranks("well")).communicate(timeout=60)
    assert p.returncode == 0 and sorted(out.split("\n")[:2]) == ["rank 0 2", "rank 1 2"]


def test_an_error_ends_all_with_its_code():
    begin = time.monotonic()
    _, err = (p := ranks("fail")).communicate(timeout=60)
    assert p.returncode == 3 and time.monotonic() - begin < 30 and "starting again" not in err


def test_a_killed_rank_is_tried_again_and_then_given_up():
    out, err = (p := ranks("die")).communicate(timeout=60)
    assert p.returncode == 128 + signal.SIGKILL and out.count("rank 0") == 2
    assert (
        "starting again from the last checkpoints (1 of 1)" in err
        and "killed by SIGKILL 2 times" in err
    )


def test_a_killed_launcher_leaves_no_orphans():
    p = ranks("sleep")
    for _ in range(2):
        p.stdout.readline()
    p.kill()
    p.wait()
    # The pipe closes only when the last rank that holds it is gone.
    begin = time.monotonic()
    p.stdout.read()
    assert time.monotonic() - begin < 10
    p.stderr.close()
    p.stdout.close()
