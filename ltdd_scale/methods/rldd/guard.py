"""What the teacher takes images for while they are recovered: how sure it is, and when to stop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models import frozen
from ltdd_scale.runtime.ranks import Ranks

STEPS = (0.25, 0.5, 0.75, 1.0)  # of the way from the initial image to the recovered one
CHECKS = 10  # of a chunk, if it has as many iterations


@torch.no_grad()
def confidence(teacher: nn.Module, images: Tensor, labels: Tensor, ranks: Ranks) -> Tensor:
    """The teacher's probability of each image's class `labels` int64 [n]: float32 [n]. `images`
    float32 [n, 3, R, R], normalised."""
    probabilities = frozen.forward(teacher, images, ranks).softmax(1)
    return probabilities.gather(1, labels[:, None])[:, 0]


@torch.no_grad()
def settled(
    networks: list[nn.Module],
    images: Tensor,
    recovered: Tensor,
    labels: Tensor,
    share: float,
    ranks: Ranks,
) -> Tensor:
    """Each image as far from its initial one towards the recovered one as it stays of its class:
    the farthest of `STEPS` at which every one of `networks` gives the class at least `share` of
    the probability that it gives the initial image.

    `images` (the initial ones) and `recovered` float32 [n, 3, R, R], normalised; so is what is
    returned.
    """
    least = [share * confidence(net, images, labels, ranks) for net in networks]
    out = images
    for step in STEPS:
        moved = torch.lerp(images, recovered, step)
        stays = torch.ones_like(labels, dtype=torch.bool)
        for net, bar in zip(networks, least, strict=True):
            stays &= confidence(net, moved, labels, ranks) >= bar
        out = torch.where(stays[:, None, None, None], moved, out)  # the farthest comes last
    return out


class Watch:
    """Stops a chunk when the teacher takes fewer of its images for their class than at the start.

    The bar is the share of the initial images, less `settings.stop`. `kept`: the images of the last
    check that was good, float32 [n, 3, R, R]; before the first check the initial ones. `stopped`:
    the iteration whose check was not good, if there was one. Only a check waits for the device.
    """

    kept: Tensor
    stopped: int | None

    def __init__(
        self, teacher: nn.Module, images: Tensor, labels: Tensor, settings: Recover, ranks: Ranks
    ):
        self._teacher, self._labels, self._ranks = teacher, labels, ranks
        self._at = checks(settings.iterations)
        self._least = self._agreed(images) - settings.stop * len(labels)
        self.kept, self.stopped = images, None

    def due(self, iteration: int) -> bool:
        """Whether the images are looked at after this many iterations."""
        return iteration in self._at

    def look(self, iteration: int, images: Tensor) -> None:
        """Keep the whole `images`, float32 [n, 3, R, R], or stop."""
        if bool(self._agreed(images) < self._least):
            self.stopped = iteration
        else:
            self.kept = images.clone()

    @torch.no_grad()
    def _agreed(self, images: Tensor) -> Tensor:
        """How many images the teacher takes for their class, int64 []."""
        logits = frozen.forward(self._teacher, images, self._ranks)
        return (logits.argmax(1) == self._labels).sum()


def checks(iterations: int) -> set[int]:
    """After how many iterations there is a check: after each tenth of them, the last one too."""
    return {-(-iterations * k // CHECKS) for k in range(1, CHECKS + 1)}
