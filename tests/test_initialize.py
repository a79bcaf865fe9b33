import json
from pathlib import Path

import numpy as np
import pytest
import rldd_tools
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from one_stage import one_stage

from ltdd_scale.config.load import to_yaml
from ltdd_scale.config.root import check
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.distilled import Distilled, to_uint8
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.loader import open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.methods.rldd import cost, initialize, selection
from ltdd_scale.methods.rldd.settings import Initialize
from ltdd_scale.models import areas, frozen
from ltdd_scale.stage import Facts, settings_of


def literal(scores, ipc):
    """The algorithm word for word: in each round every image gives its best unused crop; the round's crops are taken best first."""
    unused = [list(range(scores.shape[1])) for _ in scores]
    taken = []
    while len(taken) < ipc and any(unused):
        offers = []
        for i, crops in enumerate(unused):
            if crops:
                best = crops[0]
                for k in crops:
                    if scores[i, k] > scores[i, best]:
                        best = k
                offers.append((i, best))
        while offers and len(taken) < ipc:
            best = offers[0]
            for offer in offers:
                if scores[offer] > scores[best]:
                    best = offer
            offers.remove(best)
            taken.append(best)
            unused[best[0]].remove(best[1])
    return taken


# Few distinct values, so that ties are common.
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 5)),
        elements=st.integers(-4, 0).map(float),
    ),
    st.integers(1, 60),
)
def test_selection_is_the_literal_algorithm(scores, ipc):
    chosen, rounds = selection.confident(scores, ipc)
    images, crops = np.divmod(chosen, scores.shape[1])
    assert list(zip(images.tolist(), crops.tolist(), strict=True)) == literal(scores, ipc)
    assert len(images) == min(ipc, scores.size)
    assert rounds.tolist() == [images[:k].tolist().count(i) for k, i in enumerate(images)]


def in_turn(images, chosen):
    """Candidates of the images that have given the fewest, of those that have some left."""
    left = [k for k in range(len(images)) if k not in chosen]
    given = [sum(images[c] == images[k] for c in chosen) for k in left]
    return [k for k, g in zip(left, given, strict=True) if g == min(given)], min(given)


def herding_cost(features, chosen, taken, k):
    mean = np.mean([*taken, *features[chosen], features[k]], axis=0)
    return np.linalg.norm(mean - features.mean(0))


def k_center_cost(features, chosen, taken, k):
    before = [*taken, *features[chosen]]
    if not before:
        return np.linalg.norm(features[k] - features.mean(0))
    return -min(np.linalg.norm(features[k] - other) for other in before)


@pytest.mark.parametrize(
    ("choose", "cost_of"),
    [(selection.herding, herding_cost), (selection.k_center, k_center_cost)],
)
@given(st.data())
def test_each_choice_is_the_best_in_turn(choose, cost_of, data):
    """By brute force, with what earlier attempts have taken and images of several crops."""
    n, earlier = data.draw(st.integers(1, 10)), data.draw(st.integers(0, 3))
    points = hnp.arrays(float, (n + earlier, 3), elements=st.integers(-5, 5).map(float))
    features, taken = np.split(data.draw(points), [n])
    images = data.draw(hnp.arrays(int, n, elements=st.integers(0, 4)))
    number = data.draw(st.integers(1, 12))
    chosen, rounds = choose(features, images, number, taken)
    assert len(set(chosen.tolist())) == len(chosen) == len(rounds) == min(number, n)
    for k, (mine, turn) in enumerate(zip(chosen, rounds, strict=True)):
        able, given = in_turn(images, chosen[:k])
        costs = [cost_of(features, chosen[:k], taken, other) for other in able]
        assert mine in able and turn == given
        assert cost_of(features, chosen[:k], taken, mine) <= min(costs) + 1e-7


def test_herding_and_k_center_of_points_on_a_line():
    features, each = np.array([[0.0], [1.0], [2.0], [3.0], [9.0]]), np.arange(5)
    nothing = features[:0]
    # The mean is 3. After 3: the pair with mean 3 does not exist, (3 + 2) / 2 is closest.
    assert selection.herding(features, each, 3, nothing)[0].tolist() == [3, 2, 1]
    assert selection.k_center(features, each, 3, nothing)[0].tolist() == [3, 4, 0]
    # Crops 0, 1 and 2 are of one image: it gives one a round.
    chosen, rounds = selection.herding(features, np.array([0, 0, 0, 1, 2]), 5, nothing)
    assert chosen.tolist()[:3] == [3, 2, 4] and rounds.tolist() == [0, 0, 0, 1, 2]


@given(
    hnp.arrays(
        float,
        st.tuples(st.integers(1, 12), st.integers(1, 5)),
        elements=st.integers(0, 6).map(lambda k: k / 6),
    ),
    st.integers(0, 6).map(lambda k: k / 6),
    st.integers(1, 7),
)
def test_the_pool_is_the_literal_rule(confidence, bar, number):
    n, k = confidence.shape
    images = sorted(range(n), key=lambda i: (-max(confidence[i]), i))
    images = [
        i
        for place, i in enumerate(images)
        if max(confidence[i]) >= bar or place < max(n / 2, 2 * number)
    ]
    expected, each = [], max(k / 2, 2 * number / len(images))
    for i in images:
        crops = sorted(range(k), key=lambda c: (-confidence[i, c], c))
        expected += [i * k + c for r, c in enumerate(crops) if confidence[i, c] >= bar or r < each]
    assert selection.pool(confidence, bar, number).tolist() == sorted(expected)


def test_the_pool_of_classes_that_are_sure_hard_and_small():
    sure, hard = np.linspace(0.91, 1, 100)[:, None], np.linspace(0, 1, 100)[:, None]
    assert len(selection.pool(sure, 0.9, 10)) == 100
    assert selection.pool(hard, 0.9, 10).tolist() == list(range(50, 100))
    assert selection.pool(hard, 0.3, 10).tolist() == list(range(30, 100))
    assert selection.pool(hard[:24] / 9, 0.9, 10).tolist() == list(range(4, 24))
    assert len(selection.pool(hard[:12] / 9, 0.9, 10)) == 12
    assert len(selection.pool(hard, 0.0, 10)) == 100
    # Every image of a small class stays, with the surer half of its crops while that is a choice.
    crops = np.array([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    assert selection.pool(crops, 0.95, 1).tolist() == [1, 2, 3, 4]
    assert selection.pool(crops, 0.7, 1).tolist() == [1, 2, 3, 4, 5]
    assert selection.pool(crops, 0.95, 3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shards of 12 … 3 digits a class, and a teacher."""
    folder = tmp_path_factory.mktemp("store")
    rldd_tools.run("shard", rldd_tools.config(), folder)
    rldd_tools.expert(folder / "teacher", "teacher", "convnet3", "instance")
    return folder


@pytest.fixture(scope="module")
def settings():
    return Initialize(crops=3, crop_scale=[0.6, 1.0], batch_size=7)


def test_a_class_too_small_draws_further_crops_and_says_so(store, settings, tmp_path):
    """IPC 20 from 3 images × 3 crops: the published code would loop for ever."""
    config = rldd_tools.config(ipc=20, initialize=settings)
    facts = rldd_tools.run("initialize", config, store, out=tmp_path)
    rows = json.loads((tmp_path / "00009.json").read_text())
    assert len(rows) == 20 and max(r["attempt"] for r in rows) == 2
    assert len({tuple(r["window"]) for r in rows}) == 20
    assert np.load(tmp_path / "00009.npy").shape == (20, 3, 8, 8)
    assert 0 < facts["classes needing further crops"] < 10


@pytest.mark.parametrize("mosaic", [1, 2])
@pytest.mark.parametrize("select", ["confident", "herding", "k_center", "random"])
def test_provenance_makes_the_image_again(store, settings, tmp_path, select, mosaic):
    """Random crops need no teacher: none is among the inputs."""
    settings = settings.model_copy(update={"select": select, "mosaic": mosaic})
    config = rldd_tools.config(ipc=5, initialize=settings)
    rldd_tools.run("initialize", config, store, out=tmp_path)
    split = ShardSplit(store / "shard", "train")
    images = open_images(split, config.data, torch.device("cpu"), 0)
    chosen, side = Distilled(tmp_path, 10), 8 // mosaic

    def crop(row):
        none = np.zeros((1, 0), int), np.zeros((1, 0), bool)
        views = Views(np.float32([row["window"]]), np.asarray([row["mirrored"]]), *none)
        return next(iter(images.stream([(np.asarray([row["image"]]), views)], ViewSpec(8))))

    for c in (0, 5, 9):
        pixels, rows = chosen.load(c), chosen.provenance(c)
        assert len(pixels) == len(rows) == 5
        for image, row in zip(pixels, rows, strict=True):
            parts = row["parts"] if mosaic > 1 else [row]
            assert len(parts) == mosaic**2
            for k, part in enumerate(parts):
                top, left = side * (k // mosaic), side * (k % mosaic)
                there = image[:, top : top + side, left : left + side]
                again = to_uint8(initialize.shrink(crop(part), mosaic))[0]
                assert np.abs(again.astype(int) - there).max() <= 1
                assert part["source"] == split.names[part["image"]]
                assert split.labels[part["image"]] == c and ("score" in part) == (
                    select != "random"
                )


def test_a_restart_does_the_classes_again_that_are_not_whole(store, settings, tmp_path):
    config = rldd_tools.config(initialize=settings)
    rldd_tools.run("initialize", config, store, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("0*")}
    assert len(before) == 20
    (tmp_path / "00003.json").unlink()
    (tmp_path / "00003.npy").write_bytes(b"")
    rldd_tools.run("initialize", config, store, out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("0*")} == before


def rows_of(folder: Path, label: int) -> list:
    return json.loads((folder / f"{label:05d}.json").read_text())


def described(store, config, label):
    """Scores and features of every whole image of a class, one by one."""
    split = ShardSplit(store / "shard", "train")
    images = open_images(split, config.data, torch.device("cpu"), 0)
    normalize, teacher = prepare(split, torch.device("cpu")), teacher_of(store)
    members = np.flatnonzero(split.labels == label)
    x = torch.cat(
        [next(images.stream([(members[[i]], None)], ViewSpec(8))) for i in range(len(members))]
    )
    x = normalize(x)
    return (
        members,
        -torch.nn.functional.cross_entropy(
            teacher.logits(x), torch.full((len(x),), label), reduction="none"
        ).numpy(),
        teacher.features(x).double().numpy(),
    )


def teacher_of(store):
    return frozen.load(store / "teacher" / "weights.pt", rldd_tools.ALONE)


def test_features_and_logits_are_those_of_two_passes(store):
    teacher, x = teacher_of(store), torch.randn(4, 3, 8, 8)
    for _ in range(2):  # nothing is left behind
        features, logits = teacher.features_and_logits(x)
        assert torch.equal(features, teacher.features(x)) and torch.equal(logits, teacher.logits(x))


@pytest.mark.parametrize("bar", [0.0, 1.0])
@pytest.mark.parametrize("select", ["herding", "k_center"])
def test_whole_images_are_chosen_by_their_features(store, tmp_path, select, bar):
    """One candidate an image, whatever K; with a bar of 1 from the surer half."""
    own = Initialize(select=select, crop_scale=[1.0, 1.0], pool=bar, batch_size=5)
    config = rldd_tools.config(ipc=2, initialize=own)
    rldd_tools.run("initialize", config, store, out=tmp_path)
    members, scores, features = described(store, config, 0)
    inside = np.arange(12) if bar == 0 else np.sort(np.argsort(-scores, kind="stable")[:6])
    choose = {"herding": selection.herding, "k_center": selection.k_center}[select]
    expected = inside[choose(features[inside], inside, 2, features[:0])[0]]
    rows = rows_of(tmp_path, 0)
    assert [r["image"] for r in rows] == members[expected].tolist()
    assert np.allclose([r["score"] for r in rows], scores[expected], atol=1e-4)
    assert all(r["window"] == [0, 0, 1, 1] for r in rows)


def test_a_small_class_gives_every_image_once_before_any_a_second_time(store, tmp_path):
    """Three images, two crops each, IPC 8: rounds of two attempts."""
    own = Initialize(select="herding", crops=2, crop_scale=[0.5, 0.9], pool=0.9)
    config = rldd_tools.config(ipc=8, initialize=own)
    facts = rldd_tools.run("initialize", config, store, out=tmp_path)
    rows = rows_of(tmp_path, 9)
    turns = [[r["image"] for r in rows[i : i + 3]] for i in (0, 3)]
    assert [len(set(t)) for t in turns] == [3, 3] and len({r["image"] for r in rows[6:]}) == 2
    assert [r["round"] for r in rows] == [0] * 3 + [1] * 3 + [0] * 2
    assert [r["attempt"] for r in rows] == [0] * 6 + [1] * 2
    assert facts["classes needing further crops"] > 0


def test_a_part_shows_the_whole_crop():
    """A ramp, shrunk to half, is the ramp of half as many steps."""
    ramp = torch.linspace(0, 1, 16).expand(2, 3, 16, 16)
    small = initialize.shrink(ramp, 2)
    assert small.shape == (2, 3, 8, 8)
    inner = ramp[..., :8, ::2][..., 1:-1] + 1 / 30  # between two of its pixels
    assert torch.allclose(small[..., 1:-1], inner, atol=1e-5)


def test_parts_are_tiled_line_by_line():
    parts = np.arange(8).repeat(3 * 4).reshape(8, 3, 2, 2).astype(np.uint8)
    images = initialize.tile(parts, 2)
    assert images.shape == (2, 3, 4, 4)
    assert images[1, 0].tolist() == [[4, 4, 5, 5]] * 2 + [[6, 6, 7, 7]] * 2
    assert np.array_equal(initialize.tile(parts, 1), parts)


class Corner(torch.nn.Module):
    """Takes an image for class 0 by a bright upper left pixel, else for class 1."""

    def forward(self, x):
        bright = 20 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([bright, -bright], 1)


def test_areas_are_what_crops_keep_of_the_confidence():
    """Class 0 is known by its margin of a pixel, which most crops leave out; class 1 is dark. Every
    class weighs the same, whatever its size."""
    pixels = np.full((12, 3, 16, 16), 255, np.uint8)
    pixels[:8, :, 1:-1, 1:-1] = pixels[8:] = 0
    images = MemoryImages(pixels, np.repeat([0, 1], [8, 4]), torch.device("cpu"))
    network = frozen.Frozen(Corner(), {}, rldd_tools.ALONE)
    shown = (network, images, lambda x: x, rldd_tools.ALONE, 16)
    found = areas.kept(*shown, per_class=6)
    assert list(found) == list(areas.AREAS) and found[1.0] == 1
    # One of class 0's six small crops lies in the corner; all four of class 1 keep all.
    assert found[0.35] == pytest.approx((1 / 6 + 1) / 2, abs=1e-3)
    assert found[0.35] <= found[0.7] < found[0.85] < 1
    assert found == areas.kept(*shown, per_class=6) != areas.kept(*shown, per_class=2)


def test_the_smallest_area_is_the_last_before_too_much_is_lost():
    shares = {0.35: 0.95, 0.5: 0.6, 0.7: 0.92, 0.85: 1.01, 1.0: 1.0}
    assert areas.smallest(shares, 0.9) == 0.7
    assert areas.smallest(shares, 0.5) == 0.35
    assert areas.smallest(shares, 1.0) == 0.85
    assert areas.smallest({**shares, 0.85: 0.1}, 0.9) == 1.0


def test_the_rule_for_areas_is_followed_and_recorded(store, tmp_path):
    """The untrained teacher keeps what it has at any area: keep=0 takes the smallest, and a share
    that nothing keeps leaves images whole."""
    for keep, low in ((0.0, 0.35), (1.0, None)):
        own = Initialize(crops=2, crop_scale=[], keep=keep)
        out = tmp_path / str(keep)
        facts = rldd_tools.run("initialize", rldd_tools.config(initialize=own), store, out=out)
        shares = facts["confidence kept"]
        assert list(shares) == ["0.35", "0.5", "0.7", "0.85", "1"] and shares["1"] == 1
        exact = {float(a): s for a, s in shares.items()}
        assert facts["crop_scale"] == [low or areas.smallest(exact, keep), 1.0]
        heights = [r["window"][2] * r["window"][3] for c in range(10) for r in rows_of(out, c)]
        assert min(heights) >= facts["crop_scale"][0] - 1e-3
        assert min(heights) < facts["crop_scale"][0] + 0.2


@pytest.mark.slow
def test_two_ranks_write_the_same(store, tmp_path):
    own = Initialize(select="herding", crops=2, crop_scale=[], pool=0.5)
    config = rldd_tools.config(ipc=5, initialize=own)
    facts = rldd_tools.run("initialize", config, store, out=tmp_path / "one")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    inputs = {name: store / name for name in ("shard", "teacher")}
    done = one_stage("initialize", tmp_path / "c.yaml", tmp_path / "two", 2, (), inputs)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "facts.json").read_text()) == facts
    for path in (tmp_path / "one").glob("0*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_settings_that_do_nothing_or_do_not_fit_are_said():
    def said(size=8, **own):
        return " ".join(check(rldd_tools.config(size, initialize=Initialize(**own))))

    assert said(pool=0.3, crop_scale=[], keep=0.8, crops=3) == said(select="confident") == ""
    pool = "initialize.pool has no effect with initialize.select=confident"
    assert pool in said(select="confident", pool=0.3)
    assert "initialize.keep" in said(keep=0.8)
    assert "initialize.crops" in said(select="random", crops=3)
    assert "initialize.crops" in said(select="k_center", crops=3, crop_scale=[1.0, 1.0])
    with pytest.raises(UserError, match="must be a multiple of it, got 9"):
        said(size=9, mosaic=2)


def test_what_the_choice_costs():
    def costs(**own):
        config = rldd_tools.config(initialize=Initialize(**own))
        stage = {s.name: s for s in rldd_tools.RLDD.stages(config)}["initialize"]
        assert ("teacher" in stage.inputs) == Initialize(**own).needs_teacher
        return cost.initialize(settings_of(stage, config), Facts((30, 10)))

    crops, whole = costs(crop_scale=[0.5, 1.0]), costs()
    confident = costs(select="confident", crop_scale=[0.5, 1.0])
    assert crops.flops == 5 * whole.flops == confident.flops > 0
    assert crops.memory > confident.memory
    # Twenty images of the head and ten of the tail at five areas.
    rule = costs(select="random", crop_scale=[])
    assert rule.flops == whole.flops / 40 * 150 and costs(select="random").flops == 0
