"""Images that grow while an expert learns: coarse and cheap first, whole at the end (progressive
resizing; FFCV's ResNet recipes, Leclerc et al., 2022)."""

from __future__ import annotations

from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import Expert
from ltdd_scale.models import flops

SMALL, WHOLE = (
    0.5,
    0.8,
)  # shares of training: until one images do not grow, from the other they are whole


def side_at(epoch: int, expert: Expert, resolution: int) -> int:
    """Side in pixels of the images of `epoch`, where networks see `resolution` in the end.

    Between small and whole the side grows in a straight line, in steps of 32 pixels (networks halve
    it five times), of 4 below 128.
    """
    begin = expert.begin_resolution
    if not begin:
        return resolution
    grown = (epoch / expert.epochs - SMALL) / (WHOLE - SMALL)
    if grown >= 1:
        return resolution
    step = 32 if resolution >= 128 else 4
    return min(begin + round(max(grown, 0) * (resolution - begin) / step) * step, resolution)


def sides(expert: Expert, resolution: int) -> list[int]:
    """The side of each epoch."""
    return [side_at(epoch, expert, resolution) for epoch in range(expert.epochs)]


def check(role: str, expert: Expert, resolution: int) -> None:
    """Raise `UserError` where the images cannot grow to `resolution`."""
    begin = expert.begin_resolution
    if not begin:
        return
    if begin > resolution:
        raise UserError(
            f"{role}.begin_resolution={begin} is above data.resolution={resolution}: images grow, "
            "so lower it"
        )
    net = (expert.net, expert.width, expert.norm)
    if flops.features(*net, begin) != flops.features(*net, resolution):
        raise UserError(
            f"{role}.begin_resolution={begin}: the last layer of {expert.net} fits images of one "
            "size only; use a network that averages over positions, such as resnet32 or resnet50, "
            "or 0"
        )
