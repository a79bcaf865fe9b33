"""Settings of how work is done, not what: only `precision` is hashed."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Number, Settings, Whole, option


class Runtime(Settings):
    """How, not what: nothing here changes a fingerprint, except precision."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto, cpu or cuda")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: bfloat16 autocast on GPUs, float32 on CPUs"
    )
    ranks_per_gpu: Whole = option(
        1,
        "ranks of this machine that share a GPU: small networks leave it idle between kernels; "
        "they meet by gloo instead of NCCL, which may change the last bits of what they train "
        "together",
        low=1,
    )
    threads: Whole = option(
        1, "CPU threads a process; more than one may change the last bits", low=1
    )
    workers: Whole = option(4, "decoding threads (DALI) or processes (PyTorch) a rank", low=0)
    checkpoint_seconds: Number = option(60.0, "time between checkpoints", low=0)
