"""The moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """Of `model`, which trains: `network` has the averages. Both keep their tensors, so the pairs
    are found once and not in each step; loading a state dict copies into them."""

    def __init__(self, model: nn.Module):
        self.network = copy.deepcopy(model).requires_grad_(False)
        ours, theirs = self.network.state_dict().values(), model.state_dict().values()
        pairs = list(zip(ours, theirs, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._ours, self._theirs = [a for a, _ in floats], [b for _, b in floats]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Parameters and float buffers ← decay · average + (1 − decay) · model; counters follow."""
        torch._foreach_lerp_(self._ours, self._theirs, 1 - decay)
        for a, b in self._counters:
            a.copy_(b)
