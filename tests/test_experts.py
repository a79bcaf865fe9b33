"""What an expert sees, how it is checked, and what it carries from step to step."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_stage import one_stage

from ltdd_scale.config.root import Config
from ltdd_scale.data import augment
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.errors import UserError
from ltdd_scale.experts import batches, cost, growth, recipes, state, train
from ltdd_scale.experts.settings import Engine, Expert, Role, Teacher, Train
from ltdd_scale.experts.stage import stage
from ltdd_scale.models import flops
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.runtime.tensors import load
from ltdd_scale.stage import Facts, settings_of

CPU = torch.device("cpu")


def given(role="observer", **sections):
    """The settings of the stage `role`."""
    config = Config(**sections)
    return settings_of(stage(role, config), config)


def test_warm_up_then_cosine():
    settings = Expert(lr=1.0, epochs=20, warmup_epochs=5)
    at = [train.learning_rate(settings, p) for p in (0, 2.5, 5, 12.5, 20)]
    assert at == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    assert train.learning_rate(Expert(lr=1.0, epochs=20), 0) == 1.0


def test_labels_are_mixed_as_the_images_are():
    """Uniform images are 1 and of class 0, re-sampled ones 0 and of class 1: the mean pixel is the
    share of class 0."""
    for seed in range(20):
        ones, zeros = torch.ones(5, 3, 32, 32), torch.zeros(5, 3, 32, 32)
        first = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
        second = torch.tensor([[0.0, 1.0]]).repeat(5, 1)
        draw = recipes.Mix(rng(seed), 5, slice(0, 5))
        x, y = recipes.two_views([[ones, ones], [zeros, zeros]], [first, second], draw)
        assert x.shape == (10, 3, 32, 32)
        assert torch.allclose(x.mean((1, 2, 3)), y[:, 0], atol=1e-5)
        assert torch.allclose(y.sum(1), torch.ones(10))
        assert len(torch.unique(x[0])) == 1 and len(torch.unique(x[5])) <= 2, (
            "MixUp blends, CutMix pastes"
        )


def test_pasted_boxes_and_labels_do_not_depend_on_the_number_of_ranks():
    ones, zeros = torch.ones(6, 3, 32, 32), torch.zeros(6, 3, 32, 32)
    first, second = torch.tensor([[1.0, 0.0]]).repeat(6, 1), torch.tensor([[0.0, 1.0]]).repeat(6, 1)

    def mixed(part, share=1.0):
        draw, n = recipes.Mix(rng(3), 6, part), part.stop - part.start
        return recipes.Pasted(share)([[ones[:n]], [zeros[:n]]], [first[:n], second[:n]], draw)

    x, y = mixed(slice(0, 6))
    assert torch.allclose(x.mean((1, 2, 3)), y[:, 0], atol=1e-5), "the share of the background"
    assert torch.allclose(y.sum(1), torch.ones(6)) and len(torch.unique(y[:, 0])) == 6
    some = mixed(slice(0, 6), 0.5)[1][:, 0]
    assert 0 < (some == 1).sum() < 6, "some images stay whole"
    assert set(some.tolist()) <= {1.0, *y[:, 0].tolist()}
    assert torch.equal(mixed(slice(0, 6), 0.0)[0], ones)
    halves = [mixed(part) for part in (slice(0, 3), slice(3, 6))]
    assert torch.equal(torch.cat([h[0] for h in halves]), x)
    assert torch.equal(torch.cat([h[1] for h in halves]), y)


def test_the_prior_is_how_often_classes_are_shown():
    counts = np.asarray([90, 9, 1])
    assert np.allclose(recipes.prior(counts, (0.0,)), counts / 100)
    assert np.allclose(recipes.prior(counts, (1.0,)), 1 / 3)
    lam = augment.cutmix_boxes(rng(0), 200_000, 1000)[1]
    pasted = 0.5 * (1 - float(lam.mean()))
    both = (1 - pasted) * counts / 100 + pasted / 3
    assert np.allclose(recipes.prior(counts, (0.0, 1.0), 0.5), both, atol=1e-3)
    own = Expert(recipe="balanced", prior=0.5, cutmix=0.5, paste_power=1.0)
    log_prior = recipes.RECIPES["balanced"].objective(own, counts, CPU).log_prior
    assert np.allclose(log_prior, 0.5 * np.log(both), atol=0.01)


class Held:
    """37 images of two classes; a stream gives each image its own number as its colour."""

    labels, counts = np.repeat([0, 1], [30, 7]), np.asarray([30, 7])
    sizes, resolution = np.full((37, 2), 8), 8

    def stream(self, plans, spec):
        for indices, _ in plans:
            yield torch.from_numpy(indices).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 255


MIXINGS = {
    "glmc": recipes.Mixing((0.0, 0.2), 2, recipes.two_views),
    "pasted": recipes.Mixing((0.0, 1.0), 1, recipes.Pasted(0.5)),
    "both re-sampled": recipes.Mixing((0.5, 0.5), 1, recipes.Pasted(1.0)),
    "both uniform": recipes.Mixing((0.0, 0.0), 1, recipes.Pasted(1.0)),
    "unmixed": recipes.Mixing((0.0,), 1, recipes.unmixed),
}


def course(rank=0, world=1, mixing="glmc"):
    spec, ranks = train.ViewSpec(8, None, 1), Ranks(rank, world, CPU, None)
    return batches.Course(Held(), spec, "s", 11, MIXINGS[mixing], ranks)


@pytest.mark.parametrize("mixing", ["both re-sampled", "both uniform"])
def test_streams_of_one_power_are_drawn_apart(mixing):
    plans = batches.EpochPlans(course(mixing=mixing), 0, 0)
    assert plans.chosen(0, 0).tolist() != plans.chosen(0, 1).tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_parts_of_one_global_batch(world):
    whole = batches.EpochPlans(course(), 4, 1)
    parts = [batches.EpochPlans(course(r, world), 4, 1) for r in range(world)]
    assert len(whole) == 2 * 2
    for k, (indices, views) in enumerate(whole):
        assert np.concatenate([p[k][0] for p in parts]).tolist() == indices.tolist()
        assert np.array_equal(np.concatenate([p[k][1].windows for p in parts]), views.windows)
    indices, views = whole[0]
    assert indices[::2].tolist() == indices[1::2].tolist(), "decoded once"
    assert not np.array_equal(views.windows[::2], views.windows[1::2]), "two views of the images"


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_training_that_is_cut_sees_the_same_batches(mixing):
    """3 steps an epoch, 3 epochs: from any step on, what follows is the same."""
    sizes = {"normalize": lambda x: x - 0.5, "num_classes": 2}
    own, views = course(mixing=mixing), MIXINGS[mixing].views
    whole = list(batches.from_step(own, 0, 9, **sizes))
    assert [b.step for b in whole] == list(range(9))
    assert [b.epoch for b in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [b.ends_epoch for b in whole] == [False, False, True] * 3
    for begin in range(10):
        rest = list(batches.from_step(own, begin, 9, **sizes))
        assert len(rest) == 9 - begin
        for ours, theirs in zip(rest, whole[begin:], strict=True):
            assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y)
            assert ours.chosen.tolist() == theirs.chosen.tolist() and ours.step == theirs.step
    first = whole[0]
    assert first.x.shape == (11 * views, 3, 8, 8) and first.y.shape == (11 * views, 2)
    if mixing == "unmixed":
        shown = (first.x[:, 0, 0, 0] + 0.5) * 255
        assert np.allclose(shown, first.chosen, atol=1e-3)
        assert first.y.argmax(1).tolist() == Held.labels[first.chosen].tolist()


def test_images_grow_and_are_whole_at_the_end():
    small = Expert(epochs=20, begin_resolution=112)
    grown = growth.sides(small, 224)
    assert grown[:11] == [112] * 11 and grown[-4:] == [224] * 4
    assert grown[11:16] == [128, 144, 160, 192, 208], "in a straight line, by sixteens"
    assert growth.sides(Expert(epochs=3), 32) == [32] * 3
    for epochs in (1, 2, 3, 4):
        assert growth.sides(Expert(epochs=epochs, begin_resolution=16), 32)[-1] == 32
    arithmetic = [
        sum(side**2 for side in growth.sides(Expert(epochs=100, **own), 32))
        for own in ({"begin_resolution": 16}, {})
    ]
    assert 0.45 < arithmetic[0] / arithmetic[1] < 0.52


@pytest.mark.parametrize(
    "own, said",
    [
        ({"begin_resolution": 32}, "begin_resolution=32 is not below data.resolution=32"),
        ({"net": "convnet3"}, "convnet3 fits images of one size only.*such as resnet32"),
        (
            {"net": "vgg11_cifar"},
            "begin_resolution=16: vgg11_cifar .* at least 32 pixels, not 16; raise it, or set 0",
        ),
    ],
)
def test_images_that_cannot_grow_are_refused(own, said):
    usual = {"net": "resnet32", "begin_resolution": 16}
    train.check(given(observer=usual))
    with pytest.raises(UserError, match=said):
        train.check(given(observer={**usual, **own}))
    with pytest.raises(UserError, match=r"does not go with train\.compile"):
        train.check(given(observer=usual, train={"compile": True}))


def test_smaller_images_are_the_same_windows_and_cost_less():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (37, 3, 8, 8)).astype(np.uint8)
    images = MemoryImages(pixels, Held.labels, CPU)
    sizes = {"normalize": lambda x: x, "num_classes": 2}
    own = replace(course(mixing="unmixed"), images=images)
    whole, grown = (
        list(batches.from_step(replace(own, sides=sides), 0, 6, **sizes))
        for sides in ((8, 8), (4, 8))
    )
    assert [b.x.shape[-1] for b in grown] == [4] * 3 + [8] * 3
    for a, b in zip(grown, whole, strict=True):
        assert a.chosen.tolist() == b.chosen.tolist() and torch.equal(a.y, b.y)
        halved = torch.nn.functional.avg_pool2d(b.x, 2) if a.x.shape[-1] == 4 else b.x
        assert (a.x - halved)[..., 1:-1, 1:-1].abs().mean() < 0.1
    assert all(torch.equal(a.x, b.x) for a, b in zip(grown[3:], whole[3:], strict=True))

    for begin in (1, 3, 5):  # a resume shows what comes next at its size
        rest = batches.from_step(replace(own, sides=(4, 8)), begin, 6, **sizes)
        assert all(torch.equal(a.x, b.x) for a, b in zip(rest, grown[begin:], strict=True))

    facts, resnet = Facts([100] * 10, 10), {"net": "resnet32", "epochs": 20}
    full = cost.cost(given(observer=resnet), facts)
    less = cost.cost(given(observer={**resnet, "begin_resolution": 16}), facts)
    assert 0.4 < less.flops / full.flops < 0.6 and less.activations == full.activations


def test_micro_batches_share_out_all_views():
    x, y = torch.arange(10.0)[:, None], torch.arange(10.0)[:, None] * 2
    cut = batches.micro_batches(x, y, 2, 3)
    assert [a[:, 0].tolist() for a, _, _ in cut] == [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9]]
    assert sum(share for _, _, share in cut) == pytest.approx(1)
    assert all(torch.equal(a * 2, b) for a, b, _ in cut)
    assert batches.micro_batches(x, y, 2, 1)[0][0] is x


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
    state.restore_own(model, running, own, Ranks(1, 2, CPU, None))
    assert model.running_mean.tolist() == [4, 4] and running.tolist() == [4, 4, 4]
    state.restore_own(model, running, own, Ranks(0, 1, CPU, None))
    assert model.running_mean.tolist() == [3, 3] and running.tolist() == [6, 6, 6]


def test_history_is_of_finished_epochs():
    history, alone = state.History(CPU), Ranks(0, 1, CPU, None)
    history.add(torch.tensor([1.0, 2.0, 3.0]))
    history.add(torch.tensor([0.5, 0.5, 0.5]))
    assert history.note == "" and history.epochs == []
    history.close(0, alone)
    assert history.epochs == [{"epoch": 0, "loss": 1.5, "debias": 2.5, "robust": 3.5}]
    assert history.note == "loss 1.500" and history.running.tolist() == [0, 0, 0]


def test_networks_that_cannot_serve_are_refused_before_anything_starts():
    with pytest.raises(UserError, match=r"warmup_epochs=5: the rate would rise until the end of"):
        train.check(given(observer=Role(epochs=5, warmup_epochs=5)))
    train.check(given(observer=Role(epochs=6, warmup_epochs=5)))
    with pytest.raises(UserError, match="has no BatchNorm layer to align"):
        train.check(given(observer=Role(norm="instance")))
    train.check(given("teacher", teacher=Teacher(norm="instance")))
    train.check(given())
    with pytest.raises(UserError, match="alexnet cannot take images of 32 pixels"):
        train.check(given("teacher", teacher=Teacher(net="alexnet")))


def test_the_options_of_deepspeed_must_be_there(tmp_path):
    for content, words in (
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "holds no settings"),
    ):
        path = tmp_path / "options.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=f"train.deepspeed: .*{words}"):
            given(train=Train(engine="deepspeed", deepspeed=str(path)))
    path.write_text('{"zero_optimization": {"stage": 2}}')
    found = given(train=Train(engine="deepspeed", deepspeed=str(path)))
    assert found.deepspeed == {"zero_optimization": {"stage": 2}}
    assert given().deepspeed == {}, "DDP does not read the file"


def test_cost_of_an_expert():
    """FLOPs: epochs · images · views · (forward + 2 forwards). A micro-batch keeps less."""
    facts = Facts((80, 20))
    expert = Teacher(recipe="glmc", optimizer="sgd", width=8, epochs=7, batch_size=10)
    net = ("convnet3", 8, "instance", 32)
    both = cost.cost(given("teacher", teacher=expert), facts)
    assert both.flops == 7 * 100 * 2 * 3 * flops.forward(*net)
    one_view = Teacher(width=8, epochs=7, batch_size=10)
    plain = cost.cost(given("teacher", teacher=one_view), facts)
    assert plain.flops == both.flops / 2 and plain.batch == both.batch / 2
    assert plain.disk > 10 * 4 * flops.parameters(*net), "AdamW has two moments"
    micro = cost.cost(given("teacher", teacher=expert, train=Train(micro_batch=4)), facts)
    assert both.batch == 10 * 2 * flops.activations(*net) and both.activations == 0
    assert micro.activations == 4 * 2 * flops.activations(*net) and micro.batch == 0
    assert both.disk > 7 * 4 * flops.parameters(*net)


def test_settings_of_an_expert_are_those_that_it_reads():
    """The name of DeepSpeed's file is no part of them: what it says is."""
    settings = given()
    assert isinstance(settings.train, Engine) and not hasattr(settings.train, "deepspeed")
    with pytest.raises(AttributeError, match="does not read 'ipc'"):
        _ = settings.ipc


@pytest.mark.slow
def test_another_world_size_resumes_a_training(tmp_path, tiny):
    """Killed on two ranks, finished on one: the checkpoint of the one world serves the other."""
    shard, out = tmp_path / "shard", tmp_path / "observer"
    assert one_stage("shard", tiny, shard).returncode == 0
    env = {
        "PYTHONPATH": str(Path(__file__).parent / "faults"),
        "LTDD_FAULT": "replace:step-:20:KILL:me",
        "LTDD_FAULT_RANK": "0",
        "LTDD_FAULT_MARK": str(tmp_path / "killed"),
    }
    sets = ["observer.epochs=12", "runtime.checkpoint_seconds=0"]
    inputs = {"shard": shard}
    hurt = one_stage("observer", tiny, out, 2, sets, inputs, env)
    assert (tmp_path / "killed").exists() and hurt.returncode == 137, hurt.stderr
    done = one_stage("observer", tiny, out, 1, sets, inputs)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    assert all(torch.isfinite(v).all() for v in load(out / "weights.pt")["model"].values())
    history = json.loads((out / "log.json").read_text())
    lines = (out / "log.jsonl").read_text().splitlines()
    assert len(history) == 12 and [json.loads(line) for line in lines] == history
