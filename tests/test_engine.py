"""Two engines, any number of ranks, parts of a batch: one loss curve. With real processes."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, said_plainly
from one_stage import one_stage
from PIL import Image
from sklearn.datasets import load_sample_images

from ltdd_scale.runtime.tensors import load

pytestmark = pytest.mark.slow
WARM = "observer.warmup_epochs=1"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config, with its shards beside it."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "tiny.yaml").write_text(TINY)
    done = one_stage("shard", folder / "tiny.yaml", folder / "shard")
    assert done.returncode == 0, done.stderr
    return folder / "tiny.yaml"


def train(config, out, nproc, *sets, role="observer", env=None):
    """The finished process that trained an expert into the folder `out`."""
    inputs = {"shard": config.parent / "shard"}
    return one_stage(role, config, out, nproc, (WARM, *sets), inputs, env)


def trained(config, name, nproc, *sets, role="observer"):
    """(losses of each epoch, weights) of an expert."""
    out = config.parent / name
    done = train(config, out, nproc, *sets, role=role)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in json.loads((out / "log.json").read_text())]
    return losses, load(out / "weights.pt")["model"]


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
    settings = ["train.engine=deepspeed", f"train.deepspeed=zero{stage}"]
    close(trained(config, f"zero{stage}", 2, *settings), alone, 1e-3)


def test_a_batch_in_parts_is_the_batch(config):
    """InstanceNorm has no statistics of the batch: parts of it give its gradient."""
    pytest.importorskip("deepspeed")
    sets, role = ["teacher.contrast=0", "teacher.warmup_epochs=1"], "teacher"
    whole = trained(config, "whole", 1, *sets, role=role)
    sets.append("train.micro_batch=3")
    close(trained(config, "parts", 2, *sets, role=role), whole, 1e-3)
    zero = trained(config, "zero-parts", 2, *sets, "train.engine=deepspeed", role=role)
    close(zero, whole, 1e-3)
    one = [*sets[:2], "train.micro_batch=1", "teacher.batch_size=7"]  # slices of 3 and 4
    assert np.isfinite(trained(config, "odd", 2, *one, role=role)[0]).all()


def test_both_experts_by_deepspeed_in_one_process(config, tmp_path):
    pytest.importorskip("deepspeed")
    done = train(config, tmp_path, 1, "train.engine=deepspeed", role="observer,teacher")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / role / "weights.pt").exists() for role in ("observer", "teacher"))


def test_deepspeed_resumes_to_the_bit_and_refuses_another_world(config, tmp_path):
    pytest.importorskip("deepspeed")
    sets = ["train.engine=deepspeed", "runtime.checkpoint_seconds=0"]
    calm = trained(config, "ds-calm", 2, "train.engine=deepspeed")
    out = tmp_path / "observer"
    hurt = train(config, out, 2, *sets, env=fault(tmp_path, "replace:step-:9"))
    assert (tmp_path / "killed").exists() and hurt.returncode == 137, hurt.stderr
    said_plainly(train(config, out, 1, *sets), "was written by 2 ranks", "--nproc 2")
    newest = max((out / "checkpoints").glob("step-*"))
    shard = max(newest.glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-9])  # the newest is damaged: the one before counts
    done = train(config, out, 2, *sets)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    ours = load(out / "weights.pt")["model"]
    assert all(torch.equal(ours[k], v) for k, v in calm[1].items())


@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_ddp_resumes_to_the_bit(config, tmp_path, nproc):
    calm = trained(config, f"calm-{nproc}", nproc)
    out, sets = tmp_path / "observer", ["runtime.checkpoint_seconds=0"]
    hurt = train(config, out, nproc, *sets, env=fault(tmp_path, "replace:step-:9"))
    assert (tmp_path / "killed").exists() and hurt.returncode == 137, hurt.stderr
    done = train(config, out, nproc, *sets)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    ours = load(out / "weights.pt")["model"]
    assert all(torch.equal(ours[k], v) for k, v in calm[1].items())
    history = [row["loss"] for row in json.loads((out / "log.json").read_text())]
    assert history == calm[0], "the epoch that was cut counts whole"


def test_buffers_are_the_same_on_every_rank_and_in_the_checkpoint(config, tmp_path):
    """Ranks see different images; with statistics over all of them each rank holds the same, and so
    does the file."""
    out = tmp_path / "observer"
    env = fault(tmp_path, "replace:step-:12")
    assert train(config, out, 2, "runtime.checkpoint_seconds=0", env=env).returncode == 137
    newest = load(max((out / "checkpoints").glob("step-*.pt")))["state"]
    first, second = (own["buffers"] for own in newest["own"])
    assert len(first) > 6 and all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(value, newest["model"][f"model.{k}"]) for k, value in first.items())
    assert not torch.equal(newest["own"][0]["running"], newest["own"][1]["running"]), (
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
    sets = ["teacher.lr=1e30", "runtime.checkpoint_seconds=0"]
    done = train(config, tmp_path / "teacher", 1, *sets, role="teacher")
    words = ("digit-", "more;", "the last good checkpoint", "teacher.lr")
    said_plainly(done, "the loss is", "at step", *words)
    gentle = ["train.clip=0.1", "teacher.lr=0.5"]
    assert train(config, tmp_path / "q", 1, *gentle, role="teacher").returncode == 0


def test_batches_must_fit_the_images_and_the_ranks(config, tmp_path):
    done = train(config, tmp_path / "a", 1, "observer.batch_size=5000")
    said_plainly(done, "observer.batch_size=5000", "training images: lower it")
    done = train(config, tmp_path / "b", 2, "observer.batch_size=3")
    said_plainly(done, "observer.batch_size=3 is too small for 2 ranks")


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_resnet50_at_224_on_jpegs(tmp_path, engine):
    """The nets and sizes that all this is for, a few steps: photographs, streamed, on two ranks."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    real = tmp_path / "real"
    for name, picture in zip("ab", load_sample_images().images, strict=True):
        for part, count in (("train", 6), ("test", 1)):
            (real / part / name).mkdir(parents=True)
            for k in range(count):
                crop = picture[k * 9 : k * 9 + 360, k * 20 : k * 20 + 500]
                Image.fromarray(crop).save(real / part / name / f"{k}.jpg")
    data = f"{{source: folder, path: {real}, profile: full, resolution: 224, memory_gb: 0}}"
    net = "{net: resnet50, epochs: 1, batch_size: 4, crop_scale: [0.3, 1.0], lr: 0.001}"
    (tmp_path / "c.yaml").write_text(f"data: {data}\nobserver: {net}\n")
    assert one_stage("shard", tmp_path / "c.yaml", tmp_path / "shard").returncode == 0
    sets = ("observer.warmup_epochs=0", f"train.engine={engine}")  # of one epoch none is warm-up
    done = train(tmp_path / "c.yaml", tmp_path / "out", 2, *sets)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out" / "log.json").read_text())
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert np.isfinite(row["loss"]) and facts["steps"] == 3
    assert facts["parameters"] > 23_000_000
