"""One command's dealings with a run folder: enter it, see what is left, work, finish; status and verify."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from ltdd_scale import config as configuration
from ltdd_scale import graph, report
from ltdd_scale.config import Config
from ltdd_scale.errors import PassingError, UserError
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.progress import duration

ABLATIONS = {
    "full method": [],
    "no debiasing": ["strategies.debias=false"],
    "no fair calibration": ["strategies.calibrate=false"],
    "no confident init": ["strategies.confident_init=false"],
}


@dataclass
class Session:
    """`targets` are stage names; `out` is the run folder, `store` holds the stages' own folders."""

    config: Config
    out: Path
    store: Path
    targets: list[str]
    quiet: bool = False
    part: tuple[int, int] | None = (
        None  # (k, n): the k-th of n shares of the target's pieces, and no more
    )

    def enter(self) -> None:
        """Make the run folder ours. Raises `UserError` where it holds a run of another config."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.explain(error, self.out) from error
        record = self.out / "run.json"
        if record.exists():
            name = files.read_json(record).get("config")
            if name != self.config.name:
                raise UserError(
                    f"{self.out} holds a run of the config '{name}', not '{self.config.name}': choose another folder with --out"
                )
        elif any(p.name != "run.json" and not p.name.startswith(".") for p in self.out.iterdir()):
            raise UserError(
                f"{self.out} is not empty and is not a run folder: choose another one with --out"
            )
        before = files.read_json(record).get("stages", {}) if record.exists() else {}
        files.write_json(
            record, {"config": self.config.name, "store": str(self.store), "stages": before}
        )
        files.write_text(self.out / "config.yaml", configuration.to_yaml(self.config))

    def pending(self) -> bool:
        nodes = graph.graph(self.config)
        return any(
            not graph.complete(nodes[t].folder(self.store))
            for t in graph.goals(nodes, self.targets, self.part)
        )

    def work(self, auto_ranks: bool) -> None:
        """Do what is left, on as many ranks as the environment says."""
        from ltdd_scale import pipeline  # torch takes seconds to import: only where there is work
        from ltdd_scale.runtime import ranks

        runtime = self.config.runtime
        device = (
            "cpu" if set(self.targets) <= {"shard"} else runtime.device
        )  # a node for sharding or the report need not have a GPU
        peers = ranks.join(device, runtime.precision, runtime.threads, self.store / ".meet")
        try:
            pipeline.run(
                self.config, self.store, self.targets, peers, self.quiet, auto_ranks, self.part
            )
            peers.barrier()
            ranks.leave()  # only here: after an error peers may be missing, and leaving would wait for them
        except RuntimeError as error:
            signals.check()  # asked to stop, as our peers and helpers were, who have gone before us: what was saved last counts
            if "peer" not in str(error) and "onnection" not in str(error):
                raise
            # A peer is gone and has said why, or was killed: the launcher ends this rank too, and knows which it was.
            for _ in range(300):
                signals.check()
                time.sleep(0.1)
            raise PassingError(
                f"rank {peers.rank} lost its peers: {str(error).splitlines()[0][:120]}"
            ) from error

    def finish(self, reporting: bool) -> int:
        """Note what is done; write the report; say where things are."""
        nodes = graph.graph(self.config)
        names = graph.needed(nodes, self.targets)
        record = files.read_json(self.out / "run.json")
        record["stages"].update({n: f"{nodes[n].stage}/{nodes[n].fingerprint}" for n in names})
        files.write_json(self.out / "run.json", record)
        if reporting:
            if not graph.complete(nodes["evaluate"].folder(self.store)):
                raise UserError(f"{self.out} is not evaluated yet: run 'ltdd-scale run' first")
            if not report.is_current(self.config, nodes, self.out):
                from ltdd_scale import export

                export.write(self.config, nodes, self.store, self.out)
            print(report.table(files.read_json(self.out / "results.json")))
            print(f"\ndistilled images  {self.out / 'distilled' / 'images'}")
            print(f"results           {self.out / 'results.json'}, {self.out / 'results.md'}")
            print(f"page to look at   {self.out / 'report.html'}")
        else:
            for target in self.targets:
                if self.part:
                    print(f"{target}: part {self.part[0]} of {self.part[1]} done")
                    continue
                print(f"{target}: done, in {nodes[target].folder(self.store)}")
        return 0


def ablation(args, config: Config, command: Callable[[list[str]], int]) -> int:
    """The full run and one run with each strategy off, by the ordinary command; then one table of all."""
    out = (args.out or Path("runs") / f"{config.name}-ablation").absolute()
    store = (args.store or out.parent / "store").absolute()
    rows = []
    for title, off in ABLATIONS.items():
        folder = out / title.replace(" ", "-")
        call = ["run", str(args.config), "--out", str(folder), "--store", str(store)]
        call += ["--quiet"] * args.quiet + (["--nproc", str(args.nproc)] if args.nproc else [])
        call += ["--set", *args.set, *off] if args.set or off else []
        print(f"== {title}", flush=True)
        code = command(call)
        if code:
            return code
        rows.append((title, files.read_json(folder / "results.json")))
    text = report.ablation_table(config, rows)
    files.write_text(out / "ablation.md", text)
    print(f"\n{text}\nablation          {out / 'ablation.md'}")
    return 0


def status(run: Path) -> int:
    """Print the table of jobs, if there are any; of a run a line a stage: done, running, stale (done before, for other settings), damaged, partial, missing."""
    jobs = (run / "jobs" / "jobs.json").exists()
    if jobs:
        from ltdd_scale.launch import board, campaign

        print(board.table(campaign.load(run))[0])
    if not (run / "run.json").exists():
        if jobs:
            return 0
        raise UserError(f"{run} is not a run folder (no run.json in it), nor a sweep's")
    record = files.read_json(run / "run.json")
    config = configuration.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    nodes, store = graph.graph(config), Path(record["store"])
    students = [n for n in nodes.values() if n.stage == "student"]
    print(f"{run}: {config.name}, IPC {config.ipc}")
    left = 0
    for name, node in nodes.items():
        if node.stage == "student":
            continue
        if name == "evaluate":
            done = sum(bool(graph.complete(n.folder(store))) for n in students)
            print(
                f"  {'students':<12} {'done' if done == len(students) else 'missing':<9} {done} of {len(students)}"
            )
        folder = node.folder(store)
        saved = graph.complete(folder)
        if saved:
            state, note = (
                "done",
                f"{duration(saved['seconds'])} on {saved['ranks']} × {saved['device']}",
            )
        elif graph.is_running(folder):
            state, note = "running", f"since {duration(time.time() - folder.stat().st_mtime)}"
        elif (folder / "stage.json").exists():
            state, note = (
                "damaged",
                "a file is missing or of another size; the next run makes it again",
            )
        elif record["stages"].get(name) not in (None, f"{node.stage}/{node.fingerprint}"):
            state, note = "stale", "made for other settings"
        else:
            state, note = (
                ("partial", "interrupted; the next run goes on from there")
                if folder.exists()
                else ("missing", "")
            )
        left += state != "done"
        print(f"  {name:<12} {state:<9} {note}  {os.path.relpath(folder, run)}")
    print("everything is done" if not left else f"{left} stages left: ltdd-scale run goes on")
    return 0


def inspect(path: Path) -> int:
    """Print what is in a shard set, or in the one that a run reads."""
    if (path / "run.json").exists():
        record = files.read_json(path / "run.json")
        path = Path(record["store"]) / record["stages"].get("shard", "shard")
    if not (path / "manifest.json").exists():
        raise UserError(
            f"{path}: no shard set there (no manifest.json); 'ltdd-scale shard CONFIG' makes one"
        )
    from ltdd_scale.data import profile

    print(profile.describe(path))
    return 0


def verify(path: Path) -> int:
    """Re-hash a run folder, a stage folder, a shard set or a distilled set. 0 where every byte is as recorded."""
    if not path.exists():
        raise UserError(f"no such path: {path}")
    if (path / "run.json").exists():
        record = files.read_json(path / "run.json")
        folders = [Path(record["store"]) / f for f in dict.fromkeys(record["stages"].values())]
        folders += [path / "distilled"] * (path / "distilled" / "files.json").exists()
    else:
        folders = [path]
    wrong = []
    for folder in folders:
        if (folder / "files.json").exists():
            found = report.damage(folder)
        elif (folder / "stage.json").exists():
            found = graph.damage(folder)
        elif (folder / "manifest.json").exists():
            from ltdd_scale.data import shards

            found = shards.verify(folder, quiet=False)
        else:
            raise UserError(
                f"{folder}: nothing to verify here (no run.json, stage.json, manifest.json or files.json)"
            )
        print(f"{folder}: {'as recorded' if not found else f'{len(found)} damaged'}")
        wrong += found
    for line in wrong:
        print(f"error: {line}")
    return 1 if wrong else 0
