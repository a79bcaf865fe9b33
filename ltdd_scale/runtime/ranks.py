"""Process group, device, precision, and random numbers that do not know the rank."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ltdd_scale.errors import PassingError, PeerLost, UserError
from ltdd_scale.runtime import files, place, signals

M = TypeVar("M", bound=torch.nn.Module)

HANGS = datetime.timedelta(minutes=30)  # a collective of GPUs that takes longer


@dataclass
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    autocast_dtype: torch.dtype | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value)
        return boxes

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place. Exact, and so independent of the number of ranks, where all but one
        rank hold zeros."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_tensor(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s values on every rank, in place, on the tensor's device."""
        if self.world_size > 1:
            dist.broadcast(tensor, src)
        return tensor

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish, whether any rank has it: the same answer on every rank, in one small
        reduction on the CPUs."""
        if self.world_size == 1:
            return wishes
        bits = torch.tensor(wishes, dtype=torch.uint8)
        dist.all_reduce(bits, op=dist.ReduceOp.BOR)
        return tuple(map(bool, bits.tolist()))

    def done_in_and_on(self) -> list[str]:
        """What bits depend on besides the work: "in bfloat16", "on NVIDIA …"; nothing on a CPU in
        float32."""
        dtype, gpu = self.autocast_dtype, self.device.type == "cuda"
        words = [] if dtype is None else [f"in {str(dtype).removeprefix('torch.')}"]
        return [*words, f"on {torch.cuda.get_device_name(self.device)}"] if gpu else words

    def autocast(self):
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def to_device(self, model: M) -> M:
        """On the device, channels-last on a GPU (on a CPU oneDNN picks its own layout)."""
        model = model.to(self.device, non_blocking=True)
        return model.to(memory_format=torch.channels_last) if self.device.type == "cuda" else model

    def parallel(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        """DDP that leaves buffers alone: by default it would overwrite every rank's BN statistics
        with rank 0's at each forward."""
        with warnings.catch_warnings():
            # torch 2.15 renames the option to one that still synchronises at the start; older
            # releases know only this name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return torch.nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, **options
            )


class Agreement:
    """What any rank wishes, told to all ranks a step later, so that no step waits for it.

        agreement = Agreement(ranks)
        for step in steps:
            ...
            stop, due = agreement(stop_wished, save_is_due)
        agreement.close()

    Every rank calls it after the same steps. Each call sends this rank's wishes off, and answers
    for each wish whether any rank had it at the call before: the same answer on every rank. A rank
    alone is answered at once.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._sent: tuple[torch.Tensor, Any] | None = None

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        if self.ranks.world_size == 1:
            return wishes
        told = self.close() or (False,) * len(wishes)
        # What is told now is done now: it is not asked for again.
        fresh = [wish and not known for wish, known in zip(wishes, told, strict=True)]
        bits = torch.tensor(fresh, dtype=torch.uint8)
        self._sent = bits, dist.all_reduce(bits, op=dist.ReduceOp.BOR, async_op=True)
        return told

    def close(self) -> tuple[bool, ...]:
        """Wait for the wishes that are on their way, and return them; empty where none are."""
        if self._sent is None:
            return ()
        (bits, work), self._sent = self._sent, None
        work.wait()
        return tuple(map(bool, bits.tolist()))


def join(
    device: str, precision: str, threads: int, meeting: Path = Path(), per_gpu: int = 1
) -> Ranks:
    """Join the process group that the environment describes (torchrun, `--nproc`, a SLURM step),
    or be alone.

    The tasks of a SLURM step find each other by a note in the shared folder `meeting`. `per_gpu`:
    ranks that share a GPU.
    Raises `UserError` for a half-set environment, for a GPU that is not there, and where the ranks
    do not compute on the same kind of device, or more than
    `per_gpu` on the same GPU.
    """
    here = place.here()
    kind = _kind(device, here.in_slurm)
    local = here.local_rank // per_gpu
    if kind == "cuda":
        if here.in_step and torch.cuda.device_count() == 1:
            local = 0  # SLURM shows each task its own GPU only
        _prepare_gpu(here.rank, local, precision)
    torch.set_num_threads(threads)
    auto = "bfloat16" if kind == "cuda" else "float32"
    precision = auto if precision == "auto" else precision
    if here.world_size > 1 and not dist.is_initialized():
        _join_group(here, compute(kind, local, precision), meeting, per_gpu)
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    on = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    return Ranks(here.rank, here.world_size, on, dtype)


def _kind(device: str, in_slurm: bool) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        error = PassingError if in_slurm else UserError  # another turn may get another node
        raise error(
            "runtime.device=cuda, but torch sees no GPU here: use --set runtime.device=cpu, "
            "or check the driver"
        )
    return device


def _prepare_gpu(rank: int, local: int, precision: str) -> None:
    if local >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"rank {rank} wants GPU {local}, but there are {there}: lower --nproc")
    torch.cuda.set_device(local)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # One order of addition for a number of ranks: NCCL chooses among several by what it measures.
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.backends.cudnn.deterministic = True  # promises 1 and 2 are about bits
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That also fills every new tensor, a kernel more for each. Nothing reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]
    torch.backends.cuda.matmul.allow_tf32 = False  # crops are matrix products in float32
    torch.backends.cudnn.allow_tf32 = precision != "float32"


class Compute(NamedTuple):
    """What a rank computes on: "cpu" or "cuda", which GPU and of which model, in which
    precision."""

    kind: str
    gpu: str
    precision: str
    model: str = ""


def compute(kind: str, local: int, precision: str) -> Compute:
    """What a rank with GPU `local` computes on."""
    if kind != "cuda":
        return Compute(kind, "", precision)
    gpu = torch.cuda.get_device_properties(local)
    return Compute(kind, str(gpu.uuid), precision, gpu.name)


def refuse_unlike(ranks: Sequence[Compute], in_slurm: bool = False, per_gpu: int = 1) -> None:
    """Raise where `ranks`, what each rank computes on, cannot work together: NCCL would wait for
    the rank that has no GPU, or for two on one, and bits would depend on which rank does what."""
    kinds = _ranks_by(own.kind for own in ranks)
    error = PassingError if in_slurm else UserError  # another turn may get other nodes
    if len(kinds) > 1:
        raise error(
            f"ranks compute on different devices ({_told(kinds)}): see whether torch sees a GPU on "
            "every node, or set runtime.device=cpu"
        )
    models = _ranks_by(own.model for own in ranks)
    if len(models) > 1:
        raise error(
            f"ranks compute on different GPUs ({_told(models)}): bits would depend on which rank "
            "does what; give a run one kind (a profile's constraint or gres, CUDA_VISIBLE_DEVICES)"
        )
    precisions = _ranks_by(own.precision for own in ranks)
    if len(precisions) > 1:
        raise UserError(
            f"ranks compute in different precisions ({_told(precisions)}): give all of them the "
            "same runtime.precision"
        )
    by_gpu = _ranks_by(own.gpu for own in ranks)
    shared = {gpu: r for gpu, r in by_gpu.items() if gpu and len(r) > per_gpu}
    if shared:
        raise UserError(
            f"ranks share a GPU ({_told(shared)}): start one rank a GPU (--nproc, or one GPU for "
            "each task), or let more share it with runtime.ranks_per_gpu"
        )


def _ranks_by(values: Iterable[str]) -> dict[str, list[int]]:
    """Value → the ranks that have it."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


def _told(found: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{value}: rank {', '.join(map(str, r))}" for value, r in found.items())


def backends(kind: str, per_gpu: int = 1) -> str:
    """What ranks meet by, as torch names it. NCCL refuses two ranks on a GPU; gloo does not, and
    takes what is exchanged of a GPU: all_reduce and broadcast."""
    if kind == "cpu" or per_gpu > 1:
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def _join_group(here: place.Place, own: Compute, meeting: Path, per_gpu: int = 1) -> None:
    # Long: rank 0 may shard for hours while the others wait. A dead peer is its launcher's
    # business.
    timeout = datetime.timedelta(days=2)
    if here.in_step:
        store = place.meeting = _meet(meeting, here, timeout)
    else:
        address = here.rendezvous or "env://"
        meet = dist.rendezvous(address, here.rank, here.world_size, timeout=timeout)
        store, _, _ = next(meet)
    # torchrun keeps its store when it restarts workers. Without a prefix they would look for the
    # addresses of their dead predecessors, and wait.
    store = dist.PrefixStore(f"attempt {here.elastic_attempt}", store)
    store.set(f"rank {here.rank} computes", json.dumps(own))
    told = [json.loads(store.get(f"rank {rank} computes")) for rank in range(here.world_size)]
    refuse_unlike([Compute(*other) for other in told], here.in_slurm, per_gpu)
    chosen = backends(own.kind, per_gpu)
    dist.init_process_group(
        chosen,
        store=store,
        rank=here.rank,
        world_size=here.world_size,
        timeout=timeout,
    )
    if "nccl" in chosen:
        _end_hanging_collectives(torch.device("cuda"))


def _end_hanging_collectives(device: torch.device) -> None:
    """Ranks that may be far apart meet on their CPUs first, so that on GPUs nobody waits long: what
    takes longer there hangs. NCCL then ends the process, and its launcher starts it again."""
    group = dist.group.WORLD
    assert group is not None
    group._get_backend(device)._set_default_timeout(HANGS)


def _meet(folder: Path, here: place.Place, timeout: datetime.timedelta) -> dist.Store:
    """A store on a free port of rank 0, which it tells in the shared folder: a guessed port may be
    in use."""
    note = place.note_of(folder)
    if here.is_main:
        host = here.node
        try:
            socket.getaddrinfo(host or None, 0)
        except OSError:
            host = ""
        host = host or socket.gethostname()
        store = dist.TCPStore(
            host, 0, here.world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(note, f"{host} {store.port}")
        return store
    for waited in range(3000):
        if note.exists():
            host, port = note.read_text().split()
            return dist.TCPStore(host, int(port), here.world_size, is_master=False, timeout=timeout)
        if waited % 50 == 49:
            signals.check()
            # A network file system may remember for long that a file is not there.
            os.listdir(folder) if folder.exists() else None
        time.sleep(0.1)
    raise PassingError(
        f"rank {here.rank} has waited 5 minutes for rank 0's note {note}: is the store on a file "
        "system that all nodes share?"
    )


def peer_lost(error: RuntimeError) -> PeerLost | None:
    """`error` as a lost peer, or None where it is something else. What torch says of a peer that
    is gone is read here and nowhere else."""
    said = str(error)
    if isinstance(error, dist.DistError) or "peer" in said or "onnection" in said:
        reason = said.splitlines()[0][:120]
        return PeerLost(f"rank {place.here().rank} lost its peers: {reason}")
    return None


def leave() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def rng(*key: int | str) -> np.random.Generator:
    """A counter-based generator keyed by (seed, purpose, epoch, …): the same numbers on any rank,
    after any resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def torch_seed(*key: int | str) -> int:
    """A seed for torch's own generator (initial weights, dropout) from the same kind of key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
