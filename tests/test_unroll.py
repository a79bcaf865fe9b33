from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ltdd_scale.methods.matching.unroll import Segment, Unroll
from ltdd_scale.models.flat import Flat

N, IMAGES, CLASSES, SIZE = 6, 9, 3, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As ranks have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(double: bool = True, compared: slice | None = None, head: bool = False):
    """A tiny segment with images, labels and a rate. `head`: only the classifier is trained."""
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(0)
    flat = Flat("convnet3", 4, "instance", SIZE, CLASSES)
    whole = flat.initial("start").to(dtype)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, dtype=dtype)
    labels = torch.randn(IMAGES, CLASSES, dtype=dtype)
    weights = torch.tensor([0.5, 1.0, 1.5], dtype=dtype)
    batches = torch.stack([torch.randperm(IMAGES)[:5] for _ in range(N)])
    mask = torch.rand(N, 1, 1, SIZE, SIZE, dtype=dtype)  # an augmentation of each step's own

    def logits(theta, x, fixed):
        return flat.classify(theta, flat.features(fixed, x)) if head else flat.logits(theta, x)

    def loss(z, y):
        return -(weights * F.softmax(y, 1) * F.log_softmax(z, 1)).sum(1).mean()

    start = whole[flat.head] if head else whole
    target = start + 0.02 * torch.randn(len(start), dtype=dtype)
    part = compared or slice(0, len(start))
    fixed = whole if head else whole[:0]
    augment = lambda step, x: x * mask[step]  # noqa: E731
    segment = Segment("tiny", start, target, part, batches, augment, logits, loss, fixed)
    return segment, images, labels, torch.tensor(0.05, dtype=dtype), flat


def through_all_steps(segment, images, labels, rate):
    """Autograd through the whole unroll: (L, by images, by labels, by log β)."""
    images, labels = images.clone().requires_grad_(), labels.clone().requires_grad_()
    log_rate = rate.log().requires_grad_()
    theta = segment.start.clone().requires_grad_()
    for step, chosen in enumerate(segment.batches):
        x = segment.augment(step, images[chosen])
        loss = segment.loss(segment.logits(theta, x, segment.fixed), labels[chosen])
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - log_rate.exp() * g
    loss = segment.distance(theta)
    return loss, *torch.autograd.grad(loss, (images, labels, log_rate))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("double", [True, False])
def test_the_gradient_is_that_of_the_whole_unroll(double, head):
    segment, images, labels, rate, _ = problem(double, head=head)
    ours = Unroll(learn_labels=True).gradient(segment, images, labels, rate)
    loss, by_image, by_label, by_rate = through_all_steps(segment, images, labels, rate)
    tight = 1e-9 if double else 1e-5
    for mine, theirs in (
        (ours.loss, loss),
        (ours.images, by_image),
        (ours.labels, by_label),
        (ours.log_rate, by_rate),
    ):
        assert float(theirs.detach().abs().max()) > 0
        assert float((mine - theirs.detach()).norm() / theirs.detach().norm()) < tight


def test_only_a_part_of_the_weights_is_compared():
    _, *_, flat = problem()
    segment, images, labels, rate, _ = problem(compared=flat.backbone)
    ours = Unroll(learn_labels=True).gradient(segment, images, labels, rate)
    loss, by_image, by_label, _ = through_all_steps(segment, images, labels, rate)
    torch.testing.assert_close(ours.loss, loss)
    torch.testing.assert_close(ours.images, by_image)
    torch.testing.assert_close(ours.labels, by_label)
    whole = Unroll().gradient(problem()[0], images, labels, rate)
    assert not torch.allclose(whole.images, ours.images)


def test_the_gradient_is_that_of_finite_differences():
    segment, images, labels, rate, _ = problem()
    ours = Unroll(learn_labels=True).gradient(segment, images, labels, rate)

    def loss(images, labels, rate):
        return float(segment.distance(Unroll().student(segment, images, labels, rate)[-1]))

    generator, h = torch.Generator().manual_seed(1), 1e-5
    for _ in range(3):
        d = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        slope = (loss(images + h * d, labels, rate) - loss(images - h * d, labels, rate)) / (2 * h)
        assert slope == pytest.approx(float((ours.images * d).sum()), rel=1e-5)
        e = torch.randn(labels.shape, generator=generator, dtype=labels.dtype)
        slope = (loss(images, labels + h * e, rate) - loss(images, labels - h * e, rate)) / (2 * h)
        assert slope == pytest.approx(float((ours.labels * e).sum()), rel=1e-5)
    up, down = (
        loss(images, labels, rate * torch.tensor(s * h, dtype=rate.dtype).exp()) for s in (1, -1)
    )
    assert (up - down) / (2 * h) == pytest.approx(float(ours.log_rate), rel=1e-4)


def test_the_truncated_gradient_is_another_one():
    """v stays v_N: as TESLA's released code has it. The last step's share is right, others not."""
    segment, images, labels, rate, _ = problem()
    exact = Unroll().gradient(segment, images, labels, rate)
    short = Unroll(exact=False).gradient(segment, images, labels, rate)
    assert torch.equal(short.loss, exact.loss)
    cosine = F.cosine_similarity(exact.images.flatten(), short.images.flatten(), 0)
    assert 0 < cosine < 0.999
    one = replace(segment, batches=segment.batches[:1])
    a, b = (Unroll(exact=e).gradient(one, images, labels, rate) for e in (True, False))
    assert torch.equal(a.images, b.images) and torch.equal(a.log_rate, b.log_rate)


def test_memory_does_not_grow_with_the_steps():
    """Graphs alive at a time: tensors that autograd saves, counted in elements."""
    held = peak = 0

    class Pack:
        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor = tensor
            held += tensor.numel()
            peak = max(peak, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.numel()

    segment, images, labels, rate, _ = problem()
    peaks = []
    for n in (2, 6):
        held = peak = 0
        short = replace(segment, batches=segment.batches[:n])
        with torch.autograd.graph.saved_tensors_hooks(Pack, lambda packed: packed.tensor):
            Unroll().gradient(short, images, labels, rate)
        peaks.append(peak)
    assert peaks[0] > 0 and peaks[1] <= 1.01 * peaks[0]
