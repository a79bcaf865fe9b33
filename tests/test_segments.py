"""Trajectory matching's loop: several segments, SGD, saving, divergence. No experts are trained."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltdd_scale.data import siamese
from ltdd_scale.errors import UserError
from ltdd_scale.methods.matching import segments
from ltdd_scale.methods.matching.real import Pixels
from ltdd_scale.methods.matching.saved import Saved
from ltdd_scale.methods.matching.segments import Matching, Synthetic, Weighted
from ltdd_scale.methods.matching.settings import Unrolled
from ltdd_scale.methods.matching.unroll import Segment, Unroll
from ltdd_scale.models.flat import Flat
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), None)
CLASSES, IPC, SIZE = 3, 4, 8
FLAT = Flat("convnet3", 8, "instance", SIZE, CLASSES)
WAYS = [FLAT.initial("way", k) for k in range(3)]
ENDS: list[torch.Tensor] = []  # where an expert ends that is trained on a secret set
PIXELS = Pixels(torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As ranks have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def experts():
    secret = torch.randn(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    classes = torch.arange(12) % CLASSES
    for k, theta in enumerate(WAYS):
        for _ in range(8):
            theta = theta.detach().requires_grad_()
            loss = F.cross_entropy(FLAT.logits(theta, secret + 0.1 * k), classes)
            theta = theta - 0.1 * torch.autograd.grad(loss, theta)[0]
        ENDS.append(theta.detach())


def settings(**changes) -> Unrolled:
    small = {"iterations": 8, "inner_steps": 4, "batch_size": 6, "lr_images": 5.0, "rate": 0.1}
    return Unrolled(**{**small, **changes})


def start() -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (CLASSES * IPC, 3, SIZE, SIZE), np.uint8)
    return PIXELS.normalized(torch.from_numpy(pixels))


def matching(
    own: Unrolled, learn: bool = False, bad: tuple[int, int] = (-1, -1), saved=None
) -> Matching:
    images, strategy = start(), siamese.choices(siamese.ALL)
    classes = torch.arange(CLASSES).repeat_interleave(IPC)
    synthetic = Synthetic(images, F.one_hot(classes, CLASSES).float(), own, learn, 0.5)

    def pick(t: int, j: int) -> list[Weighted]:
        sizes = (own.inner_steps, own.batch_size, len(images))
        drawn = segments.draw(("test", t, j), len(WAYS), (0, 2), sizes, strategy, images)
        begin, end = WAYS[drawn.expert], ENDS[drawn.expert]
        factor = math.nan if (t, j) == bad else 1.0

        def logits(theta, x, _):
            return FLAT.logits(theta, x)

        def loss(z, y):
            return factor * -(F.softmax(y, 1) * F.log_softmax(z, 1)).sum(1).mean()

        how = (drawn.batches, drawn.augment, logits, loss, begin[:0])
        name = f"expert {drawn.expert} from snapshot {drawn.start}"
        return [Weighted(0.5, Segment(name, begin, end, slice(0, FLAT.size), *how))]

    return Matching("mtt", own, synthetic, PIXELS, pick, ALONE, saved)


def run(made: Matching, where: Context) -> None:
    segments.run(replace(made, saved=Saved(where)), where)


def context(out: Path, seconds: float = 60.0) -> Context:
    out.mkdir(exist_ok=True)
    return Context(ALONE, out, {}, "me", seconds, quiet=True)


def test_a_gradient_is_the_weighted_one_of_its_segments():
    made = matching(settings(), learn=True)
    one, other = made.pick(0, 0)[0], made.pick(0, 1)[0]
    synthetic = made.synthetic
    vector = synthetic.gradient([one, Weighted(2.0, other.segment)])
    rate = synthetic.log_rate.exp()
    parts = [
        Unroll(True).gradient(w.segment, synthetic.images, synthetic.labels, rate)
        for w in (one, other)
    ]
    n = synthetic.images.numel()
    expected = 0.5 * parts[0].images + 2.0 * parts[1].images
    torch.testing.assert_close(vector[:n].view_as(expected), expected)
    torch.testing.assert_close(vector[n], 0.5 * parts[0].log_rate + 2.0 * parts[1].log_rate)
    labels = 0.5 * parts[0].labels + 2.0 * parts[1].labels
    torch.testing.assert_close(vector[n + 1 : -1].view_as(labels), labels)
    torch.testing.assert_close(vector[-1], 0.5 * parts[0].loss + 2.0 * parts[1].loss)


def test_an_iteration_is_one_step_of_sgd_along_the_mean_of_its_segments():
    own = settings(segments=3, lr_images=0.5, lr_rate=0.2)
    made = matching(own)
    before, rate = made.synthetic.images.clone(), float(made.synthetic.log_rate)
    vectors = [made.synthetic.gradient(made.pick(0, j)) for j in range(3)]
    mean = sum(vectors) / 3
    distance = made.iterate(0)
    moved = before - 0.5 * mean[: before.numel()].view_as(before)
    PIXELS.clamp(moved)
    torch.testing.assert_close(made.synthetic.images, moved)
    assert not torch.equal(made.synthetic.images, before)
    assert float(made.synthetic.log_rate) == pytest.approx(rate - 0.2 * float(mean[-2]))
    assert distance == pytest.approx(float(mean[-1]))
    shown = made.synthetic.images * PIXELS.std + PIXELS.mean
    assert shown.min() >= -1e-6 and shown.max() <= 1 + 1e-6


def test_labels_are_learned_only_where_they_are_to_be():
    for learn in (False, True):
        made = matching(settings(), learn)
        before = made.synthetic.labels.clone()
        made.iterate(0)
        assert torch.equal(made.synthetic.labels, before) != learn


def test_matching_lowers_the_distance(tmp_path):
    own = settings(iterations=25, lr_images=200.0, lr_rate=0.1)
    made, untouched = matching(own, True), matching(own, True)

    def mean(made):
        drawn = [made.pick(1000 + t, 0)[0].segment for t in range(6)]
        synthetic = made.synthetic
        rate = synthetic.log_rate.exp()
        found = [Unroll().gradient(s, synthetic.images, synthetic.labels, rate).loss for s in drawn]
        return float(torch.stack(found).mean())

    run(made, context(tmp_path / "out"))
    assert mean(made) < 0.95 * mean(untouched)


def test_a_cut_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    own = settings(segments=2)
    whole, cut = matching(own, True), matching(own, True)
    run(whole, context(tmp_path / "whole"))
    begun, counted = Matching.iterate, []

    def failing(self, t):
        counted.append(t)
        if len(counted) == 6:
            raise KeyboardInterrupt
        return begun(self, t)

    monkeypatch.setattr(Matching, "iterate", failing)
    with pytest.raises(KeyboardInterrupt):
        run(cut, context(tmp_path / "cut", 0.0))
    again = matching(own, True)
    run(again, context(tmp_path / "cut"))
    # The last save may still have been on its way.
    assert counted[:6] == [0, 1, 2, 3, 4, 5] and counted[6] in (4, 5) and counted[-1] == 7
    for name in ("images", "labels", "log_rate"):
        assert torch.equal(getattr(again.synthetic, name), getattr(whole.synthetic, name))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_stop_saves_where_it_is(tmp_path, monkeypatch):
    made = matching(settings())
    monkeypatch.setattr(signals, "_requested", "SIGTERM")
    with pytest.raises(signals.Preempted, match="at step 1"):
        run(made, context(tmp_path / "out"))
    assert list((tmp_path / "out").rglob("step-000000000001.pt"))


def test_divergence_is_one_line_and_the_last_good_state_stays(tmp_path):
    made = matching(settings(segments=2), bad=(3, 1))
    out = context(tmp_path / "out", 0.0)
    with pytest.raises(UserError) as error:
        run(made, out)
    said = str(error.value)
    assert "\n" not in said and "nan at iteration 3, segment 1 (expert" in said
    assert "last good checkpoint is of step 3. Lower mtt.lr_images" in said
    step, state = out.checkpoints().load()
    assert step == 3 and torch.isfinite(state["synthetic"]["images"]).all()


def test_draws_are_pure_and_batches_hold_an_image_once():
    images, strategy = start(), siamese.choices(siamese.ALL)
    sizes = (7, 5, len(images))
    a, b = (segments.draw(("k", 1), 9, (2, 4), sizes, strategy, images) for _ in range(2))
    assert (a.expert, a.start) == (b.expert, b.start) and torch.equal(a.batches, b.batches)
    assert a.batches.shape == (7, 5) and len(a.changes) == 7
    assert all(len(set(row.tolist())) == 5 for row in a.batches)
    assert len({i for row in a.batches[:2] for i in row.tolist()}) == 10
    others = [segments.draw(("k", n), 9, (2, 4), sizes, strategy, images) for n in range(40)]
    assert {d.start for d in others} == {2, 3, 4} and len({d.expert for d in others}) > 5
