"""Steps of matching methods against what bounds them, and against what a user would write instead.

python tools/bench_match.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench import begin, in_turns, peak_mb, table
from torch import Tensor

from ltdd_scale.data import siamese
from ltdd_scale.methods.matching import segments
from ltdd_scale.methods.matching.unroll import Segment, Unroll
from ltdd_scale.models.flat import Flat
from ltdd_scale.runtime.ranks import Ranks

CLASSES, SIDE = 10, 32


def a_segment(flat: Flat, images: Tensor, steps: int, batch: int) -> Segment:
    """A segment as MTT draws it, between weights that are near each other."""
    strategy = siamese.choices(siamese.ALL)
    sizes = (steps, batch, len(images))
    drawn = segments.draw(("bench", 0), 1, (0, 0), sizes, strategy, images)
    start = flat.initial("bench").to(images.device)
    target = start + 0.01 * torch.randn_like(start)

    def logits(theta: Tensor, x: Tensor, _: Tensor) -> Tensor:
        return flat.logits(theta, x)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return -(y * F.log_softmax(z, 1)).sum(1).mean()

    how = (slice(0, flat.size), drawn.batches, drawn.augment, logits, loss, start[:0])
    return Segment("bench", start, target, *how)


def whole_unroll(segment: Segment, images: Tensor, labels: Tensor, rate: Tensor) -> None:
    """Autograd through all steps: what MTT's released code does."""
    x, theta = images.clone().requires_grad_(), segment.start.clone().requires_grad_()
    log_rate = rate.log().requires_grad_()
    for step, chosen in enumerate(segment.batches):
        seen = segment.augment(step, x[chosen])
        loss = segment.loss(segment.logits(theta, seen, segment.fixed), labels[chosen])
        (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - log_rate.exp() * grad
    torch.autograd.grad(segment.distance(theta), (x, log_rate))


def bench_unroll(ranks: Ranks, rounds: int, width: int, steps: int, batch: int) -> None:
    device = ranks.device
    torch.manual_seed(0)
    flat = Flat("convnet3", width, "instance", SIDE, CLASSES)
    images = torch.randn(10 * CLASSES, 3, SIDE, SIDE, device=device)
    labels = F.one_hot(torch.arange(CLASSES, device=device).repeat_interleave(10), CLASSES).float()
    rate = torch.tensor(0.01, device=device)
    segment = a_segment(flat, images, steps, batch)
    short, exact = Unroll(exact=False), Unroll()
    candidates = {
        "N plain steps": lambda: exact.student(segment, images, labels, rate),
        "truncated (TESLA)": lambda: short.gradient(segment, images, labels, rate),
        "exact, constant memory": lambda: exact.gradient(segment, images, labels, rate),
        "autograd through all": lambda: whole_unroll(segment, images, labels, rate),
    }
    title = f"A segment: ConvNet-3, {width} wide, {SIDE} px, N {steps}, batch {batch}"
    print(table(title, in_turns(candidates, rounds), "N plain steps", steps, "steps"))
    for name, work in candidates.items():
        print(f"- {name}: peak {peak_mb(work):,.0f} MB")
    print(flush=True)


def main() -> None:
    rounds, ranks = begin(__doc__ or "")
    gpu = ranks.device.type == "cuda"
    for width, steps, batch in (
        ((128, 30, 100), (128, 60, 100)) if gpu else ((32, 8, 25), (32, 24, 25))
    ):
        bench_unroll(ranks, rounds, width, steps, batch)


if __name__ == "__main__":
    main()
