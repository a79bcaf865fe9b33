"""What a GPU makes of every stage of every method, beside a CPU: time, memory, how far results are
apart, what makes the GPU wait, and whether a killed run ends in the same bytes.

python tools/gpu_check.py [--device cuda] [--out runs/gpu_check] [--seconds 240]
                          [--methods rldd dm] [--parts stages waits kill ranks]

Digits and tiny networks: nothing is downloaded. A stage that raises is a row, and the check goes
on. Rows are written as they come (rows.jsonl): the same command goes on from there. Four parts:

stages  each stage on the CPU, then twice on the device, in float32 and in bfloat16, always from
        what the CPU made: a row's difference is the stage's own
waits   how often a step makes the host wait for the GPU, and where
kill    each long stage, killed in the middle (SIGKILL) and gone on with, in other processes
ranks   the process group of one rank (NCCL on a GPU), and an expert that trains over it

This process imports no torch: it starts the others, and ends one that hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("stages", "waits", "kill", "ranks")
SHARE = {"stages": 0.65, "waits": 0.75}  # of the time, after which a part leaves the rest out
STALL = 90.0  # seconds without a row, after which a process hangs
RESTARTS = 3
LEFT_OUT = "left out: no time"
WORKER = Path(__file__).parent / "gpu_check_work.py"

Row = dict[str, Any]


class Rows:
    """The rows found so far, a line each of `file`; other processes add to it too."""

    def __init__(self, out: Path):
        self.file, self.now = out / "rows.jsonl", out / "now.json"

    def read(self) -> list[Row]:
        """The last row of each key."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return list({row["key"]: row for row in map(json.loads, lines)}.values())

    def done(self) -> set[str]:
        return {row["key"] for row in self.read() if row.get("error") != LEFT_OUT}

    def begin(self, key: str) -> None:
        """Say what comes next: where the process dies, that is what it died of."""
        self.now.write_text(json.dumps(key))

    def add(self, key: str, **values: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"key": key, **values}) + "\n")
        self.now.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--seconds", type=float, default=240.0, help="for all parts together")
    parser.add_argument("--methods", nargs="*", default=[], help="default: all, 'streamed', 'more'")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    check = Check(asked, begin, begin + asked.seconds)
    try:
        check.run()
    finally:
        text = report(check.rows.read(), time.time() - begin)
        (asked.out / "report.md").write_text(text)
        print(text)
    return int(any(row.get("error") for row in check.rows.read()))


class Check:
    """All parts, in processes of their own, until `until` (seconds since the epoch)."""

    def __init__(self, asked: argparse.Namespace, begin: float, until: float):
        self.asked, self.begin, self.until = asked, begin, until
        self.rows, self.log = Rows(asked.out), asked.out / "log.txt"
        self.others: list[subprocess.Popen] = []

    def run(self) -> None:
        """Stages and waits in one process; then kill and ranks, which need what it made."""
        first = [part for part in ("stages", "waits") if part in self.asked.parts]
        for _ in range(RESTARTS + 1):
            code = self._wait(self._start("first", "--parts", *(first or ["stages"])))
            if code == 0:
                break
        else:
            self.rows.add("stages", error=said(self.log, code))
        try:
            self._side_by_side()
        finally:
            for process in self.others:
                process.kill()
                process.wait()

    def _start(self, what: str, *more: str) -> subprocess.Popen:
        limits = [str(self.begin + share * (self.until - self.begin)) for share in SHARE.values()]
        command = [sys.executable, str(WORKER), what, "--device", self.asked.device]
        command += ["--out", str(self.asked.out.absolute()), "--limits", *limits]
        if self.asked.methods:
            command += ["--methods", *self.asked.methods]
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LTDD_", "SLURM_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        with self.log.open("a") as log:
            return subprocess.Popen([*command, *more], env=env, cwd=ROOT, stdout=log, stderr=log)

    def _wait(self, process: subprocess.Popen) -> int:
        """The code of the process that works through rows. What it died of is a row."""
        count, seen = -1, time.time()
        while process.poll() is None:
            time.sleep(0.1)
            size = self.rows.file.stat().st_size if self.rows.file.exists() else 0
            if size != count:
                count, seen = size, time.time()
            if time.time() > self.until or time.time() - seen > STALL:
                process.kill()
                process.wait()
                self._died("no end in sight: killed")
                return 0 if time.time() > self.until else 1
        if process.returncode:
            self._died(said(self.log, process.returncode))
        return process.returncode

    def _died(self, why: str) -> None:
        if self.rows.now.exists():
            self.rows.add(json.loads(self.rows.now.read_text()), error=why)

    def _side_by_side(self) -> None:
        """One process a stage that is killed and gone on with, and one for the ranks."""
        long: dict[str, str] = {}  # kind → the first stage of it that takes many steps
        for row in self.rows.read():
            if row["key"].startswith("stages ") and row.get("updates", 0) >= 4 and row["long"]:
                long.setdefault(row["kind"], row["where"])
        done = self.rows.done()
        waiting: dict[subprocess.Popen, tuple[str, ...]] = {}
        if "kill" in self.asked.parts:
            for where in long.values():
                if f"kill {where}" not in done:
                    waiting[self._start("killed", "--stage", where)] = ("resumed", where)
        if "ranks" in self.asked.parts and "ranks" not in done:
            waiting[self._start("ranks")] = ("ranks", "")
        self.others = list(waiting)
        while waiting and time.time() < self.until:
            for process in [p for p in waiting if p.poll() is not None]:
                what, where = waiting.pop(process)
                if what == "resumed" and process.returncode == -signal.SIGKILL:
                    again = self._start("resumed", "--stage", where)
                    waiting[again] = ("end", where)
                    self.others.append(again)
                elif what == "resumed":
                    self.rows.add(f"kill {where}", error=f"not killed: {process.returncode}")
                elif process.returncode:
                    key = f"kill {where}" if where else "ranks"
                    self.rows.add(key, error=said(self.log, process.returncode))
            time.sleep(0.05)
        for _, where in waiting.values():
            self.rows.add(f"kill {where}" if where else "ranks", error=LEFT_OUT)


def said(log: Path, code: int) -> str:
    """The last line of the log, and the code."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"the process ended with {how}: {lines[-1][:160] if lines else 'no word'}"


def report(rows: list[Row], seconds: float) -> str:
    """All rows as tables in Markdown."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row["key"].split(" ")[0], []).append(row)
    parts = [f"# GPU check, {seconds:.0f} s"]
    for row in by.get("machine", []):
        parts.append("\n".join(f"{k}: {v}" for k, v in row.items() if k != "key"))
    parts += [_stages(by.get("stages", [])), _waits(by.get("waits", []))]
    heads = ("stage", "killed at", "gone on from", "same bytes")
    parts.append(_table("Killed and gone on with", heads, by.get("kill", [])))
    parts.append(_table("A process group of one rank", ("step", "seconds"), by.get("ranks", [])))
    notes = {note: row["stage"] for row in rows for note in row.get("notes", [])}
    if notes:
        parts.append("## Warnings\n\n" + "\n".join(f"- {s}: {n}" for n, s in notes.items()))
    return "\n\n".join(parts) + "\n"


def _stages(rows: list[Row]) -> str:
    names = ("cpu", "first", "float32", "bfloat16")
    heads = ("stage", *(f"{n} s" for n in names), "ms an update", "GPU MB", "float32 off by")
    heads += ("bfloat16 off by", "twice the same")
    for row in rows:
        times = row.get("seconds", {})
        row |= {f"{n} s": f"{times[n]:.2f}" for n in names if n in times}
        if row.get("updates") and "float32" in times:
            row["ms an update"] = f"{1000 * times['float32'] / row['updates']:.1f}"
    return _table("Stages", heads, rows)


def _waits(rows: list[Row]) -> str:
    return _table("Waits for the GPU", ("stage", "update", "waits an update", "lines"), rows)


def _table(title: str, heads: tuple[str, ...], rows: list[Row]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        name = row.get(heads[0]) or row["key"].partition(" ")[2]
        if row.get("error"):
            lines.append(f"| {name} | **{row['error']}** |")
            continue
        cells = [str(row.get(head, "")) for head in heads[1:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if rows else f"## {title}\n\nnothing"


if __name__ == "__main__":
    sys.exit(main())
