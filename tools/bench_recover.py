"""Recovery's step against a bare forward + input-gradient pass, and against the published formulation.

python tools/bench_recover.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from bench import begin, in_turns, peak_mb, table
from torchvision.transforms import v2

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.methods.rldd import recover
from ltdd_scale.methods.rldd.align import Alignment
from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models import registry
from ltdd_scale.runtime.ranks import Ranks, rng


def published(images, labels, model, layers, targets, steps: int, size: int) -> None:
    """As the released scripts do it: hooks with float32 means and variances, a crop by torchvision, the loss printed from every step."""
    x = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05, betas=(0.5, 0.9))
    terms = []

    def hook(name):
        def align(_, inputs):
            y = inputs[0]
            mean = y.mean([0, 2, 3])
            var = y.permute(1, 0, 2, 3).contiguous().reshape(y.shape[1], -1).var(1, unbiased=False)
            for _, goal_mean, goal_var in targets[name]:
                terms.append(torch.norm(mean - goal_mean, 2) + torch.norm(var - goal_var, 2))

        return align

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    crop = v2.Compose(
        [v2.RandomResizedCrop(size, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    )
    for _ in range(steps):
        terms.clear()
        shown = torch.stack([crop(image) for image in x])
        loss = F.cross_entropy(model(shown), labels) + 0.01 * sum(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        x.data.clamp_(-2, 2)
    for handle in handles:
        handle.remove()


def bench(ranks: Ranks, rounds: int, net: str, width: int, size: int, n: int, steps: int) -> None:
    """Print the table of one network."""
    device = ranks.device

    def build() -> torch.nn.Module:
        return registry.TwoHeads(registry.backbone(net, width, "batch", size), 10, 0)

    model = ranks.to_device(registry.seeded(build, "bench")).eval().requires_grad_(False)
    layers = registry.norm_layers(model)
    targets = {}
    for name, layer in layers.items():
        channels = layer.num_features
        goal = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        targets[name] = [(w, *goal) for w in (0.5, 0.5)]
    torch.manual_seed(0)
    images = torch.randn(n, 3, size, size, device=device)
    labels = torch.arange(n, device=device) % 10
    settings = Recover(iterations=steps, ce=0.1, teacher_ce=0)
    spec, sizes = ViewSpec(size, (0.5, 1.0)), np.full((n, 2), size)
    drawn = [spec.draw(rng("bench", t), sizes) for t in range(steps)]
    batch = recover.Batch(
        images,
        labels,
        torch.from_numpy(np.stack([d.windows for d in drawn])).to(device),
        torch.from_numpy(np.stack([d.mirrored for d in drawn])).to(device),
    )
    low, high = (torch.full((1, 3, 1, 1), bound, device=device) for bound in (-2.0, 2.0))

    def bare() -> None:
        x = images.clone().requires_grad_()
        shown = x.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else x
        for _ in range(steps):
            torch.autograd.grad(F.cross_entropy(model(shown), labels), x)

    def ours(settings: Recover = settings) -> None:
        objective = recover.Objective(model, None, low, high, settings, size, True, ranks)
        with Alignment(layers, targets, settings) as alignment:
            recover.recover_chunk(objective, batch, alignment)

    candidates = {
        "forward + input gradient": bare,
        "recovery": ours,
        "published formulation": lambda: published(
            images, labels, model, layers, targets, steps, size
        ),
    }
    if net != "convnet3":  # takes images of one size only
        small = size * 5 // 7
        staged = settings.model_copy(update={"resolutions": [small, size], "residual": 0.5})
        title = f"recovery, half of the steps at {small} px (FADRM)"
        candidates[title] = lambda: ours(staged)
    title = f"{net} at {size} px, batch {n}, {steps} steps, float32"
    times, limit = in_turns(candidates, rounds), "forward + input gradient"
    print(table(title, times, limit, n * steps, "image-iterations"), flush=True)
    peaks = (f"{name} {peak_mb(work):,.0f} MB" for name, work in candidates.items())
    print("Peak memory: " + ", ".join(peaks) + "\n", flush=True)


def main() -> None:
    rounds, ranks = begin(__doc__)
    for net, width, size, n, steps in (
        ("convnet3", 64, 32, 100, 10),
        ("resnet18", 0, 224, 16, 2),
        ("resnet50", 0, 224, 8, 2),
    ):
        bench(ranks, rounds, net, width, size, n, steps)


if __name__ == "__main__":
    main()
