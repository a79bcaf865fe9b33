"""What trajectory matching costs, and whether its settings can work. No images here."""

from __future__ import annotations

from typing import Any

from ltdd_scale.data import siamese, whitening
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories.settings import Trajectory
from ltdd_scale.methods.matching.settings import Unrolled
from ltdd_scale.models import flops
from ltdd_scale.stage import Cost, Facts

# Of one step of a segment, in forward passes: forward and backward of the student, the same once
# more with a graph, and backward through both of these.
PASSES = 3 + 3 + 6
GRAPH = 4  # activations that the second sweep keeps, in those of a forward pass


def snapshots(trajectory: Trajectory) -> int:
    """How many snapshots an expert has after its initial weights."""
    made = trajectory.steps // trajectory.every
    return min(made, trajectory.keep) if trajectory.keep else made


def check(section: str, own: Unrolled, trajectory: Trajectory) -> None:
    """Raise `UserError` where segments need snapshots that experts do not keep."""
    siamese.choices(own.dsa)
    if not trajectory.lr:
        raise UserError("trajectories.lr=0: experts that do not move cannot be followed; raise it")
    if own.min_start > own.max_start:
        raise UserError(
            f"{section}.min_start={own.min_start} is behind {section}.max_start={own.max_start}"
        )
    last, there = own.max_start + own.target, snapshots(trajectory)
    if last > there:
        raise UserError(
            f"a segment may end at snapshot {last} ({section}.max_start + {section}.target), but "
            f"an expert keeps {there}: lower {section}.max_start, or raise trajectories.steps "
            f"(now {trajectory.steps}) or trajectories.keep"
        )


def parameters(trajectory: Trajectory, resolution: int, num_classes: int) -> tuple[int, int]:
    """Numbers of an expert's backbone, and of its head."""
    made_of = (trajectory.net, trajectory.width, trajectory.norm, resolution)
    head = num_classes * (flops.features(*made_of) + 1)
    return flops.parameters(*made_of), head


def cost(settings: Any, own: Unrolled, facts: Facts, steps: float) -> Cost:
    """`steps` of students an iteration and segment; weights of all of them are kept, the graph of
    one. `settings` has trajectory, images and ipc."""
    trajectory, size = settings.trajectory, settings.images.resolution
    one = flops.measure(trajectory.net, trajectory.width, trajectory.norm, size)
    small, pixels = facts.num_classes * settings.ipc, 3 * size * size
    batch = min(own.batch_size, small)
    weights = sum(parameters(trajectory, size, facts.num_classes))
    # All images there and back to valid pixels, once an iteration.
    whitened = whitening.flops(settings, 2 * own.iterations * small)
    # Images with gradient and momentum, and all of it once more in what ranks exchange.
    held = flops.FLOAT * ((own.inner_steps + 8) * weights + 6 * small * pixels)
    return Cost(
        flops=own.iterations * own.segments * steps * batch * PASSES * one.flops + whitened,
        memory=held + whitening.held(settings, inverse=True),
        activations=batch * GRAPH * (one.activations + flops.FLOAT * pixels),
        disk=small * pixels,
    )
