import signal
import subprocess
import sys
import time

from conftest import ROOT

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
