"""Criteria that group classes, and what a network says of them; t-SNE of judged images."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ltdd_scale.config.root import Config
from ltdd_scale.data import sharding, sources
from ltdd_scale.data.loader import prepare
from ltdd_scale.data.settings import Data
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.judging import criteria, embedding, features, grouping, trees, two_stage
from ltdd_scale.judging.contract import Roles
from ltdd_scale.judging.criteria import Described, Wanted
from ltdd_scale.judging.features import Shown, chosen, class_centres, describe
from ltdd_scale.judging.settings import CRITERIA, Evaluate, TwoStage
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, function, settings_of

ALONE = Ranks(0, 1, torch.device("cpu"), None)
ROLES = Roles("recover", "initialize")


def described(groups, spread=0.3, seed=0, d=6, centres=5) -> Described:
    """Classes planted about one point for each of `groups`, far from one another."""
    draw = np.random.default_rng(seed)
    num_classes = sum(map(len, groups))
    means, confusion = np.empty((num_classes, d)), np.full((num_classes, num_classes), 0.01)
    for group in groups:
        middle = draw.normal(0, 5, d)
        for c in group:
            means[c] = middle + draw.normal(0, spread, d)
            confusion[c, group] += 0.1
    clouds = [m + draw.normal(0, 0.1, (centres, d)) for m in means]
    names = [f"class {c}" for c in range(num_classes)]
    return Described(means, names, clouds, confusion / confusion.sum(1, keepdims=True))


def partitions(classes: int, k: int):
    """Every way to put classes into k groups, as labels int [C]."""
    for rest in itertools.product(range(k), repeat=classes - 1):
        label = np.asarray((0, *rest))
        firsts = [int(np.flatnonzero(label == g)[0]) for g in range(k) if (label == g).any()]
        if len(firsts) == k and firsts == sorted(firsts):
            yield label


def as_groups(label) -> list[list[int]]:
    return sorted(np.flatnonzero(label == g).tolist() for g in np.unique(label))


def test_the_distance_of_the_paper_has_a_closed_form():
    """D_ik² = M²·‖μ_i − μ_k‖² + M·(W_i + W_k), W the summed squares about μ; also for i = k."""
    draw = np.random.default_rng(0)
    centres = [draw.normal(0, 1 + c, (5, 7)) + 3 * c for c in range(4)]
    literal = np.empty((4, 4))
    for i, k in itertools.product(range(4), repeat=2):
        literal[i, k] = np.sqrt(sum(((a - b) ** 2).sum() for a in centres[i] for b in centres[k]))
    assert np.allclose(criteria.centre_distances(centres), literal, rtol=1e-12)
    mu, w = [c.mean(0) for c in centres], [((c - c.mean(0)) ** 2).sum() for c in centres]
    closed = 25 * ((mu[0] - mu[3]) ** 2).sum() + 5 * (w[0] + w[3])
    assert np.isclose(literal[0, 3] ** 2, closed, rtol=1e-12)


def test_a_class_with_few_images_has_fewer_centres_and_the_same_scale():
    """Each point twice is the same cloud: the distances are those of the larger number."""
    draw = np.random.default_rng(1)
    whole = [np.repeat(draw.normal(0, 1, (3, 4)), 2, 0) for _ in range(2)]
    few = [whole[0], whole[1][::2]]
    assert np.allclose(criteria.centre_distances(few), criteria.centre_distances(whole))
    assert class_centres(draw.normal(0, 1, (3, 4)), 5).shape == (3, 4)
    same = class_centres(np.ones((6, 4)), 5)
    assert np.allclose(same, 1) and len(same) == 5


@pytest.mark.parametrize(("classes", "k", "smallest"), [(8, 2, 1), (8, 2, 3), (7, 3, 1), (8, 3, 2)])
def test_maxcut_finds_the_best_of_all_cuts(classes, k, smallest):
    points = np.random.default_rng(classes + k).normal(0, 1, (classes, 3))
    distances = criteria.mean_distances(points)
    scores = {}
    for label in partitions(classes, k):
        if np.bincount(label).min() >= smallest:
            scores[str(as_groups(label))] = distances[label[:, None] != label[None]].sum() / 2
    found = criteria.cut_apart(distances, k, smallest)
    assert str(found[0].groups) == max(scores, key=lambda key: scores[key])
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    for cut in found:
        assert cut.score == pytest.approx(scores[str(cut.groups)])
    assert len(found) == 5 or k > 2


def test_the_search_for_many_classes_is_as_good_as_looking_at_all(monkeypatch):
    points = np.random.default_rng(3).normal(0, 1, (14, 4))
    distances = criteria.mean_distances(points)
    best = criteria.cut_apart(distances, 2, 4)[0]
    monkeypatch.setattr(criteria, "EXHAUSTIVE", 0)
    found = criteria.cut_apart(distances, 2, 4)[0]
    assert found.groups == best.groups and min(map(len, found.groups)) >= 4


@pytest.mark.parametrize("name", ["maxcut", "linkage", "confusion"])
def test_planted_groups_are_found(name):
    planted = [[0, 3, 5], [1, 2, 6], [4, 7, 8]]
    d = described(planted)
    for asked in (3, 0):
        cuts = grouping.group(d, Wanted(asked, smallest=2), name)
        assert cuts[0].groups == planted, (name, asked)
    assert len(cuts) == 3 and cuts[0].score > cuts[1].score, "2, 3 and 4 groups"


def test_the_centres_see_what_means_do_not():
    """Classes at one place but of other spread: Σ D grows with the spread, so small classes, which
    have the larger one, decide the published cut."""
    draw = np.random.default_rng(0)
    means = np.asarray([[0.0], [1], [2], [10], [11], [12]])
    wide = (0, 3)
    cloud = [draw.normal(0, 60 if c in wide else 0.1, (5, 1)) for c in range(6)]
    centres = [m + x - x.mean(0) for m, x in zip(means, cloud, strict=True)]
    d = Described(means, list("abcdef"), centres)
    assert criteria.linkage(d, Wanted(2, 2))[0].groups == [[0, 1, 2], [3, 4, 5]]
    assert criteria.maxcut(d, Wanted(2, 2))[0].groups != [[0, 1, 2], [3, 4, 5]]


def test_a_lone_class_joins_the_nearest_group():
    """Average linkage cuts off a class that is far away: it joins whom it is nearest to."""
    means = np.asarray([[0.0], [1], [2], [20], [21], [22], [50]])
    d = Described(means, list("abcdefg"))
    assert criteria.linkage(d, Wanted(2, 1))[0].groups == [[0, 1, 2, 3, 4, 5], [6]]
    assert criteria.linkage(d, Wanted(2, 2))[0].groups == [[0, 1, 2], [3, 4, 5, 6]]


@pytest.mark.parametrize(("k", "smallest"), [(2, 2), (2, 4), (3, 2), (3, 3), (4, 2)])
def test_a_chain_of_classes_is_cut_too(k, smallest):
    """Each class is a little farther from all before it: each join takes in one class."""
    means = (2.0 ** np.arange(10))[:, None]
    d = Described(means, [str(c) for c in range(10)])
    linked = criteria.tree(criteria.mean_distances(means))
    assert all(min(row[:2]) < 10 for row in linked), "a chain"
    groups = criteria.linkage(d, Wanted(k, smallest))[0].groups
    assert len(groups) == k and min(map(len, groups)) >= smallest
    assert sorted(c for g in groups for c in g) == list(range(10))
    assert all(g == list(range(g[0], g[-1] + 1)) for g in groups), "neighbours on the line"


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["maxcut", "linkage", "confusion", "random"]),
    classes=st.integers(6, 24),
    k=st.integers(2, 4),
    smallest=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_every_class_is_in_one_group(name, classes, k, smallest, seed):
    k = min(k, classes // max(2, smallest))
    if k < 2:
        return
    d = described([[c] for c in range(classes)], seed=seed)
    cuts = grouping.group(d, Wanted(k, smallest, seed), name)
    for cut in cuts:
        assert sorted(c for g in cut.groups for c in g) == list(range(classes))
        assert len(cut.groups) == k and min(map(len, cut.groups)) >= smallest
        assert cut.groups == sorted(map(sorted, cut.groups))
    again = grouping.group(d, Wanted(k, smallest, seed), name)
    assert again == cuts


def test_random_groups_are_drawn_from_the_seed():
    d = described([[c] for c in range(9)])
    found = [criteria.random(d, Wanted(3, seed=s))[0].groups for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and {len(g) for g in found[0]} == {3}


def test_given_groups_by_name_or_number():
    d = Described(np.zeros((4, 1)), ["cat", "dog", "3", "car"])
    cut = criteria.given(d, Wanted(2, given=[["car", "cat"], ["dog", "3"]]))[0]
    assert cut.groups == [[0, 3], [1, 2]], "a name comes before a number"
    assert criteria.given(d, Wanted(2, given=[["0", "1"], ["2", "car"]]))[0].groups[1] == [2, 3]
    for groups, words in (
        ([["cat", "dog"], ["3"]], "car in no group"),
        ([["cat", "dog"], ["3", "car", "cat"]], "cat in two places"),
        ([["cat", "dog", "3", "cow"], ["car"]], "no class 'cow'"),
        ([["cat", "dog", "3", "car"]], "two groups or more"),
    ):
        with pytest.raises(UserError, match=words):
            criteria.given(d, Wanted(2, given=groups))


def test_numbers_of_groups_that_cannot_be():
    d = described([[c] for c in range(8)])
    for wanted, words in (
        (Wanted(5), "8 classes make 2 to 4 groups"),
        (Wanted(3, smallest=3), "at most 2"),
        (Wanted(1), "2 to 4"),
    ):
        with pytest.raises(UserError, match=words):
            criteria.linkage(d, wanted)
    with pytest.raises(UserError, match="too few"):
        criteria.linkage(Described(np.zeros((3, 1)), "abc"), Wanted(2))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Shards of digits with a validation split, and an untrained network."""
    folder = tmp_path_factory.mktemp("house")
    data = Data(
        resolution=8,
        mirror=False,
        max_per_class=16,
        imbalance_factor=4,
        test_per_class=6,
        val_per_class=3,
    )
    (folder / "shard").mkdir()
    sharding.write(folder / "shard", "digits", sources.open_source(data), data, workers=1)
    (folder / "plain").mkdir()
    recipe = frozen.recipe("convnet3", 8, "instance", 8, 10)

    def made():
        return registry.Student(registry.backbone("convnet3", 8, "instance", 8), 10)

    frozen.save(folder / "plain" / "weights.pt", recipe, registry.seeded(made, "p"))
    return folder


def shown(house, split: str) -> Shown:
    train = ShardSplit(house / "shard", "train")
    of = ShardSplit(house / "shard", split)
    return Shown(
        of, Data(resolution=8, mirror=False), prepare(train, ALONE.device), ALONE.device, 0
    )


def test_what_a_network_says_of_the_classes(house):
    """Means, centres and confusion are those of its features and logits, image by image."""
    network = frozen.load(house / "plain" / "weights.pt", ALONE)
    d = describe(network, shown(house, "train"), 5, 2, shown(house, "val"))
    split = ShardSplit(house / "shard", "train")
    parts = chosen(split.labels, 10, 5)
    assert all(len(p) == min(5, n) for p, n in zip(parts, split.counts, strict=True))
    assert all((split.labels[p] == c).all() for c, p in enumerate(parts))
    x = torch.cat(list(shown(house, "train").batches([parts[3]])))
    features = network.features(x)
    assert np.allclose(d.means[3], features.double().mean(0).numpy(), atol=1e-5)
    assert torch.allclose(network.model.fc(features), network.logits(x), atol=1e-6)
    assert [len(c) for c in d.centres] == [2] * 10 and np.allclose(d.confusion.sum(1), 1)
    held = ShardSplit(house / "shard", "val")
    x = torch.cat(list(shown(house, "val").batches([np.flatnonzero(held.labels == 3)])))
    assert np.allclose(d.confusion[3], network.logits(x).double().softmax(1).mean(0).numpy())


def run_grouping(house, out, split="test", **asked):
    config = Config(
        data=Data(resolution=8, mirror=False),
        evaluate=Evaluate(split=split, plain="own"),
        protocol="two_stage",
        two_stage=TwoStage(**{"features_per_class": 8, "centres": 2, **asked}),
    )
    stage = {s.name: s for s in two_stage.stages(config, ROLES)}["grouping"]
    assert stage.inputs == {"shard": "shard", "network": "student/plain-hard-convnet3-s0"}
    out.mkdir()
    inputs = {"shard": house / "shard", "network": house / "plain"}
    context = Context(ALONE, out, inputs, "w", quiet=True, workers=0)
    facts = grouping.run(settings_of(stage, config), context)
    return facts, json.loads((out / "grouping.json").read_text())


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_the_stage(criterion, house, tmp_path):
    halves = [[str(c) for c in range(5)], [str(c) for c in range(5, 10)]]
    asked = {"given": halves} if criterion == "given" else {}
    facts, told = run_grouping(house, tmp_path / "g", criterion=criterion, **asked)
    assert facts == {"groups": 2, "sizes": [len(g) for g in told["groups"]]}
    assert (told["network"], told["criterion"]) == ("plain, whole set", criterion)
    assert told["classes"] == [str(c) for c in range(10)] and told["counts"][0] == 16
    assert sorted(c for g in told["groups"] for c in g) == list(range(10))
    tree = np.asarray(told["linkage"])
    assert tree.shape == (9, 4) and tree[-1, 3] == 10 and (np.diff(tree[:, 2]) >= 0).all()
    assert told["best"][0] == {"groups": told["groups"], "score": told["score"]}
    assert (told["score"] is None) == (criterion in ("given", "random"))
    assert len(told["best"]) == (5 if criterion == "maxcut" else 1)


def test_confusion_is_of_images_that_nobody_is_judged_on(house, tmp_path):
    """Validation images, unless students are judged on them: then training images."""
    heights = []
    for split in ("test", "val"):
        _, told = run_grouping(house, tmp_path / split, split, criterion="confusion")
        heights.append([row[2] for row in told["linkage"]])
    network = frozen.load(house / "plain" / "weights.pt", ALONE)
    for split, height in zip(("val", "train"), heights, strict=True):
        d = describe(network, shown(house, "train"), 8, 0, shown(house, split))
        assert np.allclose(height, grouping.tree_of(d)[:, 2]), split
    assert not np.allclose(*heights)


def test_an_embedding_is_always_the_same_and_has_centres():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], 12)
    features = draw.normal(0, 0.1, (36, 5)) + 4.0 * np.eye(5)[labels]
    xy, centres = embedding.embed(features.astype(np.float32), labels, 4)
    again, _ = embedding.embed(features.astype(np.float32), labels, 4)
    assert np.array_equal(xy, again) and xy.shape == (36, 2) and xy.dtype == np.float32
    assert np.isnan(centres[2]).all() and np.isfinite(centres[[0, 1, 3]]).all()
    for c in (0, 1, 3):  # each centre lies among its own
        nearest = np.linalg.norm(xy - centres[c], axis=1).argmin()
        assert labels[nearest] == c
    flat, _ = embedding.embed(np.ones((36, 5), np.float32), labels, 4)
    assert not flat.any()
    assert embedding.perplexity_of(2000) == 50 and embedding.perplexity_of(31) == 10


def test_the_stage_embedding(house, tmp_path):
    config = Config(data=Data(resolution=8, mirror=False), evaluate=Evaluate(plain="own"))
    stage = {s.name: s for s in two_stage.TWO_STAGE.stages(config, ROLES)}["embedding"]
    assert list(stage.inputs) == ["shard", "plain, whole set", "distilled"]
    inputs = dict.fromkeys(stage.inputs, house / "plain") | {"shard": house / "shard"}
    context = Context(ALONE, tmp_path, inputs, "w", quiet=True, workers=0)
    assert embedding.run(settings_of(stage, config), context)["images"] == 60
    told = json.loads((tmp_path / "embedding.json").read_text())
    assert told["titles"] == ["plain, whole set", "distilled"] and told["perplexity"] == 19.67
    with np.load(tmp_path / "embedding.npz") as found:
        assert set(found) == {"labels", "xy_0", "centres_0", "xy_1", "centres_1"}
        assert found["labels"].dtype == np.int64 and found["xy_0"].shape == (60, 2)
        assert found["centres_1"].shape == (10, 2)
    none = Config(evaluate=Evaluate(plain="none", embedding=False))
    assert "embedding" not in [s.name for s in two_stage.stages(none, ROLES)]
    alone = Config(evaluate=Evaluate(plain="none"), two_stage=TwoStage(network="distilled"))
    stage = {s.name: s for s in two_stage.stages(alone, ROLES)}["embedding"]
    assert stage.given == {"titles": ["distilled"]}


# --- Before anything starts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"criterion": "linkage", "groups": 5}, "8 classes make 2 to 4 groups"),
        ({"groups": 3, "smallest": 3}, "at most 2"),
        ({"criterion": "given", "given": [list("abc"), list("defg")]}, "7 names for 8 classes"),
        ({"criterion": "given", "given": [list("0123"), list("4566")]}, "6 in two places"),
        ({"criterion": "given", "given": [list("01234567"), []]}, "none of them empty"),
    ],
)
def test_groups_that_cannot_be_are_refused_before_anything_starts(asked, words):
    config = Config(protocol="two_stage", two_stage=TwoStage(**asked))
    stage = {s.name: s for s in two_stage.stages(config, ROLES)}["grouping"]
    with pytest.raises(UserError, match=words):
        function(stage.cost)(settings_of(stage, config), Facts((9,) * 8, 10))


def test_groups_that_may_be_are_not_refused():
    for asked in (
        {},
        {"groups": 0, "criterion": "linkage"},
        {"criterion": "given", "given": [["1", "2", "3"], ["4"]]},  # classes may be called so
    ):
        config = Config(protocol="two_stage", two_stage=TwoStage(**asked))
        stage = {s.name: s for s in two_stage.stages(config, ROLES)}["grouping"]
        assert function(stage.cost)(settings_of(stage, config), Facts((9,) * 4, 10)).memory > 0


# --- Many classes ---------------------------------------------------------------------------------


def cut_by_definition(linked, distances, k: int, smallest: int):
    """The first cut of the tree that leaves k groups: branches are joined one by one, and all mean
    distances computed anew. None for a chain."""
    from scipy.cluster import hierarchy

    for branches in range(k, min(len(distances), 10 * k)):
        label = hierarchy.fcluster(linked, branches, "maxclust")
        groups = [np.flatnonzero(label == v).tolist() for v in np.unique(label)]
        while len(groups) > 1:
            mean = np.asarray([[distances[np.ix_(a, b)].mean() for b in groups] for a in groups])
            np.fill_diagonal(mean, np.inf)
            sizes = [len(g) for g in groups]
            if min(sizes) < smallest:
                a = int(np.argmin(sizes))
                b = int(mean[a].argmin())
            elif len(groups) > k:
                a, b = np.unravel_index(int(mean.argmin()), mean.shape)
            else:
                break
            a, b = sorted((int(a), int(b)))
            groups[a] = groups[a] + groups.pop(b)
        if len(groups) == k:
            return trees.in_order(groups)
    return None


def test_a_cutter_finds_what_the_definition_does():
    """For all numbers of groups, one after the other, as the silhouette asks for them."""
    found = 0
    for seed in range(8):
        draw = np.random.default_rng(seed)
        means = draw.normal(0, 1, (24, 4)) * draw.lognormal(0, 0.5, (24, 1))
        distances = criteria.mean_distances(means)
        cutter = trees.Cutter(criteria.tree(distances), distances, 1 + seed % 3)
        for k in range(2, 8):
            expected = cut_by_definition(cutter.linked, distances, k, cutter.smallest)
            groups = cutter.cut(k)
            assert len(groups) == k and min(map(len, groups)) >= cutter.smallest
            assert expected is None or groups == expected
            found += expected is not None
    assert found >= 40


def test_branches_are_joined_once_for_all_numbers_of_groups(monkeypatch):
    """Most cuts of a chain fail; each is tried once, whatever number of groups asks for it."""
    asked = []
    real = trees._join_small
    monkeypatch.setattr(trees, "_join_small", lambda *a: (asked.append(a[0].count), real(*a))[1])
    means = np.random.default_rng(0).normal(0, 1, (60, 8))
    means *= np.random.default_rng(1).lognormal(0, 0.5, (60, 1))
    cuts = criteria.linkage(Described(means, [str(c) for c in range(60)]), Wanted(0, 4))
    assert len(cuts) == 5
    # Once more for the one cut that counts, for each of 14 numbers of groups.
    assert len(asked) <= 60 + 14, len(asked)


def test_a_network_sees_few_images_at_a_time(house, monkeypatch):
    """However many of a class are looked at, and it says the same of them."""
    network = frozen.load(house / "plain" / "weights.pt", ALONE)
    whole = describe(network, shown(house, "train"), 16, 2, shown(house, "train"))
    monkeypatch.setattr(features, "together", lambda side: 3)
    sizes = []
    real = Shown.batches

    def batches(self, parts):
        for x in real(self, parts):
            sizes.append(len(x))
            yield x

    monkeypatch.setattr(Shown, "batches", batches)
    pieces = describe(network, shown(house, "train"), 16, 2, shown(house, "train"))
    assert max(sizes) == 3
    assert np.allclose(whole.means, pieces.means, atol=1e-6)
    assert np.allclose(whole.confusion, pieces.confusion, atol=1e-6)
    assert np.allclose(np.stack(whole.centres), np.stack(pieces.centres), atol=1e-5)


def test_the_criterion_in_the_manual_works():
    text = (ROOT / "docs" / "two_stage.md").read_text()
    place = dict(vars(criteria))
    exec(text.split("```python")[1].split("```")[0], place)
    d = described([[0, 2, 4], [1, 3, 5]])
    (cut,) = place["by_spread"](d, Wanted(2))
    assert sorted(c for g in cut.groups for c in g) == list(range(6))
    assert [len(g) for g in cut.groups] == [3, 3]
