"""Who averages gradients, steps the optimizer and keeps checkpoints: DDP, or DeepSpeed with ZeRO.

Both give the trainer the same few verbs. The loop, the losses, the order of images and the random numbers are the trainer's.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ltdd_scale.config import Expert, Train
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.ranks import Ranks


def sgd(model: nn.Module, settings: Expert, device: torch.device) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda" or None,
    )


class DDPEngine:
    """DistributedDataParallel; checkpoints are written by rank 0, in the background."""

    def __init__(
        self,
        training: nn.Module,
        settings: Expert,
        train: Train,
        ranks: Ranks,
        checkpoints: Checkpoints,
        unused: bool,
    ):
        self.ranks, self.clip, self.checkpoints, self.folder = (
            ranks,
            train.clip,
            checkpoints,
            checkpoints.folder,
        )
        self.inner, self.optimizer = training, sgd(training, settings, ranks.device)
        module = torch.compile(training) if train.compile else training
        self.module = (
            ranks.parallel(module, find_unused_parameters=unused) if ranks.world > 1 else module
        )

    def load(self) -> tuple[int, dict[str, Any]] | None:
        # On the CPU: what is loaded from it moves to where it belongs, the rest is let go. Rank 0 says which, or ranks might go on from different steps.
        saved = self.checkpoints.load() if self.ranks.first else None
        step = self.ranks.share(saved and saved[0])
        if step is not None and not self.ranks.first:
            saved = self.checkpoints.load(step=step)
        if saved:
            self.inner.load_state_dict(saved[1]["model"])
            self.optimizer.load_state_dict(saved[1]["optimizer"])
        return saved

    def save(self, step: int, state: dict[str, Any], wait: bool) -> None:
        """`state` beside weights and optimizer. With `wait` it is on the disk when this returns, on every rank."""
        if self.ranks.first:
            self.checkpoints.save(
                step,
                {
                    "model": self.inner.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    **state,
                },
                wait,
            )
        if wait:
            self.ranks.barrier()

    def due(self) -> bool:
        return self.ranks.first and self.checkpoints.due()

    def finish(self) -> None:
        self.checkpoints.wait()

    def forward(self, x: torch.Tensor, last: bool):
        """A forward pass; gradients are averaged over ranks in the backward pass of the `last` part of a batch."""
        with self._averaging(last), self.ranks.autocast():
            return self.module(x)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        with self._averaging(last):
            loss.backward()

    def _averaging(self, last: bool):
        return nullcontext() if last or self.ranks.world == 1 else self.module.no_sync()

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.inner.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeedEngine:
    """DeepSpeed (ZeRO 1 or 2). Every rank writes its shard of the optimizer; a checkpoint counts when all of them are there and whole."""

    def __init__(
        self,
        training: nn.Module,
        settings: Expert,
        train: Train,
        ranks: Ranks,
        checkpoints: Checkpoints,
        parts: int,
    ):
        deepspeed = _import(ranks)
        self.ranks, self.folder, self.owner, self.seconds = (
            ranks,
            checkpoints.folder,
            checkpoints.owner,
            checkpoints.seconds,
        )
        self.parts, self._last = parts, time.monotonic()
        options = {
            **files.read_json(train.deepspeed),
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed needs a number; batches and losses are the trainer's
            "gradient_accumulation_steps": parts,
            "gradient_clipping": train.clip,
            # The empty list: autocast as torch does it, and gradients that are summed over ranks in float32. By default those of every convolution would be rounded.
            "torch_autocast": {
                "enabled": ranks.autocast_dtype is not None,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        if not dist.is_initialized():  # DeepSpeed wants one, with one rank too
            dist.init_process_group(
                "gloo" if ranks.device.type == "cpu" else "cpu:gloo,cuda:nccl",
                store=dist.HashStore(),
                rank=0,
                world_size=1,
            )
        with _local_rank(
            ranks.device.index or 0
            if ranks.device.type == "cuda"
            else int(os.environ.get("LOCAL_RANK", 0))
        ):
            made = deepspeed.initialize(
                model=training,
                optimizer=sgd(training, settings, ranks.device),
                config=options,
                dist_init_required=False,
            )
        self.module, self.optimizer = made[0], made[1]

    def load(self) -> tuple[int, dict[str, Any]] | None:
        found = self.ranks.share(self._newest() if self.ranks.first else None)
        if found is None:
            return None
        name, facts = found
        if facts["owner"] != self.owner:
            raise UserError(
                f"{self.folder / name} belongs to other work; delete it or choose another --store"
            )
        if facts["ranks"] != self.ranks.world:
            raise UserError(
                f"{self.folder / name} was written by {facts['ranks']} ranks and is sharded over them: use --nproc {facts['ranks']}, or delete it to begin again"
            )
        _, state = self.module.load_checkpoint(str(self.folder), tag=name)
        return facts["step"], state["trainer"]

    def _newest(self) -> tuple[str, dict] | None:
        for folder in sorted(
            self.folder.glob("step-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True
        ):
            manifest = folder / "manifest.json"
            if manifest.exists():
                facts = files.read_json(manifest)
                if all(
                    (folder / n).exists() and files.sha256(folder / n) == digest
                    for n, digest in facts["files"].items()
                ):
                    return folder.name, facts
        return None

    def save(self, step: int, state: dict[str, Any], wait: bool) -> None:
        """All ranks write, then rank 0 hashes every shard and puts the checkpoint in place. (DeepSpeed's writer does not work in the background.)"""
        name, ranks = f"step-{step:012d}", self.ranks
        scratch = self.folder / ".writing"
        if ranks.first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        ranks.barrier()
        self.module.save_checkpoint(
            str(scratch), tag=name, client_state={"trainer": state}, save_latest=False
        )
        ranks.barrier()
        if ranks.first:
            written = sorted(p for p in (scratch / name).rglob("*") if p.is_file())
            for path in written:
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
            facts = {
                "owner": self.owner,
                "step": step,
                "ranks": ranks.world,
                "files": {str(p.relative_to(scratch / name)): files.sha256(p) for p in written},
            }
            files.write_json(scratch / name / "manifest.json", facts)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.replace(scratch / name, self.folder / name)
            files.sync_folder(self.folder)
            shutil.rmtree(scratch)  # DeepSpeed leaves a script in it
            for old in sorted(self.folder.glob("step-*"), reverse=True)[2:]:
                shutil.rmtree(old)
        ranks.barrier()
        self._last = time.monotonic()

    def due(self) -> bool:
        return self.ranks.first and (
            time.monotonic() - self._last >= self.seconds or signals.save_wanted(self._last)
        )

    def finish(self) -> None:
        pass

    def forward(self, x: torch.Tensor, last: bool):
        return self.module(x)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed divides by the number of parts; ours are weighted by their share already.
        self.module.backward(loss * self.parts)
        if not last:
            self.module.step()  # counts the part; the optimizer steps with the last

    def step(self, lr: float) -> None:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        self.module.step()


@contextmanager
def _local_rank(number: int) -> Iterator[None]:
    """The launcher's variable, by which DeepSpeed picks the GPU: where SLURM shows each task its own alone, that is not the task's number."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _import(ranks: Ranks):
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"train.engine=deepspeed, but DeepSpeed does not import ({error}): pip install deepspeed, or --set train.engine=ddp"
        ) from error
    deepspeed.logger.setLevel("ERROR")
    if (
        ranks.device.type == "cpu"
    ):  # else it compiles a collective of its own at first use, for minutes; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def make(
    training: nn.Module,
    settings: Expert,
    train: Train,
    ranks: Ranks,
    checkpoints: Checkpoints,
    unused: bool,
    parts: int,
) -> DDPEngine | DeepSpeedEngine:
    if train.engine == "ddp":
        return DDPEngine(training, settings, train, ranks, checkpoints, unused)
    if not Path(train.deepspeed).exists():
        raise UserError(f"train.deepspeed: no such file: {train.deepspeed}")
    return DeepSpeedEngine(training, settings, train, ranks, checkpoints, parts)
