import shutil

import numpy as np
import pytest
import rldd_tools
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ltdd_scale.data import loader
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.methods.rldd import calibrate
from ltdd_scale.methods.rldd.settings import Calibrate
from ltdd_scale.models import frozen, registry
from ltdd_scale.models.moments import fair_statistics, position_sums
from ltdd_scale.runtime import signals, tensors


def recursion(batches):
    """The paper's dynamic momentum for one class and channel: α_t = B_t / (N_{t−1} + B_t), on x and on x²."""
    mean = square = 0.0
    seen = 0
    for values in batches:
        if not len(values):
            continue
        alpha = len(values) / (seen + len(values))
        mean = (1 - alpha) * mean + alpha * np.mean(values)
        square = (1 - alpha) * square + alpha * np.mean(np.square(values))
        seen += len(values)
    return mean, square


@settings(max_examples=40)
@given(st.data())
def test_the_recursion_of_any_batching_and_order_is_sum_over_count(data):
    n = data.draw(st.integers(3, 40))
    seed = data.draw(st.integers(0, 1000))
    generator = np.random.default_rng(seed)
    x = torch.from_numpy(generator.normal(generator.normal(), 2.0, (n, 3, 4, 4))).float()
    labels = torch.from_numpy(np.concatenate([[0, 1], generator.integers(0, 2, n - 2)]))
    cuts = sorted(data.draw(st.lists(st.integers(1, n - 1), max_size=6)))
    order = np.asarray(data.draw(st.permutations(range(n))))
    layer = nn.BatchNorm2d(3).eval()
    with calibrate.ClassMoments({"layer": layer}, 2) as found:
        parts = [p for p in np.split(order, cuts) if len(p)]
        for part in parts:
            found.labels = labels[part].numpy()
            layer(x[part])
    moments = found.moments["layer"]
    for c in range(2):
        assert int(moments[c, 0]) == int((labels == c).sum()) * 16
        for channel in range(3):
            batches = [x[p][labels[p] == c][:, channel].double().numpy().ravel() for p in parts]
            mean, square = recursion(batches)
            assert np.isclose(
                mean, float(moments[c, 1 + channel] / moments[c, 0]), rtol=1e-5, atol=1e-6
            )
            assert np.isclose(
                square, float(moments[c, 4 + channel] / moments[c, 0]), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 1), (3, 5, 7, 7), (2, 4, 56, 56), (1, 2, 113, 127), (2, 3, 17, 19)]
)
def test_position_sums_are_float64_sums(shape):
    x = torch.randn(shape) * 3 + 1
    sums, squares = position_sums(x)
    assert sums.dtype == squares.dtype == torch.float64
    assert torch.allclose(sums, x.double().sum((2, 3)), rtol=1e-6, atol=1e-5) and torch.allclose(
        squares, (x.double() ** 2).sum((2, 3)), rtol=1e-6
    )
    if shape[2] > 1:
        moved = position_sums(x.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(moved[0], sums, rtol=1e-6, atol=1e-5)


def test_mixture_is_the_balanced_population_and_within_leaves_out_the_means():
    torch.manual_seed(0)
    classes = [
        torch.randn(n, 2, dtype=torch.float64) * s + m
        for n, s, m in ((500, 1.0, 0.0), (20, 2.0, 4.0), (5, 0.5, -3.0))
    ]
    moments = torch.stack(
        [
            torch.cat([torch.tensor([len(x)], dtype=torch.float64), x.sum(0), (x**2).sum(0)])
            for x in classes
        ]
    )
    mean, var = fair_statistics(moments, "mixture")
    # The same population by brute force: every class repeated to the same size.
    size = 500 * 20 * 5
    balanced = torch.cat([x.repeat(size // len(x), 1) for x in classes])
    assert torch.allclose(mean, balanced.mean(0)) and torch.allclose(
        var, balanced.var(0, correction=0)
    )
    _, within = fair_statistics(moments, "within")
    assert torch.allclose(
        within, torch.stack([x.var(0, correction=0) for x in classes]).mean(0)
    ) and bool((within < var).all())


def test_a_class_without_images_is_an_error():
    with pytest.raises(UserError, match="class 1 has no images"):
        fair_statistics(torch.tensor([[2.0, 1, 1], [0, 0, 0]]), "mixture")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 200))
def test_units_hold_every_class_once_and_whole(counts, at_least):
    units = calibrate.class_units(np.asarray(counts), at_least)
    assert np.concatenate(units).tolist() == list(range(len(counts)))
    assert all(sum(counts[c] for c in u) >= at_least for u in units[:-1])


@pytest.mark.parametrize(
    ("net", "lead"),
    [("convnet3", 0), ("convnet3", 3), ("resnet32", 0), ("resnet32", 3), ("densenet121", 0)],
)
def test_every_buffer_is_the_statistic_of_what_its_layer_sees(tmp_path, net, lead):
    """Also in deep networks, where layers that are measured at once would all make up for the same
    shift, each on top of the others; and where a few images a class lead."""
    size, largest = (8, 12) if net != "densenet121" else (32, 5)  # 121 passes
    config = rldd_tools.config(size, largest, calibrate=Calibrate(lead=lead))
    rldd_tools.run("shard", config, tmp_path)
    split = ShardSplit(tmp_path / "shard", "train")
    device = torch.device("cpu")
    images = loader.open_images(split, config.data, device, 0)
    whole = next(iter(images.stream([(np.arange(len(split)), None)], ViewSpec(size))))
    x = loader.normalizer(split.mean, split.std, device)(whole)

    def train(model):
        """Plain averages of one pass over other images than those to be calibrated on."""
        for layer in registry.norm_layers(model).values():
            layer.momentum = None
        with torch.no_grad():
            model.train()(0.95 * x + 0.1)

    rldd_tools.expert(tmp_path / "observer", "deep", net, "batch", size, train)
    facts = rldd_tools.run("calibrate", config, tmp_path)
    model = frozen.load(tmp_path / "calibrate" / "observer.pt", rldd_tools.ALONE).model
    layers = registry.norm_layers(model)
    weight = torch.from_numpy(1 / split.counts[split.labels] / len(split.counts))
    wrong = []

    def compare(layer, inputs):
        v = inputs[0].double()
        mean = (v.mean((2, 3)) * weight[:, None]).sum(0)
        var = ((v**2).mean((2, 3)) * weight[:, None]).sum(0) - mean**2
        far = (mean - layer.running_mean).abs() / (var + layer.eps).sqrt()
        off = ((layer.running_var - var).abs() - 1e-6).clamp(min=0) / (var + layer.eps)
        wrong.extend((float(far.max()), float(off.max())))

    for layer in layers.values():
        layer.register_forward_pre_hook(compare)
    with torch.no_grad():
        model(x)
    assert len(wrong) == 2 * len(layers) and max(wrong) < 0.01, max(wrong)
    assert facts["layers"] == len(layers) and ("off" in facts) == bool(lead)
    if lead:
        assert max(wrong) < 1.5 * calibrate.CLOSE and facts["off"] <= calibrate.CLOSE


@pytest.mark.parametrize("lead", [0, 3])
def test_long_passes_are_kept_and_a_stage_that_is_interrupted_goes_on_at_the_pass(
    tmp_path, monkeypatch, lead
):
    """A turn of a queue may be shorter than all passes."""
    config = rldd_tools.config(8, 12, calibrate=Calibrate(lead=lead, conv_inputs=True))
    rldd_tools.run("shard", config, tmp_path)
    rldd_tools.expert(tmp_path / "observer", "deep", "convnet3", "batch", 8, lambda model: None)
    rldd_tools.run("calibrate", config, tmp_path)
    names = ("statistics.pt", "observer.pt")
    calm = {name: (tmp_path / "calibrate" / name).read_bytes() for name in names}
    shutil.rmtree(tmp_path / "calibrate")
    monkeypatch.setattr(calibrate, "LONG", 0.0)
    collect, made, turns = calibrate.Measurement._collect, [], 0

    def one_a_turn(self, *more):
        if made and made[-1] == turns:
            raise signals.Preempted("the end of its turn")
        made.append(turns)
        return collect(self, *more)

    monkeypatch.setattr(calibrate.Measurement, "_collect", one_a_turn)
    done = False
    while not done:
        try:
            rldd_tools.run("calibrate", config, tmp_path)
            done = True
        except signals.Preempted:
            turns += 1
    assert made == list(range(len(made))) and len(made) >= 4, "each pass once"
    assert {name: (tmp_path / "calibrate" / name).read_bytes() for name in names} == calm


@pytest.mark.parametrize("conv_inputs", [False, True])
def test_a_lead_that_does_not_come_close_is_given_up(tmp_path, monkeypatch, conv_inputs):
    """Then the statistics are those of all images layer by layer, to the byte."""
    monkeypatch.setattr(calibrate, "CLOSE", 1e-12)
    saved, facts = {}, {}
    for lead in (0, 2):
        config = rldd_tools.config(calibrate=Calibrate(lead=lead, conv_inputs=conv_inputs))
        store = tmp_path / str(lead)
        rldd_tools.run("shard", config, store)
        rldd_tools.expert(store / "observer", "deep", "convnet3", "batch")
        facts[lead] = rldd_tools.run("calibrate", config, store)
        saved[lead] = tensors.load(store / "calibrate" / "statistics.pt")
    assert facts[2].pop("lead given up") > 1e-12 and facts[2] == facts[0]
    for kind in ("moments", "running"):
        assert saved[0][kind].keys() == saved[2][kind].keys()
        for name, values in saved[0][kind].items():
            for a, b in zip(values, saved[2][kind][name], strict=True):
                assert torch.equal(a, b)


def test_a_channel_that_the_lead_never_sees_gets_its_variance(tmp_path):
    """It is zero in the images that lead, and not in the set: no factor would correct that."""
    config = rldd_tools.config(calibrate=Calibrate(lead=1))
    rldd_tools.run("shard", config, tmp_path)
    split = ShardSplit(tmp_path / "shard", "train")
    images = loader.open_images(split, config.data, torch.device("cpu"), 0)
    x = next(iter(images.stream([(np.arange(len(split)), None)], ViewSpec(8))))
    x = loader.normalizer(split.mean, split.std, torch.device("cpu"))(x)
    leads = np.concatenate(calibrate.by_class(images, 1, config.seed))

    def hide(model):
        """What the first channel lets through is seen by one channel of the next layer alone, and
        is nothing in the images that lead."""
        first, second = [m for m in model.modules() if isinstance(m, nn.Conv2d)][:2]
        norm = next(iter(registry.norm_layers(model).values()))
        with torch.no_grad():
            seen = first(x)[:, 0]
            weight = 1 / torch.from_numpy(split.counts[split.labels] * len(split.counts)).float()
            mean = (seen.mean((1, 2)) * weight).sum()
            var = ((seen - mean).square().mean((1, 2)) * weight).sum()
            most = ((seen - mean) / (var + norm.eps).sqrt()).amax((1, 2))
            bar = float(most[leads].max())
            assert bar < float(most.max()), "choose another seed: an image that leads has the peak"
            norm.weight[0], norm.bias[0] = 1.0, -(bar + float(most.max())) / 2
            second.weight[0] = 0.0
            second.weight[0, 0] = 300.0

    rldd_tools.expert(tmp_path / "observer", "deep", "convnet3", "batch", 8, hide)
    facts = rldd_tools.run("calibrate", config, tmp_path)
    assert "off" in facts and facts["off"] <= calibrate.CLOSE, facts


def test_without_fair_statistics_the_observer_keeps_its_own(tmp_path):
    config = rldd_tools.config(calibrate=Calibrate(fair=False))
    rldd_tools.expert(tmp_path / "observer", "own", "convnet3", "batch")
    rldd_tools.run("calibrate", config, tmp_path)  # needs no shards
    statistics = tensors.load(tmp_path / "calibrate" / "statistics.pt")
    assert not statistics["fair"] and not statistics["moments"]
    assert len(statistics["running"]) == len(statistics["batchnorm"]) == 3
    weights = (tmp_path / "observer" / "weights.pt").read_bytes()
    assert (tmp_path / "calibrate" / "observer.pt").read_bytes() == weights
