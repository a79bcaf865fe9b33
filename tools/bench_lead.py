"""A deep observer's calibration: layer after layer, and with a lead of a few images a class.

    python tools/bench_lead.py STORE/shard/… --observer STORE/experts/…/weights.pt
    python tools/bench_lead.py STORE/shard/… --net resnet50 --side 64 --lead 8 --stream

The first line takes a trained observer, the second an untrained one, whose buffers are the averages
of its training mode over the set. Told are: seconds, how far the buffers are from those of
layer after layer (means in deviations, variances as a share), and the balanced accuracy on the
validation images, where the set has some. With --stream images are decoded from the tars, as those
of a set too large for memory, in each pass or once.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from bench import circumstances

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.kept import Kept
from ltdd_scale.data.loader import open_images, prepare
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.experts import accuracy
from ltdd_scale.methods.rldd import calibrate
from ltdd_scale.methods.rldd.settings import Calibrate
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import join, rng

Fair = dict[str, tuple[torch.Tensor, torch.Tensor]]


class _EachPass(Kept):
    """Images that are decoded in each pass."""

    def _room(self, *_) -> None:
        return None


@dataclass(frozen=True)
class Decoding(calibrate.Measurement):
    """A measurement that decodes in each pass, and not once."""

    @cached_property
    def batches(self) -> Kept:
        made_of = self.images, self.plans, self.spec, self.context.ranks.device
        return _EachPass(*made_of, 0, self.context.say)


def untrained(net: str, seen: Seen, split: ShardSplit, whole: calibrate.Measurement):
    """A network whose buffers are the averages of its training mode over the set, shuffled."""
    classes, side = len(split.classes), seen.resolution
    model = registry.seeded(
        lambda: registry.TwoHeads(registry.backbone(net, 0, "batch", side), classes, 0), "lead"
    )
    for layer in registry.norm_layers(model).values():
        layer.momentum = None  # the plain average of all batches
    order = rng("lead").permutation(len(split))
    plans = [(order[i : i + 128], None) for i in range(0, len(order) - 1, 128)]
    with torch.no_grad():
        for x in whole.images.stream(plans, whole.spec):
            model.train()(whole.normalize(x))
    return model.eval().requires_grad_(False)


def buffers(model: torch.nn.Module) -> Fair:
    layers = registry.norm_layers(model)
    return {n: tuple(b.double() for b in calibrate.running(layer)) for n, layer in layers.items()}


def apart(one: Fair, other: Fair) -> tuple[float, float]:
    """The largest difference of means, in deviations, and of variances, as a share."""
    mean = max(
        float(((a - c) / (d + 1e-5).sqrt()).abs().max())
        for (a, _), (c, d) in zip(one.values(), other.values(), strict=True)
    )
    var = max(
        float(((b + 1e-5) / (d + 1e-5) - 1).abs().max())
        for (_, b), (_, d) in zip(one.values(), other.values(), strict=True)
    )
    return mean, var


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, help="the folder of a finished stage shard")
    parser.add_argument("--observer", type=Path, help="weights.pt of a trained observer")
    parser.add_argument("--net", default="resnet50", help="an untrained network instead")
    parser.add_argument("--side", type=int, default=64, help="its resolution")
    parser.add_argument("--lead", type=int, default=8, help="images a class that lead")
    parser.add_argument("--stream", action="store_true", help="decode from the tars")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ranks, split = join("auto", "float32", args.threads), ShardSplit(args.shards, "train")
    model, side = None, args.side
    if args.observer:
        loaded = frozen.load(args.observer, ranks)
        model, side = loaded.model, loaded.recipe["resolution"]
    seen = Seen(resolution=side, memory_gb=0 if args.stream else 4)
    context = Context(
        ranks, Path("no folder"), {"shard": args.shards}, "lead", workers=2, quiet=True
    )
    images = open_images(split, seen, ranks.device, context.workers)
    seen_by = images, prepare(split, ranks.device), ViewSpec(side), Calibrate().batch_size, context
    blank = torch.nn.Identity()
    model = model or untrained(args.net, seen, split, calibrate.Measurement(blank, *seen_by))
    members = calibrate.by_class(images, args.lead)
    ways = {"layer after layer": (calibrate.Measurement, None)}
    if args.stream:
        ways["layer after layer, decoded in each pass"] = (Decoding, None)
    ways[f"{args.lead} images a class lead"] = (calibrate.Measurement, members)
    print(circumstances(args.threads), "\n")
    held = sum(map(len, members))
    print(f"{len(split)} images of {len(split.classes)} classes at {side} px, lead of {held}\n")
    print(
        "| | seconds | means apart | variances apart | off | accuracy |\n|---|---|---|---|---|---|"
    )

    def judged(net: torch.nn.Module) -> str:
        if not args.observer:
            return "–"
        found = accuracy.judge("observer", net, split, seen, seen_by[1], context)
        return " / ".join(f"{v:.1f}" for v in found.values()) or "–"

    print(f"| as it is | – | – | – | – | {judged(model)} |", flush=True)
    exact: Fair = {}
    for name, (kind, led_by) in ways.items():
        net = copy.deepcopy(model)
        whole = kind(net, *seen_by, seen.memory_gb * 2**30 or 2**32)
        lead = replace(whole, members=led_by) if led_by else None
        begin, norms = time.perf_counter(), registry.norm_layers(net)
        _, facts = calibrate.measure(whole, lead, norms, {}, Calibrate())
        took, found = time.perf_counter() - begin, buffers(net)
        exact = exact or found
        mean, var = apart(found, exact)
        off = facts.get("off", np.nan)
        told = f"{mean:.1e} | {var:.1e} | {off:.1e}"
        print(f"| {name} | {took:.1f} | {told} | {judged(net)} |", flush=True)


if __name__ == "__main__":
    main()
