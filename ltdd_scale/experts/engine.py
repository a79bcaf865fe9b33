"""Who averages gradients, steps the optimizer and keeps checkpoints: DDP, or DeepSpeed with ZeRO.

Both give the trainer the same few verbs. The loop, the losses, the order of images and the random
numbers are the trainer's.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import Engine, Expert
from ltdd_scale.runtime import files, place, signals
from ltdd_scale.runtime.checkpoint import Checkpoints, not_ours
from ltdd_scale.runtime.ranks import Ranks, backends

Saved = tuple[int, dict[str, Any]]  # the step, and the state that the trainer gave to `save`


@dataclass(frozen=True)
class Setup:
    """How an engine is set up. `expert` has the optimizer's settings, `deepspeed` its options.

    `unused`: parameters may get no gradient in a step. `micro_batches` of a rank's batch are
    accumulated in each step.
    """

    expert: Expert
    train: Engine
    unused: bool = False
    micro_batches: int = 1
    deepspeed: Mapping[str, Any] = field(default_factory=dict)


class Trainer(Protocol):
    """What the training loop asks of an engine. `folder` holds checkpoints named ``step-…``."""

    folder: Path

    def load(self) -> Saved | None:
        """Restore the newest valid checkpoint, the same on every rank; None where there is none."""
        ...

    def save(self, step: int, state: dict[str, Any], wait: bool) -> None:
        """Save `state` beside weights and optimizer. With `wait` it is on the disk, for every
        rank, when this returns."""
        ...

    def due(self) -> bool:
        """Whether this rank wants a checkpoint now."""
        ...

    def finish(self) -> None:
        """Wait for the last save."""
        ...

    def forward(self, x: torch.Tensor, last: bool) -> Any:
        """A forward pass of a micro-batch; `last`: the step's last one."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients; they are averaged over ranks with the `last` micro-batch."""
        ...

    def step(self, lr: float) -> None:
        """Step the optimizer, and clear the gradients."""
        ...


def make(training: nn.Module, setup: Setup, ranks: Ranks, checkpoints: Checkpoints) -> Trainer:
    """The engine that ``train.engine`` names, for `training`, whose forward pass it runs."""
    made = DDPEngine if setup.train.engine == "ddp" else DeepSpeedEngine
    return made(training, setup, ranks, checkpoints)


def optimizer_of(model: nn.Module, expert: Expert, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW, in one kernel where `device` is a GPU."""
    parameters, fused = model.parameters(), device.type == "cuda" or None
    lr, decay = expert.lr, expert.weight_decay
    if expert.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=fused)
    momentum = expert.momentum
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=decay, fused=fused)


class DDPEngine:
    """DistributedDataParallel; checkpoints are written by rank 0, in the background."""

    def __init__(self, training: nn.Module, setup: Setup, ranks: Ranks, checkpoints: Checkpoints):
        self.ranks, self.clip = ranks, setup.train.clip
        self.checkpoints, self.folder = checkpoints, checkpoints.folder
        self.inner = training
        self.optimizer = optimizer_of(training, setup.expert, ranks.device)
        module: Any = torch.compile(training) if setup.train.compile else training
        if ranks.world_size > 1:
            module = ranks.parallel(module, find_unused_parameters=setup.unused)
        self.module: Any = module

    def load(self) -> Saved | None:
        # On the CPU: what is loaded moves to where it belongs, the rest is let go. Rank 0 says
        # which step, or ranks might go on from different ones.
        saved = self.checkpoints.load() if self.ranks.is_main else None
        step = self.ranks.broadcast(saved and saved[0])
        if step is not None and not self.ranks.is_main:
            saved = self.checkpoints.load(step=step)
        if saved:
            self.inner.load_state_dict(saved[1]["model"])
            self.optimizer.load_state_dict(saved[1]["optimizer"])
        return saved

    def save(self, step: int, state: dict[str, Any], wait: bool) -> None:
        if self.ranks.is_main:
            own = {"model": self.inner.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.checkpoints.save(step, {**own, **state}, wait)
        if wait:
            self.ranks.barrier()

    def due(self) -> bool:
        return self.ranks.is_main and self.checkpoints.due()

    def finish(self) -> None:
        self.checkpoints.wait()

    def forward(self, x: torch.Tensor, last: bool) -> Any:
        with self._averaging(last), self.ranks.autocast():
            return self.module(x)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        with self._averaging(last):
            loss.backward()

    def _averaging(self, last: bool):
        return nullcontext() if last or self.ranks.world_size == 1 else self.module.no_sync()

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.inner.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeedEngine:
    """DeepSpeed (ZeRO 1 or 2).

    Every rank writes its shard of the optimizer; a checkpoint counts when all of them are there
    and whole.
    """

    def __init__(self, training: nn.Module, setup: Setup, ranks: Ranks, checkpoints: Checkpoints):
        deepspeed = _import(ranks)
        self.ranks, self.folder = ranks, checkpoints.folder
        self.owner, self.seconds = checkpoints.owner, checkpoints.seconds
        self.parts, self._last = setup.micro_batches, time.monotonic()
        if not dist.is_initialized():  # DeepSpeed wants one, with one rank too
            dist.init_process_group(
                backends(ranks.device.type),
                store=dist.HashStore(),
                rank=0,
                world_size=1,
            )
        gpu = ranks.device.type == "cuda"
        with _local_rank(ranks.device.index or 0 if gpu else place.here().local_rank):
            made = deepspeed.initialize(
                model=training,
                optimizer=optimizer_of(training, setup.expert, ranks.device),
                config=_options(setup, ranks),
                dist_init_required=False,
            )
        self.module, self.optimizer = made[0], made[1]

    def load(self) -> Saved | None:
        """Raises `UserError` for a checkpoint of other work or of another number of ranks."""
        newest = self.ranks.broadcast(self._newest() if self.ranks.is_main else None)
        if newest is None:
            return None
        name, facts = newest
        if facts["owner"] != self.owner:
            raise not_ours(self.folder / name, facts["owner"], self.owner)
        if facts["ranks"] != self.ranks.world_size:
            raise UserError(
                f"{self.folder / name} was written by {facts['ranks']} ranks and is sharded over "
                f"them: use --nproc {facts['ranks']}, or delete it to begin again"
            )
        _, state = self.module.load_checkpoint(str(self.folder), tag=name)
        return facts["step"], state["trainer"]

    def _newest(self) -> tuple[str, dict] | None:
        """Name and manifest of the newest checkpoint whose files are all there and whole."""
        folders = self.folder.glob("step-*")
        for folder in sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True):
            manifest = folder / "manifest.json"
            if manifest.exists():
                facts = files.read_json(manifest)
                if all(
                    (folder / name).exists() and files.sha256(folder / name) == digest
                    for name, digest in facts["files"].items()
                ):
                    return folder.name, facts
        return None

    def save(self, step: int, state: dict[str, Any], wait: bool) -> None:
        """All ranks write, then rank 0 hashes every shard and puts the checkpoint in place.

        (DeepSpeed's writer does not work in the background.)
        """
        name, ranks = f"step-{step:012d}", self.ranks
        scratch = self.folder / ".writing"
        if ranks.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        ranks.barrier()
        self.module.save_checkpoint(
            str(scratch), tag=name, client_state={"trainer": state}, save_latest=False
        )
        ranks.barrier()
        if ranks.is_main:
            self._put_in_place(scratch, name, step)
        ranks.barrier()
        self._last = time.monotonic()

    def _put_in_place(self, scratch: Path, name: str, step: int) -> None:
        written = sorted(p for p in (scratch / name).rglob("*") if p.is_file())
        for path in written:
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        facts = {
            "owner": self.owner,
            "step": step,
            "ranks": self.ranks.world_size,
            "files": {str(p.relative_to(scratch / name)): files.sha256(p) for p in written},
        }
        files.write_json(scratch / name / "manifest.json", facts)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(scratch / name, self.folder / name)
        files.sync_folder(self.folder)
        shutil.rmtree(scratch)  # DeepSpeed leaves a script in it
        for old in sorted(self.folder.glob("step-*"), reverse=True)[2:]:
            shutil.rmtree(old)

    def due(self) -> bool:
        return self.ranks.is_main and (
            time.monotonic() - self._last >= self.seconds or signals.save_wanted(self._last)
        )

    def finish(self) -> None:
        pass

    def forward(self, x: torch.Tensor, last: bool) -> Any:
        return self.module(x)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed divides by their number; ours are weighted by their share of the batch already.
        self.module.backward(loss * self.parts)
        if not last:
            self.module.step()  # counts the micro-batch; the optimizer steps with the last

    def step(self, lr: float) -> None:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        self.module.step()


def _options(setup: Setup, ranks: Ranks) -> dict[str, Any]:
    return {
        **setup.deepspeed,
        # DeepSpeed needs a number; batches and losses are the trainer's.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setup.micro_batches,
        "gradient_clipping": setup.train.clip,
        # The empty list: autocast as torch does it, and gradients that are summed over ranks in
        # float32. By default those of every convolution would be rounded.
        "torch_autocast": {
            "enabled": ranks.autocast_dtype is not None,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


@contextmanager
def _local_rank(number: int) -> Generator[None]:
    """The launcher's variable, by which DeepSpeed picks the GPU. Where SLURM shows each task its
    own GPU alone, that is not the task's number."""
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
            f"train.engine=deepspeed, but DeepSpeed does not import ({error}): "
            "pip install deepspeed, or --set train.engine=ddp"
        ) from error
    deepspeed.logger.setLevel("ERROR")
    if ranks.device.type == "cpu":
        # Else it compiles a collective of its own at first use, for minutes; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
