"""The trained experts that segments are taken from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories.kept import Kept
from ltdd_scale.experts.trajectories.settings import Trajectory
from ltdd_scale.models.flat import Flat
from ltdd_scale.runtime.context import Context

TRAJECTORIES, CLASSIFIERS = "trajectory/", "classifier/"


@dataclass(frozen=True)
class Experts:
    """`flat` is their network; `ways` what each expert keeps of its way, memory-mapped.

    `heads`: where classifiers were trained once more, the ways of these; else nothing.
    """

    flat: Flat
    ways: list[Kept]
    heads: list[Kept]

    def __len__(self) -> int:
        return len(self.ways)

    def way(self, expert: int, start: int, target: int, device: torch.device) -> tuple[Tensor, ...]:
        """The weights [P] of two snapshots."""
        return tuple(self.ways[expert].vector(k, device) for k in (start, target))


def load(trajectory: Trajectory, resolution: int, num_classes: int, context: Context) -> Experts:
    """All experts among the inputs. Raises `UserError` for one that is damaged or of another
    network."""
    made_of = (trajectory.net, trajectory.width, trajectory.norm, resolution)
    flat = Flat(*made_of, num_classes)
    names = sorted(context.inputs)
    ways = [Kept(context.input(n)) for n in names if n.startswith(TRAJECTORIES)]
    heads = [Kept(context.input(n)) for n in names if n.startswith(CLASSIFIERS)]
    for kept, size in [*((k, flat.size) for k in ways), *((k, _head(flat)) for k in heads)]:
        if kept.size != size:
            raise UserError(
                f"{kept.folder}: weights of {kept.size} numbers, but {trajectory.net} with "
                f"{num_classes} classes has {size}: these experts are of another network"
            )
    return Experts(flat, ways, heads)


def _head(flat: Flat) -> int:
    return flat.head.stop - flat.head.start
