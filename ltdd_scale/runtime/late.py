"""What a GPU is still computing, read when it is long known: nobody waits for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """The values that `tensor` has now, whatever becomes of it, to be read later.

    On a GPU they are copied to the host behind the work that makes them, and reading waits for
    that copy alone: read when the next step is under way, it is over. On a CPU they are there at
    once.
    """

    def __init__(self, tensor: Tensor):
        gpu = tensor.device.type == "cuda"
        # Pinned: a copy to other memory returns when it is over.
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=gpu)
        self._copy.copy_(tensor.detach(), non_blocking=gpu)
        self._over: torch.cuda.Event | None = None
        if gpu:
            self._over = torch.cuda.Event()
            self._over.record(torch.cuda.current_stream(tensor.device))

    @property
    def known(self) -> bool:
        """Whether `read` would not wait."""
        return self._over is None or self._over.query()

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._over is not None:
            self._over.synchronize()
        return self._copy
