from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cli

from ltdd_scale.config import Expert
from ltdd_scale.experts import batches, train
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.runtime.tensors import load


def test_warm_up_then_cosine():
    settings = Expert(lr=1.0, epochs=20, warmup_epochs=5)
    at = [train.learning_rate(settings, p) for p in (0, 2.5, 5, 12.5, 20)]
    assert at == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    assert train.learning_rate(Expert(lr=1.0, epochs=20), 0) == 1.0


def test_labels_are_mixed_as_the_pictures_are():
    """Uniform images are 1 and of class 0, re-sampled ones 0 and of class 1: the mean pixel is the share of class 0."""
    for seed in range(20):
        ones, zeros = torch.ones(5, 3, 32, 32), torch.zeros(5, 3, 32, 32)
        first, second = (
            torch.tensor([[1.0, 0.0]]).repeat(5, 1),
            torch.tensor([[0.0, 1.0]]).repeat(5, 1),
        )
        x, y = batches.mix([ones, ones, zeros, zeros], [first, second], rng(seed))
        assert (
            x.shape == (10, 3, 32, 32)
            and torch.allclose(x.mean((1, 2, 3)), y[:, 0], atol=1e-5)
            and torch.allclose(y.sum(1), torch.ones(10))
        )
        assert len(torch.unique(x[0])) == 1 and len(torch.unique(x[5])) <= 2, (
            "MixUp blends, CutMix pastes"
        )


class Held:
    labels, counts = np.repeat([0, 1], [30, 7]), np.asarray([30, 7])
    sizes = np.full((37, 2), 8)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_parts_of_one_global_batch(world):
    settings, spec = Expert(batch_size=11), train.ViewSpec(8, None, 1)
    make = lambda rank, n: batches.EpochPlans(
        settings, spec, Held, "s", 4, 1, 3, Ranks(rank, n, torch.device("cpu"), None), 2
    )  # noqa: E731
    whole, parts = make(0, 1), [make(r, world) for r in range(world)]
    assert len(whole) == 2 * 4
    for k, (indices, views) in enumerate(whole):
        assert np.concatenate([p[k][0] for p in parts]).tolist() == indices.tolist()
        assert np.array_equal(np.concatenate([p[k][1].windows for p in parts]), views.windows)
    assert whole[0][0].tolist() == whole[1][0].tolist() and not np.array_equal(
        whole[0][1].windows, whole[1][1].windows
    ), "two views of the same images"


def test_own_state_after_a_change_of_world_size():
    model = torch.nn.BatchNorm1d(2)
    own = [
        {
            "buffers": {k: torch.full_like(v, r) for k, v in model.named_buffers()},
            "running": torch.tensor([r, r, r]),
        }
        for r in (2.0, 4.0)
    ]
    running = torch.zeros(3)
    train._restore_own(model, running, own, Ranks(1, 2, torch.device("cpu"), None))
    assert model.running_mean.tolist() == [4, 4] and running.tolist() == [4, 4, 4]
    train._restore_own(model, running, own, Ranks(0, 1, torch.device("cpu"), None))
    assert model.running_mean.tolist() == [3, 3] and running.tolist() == [6, 6, 6]


def test_another_world_size_resumes_a_training(tmp_path, tiny):
    """Killed on two ranks, finished on one: the checkpoint of the one world serves the other."""
    env = {
        "PYTHONPATH": str(Path(__file__).parent / "faults"),
        "LTDD_FAULT": "replace::20:KILL:me",
        "LTDD_FAULT_RANK": "0",
        "LTDD_FAULT_MARK": str(tmp_path / "killed"),
    }
    command = ("train", "observer", tiny, "--out", tmp_path / "r")
    hurt = cli(
        *command,
        "--nproc",
        2,
        "--max-restarts",
        0,
        "--set",
        "runtime.checkpoint_seconds=0",
        "observer.epochs=12",
        env=env,
    )
    assert (tmp_path / "killed").exists() and hurt.returncode == 137, hurt.stderr
    done = cli(*command, "--nproc", 1, "--set", "observer.epochs=12")
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    (weights,) = (tmp_path / "store" / "experts").glob("*/weights.pt")
    assert all(torch.isfinite(v).all() for v in load(weights)["model"].values())
