import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT

from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files, ranks, tensors
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.late import Late
from ltdd_scale.runtime.progress import duration


def test_a_sealed_file_knows_when_it_is_damaged(tmp_path):
    path = tmp_path / "x.pt"
    tensors.save(path, {"a": torch.arange(5)})
    first = path.read_bytes()
    tensors.save(path, {"a": torch.arange(5)})
    assert path.read_bytes() == first and torch.equal(tensors.load(path)["a"], torch.arange(5))
    for broken in (
        first[:-1],
        first[:40] + bytes([first[40] ^ 1]) + first[41:],
        b"",
        first[:-32] + bytes(32),
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            tensors.load(path)


def test_the_newest_valid_checkpoint_counts(tmp_path):
    c = Checkpoints(tmp_path / "c", "me", 0)
    assert c.load() is None and c.due()
    for step in (9, 10, 100):
        c.save(step, {"x": step})
    assert c.load() == (100, {"x": 100}), "numerically, not as text"
    assert len(list((tmp_path / "c").glob("*.pt"))) == 2
    newest = tmp_path / "c" / "step-000000000100.pt"
    newest.write_bytes(newest.read_bytes()[:-7])
    assert c.load() == (10, {"x": 10})
    with pytest.raises(UserError, match="belongs to other work"):
        Checkpoints(tmp_path / "c", "you", 0).load()
    with pytest.raises(
        UserError, match=r"begun on a CPU.* continue in bfloat16 on H100: .* constraint"
    ):
        Checkpoints(tmp_path / "c", "me in bfloat16 on H100", 0).load()
    c.clear()
    assert not (tmp_path / "c").exists() and c.load() is None


def test_time_between_checkpoints(tmp_path):
    c = Checkpoints(tmp_path / "c", "me", 3600)
    assert not c.due()


def test_nothing_is_torn_when_the_disk_is_full(tmp_path):
    """A real full disk: a file system of 256 KB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root to mount a small tmpfs")
    try:
        files.write_bytes(disk / "a", b"old")
        with pytest.raises(UserError, match="no space left"):
            files.write_bytes(disk / "a", bytes(500_000))
        assert (disk / "a").read_bytes() == b"old" and os.listdir(disk) == ["a"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_random_numbers_belong_to_their_key():
    a = ranks.rng(1, "x", 2).random(4)
    assert (
        (a == ranks.rng(1, "x", 2).random(4)).all()
        and (a != ranks.rng(1, "x", 3).random(4)).any()
        and (a != ranks.rng(12, "x").random(4)).any()
    )
    # Golden: these draws decide every published set, and must not move.
    assert np.allclose(a, GOLDEN)


GOLDEN = [0.11147187861226882, 0.14285467157034681, 0.5047307811656855, 0.4001573932237241]


def test_a_half_set_environment_is_refused():
    code = "from ltdd_scale.runtime import ranks\nranks.join('cpu', 'auto', 1)"
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")} | {
        "RANK": "0"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode and "has RANK but not WORLD_SIZE, LOCAL_RANK" in done.stderr


def test_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="sees no GPU"):
        ranks.join("cuda", "auto", 1)


def test_durations():
    assert [duration(s) for s in (0.4, 59, 61, 3599, 3661)] == [
        "0 s",
        "59 s",
        "1:01 min",
        "59:59 min",
        "1:01 h",
    ]


def test_a_late_value_is_that_of_the_moment_it_was_noted():
    x = torch.tensor([1.5, float("inf")], requires_grad=True)
    late, number = Late(x * 2), Late(x.detach()[0])
    with torch.no_grad():
        x.zero_()
    assert late.known and late.read().tolist() == [3.0, float("inf")]
    assert not late.read().requires_grad and float(number.read()) == 1.5
    assert late.read().tolist() == [3.0, float("inf")], "as often as it is asked for"


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        files.read_json(tmp_path / "no")
    Path(tmp_path / "bad").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        files.read_json(tmp_path / "bad")


def agreeing_rank(rank: int, folder: str) -> None:
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    agreement = ranks.Agreement(ranks.Ranks(rank, 2, torch.device("cpu"), None))
    stop = [False, False, rank == 1, rank == 1, False]
    due = [rank == 0, rank == 0, False, rank == 0, False]
    told = [agreement(*wishes) for wishes in zip(stop, due, strict=True)]
    # A step late, on both ranks; what is wished until it is told counts once.
    late = [(False, False), (False, True), (False, False), (True, False), (False, True)]
    assert told == late
    assert agreement.close() == (False, False) and agreement.close() == ()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_a_step_late_without_waiting(tmp_path):
    mp.spawn(agreeing_rank, (str(tmp_path),), nprocs=2)


def test_a_rank_alone_agrees_at_once():
    agreement = ranks.Agreement(ranks.Ranks(0, 1, torch.device("cpu"), None))
    assert agreement(True, False) == (True, False) and agreement.close() == ()
