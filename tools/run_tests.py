"""Run all tests: four suites side by side, then what failed once more, alone.

    python tools/run_tests.py

SLURM's tests wait most of the time, those of faults for processes to start: side by side they take
two cores half an hour instead of three quarters. So many at once can keep a test from its time
limit: what fails is tried once more, alone, and is shown as such.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ["tests/faults", "tests/test_promises.py"]
SUITES = {
    "faults": HEAVY,
    "disturbed jobs": ["tests/slurm/test_disturbed.py"],
    "campaigns": ["tests/slurm/test_campaigns.py"],
    "the others": ["tests", "--ignore=tests/slurm", *(f"--ignore={path}" for path in HEAVY)],
}


class Suite:
    """One pytest process; its output goes to a file until it is over."""

    def __init__(self, number: int, name: str):
        self.name, self.log = name, ROOT / f"tests-{number}.tmp"
        # Two suites start a SLURM of their own; one thread a process, since there are more
        # processes than cores.
        own = {"LTDD_TEST_CLUSTER": str(number), "OMP_NUM_THREADS": "1"}
        self.env, self.begin = {**os.environ, **own}, time.monotonic()
        self.cache = ["-o", f"cache_dir=.pytest_cache/{number}"]
        with open(self.log, "w") as log:
            self.process = self._start(log)

    def _start(self, out, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pytest", *self.cache, *more, *SUITES[self.name]]
        return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=out, stderr=out)

    def show(self) -> None:
        minutes = (time.monotonic() - self.begin) / 60
        print(f"== {self.name}: {minutes:.1f} min", flush=True)
        print(self.log.read_text(errors="replace"), flush=True)
        self.log.unlink()

    def again(self) -> int:
        """The failed tests once more, alone; the exit code."""
        print(f"== {self.name}: what failed, once more and alone", flush=True)
        self.process = self._start(None, "--last-failed", "--last-failed-no-failures", "none")
        return self.process.wait()


def main() -> int:
    suites = [Suite(number, name) for number, name in enumerate(SUITES)]

    def stop(number: int, _) -> None:
        """Asked to end, the suites take their clusters down first."""
        for suite in suites:
            if suite.process.poll() is None:
                suite.process.terminate()
                suite.process.wait()
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    left, codes = list(suites), {}
    while left:
        time.sleep(0.5)
        for suite in [s for s in left if s.process.poll() is not None]:
            left.remove(suite)
            codes[suite.name] = suite.process.returncode
            suite.show()
    for suite in suites:
        if codes[suite.name] == 1:
            codes[suite.name] = suite.again()
    for name, code in codes.items():
        print(f"{name}: {'passed' if code == 0 else f'exit code {code}'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
