"""Running a request on this machine: in this process, or on ranks that are started here."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ltdd_scale import session
from ltdd_scale.launch import limits, perform
from ltdd_scale.request import Request
from ltdd_scale.runtime import place, signals
from ltdd_scale.session import Session

# Seconds for the peers of a rank that has stopped: enough to end a step. Who waits for the one that
# has gone is ended then.
GRACE = 10.0
MAX_CPU_RANKS = 8  # more gain little on small global batches


def run(request: Request, nproc: int | None = None, max_restarts: int = 3) -> int:
    """Bring a request to its end; return the exit code. Errors are the caller's to report
    (`perform.guarded`).

    `nproc`: ranks; None: one a GPU, without GPUs one a core, up to 8. Where torchrun or SLURM has
    started us we are one rank of theirs, whatever `nproc` is.
    """
    work, here = Session(request), place.here()
    if here.launched:
        if here.is_main and work.pending():
            limits.check(work, here.local_size)
        return perform.take_part(work)
    if not work.pending():
        session.enter(work)
        return perform.finish(work)
    num = nproc or default_ranks(work.config.runtime)
    asked = limits.check(work, num)
    session.enter(work)  # only now: a request that is refused leaves the run folder as it was
    limits.remember(work, asked)
    if num > 1:
        code = run_ranks(num, request, max_restarts)
        return code or perform.finish(work)
    session.execute(work)
    return perform.finish(work)


def default_ranks(runtime: Any) -> int:
    """One rank a GPU, or `ranks_per_gpu`; without GPUs one a core, up to 8."""
    if runtime.device != "cpu" and limits.may_have_gpu():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count() * runtime.ranks_per_gpu
    return min(limits.cores(), MAX_CPU_RANKS)


def _in_child() -> None:
    """Before a rank begins: a killed launcher leaves no orphans, and a rank that is asked to stop
    while it starts is not killed by that."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signals.hold()


def _start(num: int, request: Request, folder: str, attempt: int) -> list[subprocess.Popen]:
    workers = []
    asked = Path(folder) / "request.json"  # a long config is too long for an argument
    asked.write_text(request.to_json())
    for rank in range(num):
        env = dict(os.environ)
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        env.setdefault("OMP_NUM_THREADS", "1")
        # DDP's advice on an option that is set on purpose.
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        env.update(dict(zip(place.TORCHRUN, (str(rank), str(num), str(rank)), strict=True)))
        # A file instead of a port: no port to be in use, none to guess.
        env[place.RENDEZVOUS] = f"file://{folder}/rendezvous-{attempt}"
        command = [sys.executable, "-m", "ltdd_scale.launch.rank", str(asked)]
        workers.append(subprocess.Popen(command, env=env, preexec_fn=_in_child))
    return workers


def run_ranks(num: int, request: Request, max_restarts: int) -> int:
    """Run `request` on `num` ranks; return the exit code.

    A rank that a signal killed (out of memory, say) or asked to stop ends all, and all start again
    from their checkpoints, up to `max_restarts` times. A rank that ended with an error ends all for
    good. A signal to this process reaches all ranks: they save, and the code is
    `signals.STOP_CODE`.
    """
    with tempfile.TemporaryDirectory(prefix="ltdd-") as folder:
        for attempt in range(max_restarts + 1):
            signals.check()
            workers = _start(num, request, folder, attempt)
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
                    f"a rank was {what}; starting again from the last checkpoints "
                    f"({attempt + 1} of {max_restarts})",
                    file=sys.stderr,
                    flush=True,
                )
        hint = "; if that is SIGKILL, memory may be short: lower --nproc" if code < 0 else ""
        print(f"error: a rank was {what} {max_restarts + 1} times{hint}", file=sys.stderr)
        return code if code > 0 else 128 - code


def _wait(workers: list[subprocess.Popen]) -> int:
    """0 when all have ended well; else the code of who was killed, or of who failed. A signal to us
    is passed on, once."""
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
            # A kill comes first, then an error: what peers then say of a lost connection is its
            # consequence.
            return sorted(c for c in (w.poll() for w in workers) if c)[0]
        if all(c == 0 for c in codes):
            return 0
        time.sleep(0.05)


def _ask_to_stop(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGUSR2)  # SIGTERM only saves in a SLURM step
