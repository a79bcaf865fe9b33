"""Work that is the same at each call, as one CUDA graph: a GPU does not wait for Python then."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose their kernels and take their workspaces

Function = Callable[..., tuple[Tensor, ...]]


class Captured:
    """`function` of tensors, which gives a tuple of tensors. On a CPU it is called as it is.

    On a GPU its kernels are captured once for each shape of its inputs, and replayed from then on:
    small networks spend most of their time on launches. `function` must be pure, must not wait for
    the GPU, and draws no random numbers. It may differentiate inside. Results are copies. Whoever
    holds this must not be held by `function`: a graph keeps memory until it is let go.
    """

    def __init__(self, function: Function):
        self.function = function
        self._graphs: dict[tuple, _Graph] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if inputs[0].device.type != "cuda":
            return self.function(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.function, inputs)
        return self._graphs[key](*inputs)


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all warm-ups: libraries keep a workspace for each stream that they saw."""
    return torch.cuda.Stream(device)


class _Graph:
    def __init__(self, function: Function, inputs: tuple[Tensor, ...]):
        self.inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
        aside = _aside(inputs[0].device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may decode and pin images meanwhile, which the usual mode would not stand.
        capture = torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local")
        with capture:
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)
