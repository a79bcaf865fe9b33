"""Images that grow while an expert learns: coarse and cheap first, whole at the end (progressive
resizing; FFCV's ResNet recipes, Leclerc et al., 2022)."""

from __future__ import annotations

from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import Engine, Expert
from ltdd_scale.models import flops

# Shares of training: until `SMALL` images do not grow, from `WHOLE` on they are whole.
SMALL = 0.5
WHOLE = 0.8


def sides(expert: Expert, resolution: int) -> list[int]:
    """The side of the images of each epoch in pixels, where networks see `resolution` in the end.

    Between small and whole it grows in a straight line, to multiples of 16, of 4 below 128. The
    last epoch's images are whole always.
    """
    begin, epochs = expert.begin_resolution or resolution, expert.epochs
    step, out = 16 if resolution >= 128 else 4, []
    for epoch in range(epochs):
        grown = (epoch / epochs - SMALL) / (WHOLE - SMALL)
        side = begin
        if grown >= 1 or epoch == epochs - 1:
            side = resolution
        elif grown > 0:
            between = begin + grown * (resolution - begin)
            side = min(max(begin, round(between / step) * step), resolution)
        out.append(side)
    return out


def check(role: str, expert: Expert, train: Engine, resolution: int) -> None:
    """Raise `UserError` where the images cannot grow to `resolution`."""
    begin, net = expert.begin_resolution, (expert.net, expert.width, expert.norm)
    name = f"{role}.begin_resolution={begin}"
    if not begin:
        return
    if begin >= resolution:
        raise UserError(
            f"{name} is not below data.resolution={resolution}: images grow, so lower it"
        )
    # It compiles each size anew, and the first one otherwise than those that follow: a resumed run
    # would have other bits.
    if train.compile:
        raise UserError(f"{name} does not go with train.compile: switch one of them off")
    for side in sorted(set(sides(expert, resolution))):
        try:
            features = flops.features(*net, side)
        except UserError as error:
            raise UserError(
                f"{name}: {str(error).partition(';')[0]}; raise it, or set 0"
            ) from error
        if features != flops.features(*net, resolution):
            raise UserError(
                f"{name}: the last layer of {expert.net} fits images of one size only; use a "
                "network that averages over positions, such as resnet32 or resnet50, or set 0"
            )
