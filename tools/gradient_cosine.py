"""How well a balanced set can give an expert's gradients, with and without DAMED's weights w.

    python tools/gradient_cosine.py RUN [--experts 4] [--snapshots 6]

RUN is the folder of a finished run with method damed or mtt. At snapshots θ of its experts: the cosine of
∇ℓ(θ) on the whole long-tailed set with ∇ℓ(θ) and with ∇ℓ_w(θ) on the distilled set, and on random real images of
the same IPC. No augmentation, hard labels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import distilled
from ltdd_scale.data.chosen import random_real
from ltdd_scale.data.loader import decode, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories.kept import Kept
from ltdd_scale.launch.status import load_run
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.methods.damed.match import class_weights
from ltdd_scale.models.flat import Flat
from ltdd_scale.publish.tables import markdown


def gradient(flat: Flat, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """∇θ of the mean weighted cross-entropy, in batches of 256."""
    total = torch.zeros_like(theta)
    for images, classes in zip(x.split(256), y.split(256), strict=True):
        at = theta.detach().requires_grad_()
        loss = F.cross_entropy(flat.logits(at, images), classes, reduction="none")
        total += torch.autograd.grad((loss * weights[classes]).sum() / len(x), at)[0]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--snapshots", type=int, default=6)
    asked = parser.parse_args()
    try:
        config, nodes, record = load_run(asked.run)
    except UserError as error:
        sys.exit(f"error: {error}")
    if "trajectory/000" not in nodes:
        sys.exit(f"error: method={config.method} has no trajectories: give a run of mtt or damed")
    store = Path(record["store"])
    split = ShardSplit(nodes["shard"].folder(store), "train")
    num_classes, size = len(split.classes), config.data.resolution
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    zca = nodes["whiten"].folder(store) if "whiten" in nodes else None
    normalize = prepare(split, device, zca)

    def shown(pixels: np.ndarray) -> Tensor:
        return normalize(torch.from_numpy(pixels).to(device).float() / 255)

    pixels = decode(split, size, 0)
    made = distilled.Distilled(nodes[METHODS[config.method].distilled].folder(store), num_classes)
    chosen = random_real(split.labels, num_classes, config.ipc, config.seed)
    sets = {
        "distilled": (
            shown(np.concatenate([made.load(c) for c in range(num_classes)])),
            made.labels,
        ),
        "random real": (shown(pixels[chosen]), split.labels[chosen]),
    }
    whole, truth = shown(pixels), torch.from_numpy(split.labels).to(device)
    t = config.trajectories
    flat = Flat(t.net, t.width, t.norm, size, num_classes)
    plain, w = torch.ones(num_classes, device=device), class_weights(split.counts).to(device)
    rows = [["snapshot", "step", *(f"{name}, {kind}" for name in sets for kind in ("ℓ", "ℓ_w"))]]
    ways = [
        Kept(nodes[f"trajectory/{k:03d}"].folder(store))
        for k in range(min(asked.experts, t.experts))
    ]
    for k in np.unique(np.linspace(0, ways[0].count - 1, asked.snapshots).astype(int)):
        found = []
        for way in ways:
            theta = way.vector(int(k), device)
            goal = gradient(flat, theta, whole, truth, plain)
            found.append(
                [
                    float(
                        F.cosine_similarity(
                            goal, gradient(flat, theta, x, torch.from_numpy(y).to(device), v), 0
                        )
                    )
                    for x, y in sets.values()
                    for v in (plain, w)
                ]
            )
        rows.append([str(k), str(k * ways[0].every), *(f"{v:.2f}" for v in np.mean(found, 0))])
        print(" ".join(rows[-1]), flush=True)
    print(f"\nMeans over {len(ways)} experts.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
