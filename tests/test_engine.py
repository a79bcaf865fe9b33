"""Two engines, any number of ranks, parts of a batch: one loss curve. With real processes."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, said_plainly
from PIL import Image
from sklearn.datasets import load_sample_images

from ltdd_scale.experts import batches
from ltdd_scale.runtime.tensors import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    (folder / "tiny.yaml").write_text(TINY)
    return folder / "tiny.yaml"


def trained(config, name, nproc, *sets, command=("train", "observer")):
    """(losses of each epoch, weights) of an observer with BatchNorm."""
    store = config.parent / name / "store"
    done = cli(
        *command,
        config,
        "--out",
        config.parent / name / "run",
        "--store",
        store,
        "--nproc",
        nproc,
        "--set",
        "observer.warmup_epochs=1",
        *sets,
    )
    assert done.returncode == 0, done.stderr
    (log,) = store.glob("experts/*/log.json")
    return [row["loss"] for row in json.loads(log.read_text())], load(log.parent / "weights.pt")[
        "model"
    ]


@pytest.fixture(scope="module")
def alone(config):
    return trained(config, "alone", 1)


def close(ours, theirs, tolerance):
    assert np.allclose(ours[0], theirs[0], rtol=tolerance), (ours[0], theirs[0])
    for name, value in theirs[1].items():
        assert torch.allclose(ours[1][name].float(), value.float(), atol=30 * tolerance), name


@pytest.mark.parametrize("nproc", [2, 3])
def test_ranks_follow_one_through_batchnorm(config, alone, nproc):
    """Statistics are of the global batch: only the order of float32 additions differs. (Without that the curves part at once.)"""
    close(trained(config, f"world-{nproc}", nproc), alone, 1e-3)
    if nproc == 2:
        apart = trained(config, "unsynced", nproc, "train.sync_bn=false")
        assert not np.allclose(apart[0], alone[0], rtol=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_follows_ddp(config, alone, stage):
    """ZeRO 1 and 2 on two ranks, saving and loading along the way."""
    pytest.importorskip("deepspeed")
    settings = ["train.engine=deepspeed", f"train.deepspeed=configs/deepspeed/zero{stage}.json"]
    close(trained(config, f"zero{stage}", 2, *settings), alone, 1e-3)


def test_a_batch_in_parts_is_the_batch(config):
    """InstanceNorm has no statistics of the batch: parts of it give its gradient."""
    pytest.importorskip("deepspeed")
    train = ("train", "teacher")
    sets = ["teacher.contrast=0", "teacher.warmup_epochs=1"]
    whole = trained(config, "whole", 1, *sets, command=train)
    close(trained(config, "parts", 2, *sets, "train.micro_batch=3", command=train), whole, 1e-3)
    odd = trained(
        config, "odd", 2, *sets, "train.micro_batch=1", "teacher.batch_size=7", command=train
    )  # slices of 3 and 4
    assert np.isfinite(odd[0]).all()
    close(
        trained(
            config,
            "zero-parts",
            2,
            *sets,
            "train.micro_batch=3",
            "train.engine=deepspeed",
            command=train,
        ),
        whole,
        1e-3,
    )


def test_both_experts_by_deepspeed_in_one_process(config, tmp_path):
    pytest.importorskip("deepspeed")
    done = cli(
        "recover",
        config,
        "--out",
        tmp_path / "run",
        "--nproc",
        1,
        "--set",
        "train.engine=deepspeed",
    )
    assert done.returncode == 0, done.stderr


def test_pieces_share_out_all_views():
    x, y = torch.arange(10.0)[:, None], torch.arange(10.0)[:, None] * 2
    cut = batches.pieces(x, y, 2, 3)
    assert [a[:, 0].tolist() for a, _, _ in cut] == [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9]] and sum(
        s for _, _, s in cut
    ) == pytest.approx(1)
    assert all(torch.equal(a * 2, b) for a, b, _ in cut) and batches.pieces(x, y, 2, 1)[0][0] is x


def test_deepspeed_resumes_to_the_bit_and_refuses_another_world(config, tmp_path):
    pytest.importorskip("deepspeed")
    settings = ["--set", "train.engine=deepspeed", "runtime.checkpoint_seconds=0"]
    calm = trained(config, "ds-calm", 2, "train.engine=deepspeed")
    command = ("train", "observer", config, "--out", tmp_path / "run", "--nproc")
    env = {
        "PYTHONPATH": str(ROOT / "tests" / "faults"),
        "LTDD_FAULT": "replace:step-:9:KILL:me",
        "LTDD_FAULT_RANK": "0",
        "LTDD_FAULT_MARK": str(tmp_path / "killed"),
    }
    hurt = cli(*command, 2, "--max-restarts", 0, *settings, "observer.warmup_epochs=1", env=env)
    assert (tmp_path / "killed").exists() and hurt.returncode == 137, hurt.stderr
    said_plainly(
        cli(*command, 1, *settings, "observer.warmup_epochs=1"),
        "was written by 2 ranks",
        "--nproc 2",
    )
    (shard,) = [
        max(p.glob("*optim_states.pt"))
        for p in (tmp_path / "store").glob("experts/*/checkpoints/step-*")
        if p.name == max(q.name for q in p.parent.glob("step-*"))
    ]
    shard.write_bytes(shard.read_bytes()[:-9])  # the newest is damaged: the one before counts
    done = cli(*command, 2, *settings, "observer.warmup_epochs=1")
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    (weights,) = (tmp_path / "store").glob("experts/*/weights.pt")
    ours = load(weights)["model"]
    assert all(torch.equal(ours[k], v) for k, v in calm[1].items())


def test_buffers_are_the_same_on_every_rank_and_in_the_checkpoint(config, tmp_path):
    """Ranks see different images; with statistics over all of them each rank holds the same, and so does the file."""
    done = cli(
        "train",
        "observer",
        config,
        "--out",
        tmp_path / "run",
        "--nproc",
        2,
        "--max-restarts",
        0,
        "--set",
        "runtime.checkpoint_seconds=0",
        env=fault(tmp_path, "replace:step-:12"),
    )
    assert done.returncode == 137
    newest = max((tmp_path / "store").glob("experts/*/checkpoints/step-*.pt"))
    state = load(newest)["state"]
    first, second = (own["buffers"] for own in state["own"])
    assert len(first) > 6 and all(torch.equal(first[k], second[k]) for k in first)
    assert all(
        torch.equal(
            first[k],
            state["model"][
                k.replace("backbone", "model.backbone")
                if k.startswith("backbone")
                else f"model.{k}"
            ],
        )
        for k in first
    )
    assert not torch.equal(state["own"][0]["running"], state["own"][1]["running"]), (
        "the ranks' losses differ: their images do"
    )


def fault(folder, what):
    return {
        "PYTHONPATH": str(ROOT / "tests" / "faults"),
        "LTDD_FAULT": f"{what}:KILL:me",
        "LTDD_FAULT_RANK": "0",
        "LTDD_FAULT_MARK": str(folder / "killed"),
    }


def test_a_loss_that_is_not_finite_stops_with_its_images(config, tmp_path):
    done = cli(
        "train",
        "teacher",
        config,
        "--out",
        tmp_path / "run",
        "--nproc",
        1,
        "--set",
        "teacher.lr=1e30",
        "runtime.checkpoint_seconds=0",
    )
    said_plainly(
        done, "the loss is", "at step", "digit-", "more;", "the last good checkpoint", "teacher.lr"
    )
    gentle = cli(
        "train",
        "teacher",
        config,
        "--out",
        tmp_path / "q",
        "--nproc",
        1,
        "--set",
        "train.clip=0.1",
        "teacher.lr=0.5",
    )
    assert gentle.returncode == 0


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_resnet50_at_224_on_jpegs(tmp_path, engine):
    """The nets and sizes that all this is for, a few steps: photographs, streamed, on two ranks."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    for name, picture in zip("ab", load_sample_images().images, strict=True):
        for part, count in (("train", 6), ("test", 1)):
            (tmp_path / "real" / part / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(picture[k * 9 : k * 9 + 360, k * 20 : k * 20 + 500]).save(
                    tmp_path / "real" / part / name / f"{k}.jpg"
                )
    net = "{net: resnet50, epochs: 1, batch_size: 4, crop_scale: [0.3, 1.0], lr: 0.001}"
    text = f"data: {{source: folder, path: {tmp_path / 'real'}, profile: full, resolution: 224, memory_gb: 0}}\nobserver: {net}\n"
    (tmp_path / "c.yaml").write_text(text)
    done = cli(
        "train",
        "observer",
        tmp_path / "c.yaml",
        "--out",
        tmp_path / "run",
        "--nproc",
        2,
        "--set",
        f"train.engine={engine}",
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "store").glob("experts/*/log.json")
    (row,) = json.loads(log.read_text())
    record = json.loads((log.parent / "stage.json").read_text())
    assert (
        np.isfinite(row["loss"])
        and record["facts"]["steps"] == 3
        and record["facts"]["parameters"] > 23_000_000
        and record["ranks"] == 2
    )
