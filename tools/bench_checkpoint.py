"""What a checkpoint costs: the time that a save adds to training steps of ResNet-50.

python tools/bench_checkpoint.py [--rounds 5] [--threads 1]

Steps of a two-headed ResNet-50 expert (SGD with momentum: a checkpoint of twice its parameters),
with no save, with one save in the background as training does it, and with one that is waited for.
The overhead is what one save adds, as a share of the 60 s between two saves.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from bench import begin, in_turns, table

from ltdd_scale.experts import engine
from ltdd_scale.experts.settings import Expert
from ltdd_scale.models import registry
from ltdd_scale.runtime.checkpoint import Checkpoints

STEPS, SECONDS = 12, 60.0


def main() -> None:
    rounds, ranks = begin(__doc__)
    model = ranks.to_device(
        registry.seeded(
            lambda: registry.TwoHeads(registry.backbone("resnet50", 0, "batch", 64), 1000, 0),
            "bench",
        )
    ).train()
    optimizer = engine.optimizer_of(model, Expert(optimizer="sgd", lr=0.01), ranks.device)
    x = torch.randn(16, 3, 64, 64, device=ranks.device)

    def step() -> None:
        with ranks.autocast():
            plain, rebalanced, _, _ = model.heads(x)
        optimizer.zero_grad(set_to_none=True)
        (plain.float().square().mean() + rebalanced.float().square().mean()).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder) / "c", "bench", SECONDS)
        number = [0]

        def steps(save: bool, wait: bool = False) -> None:
            for k in range(STEPS):
                step()
                if save and k == 1:
                    number[0] += 1
                    checkpoints.save(
                        number[0],
                        {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                        wait,
                    )
            checkpoints.wait()

        times = in_turns(
            {
                "no save": lambda: steps(False),
                "one save, in the background": lambda: steps(True),
                "one save, waited for": lambda: steps(True, True),
            },
            rounds,
        )
        size = max(p.stat().st_size for p in (Path(folder) / "c").glob("step-*.pt"))
    print(
        table(
            f"ResNet-50, {STEPS} steps of 16 images of 64 px, checkpoint of {size / 1e6:.0f} MB",
            times,
            "no save",
            STEPS,
            "steps",
        )
    )
    base = statistics.median(times["no save"])
    for name in ("one save, in the background", "one save, waited for"):
        extra = statistics.median(times[name]) - base
        print(
            f"{name}: {extra:.2f} s more, {100 * extra / SECONDS:.1f} % of the time "
            f"at one in {SECONDS:.0f} s"
        )


if __name__ == "__main__":
    main()
