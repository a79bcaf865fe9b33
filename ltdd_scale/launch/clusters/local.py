"""Jobs on this machine, one after the other, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltdd_scale.launch.cluster import Cluster, Order, Phase, State
from ltdd_scale.launch.jobs import Job
from ltdd_scale.request import Request
from ltdd_scale.runtime import files, signals


class Local(Cluster):
    """`submit` runs the job to its end. A failed one stops what needs it and nothing else."""

    title = "this machine"
    absent = ""
    detached = False

    def available(self) -> bool:
        return True

    def need(self) -> None:
        pass

    def submit(self, order: Order) -> str:
        """Run the job, or leave it out where one that it needs has failed.

        Raises `Preempted` or `KeyboardInterrupt` where the job was asked to stop.
        """
        job, ends = order.job, self._ends()
        number = f"local-{len(ends) + 1}"
        broken = [i for i in order.after if ends[i]["phase"] != Phase.COMPLETED]
        if broken and not order.after_any:
            phase, reason = Phase.CANCELLED, "what it needs has failed"
            print(f"== {job.name}: left out, as {ends[broken[0]]['job']} failed", flush=True)
        else:
            code = self._run(job)
            phase = Phase.FAILED if code else Phase.COMPLETED
            reason = f"exit code {code}" if code else ""
        ends[number] = {"job": job.name, "phase": phase, "reason": reason}
        files.write_json(self._record, ends)
        return number

    def script(self, order: Order) -> str:
        return "\n".join(order.job.titles())

    def states(self) -> dict[str, State]:
        return {
            number: State(end["phase"], Phase(end["phase"]), end["reason"])
            for number, end in self._ends().items()
        }

    def cancel(self, ids: Sequence[str]) -> None:
        """Nothing: no job goes on without the command that runs it."""

    @property
    def _record(self) -> Path:
        return self.folder / "local.json"

    def _ends(self) -> dict[str, Any]:
        return files.read_json(self._record) if self._record.exists() else {}

    def _run(self, job: Job) -> int:
        """The exit code of the first element that fails, or 0."""
        for request in job.requests:
            part = f" part {request.part[0]} of {request.part[1]}" if request.part else ""
            print(f"== {job.name}:{part or ' …'}", flush=True)
            code = self._work(request.replace(quiet=self.quiet))
            if code:
                return code
        return 0

    def _work(self, request: Request) -> int:
        command = [sys.executable, "-m", "ltdd_scale.launch.work"]
        if self.nproc and request.targets:
            command += ["--nproc", str(self.nproc)]
        with tempfile.TemporaryFile("w+") as text:  # a long config is too long for an argument
            text.write(request.to_json())
            text.seek(0)
            process = subprocess.Popen(command, stdin=text, preexec_fn=signals.hold)
        passed_on = False
        while (code := process.poll()) is None:
            if signals.requested() and not passed_on:
                passed_on = True
                process.send_signal(signal.SIGUSR2)  # SIGTERM only saves in a SLURM step
            time.sleep(0.1)
        signals.check()
        if code == signals.STOP_CODE:
            raise signals.Preempted("a signal to the job")
        if code == 130:
            raise KeyboardInterrupt
        return code
