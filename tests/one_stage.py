"""One stage of a config on ranks of this machine, without a session: for tests of a single room.

python -m tests.one_stage NAME CONFIG OUT [--nproc N] [--input NAME=FOLDER …] [--set a.b=c …]

Each rank is a process of its own. A rank that dies takes the others with it. The stage's facts are
written to OUT/facts.json. A `UserError` is one line, "error: …". Several stages, as "a,b", run one
after the other in the same processes; their folders are OUT/a and OUT/b.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def one_stage(
    name: str, config: Path, out: Path, nproc: int = 1, sets=(), inputs=None, env=None
) -> subprocess.CompletedProcess:
    """Run the stage in processes of its own; `inputs` maps what it reads to folders."""
    command = [sys.executable, "-m", "tests.one_stage", name, config, out, "--nproc", nproc]
    given = [f"{key}={folder}" for key, folder in (inputs or {}).items()]
    command += ["--input", *given, "--set", *sets]
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LTDD_", "SLURM_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=500,
        env={**clean, **(env or {})},
        cwd=ROOT,
    )


def _start(nproc: int, arguments: argparse.Namespace) -> int:
    """All ranks; the first exit code that is not 0. They are forked: torch is imported once."""
    import ltdd_scale.pipeline.run
    import ltdd_scale.recipe  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for k in range(nproc):
            env = {"RANK": k, "WORLD_SIZE": nproc, "LOCAL_RANK": k}
            env["LTDD_RENDEZVOUS"] = f"file://{folder}/meet"
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                os.environ.update({key: str(value) for key, value in env.items()})
                _leave(_rank(arguments))
            ranks.append(pid)
        codes: dict[int, int] = {}
        while len(codes) < nproc and not any(codes.values()):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        code = next((code for code in codes.values() if code), 0)
        left = [pid for pid in ranks if pid not in codes]
        deadline = time.monotonic() + 3
        while left and time.monotonic() < deadline:
            left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return 128 - code if code < 0 else code


def _rank(arguments: argparse.Namespace) -> int:
    """The exit code of one rank."""
    from ltdd_scale.errors import UserError
    from ltdd_scale.runtime.signals import STOP_CODE, Preempted

    if "LTDD_FAULT" in os.environ:
        import sitecustomize  # of tests/faults; it has not known that this would be a rank

        sitecustomize.arm()
    try:
        _run(arguments)
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"error: {error}", file=sys.stderr)
        return error.code
    except Preempted:
        return STOP_CODE
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the command ends: left-over threads have no say


def _run(arguments: argparse.Namespace) -> None:
    from ltdd_scale import recipe
    from ltdd_scale.config.load import load
    from ltdd_scale.data import digest
    from ltdd_scale.data.settings import Location
    from ltdd_scale.runtime import ranks, signals
    from ltdd_scale.runtime.context import Context
    from ltdd_scale.stage import Division, function, settings_of

    config = load(arguments.config, arguments.set)
    names, runtime = arguments.name.split(","), config.runtime
    inputs = {key: Path(folder) for key, _, folder in (i.partition("=") for i in arguments.input)}
    signals.install()
    peers = ranks.join(runtime.device, runtime.precision, runtime.threads)
    for stage in (s for s in recipe.stages(config, digest.of(config.data)) if s.name in names):
        settings = settings_of(stage, config)
        if stage.check:
            function(stage.check)(settings)
        out = arguments.out / stage.name if len(names) > 1 else arguments.out
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps([stage.name, settings.hashed()], sort_keys=True)
        context = Context(
            peers,
            out,
            inputs,
            owner=os.environ.get("LTDD_OWNER") or hashlib.sha256(text.encode()).hexdigest()[:16],
            checkpoint_seconds=runtime.checkpoint_seconds,
            workers=runtime.workers,
            location=Location(**{k: getattr(config.data, k) for k in Location.model_fields}),
        )
        if peers.is_main or stage.division is not Division.ONE:
            facts = function(stage.run)(settings, context)
            if peers.is_main:
                (out / "facts.json").write_text(json.dumps(facts))
        peers.barrier()
    ranks.leave()


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--input", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    return _start(arguments.nproc, arguments)


if __name__ == "__main__":
    _leave(_main())
