"""Ranks on this machine: `--nproc N` without torchrun's noise. (`torchrun -m ltdd_scale …` works as well.)"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ltdd_scale.runtime import signals

GRACE = 10.0  # seconds for peers of a rank that has stopped: enough to end a step, and who waits for the one that has gone is ended
MAX_CPU_RANKS = 8  # more gain little on small global batches


def default_ranks(device: str) -> int:
    """One rank a GPU; without GPUs one a core, up to 8."""
    if device != "cpu" and (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return min(len(os.sched_getaffinity(0)), MAX_CPU_RANKS)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: a killed launcher leaves no orphans at work


def _start(
    num: int, arguments: Sequence[str], folder: str, attempt: int, auto: bool
) -> list[subprocess.Popen]:
    workers = []
    for rank in range(num):
        env = dict(os.environ)
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # DDP's advice on an option that is set on purpose
        # A file instead of a port: no port to be in use, none to guess.
        env.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num),
            LTDD_RENDEZVOUS=f"file://{folder}/rendezvous-{attempt}",
            LTDD_AUTO_RANKS=str(int(auto)),
        )
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "ltdd_scale", *arguments],
                env=env,
                preexec_fn=_die_with_parent,
            )
        )
    return workers


def run_ranks(num: int, arguments: Sequence[str], auto: bool, max_restarts: int) -> int:
    """Run `ltdd-scale ARGUMENTS` on `num` ranks; return the exit code.

    A rank that a signal killed (out of memory, say) or asked to stop ends all, and all start again from their checkpoints, up to
    `max_restarts` times. A rank that ended with an error ends all for good. A signal to this process reaches all ranks: they save,
    and the code is `signals.STOP_CODE`.
    """
    with tempfile.TemporaryDirectory(prefix="ltdd-") as folder:
        for attempt in range(max_restarts + 1):
            signals.check()
            workers = _start(num, arguments, folder, attempt, auto)
            try:
                code = _wait(workers)
            except KeyboardInterrupt:
                code = 130
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
            if code >= 0 and code != signals.STOP_CODE:
                return code
            signals.check()  # we were asked to stop, not just a rank
            what = "asked to stop" if code > 0 else f"killed by {signal.Signals(-code).name}"
            if attempt < max_restarts:
                print(
                    f"a rank was {what}; starting again from the last checkpoints ({attempt + 1} of {max_restarts})",
                    file=sys.stderr,
                    flush=True,
                )
        hint = "; if that is SIGKILL, memory may be short: lower --nproc" if code < 0 else ""
        print(f"error: a rank was {what} {max_restarts + 1} times{hint}", file=sys.stderr)
        return code if code > 0 else 128 - code


def _wait(workers: list[subprocess.Popen]) -> int:
    """0 when all have ended well; else the code of who was killed, or of who failed. A signal to us is passed on, once."""
    passed_on = False
    while True:
        if signals.requested() and not passed_on:
            passed_on = True
            _ask_to_stop(workers)
        codes = [w.poll() for w in workers]
        if any(codes):
            if signals.STOP_CODE in codes:
                # The others may be saving, or wait for one that has gone.
                _ask_to_stop(workers)
                deadline = time.monotonic() + GRACE
                while any(w.poll() is None for w in workers) and time.monotonic() < deadline:
                    time.sleep(0.05)
            else:
                time.sleep(0.2)
            # A kill comes first, then an error: what peers then say of a lost connection is its consequence.
            return sorted(c for c in (w.poll() for w in workers) if c)[0]
        if all(c == 0 for c in codes):
            return 0
        time.sleep(0.05)


def _ask_to_stop(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
