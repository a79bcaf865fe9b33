import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale import recipe
from ltdd_scale.config.root import Config, check
from ltdd_scale.data import augment, distilled
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.loader import normalizer
from ltdd_scale.data.settings import Seen
from ltdd_scale.errors import UserError
from ltdd_scale.judging.training import student_loss
from ltdd_scale.labels import adjust, cost, labeller, learned, single, stored
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.mixture import with_class
from ltdd_scale.labels.settings import Relabel, Single, Views
from ltdd_scale.labels.stage import stage as relabel_stage
from ltdd_scale.labels.views import draw_epoch, mix, onehot, render, view_spec
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Facts, Given, settings_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
COUNTS = np.asarray([50, 30, 10, 5, 2])
VIEWS = Views(crop_scale=[0.4, 1.0], randaugment=1)
SPEC = view_spec(VIEWS, 8, True)
LOGITS = np.random.default_rng(7).normal(0, 2, (11, 5)).astype(np.float32)  # that a set brings


def teacher() -> frozen.Frozen:
    """A network that favours the classes that are frequent in `COUNTS`: ADSA finds work."""

    def made():
        return registry.TwoHeads(registry.backbone("convnet3", 4, "instance", 8), 5, 0)

    model = registry.seeded(made, "t").eval().requires_grad_(False)
    model.fc_cb.bias += torch.from_numpy(np.log(COUNTS / COUNTS.sum())).float()
    return frozen.Frozen(model, frozen.recipe("convnet3", 4, "instance", 8, 5), ALONE)


def images(n=11) -> MemoryImages:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    return MemoryImages(pixels, np.arange(n) % 5, CPU)


def maker(**changes) -> Maker:
    made = Maker(
        images=images(),
        teacher=teacher(),
        normalize=normalizer([0.5] * 3, [0.25] * 3, CPU),
        spec=SPEC,
        views=VIEWS,
        relabel=Relabel(batch_size=4, epochs=2),
        num_classes=5,
        train_counts=COUNTS,
        seed=3,
        epochs=4,
        ranks=ALONE,
        temperature=None,
        learned=LOGITS,
    )
    return dataclasses.replace(made, **changes)


class Half(Ranks):
    """One of two ranks, whose sums are its own share."""

    def all_reduce(self, tensor):
        return tensor

    def barrier(self):
        pass


def shown(made: Maker, labels, epoch: int, batches: list, key="another seed"):
    """(drawn, images) of an epoch as a student would see them."""
    drawn = draw_epoch(SPEC, made.images.sizes, *labels.view_key(key, epoch), True)
    return drawn, list(render(made.images, drawn, batches, SPEC, made.normalize))


@given(st.integers(1, 20), st.integers(2, 12), st.integers(0, 12))
def test_packed_logits_come_back(n, num_classes, topk):
    logits = torch.randn(n, num_classes)
    packed = stored.pack(logits, topk)
    rows = np.arange(n)[::2]
    back = stored.unpack(packed, rows, num_classes, CPU)
    if not topk or topk >= num_classes:
        assert torch.equal(back, logits[::2].half().float())
    else:
        values, kept = logits[::2].topk(topk, 1)
        assert torch.allclose(back.gather(1, kept), values, atol=5e-3)
        assert torch.allclose(back.sum(1), logits[::2].sum(1), atol=0.05)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_for_the_kl_what_is_left_out_keeps_its_share_of_the_softmax(temperature):
    logits = 3 * torch.randn(20, 1000, generator=torch.Generator().manual_seed(0))
    packed = stored.pack(logits, 100, temperature)
    back = stored.unpack(packed, np.arange(20), 1000, CPU)
    top = logits.topk(100, 1)[1]
    left, found = (1 - (z / temperature).softmax(1).gather(1, top).sum(1) for z in (logits, back))
    assert torch.allclose(left, found, rtol=0.02)
    mean = stored.unpack(stored.pack(logits, 100), np.arange(20), 1000, CPU)
    lost = 1 - (mean / temperature).softmax(1).gather(1, top).sum(1)
    assert (lost < 0.99 * left).all(), "their mean loses a part of it"


def test_stored_labels_of_a_few_epochs_are_made_once(monkeypatch):
    """They are used in turn: 2 epochs of labels for 6 of a student are 2 passes of the teacher."""
    passes = []
    real = stored.store_epoch
    monkeypatch.setattr(stored, "store_epoch", lambda *a: passes.append(a[1]) or real(*a))
    made = maker(relabel=Relabel(epochs=2))
    labels = stored.fresh(made)
    first = [labels.table[epoch % 2]["values"] for epoch in range(6)]
    assert passes == [0, 1] and (first[0] == first[2]).all() and (first[1] == first[5]).all()
    monkeypatch.setattr(stored, "HELD", 0)
    labels = stored.fresh(made)
    again = [labels.table[epoch % 2]["values"] for epoch in range(4)]
    assert passes[2:] == [0, 1, 0, 1] and (again[1] == first[1]).all()


def test_a_stored_label_is_the_teachers_word_on_the_very_view_the_student_sees():
    """Made in batches of 4, used in another order and batches of 3: no coupling to a batch size."""
    made = maker()
    labels = stored.fresh(made)
    for epoch in (0, 1, 3):
        order = np.random.default_rng(epoch).permutation(11)
        batches = [order[i : i + 3] for i in range(0, 11, 3)]
        drawn, views = shown(made, labels, epoch, batches)
        for indices, x in zip(batches, views, strict=True):
            classes, logits = labels.targets(epoch, drawn, indices, x, ALONE)
            assert torch.allclose(logits, made.teacher.logits(x), atol=5e-3)
            assert torch.allclose(classes.sum(1), torch.ones(len(indices)))


def test_a_view_belongs_to_seed_epoch_and_image():
    made, held = maker(), images()
    drawn = draw_epoch(SPEC, held.sizes, 0, 5, True)
    whole = next(render(held, drawn, [np.arange(11)], SPEC, made.normalize))
    batches = [np.asarray([7]), np.asarray([2, 9])]
    parts = torch.cat(list(render(held, drawn, batches, SPEC, made.normalize)))
    assert torch.allclose(whole[[7, 2, 9]], parts, atol=1e-5)
    later = draw_epoch(SPEC, held.sizes, 0, 6, True)
    other = next(render(held, later, [np.arange(11)], SPEC, made.normalize))
    assert not torch.allclose(whole, other, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_labels(kind):
    made = maker(teacher=teacher() if KINDS[kind].teacher else None)
    labels, indices = KINDS[kind].code().fresh(made), np.arange(11)
    drawn, (x,) = shown(made, labels, 0, [indices])
    classes, logits = labels.targets(0, drawn, indices, x, ALONE)
    own, lam = made.images.labels, drawn.lam
    table = adjust.whole_logits(made) if kind == "single" else None
    assert labels.kind == kind
    for i in range(11):
        mixed = torch.zeros(5)
        if kind == "learned":
            soft = torch.from_numpy(LOGITS).softmax(1)
            mixed = lam[i] * soft[i] + (1 - lam[i]) * soft[drawn.partners[i]]
        else:
            mixed[own[i]] += lam[i]
            mixed[own[drawn.partners[i]]] += 1 - lam[i]
        assert torch.allclose(classes[i], mixed)
        if kind == "single":
            expected = lam[i] * table[i] + (1 - lam[i]) * table[drawn.partners[i]]
            assert torch.allclose(logits[i], expected, atol=1e-5)
    if kind == "online":
        assert torch.allclose(logits, made.teacher.logits(x), atol=1e-5)
    assert np.any((lam > 0) & (lam < 1)), "some images are mixed"
    assert (logits is None) == (kind in ("hard", "learned"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"adjust": True}, {"views": 3, "class_share": 0.3}, {"class_share": 0.3}]
)
def test_labels_of_a_folder_are_those_made_without_one(kind, settings, tmp_path):
    """What relabel writes and a student loads, and what a student of other images makes."""
    code = KINDS[kind].code()
    made = maker(relabel=Relabel(batch_size=4, epochs=2, topk=3, **settings))
    facts = {"seed": "labels 3", "epochs": 0, "tau": 0.0}
    facts |= code.make(made, tmp_path, Context(ALONE, tmp_path, {}, "w"))
    assert (facts["tau"] > 0) == ("adjust" in settings and KINDS[kind].teacher)
    # Who loads knows no settings, and has a teacher only where it labels every view.
    looking = teacher() if KINDS[kind].each_view else None
    reader = maker(relabel=None, teacher=looking, seed=99, learned=None)
    loaded, fresh, indices = code.load(tmp_path, facts, reader), code.fresh(made), np.arange(11)
    for epoch in (0, 1, 2):
        assert loaded.view_key("s", epoch) == fresh.view_key("s", epoch)
        drawn, (x,) = shown(made, fresh, epoch, [indices])
        ours = loaded.targets(epoch, drawn, indices, x, ALONE)
        theirs = fresh.targets(epoch, drawn, indices, x, ALONE)
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] is theirs[1] is None or torch.equal(ours[1], theirs[1])


def test_learned_labels_that_a_set_does_not_bring_are_refused(tmp_path):
    context = Context(ALONE, tmp_path, {}, "w")
    for way in (learned.fresh, lambda made: learned.make(made, tmp_path, context)):
        with pytest.raises(UserError, match=r"brings no learned labels .*relabel\.labels"):
            way(maker(learned=None))
        with pytest.raises(UserError, match="not finite"):
            way(maker(learned=LOGITS * np.float32(np.inf)))
    assert not list(tmp_path.iterdir())


def test_learned_labels_of_another_set_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"learned\.npy"):
        learned.load(tmp_path, {}, maker())
    for wrong in (LOGITS[:10], LOGITS[:, :4], LOGITS.astype(np.float64)):
        distilled.save(tmp_path / "learned.npy", wrong)
        with pytest.raises(UserError, match=r"expected logits float32 \[11, 5\]"):
            learned.load(tmp_path, {}, maker())


def test_one_rank_writes_the_learned_labels(tmp_path):
    for rank in (1, 0):
        peer = Ranks(rank, 2, CPU, None)
        learned.make(maker(ranks=peer), tmp_path, Context(peer, tmp_path, {}, "w", quiet=True))
        assert (tmp_path / "learned.npy").exists() == (rank == 0)
    assert np.array_equal(np.load(tmp_path / "learned.npy"), LOGITS)


def test_stored_labels_that_are_not_all_there_are_refused(tmp_path):
    context = Context(ALONE, tmp_path, {}, "w")
    facts = {"seed": "labels 3", **stored.make(maker(), tmp_path, context)}
    (tmp_path / "epoch-00001-values.npy").unlink()
    with pytest.raises(UserError, match="epoch-00001-values"):
        stored.load(tmp_path, facts, maker())
    (tmp_path / "epoch-00000-values.npy").unlink()
    topk = maker(relabel=Relabel(batch_size=4, epochs=2, topk=3))
    facts |= stored.make(topk, tmp_path, context)
    stored.load(tmp_path, facts, maker())
    (tmp_path / "epoch-00001-classes.npy").unlink()
    with pytest.raises(UserError, match="epoch-00001-classes"):
        stored.load(tmp_path, facts, maker())


def test_a_thousand_stored_epochs_are_not_open_at_once(tmp_path):
    made = maker(relabel=Relabel(batch_size=11, epochs=1, topk=3))
    packed = stored.store_epoch(made, 0, None)
    for part, values in packed.items():
        np.save(tmp_path / f"epoch-00000-{part}.npy", values)
        for epoch in range(1, 1000):
            os.link(
                tmp_path / f"epoch-00000-{part}.npy", tmp_path / f"epoch-{epoch:05d}-{part}.npy"
            )
    labels = stored.load(tmp_path, {"seed": "labels 3", "epochs": 1000}, made)
    indices, most, before = np.arange(11), 0, len(os.listdir("/proc/self/fd"))
    for epoch in range(0, 1000, 50):
        drawn = draw_epoch(SPEC, made.images.sizes, "k", epoch, True)
        labels.targets(epoch, drawn, indices, torch.zeros(1), ALONE)
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert most <= 4


def test_classes_are_mixed_as_their_whole_table_would_be():
    classes = np.random.default_rng(0).integers(0, 5, 11)
    drawn = draw_epoch(SPEC, images().sizes, "k", 0, True)
    whole = torch.nn.functional.one_hot(torch.from_numpy(classes), 5).float()
    for indices in (np.arange(11), np.asarray([7, 2, 2]), np.asarray([], int)):
        rows = mix(onehot(classes, 5, CPU), drawn, indices)
        assert torch.equal(rows, mix(whole, drawn, indices)) and rows.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_single_labels_of_mixed_images_are_mixed_as_classes_are(temperature):
    """Where a student learns by KL. The softmax of mixed logits would be another label."""
    made = maker(temperature=temperature)
    labels, indices = single.Single(made, torch.from_numpy(LOGITS)), np.arange(11)[::-1].copy()
    drawn = draw_epoch(SPEC, made.images.sizes, "k", 0, True)
    drawn.lam[:3] = [1, 0, 0.5]
    _, logits = labels.targets(0, drawn, indices, torch.zeros(1), ALONE)
    p = torch.softmax(labels.table / temperature, 1)
    wanted = mix(p, drawn, indices)
    assert torch.allclose(torch.softmax(logits / temperature, 1), wanted, atol=1e-6)
    plain = torch.softmax(mix(labels.table, drawn, indices) / temperature, 1)
    assert logits.isfinite().all() and (plain - wanted).abs().max() > 0.02
    # By KL a mixed image pulls as its two images would by their shares.
    student, lam = torch.randn(11, 5), torch.from_numpy(drawn.lam[indices])
    loss = student_loss(student, p, logits, 0.0, 1.0, "kl", temperature)
    log_q = F.log_softmax(student / temperature, 1)
    cross = -(p[indices] * log_q).sum(1) * lam - (p[drawn.partners[indices]] * log_q).sum(1) * (
        1 - lam
    )
    entropy = -(wanted * wanted.log()).sum(1)
    assert torch.allclose(loss, temperature**2 * (cross - entropy).mean(), atol=1e-4)


def test_by_a_squared_error_single_labels_are_logits_mixed():
    made = maker()
    labels, indices = single.fresh(made), np.arange(11)
    drawn = draw_epoch(SPEC, made.images.sizes, "k", 0, True)
    _, logits = labels.targets(0, drawn, indices, torch.zeros(1), ALONE)
    assert made.temperature is None
    assert torch.equal(logits, mix(labels.table, drawn, indices))


def test_stored_labels_do_not_depend_on_the_number_of_ranks(tmp_path):
    for world in (1, 2):
        out = tmp_path / str(world)
        out.mkdir()
        for rank in range(world):
            peer = Ranks(rank, world, CPU, None)
            stored.make(maker(ranks=peer), out, Context(peer, out, {}, "w", quiet=True))
    names = [sorted(p.name for p in (tmp_path / w).glob("*.npy")) for w in "12"]
    assert names[0] == names[1] == ["epoch-00000-values.npy", "epoch-00001-values.npy"]
    assert all(
        files.sha256(tmp_path / "1" / n) == files.sha256(tmp_path / "2" / n) for n in names[0]
    )


@pytest.mark.parametrize("views", [None, SPEC.draw(rng("v"), images().sizes)])
def test_ranks_share_out_a_pass_and_tell_how_far_they_are(views):
    whole = adjust.logits_of(maker(), views)
    told = []
    shares = [
        adjust.logits_of(
            maker(ranks=Half(rank, 2, CPU, None), tell=lambda *at: told.append(at)), views
        )
        for rank in (0, 1)
    ]
    assert torch.equal(shares[0] + shares[1], whole), "batches are the same on any number of ranks"
    own = [set(share.abs().sum(1).nonzero()[:, 0].tolist()) for share in shares]
    assert own == [{0, 1, 2, 3, 8, 9, 10}, {4, 5, 6, 7}] and told == [(1, 2), (2, 2), (1, 1)]


def test_adsa_finds_the_shift_that_was_put_in():
    """Logits biased by 0.7 · log π: τ = 0.7 makes every class equally confident."""
    prior = np.asarray([100.0, 30, 10, 3, 1])
    classes = np.repeat(np.arange(5), 6)
    log_prior = torch.from_numpy(np.log(prior / prior.sum())).float()
    logits = torch.eye(5)[classes] * 2.0 + 0.7 * log_prior
    assert adjust.adsa_tau(logits, classes, prior) == pytest.approx(0.7, abs=0.03)
    unbiased = torch.eye(5)[classes] * 2.0
    assert adjust.adsa_tau(unbiased, classes, prior) == 0.0


def test_cost_is_the_teachers_passes():
    def asked(labels, more=None, **changes):
        values = {
            "labels": labels,
            **(more or {}),
            "relabel": Relabel(**changes),
            "ipc": 10,
            "net": "convnet3",
            "width": 8,
            "norm": "instance",
            "student_epochs": 50,
            "images": Seen(resolution=8),
        }
        if KINDS[labels].of_views:
            values["single"] = Single(views=changes.get("views", 1))
        return cost.relabel(Given("relabel", values), Facts((100, 50, 10)))

    once = asked("single").flops
    # Labels of views have single ones beside them.
    assert once > 0 and asked("stored").flops == pytest.approx(51 * once)
    assert asked("stored", epochs=7).flops == pytest.approx(8 * once)
    assert asked("online").flops == once and asked("online").disk == asked("single").disk
    assert asked("hard").flops == asked("learned").flops == 0
    assert asked("learned").disk == 4 * 30 * 3 and asked("hard").disk == 0
    assert asked("online", adjust=True).flops == pytest.approx(2 * once)
    assert asked("online", {"labellers": 2}).flops == pytest.approx(2 * once)
    assert asked("single", views=4).flops == pytest.approx(4 * once)
    assert asked("stored", views=4).flops == pytest.approx(54 * once)
    single = asked("single").disk
    assert single == 4 * 30 * 3
    assert asked("stored", epochs=2).disk == single + 2 * 30 * 3 * 2
    assert asked("stored", epochs=2, topk=1).disk == single + 2 * 30 * (2 * 2 + 2)


def test_whole_images_are_looked_at_once_and_in_order():
    made = maker()
    at_once = made.teacher.logits(made.normalize(made.images.pixels.float() / 255))
    assert torch.allclose(adjust.whole_logits(made), at_once, atol=1e-5)
    assert made.spec == ViewSpec(8, (0.4, 1.0), 0, True, 1, 9)


def test_a_single_label_is_the_mean_over_the_whole_image_and_views():
    """By hand, an image at a time; and the same in any batches and on any rank."""
    three = Relabel(batch_size=4, views=3)
    made = maker(relabel=three)
    pixels = made.images.pixels.float() / 255
    views = [
        SPEC.draw(rng("labels 3", "views of single labels", k), made.images.sizes) for k in (1, 2)
    ]
    assert not np.array_equal(views[0].windows, views[1].windows)
    table = single.fresh(made).table
    for i in range(11):
        shown = [pixels[i : i + 1]]
        shown += [augment.apply(shown[0], drawn[[i]], SPEC) for drawn in views]
        logits = torch.cat([made.teacher.logits(made.normalize(x)) for x in shown])
        assert torch.allclose(table[i], logits.mean(0), atol=1e-5)
    halves = [maker(relabel=three, ranks=Half(rank, 2, CPU, None)) for rank in (0, 1)]
    assert torch.equal(sum(single.fresh(half).table for half in halves), table)
    batches = maker(relabel=Relabel(batch_size=11, views=3))
    assert torch.allclose(single.fresh(batches).table, table, atol=1e-5)
    once = single.fresh(maker(relabel=Relabel(batch_size=4))).table
    assert torch.equal(once, adjust.whole_logits(made))
    assert not torch.allclose(once, table, atol=1e-3)


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0.001, 0.99), st.integers(0, 99))
def test_a_share_of_the_class_by_hand(n, num_classes, share, seed):
    draw = np.random.default_rng(seed)
    z = draw.normal(0, 4, (n, num_classes)) + draw.normal(0, 9, (n, 1))
    y = np.eye(num_classes)[draw.integers(0, num_classes, (2, n))]
    lam = draw.random((n, 1))
    y = lam * y[0] + (1 - lam) * y[1]
    found = with_class(torch.from_numpy(z).float(), torch.from_numpy(y).float(), share).numpy()
    p = (1 - share) * np.exp(z) / np.exp(z).sum(1, keepdims=True) + share * y
    assert np.allclose(np.exp(found) / np.exp(found).sum(1, keepdims=True), p, atol=1e-5)
    # Of all constants on a row, the one nearest to the raw logits.
    assert np.allclose(found.mean(1), z.mean(1), atol=1e-4)


def test_no_share_of_the_class_leaves_the_logits_alone_and_a_small_one_nearly():
    z, y = torch.randn(4, 5) + 7, torch.eye(5)[:4]
    assert with_class(z, y, 0.0) is z
    assert torch.allclose(with_class(z, y, 1e-6), z, atol=1e-3)
    sure = torch.tensor([[200.0, 0, 0, 0, 0]])  # the softmax of the others is 0 in float32
    assert torch.isfinite(with_class(sure, torch.eye(5)[1:2], 0.5)).all()


@pytest.mark.parametrize("kind", ["online", "stored", "single"])
def test_the_class_has_its_share_in_each_kind_of_soft_label(kind):
    """Mixed as the view is where the teacher sees the view, before images are mixed in a table."""
    code, indices = KINDS[kind].code(), np.arange(11)
    raw, mixed = (
        code.fresh(maker(relabel=Relabel(batch_size=4, epochs=2, class_share=share)))
        for share in (0.0, 0.4)
    )
    drawn, (x,) = shown(maker(), raw, 0, [indices])
    classes, teacher = raw.targets(0, drawn, indices, x, ALONE)
    same, found = mixed.targets(0, drawn, indices, x, ALONE)
    assert torch.equal(classes, same)
    if kind == "single":
        rows = with_class(raw.table, torch.eye(5)[maker().images.labels], 0.4)
        expected = mix(rows, drawn, indices)
        assert torch.allclose(found, expected, atol=1e-5)
    else:
        p = 0.6 * teacher.softmax(1) + 0.4 * classes
        assert torch.allclose(found.softmax(1), p, atol=5e-3)
        assert torch.allclose(found.mean(1), teacher.mean(1), atol=5e-3)


def test_the_record_says_what_single_labels_are_drawn_from():
    """Only where views are drawn; and labels beside others have settings of their own."""

    def record(**changes):
        config = Config(relabel=Relabel(**changes))
        return settings_of(relabel_stage(config, "recover"), config)

    assert "views" not in record(labels="single") and "single" not in record(labels="single")
    drawn = record(labels="single", views=2)
    assert drawn.views.crop_scale == [0.5, 1.0] and drawn.relabel.views == 2
    assert "student_epochs" not in drawn
    beside = record(labels="online", views=2, class_share=0.1)
    assert (beside.single.views, beside.single.class_share) == (2, 0.1)
    assert "views" in beside and "views" not in record(labels="online")
    assert "student_epochs" in record(labels="stored")
    assert "views" not in record(labels="hard", views=2)


def test_the_observer_labels_too_where_it_is_asked_to(tmp_path):
    """The teacher alone, the default, has no trace of it; with both, all who are labelled by
    networks read both, and the stage writes the mean of their logits."""
    alone = Config(relabel=Relabel(labels="single"))
    own = {"teacher": {"weights": "own"}}
    both = Config(relabel=Relabel(labels="single", labeller="both"), **own)
    stage = relabel_stage(both, "recover")
    assert "observer" not in relabel_stage(alone, "recover").inputs
    assert "labellers" not in relabel_stage(alone, "recover").given
    assert stage.inputs["observer"] == "observer" and stage.given["labellers"] == 2
    hard = Config(relabel=Relabel(labels="hard", labeller="both"))
    assert "observer" not in relabel_stage(hard, "recover").inputs
    assert any("labeller has no effect" in w for w in check(hard))
    # Whoever is labelled by networks reads both: random real images beside a set of another method.
    matched = Config(method="dm", relabel=Relabel(labels="single", labeller="both"), **own)
    stages = {s.name: s for s in recipe.stages(matched, "")}
    assert {"observer", "teacher"} <= set(stages)
    assert "observer" in stages["student/random-single-convnet3-s0"].inputs
    assert "observer" not in stages["student/random-hard-convnet3-s0"].inputs

    folders = {}
    for name, norm in (("teacher", "instance"), ("observer", "batch")):
        made_of = frozen.recipe("convnet3", 4, norm, 8, 5)
        model = registry.Student(registry.backbone("convnet3", 4, norm, 8), 5).eval()
        folders[name] = tmp_path / name
        folders[name].mkdir()
        frozen.save(folders[name] / "weights.pt", made_of, model)
    loaded = labeller.load(Context(ALONE, tmp_path, folders, "w", quiet=True))
    one = labeller.load(Context(ALONE, tmp_path, {"teacher": folders["teacher"]}, "w", quiet=True))
    assert loaded is not None and one is not None
    observer = frozen.load(folders["observer"] / "weights.pt", ALONE)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(loaded.logits(x), (one.logits(x) + observer.logits(x)) / 2, atol=1e-6)
    assert labeller.load(Context(ALONE, tmp_path, {}, "w", quiet=True)) is None
