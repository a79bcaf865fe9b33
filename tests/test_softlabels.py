import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale import softlabels
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import MemoryImages, normalizer
from ltdd_scale.models import registry
from ltdd_scale.runtime.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
SPEC = ViewSpec(8, (0.4, 1.0), randaugment=1)
NORMALIZE = normalizer([0.5] * 3, [0.25] * 3, CPU)


def teacher():
    build = lambda: registry.TwoHeads(registry.backbone("convnet3", 4, "instance", 8), 5, 0)  # noqa: E731
    return registry.seeded(build, "t").eval().requires_grad_(False)


def images(n=11):
    return MemoryImages(
        np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8),
        np.arange(n) % 5,
        CPU,
    )


@given(st.integers(1, 20), st.integers(2, 12), st.integers(0, 12))
def test_packed_logits_come_back(n, num_classes, topk):
    logits = torch.randn(n, num_classes)
    packed = softlabels.pack(logits, topk)
    rows = np.arange(n)[::2]
    back = softlabels.unpack(packed, rows, num_classes, CPU)
    if not topk or topk >= num_classes:
        assert torch.equal(back, logits[::2].half().float())
    else:
        values, kept = logits[::2].topk(topk, 1)
        assert torch.allclose(back.gather(1, kept), values, atol=5e-3) and torch.allclose(
            back.sum(1), logits[::2].sum(1), atol=0.05
        )


def test_a_stored_label_is_the_teachers_word_on_the_very_view_the_student_sees():
    """Made in batches of 4, used in another order and batches of 3: no coupling to a batch size."""
    held, t = images(), teacher()
    table = [
        softlabels.store_epoch(held, t, NORMALIZE, SPEC, "s", e, True, 0, 4, None, ALONE)
        for e in range(2)
    ]
    labels = softlabels.Labels("stored", held.labels, 5, CPU, "s", table)
    for epoch in (0, 1, 3):
        drawn = softlabels.draw_epoch(
            SPEC, held.sizes, *labels.view_key("another seed", epoch), True
        )
        order = np.random.default_rng(epoch).permutation(11)
        batches = [order[i : i + 3] for i in range(0, 11, 3)]
        for indices, x in zip(
            batches, softlabels.render(held, drawn, batches, SPEC, NORMALIZE), strict=True
        ):
            classes, logits = labels.targets(epoch, drawn, indices, x, None, ALONE)
            assert torch.allclose(logits, softlabels.teacher_logits(t, x, ALONE), atol=5e-3)
            assert torch.allclose(classes.sum(1), torch.ones(len(indices)))


def test_a_view_belongs_to_seed_epoch_and_image():
    held = images()
    drawn = softlabels.draw_epoch(SPEC, held.sizes, 0, 5, True)
    whole = next(softlabels.render(held, drawn, [np.arange(11)], SPEC, NORMALIZE))
    parts = torch.cat(
        list(softlabels.render(held, drawn, [np.asarray([7]), np.asarray([2, 9])], SPEC, NORMALIZE))
    )
    assert torch.allclose(whole[[7, 2, 9]], parts, atol=1e-5)
    other = next(
        softlabels.render(
            held,
            softlabels.draw_epoch(SPEC, held.sizes, 0, 6, True),
            [np.arange(11)],
            SPEC,
            NORMALIZE,
        )
    )
    assert not torch.allclose(whole, other, atol=1e-2)


@pytest.mark.parametrize("kind", ["online", "single", "hard"])
def test_kinds_of_labels(kind):
    held, t = images(), teacher()
    table = (
        softlabels.single_logits(held, t, NORMALIZE, SPEC, 4, None, ALONE)
        if kind == "single"
        else None
    )
    labels = softlabels.Labels(kind, held.labels, 5, CPU, 0, table)
    drawn = softlabels.draw_epoch(SPEC, held.sizes, *labels.view_key(1, 0), True)
    indices = np.arange(11)
    x = next(softlabels.render(held, drawn, [indices], SPEC, NORMALIZE))
    classes, logits = labels.targets(0, drawn, indices, x, t, ALONE)
    for i in range(11):
        mixed = torch.zeros(5)
        mixed[held.labels[i]] += drawn.stays[i]
        mixed[held.labels[drawn.partners[i]]] += 1 - drawn.stays[i]
        assert torch.allclose(classes[i], mixed)
        if kind == "single":
            assert torch.allclose(
                logits[i],
                drawn.stays[i] * table[i] + (1 - drawn.stays[i]) * table[drawn.partners[i]],
                atol=1e-5,
            )
    if kind == "online":
        assert torch.allclose(logits, t(x), atol=1e-5)
    if kind == "hard":
        assert logits is None


def test_adsa_finds_the_shift_that_was_put_in():
    """Logits biased by 0.7 · log π: τ = 0.7 makes every class equally confident."""
    prior = np.asarray([100.0, 30, 10, 3, 1])
    classes = np.repeat(np.arange(5), 6)
    logits = (
        torch.eye(5)[classes] * 2.0 + 0.7 * torch.from_numpy(np.log(prior / prior.sum())).float()
    )
    assert softlabels.adsa_tau(logits, classes, prior) == pytest.approx(0.7, abs=0.03)
    unbiased = torch.eye(5)[classes] * 2.0
    assert softlabels.adsa_tau(unbiased, classes, prior) == 0.0
