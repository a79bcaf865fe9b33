import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY
from one_stage import one_stage

from ltdd_scale import recipe
from ltdd_scale.config.load import load
from ltdd_scale.data import distilled, sharding, shards, siamese, sources
from ltdd_scale.data.settings import Data, Location
from ltdd_scale.errors import UserError
from ltdd_scale.methods.gm import cost, gradients, match
from ltdd_scale.methods.gm.match import Matching, State
from ltdd_scale.methods.gm.method import GM
from ltdd_scale.methods.gm.settings import Gm
from ltdd_scale.methods.matching.real import Pixels, RealClass
from ltdd_scale.models import registry
from ltdd_scale.models.flat import Flat
from ltdd_scale.pipeline import graph
from ltdd_scale.runtime import tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, settings_of

ROOT = Path(__file__).parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"), None)
SIZE = 16
SMALL = {"networks": 2, "outer_steps": 2, "inner_epochs": 1, "width": 8, "real_batch": 12}


@pytest.fixture(autouse=True)
def one_thread():
    """As ranks have it: the tests compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def real(label: int, n: int, ipc: int) -> RealClass:
    generator = np.random.default_rng(label)
    pixels = generator.integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)
    pixels //= label + 1  # classes differ
    return RealClass(label, torch.from_numpy(pixels), np.arange(ipc) % n)


def matching(classes, **changes) -> tuple[Matching, State]:
    """Of real classes of which the set has IPC images each, before the first outer step."""
    settings = Gm(**{**SMALL, **changes})
    pixels = Pixels(torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25))
    flat = Flat(settings.net, settings.width, settings.norm, SIZE, len(classes))
    strategy = siamese.choices(settings.dsa)
    made = Matching(
        settings,
        0,
        SIZE,
        strategy,
        flat,
        pixels,
        classes,
        ALONE,
        match.inner_step(flat, settings.inner_lr),
    )
    images = torch.stack([pixels.normalized(c.pixels[torch.from_numpy(c.start)]) for c in classes])
    return made, State(images, torch.zeros_like(images), flat.initial(0, "gm net", 0))


def test_the_distance_is_the_published_one():
    flat = Flat("convnet3", 4, "instance", SIZE, 3)
    g, h = torch.randn(2, flat.size, generator=torch.manual_seed(0))
    plain = 0.0
    pieces = zip(*(flat.parameters(v).values() for v in (g, h)), strict=True)
    for a, b in ((a.double().numpy(), b.double().numpy()) for a, b in pieces):
        if a.ndim > 1:
            for row in range(len(a)):  # output channels
                p, q = a[row].ravel(), b[row].ravel()
                plain += 1 - p @ q / (np.linalg.norm(p) * np.linalg.norm(q) + 1e-6)
    found = gradients.distance(flat, g, h)
    assert plain > 5 and float(found) == pytest.approx(plain, rel=1e-5)
    assert float(gradients.distance(flat, g, 3 * g)) == pytest.approx(0, abs=1e-4)
    assert float(gradients.distance(flat, 5 * g, h)) == pytest.approx(plain, rel=1e-5)


def test_biases_and_norms_are_left_out():
    flat = Flat("convnet3", 4, "instance", SIZE, 3)
    g, h = torch.randn(2, flat.size, generator=torch.manual_seed(0))
    before, changed = gradients.distance(flat, g, h), 0
    for name, piece in flat.parameters(h).items():
        if piece.ndim == 1:
            piece += 10  # a view of `h`
            changed += "bias" in name
    assert changed == 7 and torch.equal(gradients.distance(flat, g, h), before)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_both_gradients_of_a_class_that_the_set_has_whole_are_the_same(n):
    """Its distance is 0 under a fresh network and under a trained one: no rank looks at it."""
    made, state = matching([real(0, n, 4), real(1, 20, 4)], dsa="crop_scale")
    for t in range(2):
        theta = state.theta.detach().requires_grad_()
        one, y = made.classes[0], torch.zeros(4, dtype=torch.int64)
        shown = made.pixels.normalized(one.pixels[torch.from_numpy(one.batch(12, 0, "gm real", t))])
        assert torch.equal(shown, state.images[0])
        goal = gradients.gradient(made.flat, theta, shown, y)
        found = gradients.gradient(made.flat, theta, state.images[0], y, graph=True)
        assert torch.equal(gradients.gradient(made.flat, theta, state.images[0], y), goal)
        torch.testing.assert_close(found, goal, rtol=1e-4, atol=1e-5)  # with a graph, other sums
        apart = gradients.distance(made.flat, goal, found)
        assert goal.any() and apart.detach() == pytest.approx(0, abs=1e-3)
        state.theta = match.train(made, state, t)
    assert cost.efforts(made.settings, 4, (n, 5))[0] == 0


def test_a_row_without_gradient_has_no_direction():
    flat = Flat("convnet3", 4, "instance", SIZE, 3)
    g, h = torch.randn(2, flat.size, generator=torch.manual_seed(0))
    list(flat.parameters(h).values())[-2][0] = 0
    h.requires_grad_()
    apart = gradients.distance(flat, g, h)
    (grad,) = torch.autograd.grad(apart, h)
    assert apart.isfinite() and grad.isfinite().all()


def test_class_by_class_gives_the_gradient_of_the_sum_over_classes():
    made, state = matching([real(c, n, 3) for c, n in enumerate((30, 9, 7))])
    collected = match.gradients(made, state, 5)
    images = state.images.clone().requires_grad_()
    theta, total = state.theta.clone().requires_grad_(), torch.zeros(())
    for one in made.classes:
        c = one.label
        draw = siamese.draw(match.rng(0, "gm dsa", c, 5), made.strategy, SIZE)
        which = torch.from_numpy(one.batch(12, 0, "gm real", 5))
        pair = (made.pixels.normalized(one.pixels[which]), images[c])
        grads = [
            torch.autograd.grad(
                F.cross_entropy(
                    made.flat.logits(theta, siamese.apply(x, draw)), torch.full((len(x),), c)
                ),
                theta,
                create_graph=True,
            )[0]
            for x in pair
        ]
        total = total + gradients.distance(made.flat, grads[0].detach(), grads[1])
    (joint,) = torch.autograd.grad(total, images)
    assert joint.abs().sum() > 0
    torch.testing.assert_close(collected[:, :-1].reshape(images.shape), joint)
    torch.testing.assert_close(collected[:, -1].sum(), total.detach())


def test_one_graph_is_held_at_a_time(monkeypatch):
    """More classes do not hold more: what autograd has saved is gone when the next class begins."""
    held: list[int] = []
    alive: set[int] = set()

    class Kept:
        def __init__(self, value):
            self.value = value
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    whole = match.class_gradient

    def counting(*given):
        held.append(len(alive))
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
            out = whole(*given)
            held.append(-len(alive))
        return out

    monkeypatch.setattr(match, "class_gradient", counting)
    made, state = matching([real(c, 9, 3) for c in range(4)])
    match.gradients(made, state, 0)
    assert held == [0] * 8


def test_the_inner_training_is_sgd_on_the_whole_set():
    made, state = matching([real(c, 20, 3) for c in range(3)], inner_epochs=3, inner_lr=0.1, dsa="")
    model = registry.Student(registry.backbone("convnet3", 8, "instance", SIZE), 3)
    model.load_state_dict(made.flat.parameters(state.theta))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = state.images.flatten(0, 1), torch.arange(3).repeat_interleave(3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    plain = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert not torch.equal(plain, state.theta)
    torch.testing.assert_close(match.train(made, state, 0), plain)


def test_batches_of_the_inner_training_hold_every_image_once():
    made, _ = matching([real(c, 20, 3) for c in range(3)], inner_batch=4)
    parts = match._batches(made, 9, 0, 0)
    assert [len(p) for p in parts] == [4, 4, 1]
    order = torch.cat(parts).tolist()
    assert sorted(order) == list(range(9)) and order != list(range(9))
    assert order == torch.cat(match._batches(made, 9, 0, 0)).tolist()
    assert order != torch.cat(match._batches(made, 9, 0, 1)).tolist()


def test_classes_are_coupled_from_the_second_outer_step_on():
    """The network trains on all images: what class 1 shows changes the gradient of class 0."""
    classes = [real(c, 20, 3) for c in range(2)]
    made, state = matching(classes, inner_epochs=2, inner_lr=0.1, inner_batch=4)
    _, other = matching(classes)
    other.images[1] = -other.images[1]
    before = [match.gradients(made, s, 0) for s in (state, other)]
    assert torch.equal(before[0][0], before[1][0])
    assert not torch.equal(before[0][1], before[1][1])
    for s in (state, other):
        s.theta = match.train(made, s, 0)
    after = [match.gradients(made, s, 1) for s in (state, other)]
    assert not torch.equal(after[0][0], after[1][0])


def test_draws_depend_on_the_outer_step_and_the_class_alone():
    classes = [real(c, 20, 3) for c in range(3)]
    made, state = matching(classes)
    alone, _ = matching(classes)
    alone = Matching(**{**vars(alone), "classes": classes[1:2]})
    whole, part = match.gradients(made, state, 3), match.gradients(alone, state, 3)
    assert torch.equal(whole[1], part[1]) and whole[1].any()
    assert not part[0].any() and not part[2].any()
    assert not torch.equal(whole, match.gradients(made, state, 4))


def context(out: Path, shard: Path = Path(), **changes) -> Context:
    out.mkdir(exist_ok=True, parents=True)
    place = {"ranks": ALONE, "out": out, "inputs": {"shard": shard}, "owner": "me"}
    return Context(**place, quiet=True, workers=0, location=Location(), **changes)


def test_matching_lowers_the_distance_on_networks_it_has_not_seen(tmp_path):
    classes = [real(c, 40, 4) for c in range(2)]
    for one in classes:  # the images that it starts from are unlike the rest
        one.pixels[4:, :, :, :8] //= 4
        one.pixels[4:, one.label, 8:] //= 4
    made, state = matching(classes, networks=12, outer_steps=3, real_batch=40, lr=1.0)
    saved = match.Saved(context(tmp_path))
    images = match.match(made, state.images, context(tmp_path), saved)
    assert images.data_ptr() != state.images.data_ptr()

    def apart(shown: torch.Tensor) -> float:
        values = []
        for k in range(1000, 1006):
            fresh = State(shown, shown, made.flat.initial(0, "gm net", k))
            values.append(match.gradients(made, fresh, 3 * k)[:, -1].sum())
            fresh.theta = match.train(made, fresh, 3 * k)
            values.append(match.gradients(made, fresh, 3 * k + 1)[:, -1].sum())
        return float(torch.stack(values).mean())

    assert apart(images) < 0.7 * apart(state.images)
    shown = images * made.pixels.std + made.pixels.mean
    assert shown.min() >= -1e-6 and shown.max() <= 1 + 1e-6
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["network"] for line in lines] == list(range(12))
    assert lines[-1]["distance"] < lines[0]["distance"]


def given_settings(**changes):
    config = SimpleNamespace(
        gm=Gm(**{**SMALL, "outer_steps": 3, **changes}),
        seed=0,
        ipc=3,
        runtime=SimpleNamespace(precision="float32"),
        data=Data(resolution=SIZE, mirror=False),
    )
    (stage,) = GM.stages(config)
    return settings_of(stage, config)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    data = Data(source="digits", max_per_class=20, imbalance_factor=10, test_per_class=5)
    sharding.write(folder, "digits", sources.open_source(data), data, workers=1)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*") if p.is_file() and p.name[0] != "."}


def finish_saving() -> None:
    """A process that ends waits for its writer."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_a_run_that_was_cut_goes_on_to_the_bit(shard, tmp_path, monkeypatch):
    settings = given_settings()
    facts = match.run(settings, context(tmp_path / "whole", shard))
    whole = bytes_of(tmp_path / "whole")
    assert facts == {"networks": 2, "images": 30} and len(whole) == 21
    assert not list((tmp_path / "whole").glob("*/step-*"))

    step, steps = match.descend, []

    def failing(*given):
        steps.append(1)
        if len(steps) in (3, 6):  # in the first network, then in the second
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(match, "descend", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            match.run(settings, context(tmp_path / "cut", shard, checkpoint_seconds=0.0))
        finish_saving()
    assert match.run(settings, context(tmp_path / "cut", shard)) == facts
    assert bytes_of(tmp_path / "cut") == whole
    assert len(steps) == 6 + 2, "outer steps that are done are not done again"

    # Killed after the last image was written: nothing is matched again.
    assert match.run(settings, context(tmp_path / "cut", shard)) == facts
    assert len(steps) == 8 and bytes_of(tmp_path / "cut") == whole


def test_what_is_written_is_a_distilled_set_that_started_from_real_images(shard, tmp_path):
    match.run(given_settings(networks=0), context(tmp_path / "start", shard))
    match.run(given_settings(), context(tmp_path / "moved", shard))
    split = shards.ShardSplit(shard, "train")
    start, moved = (distilled.Distilled(tmp_path / name, 10) for name in ("start", "moved"))
    for c in range(10):
        rows = moved.provenance(c)
        assert rows == start.provenance(c) and len(rows) == 3
        for pixels, row in zip(start.load(c), rows, strict=True):
            assert split.labels[row["image"]] == c
            image = np.asarray(shards.square(split.image(row["image"]), SIZE))
            assert np.array_equal(pixels, image.transpose(2, 0, 1))
        # The tail does not move: the set has all of it.
        assert np.array_equal(start.load(c), moved.load(c)) == (split.counts[c] <= 3)
    assert min(split.counts) <= 3 < max(split.counts)


def config_file(folder: Path, **changes) -> Path:
    own = {"networks": 3, "outer_steps": 2, "inner_epochs": 2, "width": 8, "real_batch": 8}
    path = folder / "gm.yaml"
    values = {**yaml.safe_load(TINY), "method": "gm", "gm": own, "relabel": {"labels": "hard"}}
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


@pytest.mark.slow
def test_killed_on_two_ranks_and_ended_on_three_gives_the_bytes_of_one(shard, tmp_path):
    config = config_file(tmp_path)
    given = {"inputs": {"shard": shard}, "sets": ["runtime.checkpoint_seconds=0"]}
    loaded = load(config, [])
    match.run(settings_of(*GM.stages(loaded), loaded), context(tmp_path / "one", shard))
    fault = {
        "PYTHONPATH": str(ROOT / "tests" / "faults"),
        "LTDD_FAULT": "replace:step-:2:KILL:me",
        "LTDD_FAULT_RANK": "0",
        "LTDD_FAULT_MARK": str(tmp_path / "killed"),
    }
    done = one_stage("match", config, tmp_path / "more", nproc=2, env=fault, **given)
    assert done.returncode != 0 and (tmp_path / "killed").exists(), done.stderr
    assert not list((tmp_path / "more").glob("0*"))
    assert list((tmp_path / "more").glob("*/step-*.pt"))
    done = one_stage("match", config, tmp_path / "more", nproc=3, **given)
    assert done.returncode == 0 and "goes on at outer step" in done.stderr, done.stderr
    whole = bytes_of(tmp_path / "one")
    assert len([name for name in whole if name.endswith(".npy")]) == 10
    more = bytes_of(tmp_path / "more")
    assert json.loads(more.pop("facts.json")) == {"networks": 3, "images": 40} and more == whole


def test_divergence_is_one_line_and_the_last_good_state_stays(shard, tmp_path, monkeypatch):
    bad = given_settings(inner_lr=1e30)
    said = r"at network 0, outer step \d; there is no checkpoint yet. Lower gm.inner_lr \(it is"
    worse = given_settings(inner_lr=1e30, inner_epochs=3)
    with pytest.raises(UserError, match=rf"the weights are not finite {said}"):
        match.run(worse, context(tmp_path / "a", shard, checkpoint_seconds=0.0))
    with pytest.raises(UserError, match=rf"of class 0 is n?-?[ani][nf]+ {said}") as error:
        match.run(bad, context(tmp_path / "b", shard))
    assert "\n" not in str(error.value)

    # Good until the second network's first step is done.
    step, steps = match.descend, []
    with monkeypatch.context() as patch:

        def failing(*given):
            steps.append(1)
            if len(steps) == 5:
                raise KeyboardInterrupt
            return step(*given)

        patch.setattr(match, "descend", failing)
        with pytest.raises(KeyboardInterrupt):
            match.run(given_settings(), context(tmp_path / "c", shard, checkpoint_seconds=0.0))
    finish_saving()
    with pytest.raises(
        UserError, match=r"network 1, outer step 1; the last good checkpoint is of step 4\."
    ):
        match.run(worse, context(tmp_path / "c", shard, checkpoint_seconds=0.0))
    kept = sorted((tmp_path / "c").glob("*/step-*.pt"))
    assert kept
    for path in kept:
        state = tensors.load(path)["state"]
        assert state["images"].isfinite().all() and state["theta"].isfinite().all()
    assert not list((tmp_path / "c").glob("0*"))


def test_settings_that_cannot_work_are_refused():
    cost.check(given_settings())
    with pytest.raises(UserError, match="'blur' is none of"):
        cost.check(given_settings(dsa="crop_blur"))
    with pytest.raises(UserError, match=r"gm\.net=resnet32 has BatchNorm"):
        cost.check(given_settings(net="resnet32"))


def test_settings_without_effect_are_named():
    def said(**changes) -> list[str]:
        return GM.check(SimpleNamespace(gm=Gm(**changes)))

    assert said(inner_lr=0.1) == []
    (one,) = said(outer_steps=1, inner_lr=0.1)
    assert "gm.inner_lr has no effect with gm.outer_steps=1" in one
    (one,) = said(inner_epochs=0, inner_batch=8)
    assert "gm.inner_batch has no effect with gm.inner_epochs=0" in one


def test_a_part_of_it_is_refused_in_one_line(tmp_path):
    config = load(config_file(tmp_path), [])
    nodes = graph.build(recipe.stages(config, ""), config)
    with pytest.raises(UserError) as error:
        graph.check_part(nodes, ["match"], (0, 2))
    assert str(error.value) == "--part 0/2: match cannot be done in parts, only students can"


def test_the_cost_counts_what_is_looked_at():
    facts = Facts((40, 20, 2))
    few, many = (cost.cost(given_settings(real_batch=n), facts) for n in (4, 40))
    assert 0 < few.flops < many.flops and few.activations <= many.activations
    assert few.disk == many.disk == 3 * 3 * 3 * SIZE * SIZE
    twice = cost.cost(given_settings(networks=4), facts)
    assert twice.flops == pytest.approx(2 * cost.cost(given_settings(), facts).flops)
    # One outer step and no training; a tail class costs nothing.
    alone = given_settings(networks=1, outer_steps=1, real_batch=30)
    from ltdd_scale.models import flops

    one = flops.forward("convnet3", 8, "instance", SIZE)
    assert cost.cost(alone, facts).flops == pytest.approx(one * (3 * 50 + 7 * 6))
    trained = given_settings(networks=1, outer_steps=2, real_batch=30, inner_epochs=5)
    assert cost.cost(trained, facts).flops == pytest.approx(one * (2 * (3 * 50 + 7 * 6) + 5 * 27))


def test_gm_trains_no_expert():
    assert GM.experts(None) == () and GM.initial == "" and GM.distilled == "match"
