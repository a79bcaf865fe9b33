"""The processes of `gpu_check.py`: they run stages, and write what they find as rows."""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from gpu_check import LEFT_OUT, ROOT, Rows
from gpu_check_look import apart, listening, same
from torch.cuda import nccl

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.config.root import Config
from ltdd_scale.data import digest
from ltdd_scale.data.settings import Location
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.pipeline import graph
from ltdd_scale.pipeline.graph import Node
from ltdd_scale.runtime import memory, place, ranks
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Resources, function

# What the methods' own settings do not reach, for the method with the most stages.
MORE = {
    "streamed": {
        "data": {"memory_gb": 0.0, "loader": "torch"},
        "observer": {"epochs": 2, "randaugment": 2},
        "teacher": {"epochs": 2},
        "evaluate": {"random": False, "plain": "expert", "randaugment": 2},
    },
    # A graph of its steps is captured while other threads decode and pin images.
    "streamed mtt": {"method": "mtt", "data": {"memory_gb": 0.0, "loader": "torch"}},
    "more": {
        "observer": {"net": "resnet32"},
        "train": {"micro_batch": 8},
        "calibrate": {"conv_inputs": True},
        "recover": {"residual": 0.1, "ce": 0.1},
        "relabel": {"labels": "online", "adjust": True, "topk": 0},
        "evaluate": {"matrix": True, "full_epochs": 2, "optimizer": "sgd"},
    },
}


def constants(path: Path) -> dict[str, Any]:
    """Constants of a file of the tests, which import more than a run needs."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            with suppress(NameError):  # made of what the file imports
                exec(compile(ast.Module([node], []), str(path), "exec"), found)
    return found


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = {**out[key], **value} if both else value
    return out


def configs(methods: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The tiny config of each method of the catalog; last, what they leave out."""
    tiny = yaml.safe_load(constants(ROOT / "tests" / "conftest.py")["TINY"])
    # t-SNE makes another picture of every last bit: there is nothing to compare.
    tiny = merged(tiny, {"evaluate": {"embedding": False}})
    own = constants(ROOT / "tests" / "test_promises.py")["OWN"]
    for name in list(methods) or [*METHODS, *MORE]:
        above = MORE.get(name, {"method": name})
        above = merged(own.get(above.get("method", ""), {}), above)
        yield name, load.changed(Config(), merged(tiny, {"name": name, **above}))


@dataclass(frozen=True)
class Work:
    """A stage of a config, and the folders of what it reads. `root` holds a folder a stage."""

    case: str
    node: Node
    above: dict[str, str]
    root: Path

    @property
    def title(self) -> str:
        return f"{self.case}: {self.node.name}"

    def folder(self, made: str) -> Path:
        """Where the results lie that `made` names: those of the CPU, say."""
        return self.root / self.node.where / made

    def inputs(self) -> dict[str, Path]:
        return {role: self.root / where / "cpu" for role, where in self.above.items()}


def works(methods: Iterable[str], root: Path) -> dict[str, Work]:
    """All stages, each once, inputs before what reads them; by their place in the store."""
    found: dict[str, Work] = {}
    for case, config in configs(methods):
        nodes = graph.build(recipe.stages(config, digest.of(config.data)), config)
        for node in nodes.values():
            above = {role: nodes[name].where for role, name in node.stage.inputs.items()}
            found.setdefault(node.where, Work(case, node, above, root))
    return found


class Watched(Context):
    """A context that hears of every update of the progress line."""

    updates, total, unit, saves = 0, 0, "", False
    each: Callable[[Watched], None]

    def progress(
        self, title: str, total: int, unit: str, done: int = 0, stops: bool = True
    ) -> Progress:
        made = super().progress(title, total, unit, done, stops)
        plain = made.update
        self.total, self.unit = self.total + total, unit
        self.saves = self.saves or not stops  # it saves by itself: there are checkpoints

        def update(done: int, note: str = "") -> None:
            self.updates += 1
            self.each(self)
            plain(done, note)

        made.update = update
        return made


@dataclass
class Ran:
    """`seconds` of a stage, the peak of its GPU in MB, and the context that watched it."""

    seconds: float
    peak_mb: int
    context: Watched


def run_stage(
    work: Work,
    made: str,
    peers: Ranks,
    each: Callable[[Watched], None] = lambda context: None,
    saves: bool = False,
    fresh: bool = True,
) -> Ran:
    """Run a stage into `work.folder(made)`. `each` is called at every update of its progress.
    With `saves` a checkpoint is written at every step. Not `fresh`: go on with what is there."""
    out, stage, settings = work.folder(made), work.node.stage, work.node.settings
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    seconds = 0.0 if saves else 1e9
    context = Watched(peers, out, work.inputs(), work.node.fingerprint, seconds, 2, True)
    context.location, context.each = Location(), each
    if stage.check:
        function(stage.check)(settings)
    memory.reset_peak()
    begin = time.perf_counter()
    function(stage.run)(settings, context)
    synchronize(peers.device)
    return Ran(time.perf_counter() - begin, memory.peak_mb().get("gpu", 0), context)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class First:
    """Parts "stages" and "waits", in this process."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.rows = asked, Rows(asked.out)
        self.works = works(asked.methods, asked.out / "work")

    def peers(self, device: str, precision: str = "float32") -> Ranks:
        """Anew for each run: joining sets what torch does in this precision."""
        return ranks.join(device, precision, 1)

    def run(self) -> None:
        done = self.rows.done()
        if "machine" not in done:
            self.rows.add("machine", **machine(self.asked.device))
        kinds: set[str] = set()
        parts = [(self.stage, "stages", self.asked.limits[0])]
        if "waits" in self.asked.parts:
            parts.append((self.waits, "waits", self.asked.limits[1]))
        for part, name, until in parts:
            for where, work in self.works.items():
                key = f"{name} {where}"
                if name == "waits":
                    if work.node.stage.resources is Resources.CPU or what(work) in kinds:
                        continue
                    kinds.add(what(work))
                if key in done:
                    continue
                if time.time() > until:
                    self.rows.add(key, stage=work.title, error=LEFT_OUT)
                    continue
                self.rows.begin(key)
                self.guarded(part, key, work)

    def guarded(self, part: Callable[[Work], dict], key: str, work: Work) -> None:
        about = {"stage": work.title, "kind": work.node.kind, "where": work.node.where}
        missing = [
            folder.parent.parent.name for folder in work.inputs().values() if not folder.exists()
        ]
        if missing:
            self.rows.add(key, **about, error=f"left out: {missing[0]} failed")
            return
        try:
            self.rows.add(key, **about, **part(work))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.rows.add(key, **about, error=f"{type(error).__name__}: {lines[-1][:200]}")
            try:
                synchronize(torch.device(self.asked.device))
            except RuntimeError:  # an error that stays: a new process goes on
                sys.exit(3)

    def stage(self, work: Work) -> dict[str, Any]:
        """Run it on the CPU, then on the device. Its results on the CPU are what others read."""
        reference = work.folder("cpu")
        try:
            cpu = run_stage(work, "cpu", self.peers("cpu"))
        except BaseException:
            shutil.rmtree(reference, ignore_errors=True)
            raise
        row: dict[str, Any] = {"seconds": {"cpu": cpu.seconds}, "updates": cpu.context.updates}
        row["long"] = cpu.context.saves
        if work.node.stage.resources is Resources.CPU:
            return row
        notes: set[str] = set()
        twice = []
        with listening(Counter(), notes, False):
            for precision in ("float32", "bfloat16"):
                ran = [
                    run_stage(work, made, self.peers(self.asked.device, precision))
                    for made in (precision, f"{precision}-again")
                ]
                row["seconds"][precision] = ran[1].seconds
                if precision == "float32":
                    row["seconds"]["first"], row["GPU MB"] = ran[0].seconds, ran[1].peak_mb
                row[f"{precision} off by"] = apart(reference, work.folder(precision))
                again = work.folder(f"{precision}-again")
                twice.append("yes" if same(work.folder(precision), again) else "no")
                if twice[-1] == "no":
                    twice[-1] += f" ({apart(work.folder(precision), again)})"
        return {**row, "twice the same": " / ".join(twice), "notes": sorted(notes)}

    def waits(self, work: Work) -> dict[str, Any]:
        """Count between the first and the last update: what comes before is not the loop."""
        found: Counter[str] = Counter()
        marks: list[Counter[str]] = []
        gpu = self.asked.device == "cuda"
        with listening(found, set(), gpu):
            peers = self.peers(self.asked.device)
            ran = run_stage(work, "waits", peers, lambda context: marks.append(Counter(found)))
        if len(marks) < 3:
            return {"update": "too few updates"}
        between, number = marks[-1] - marks[0], len(marks) - 1
        lines = [f"{line} × {n / number:.2g}" for line, n in between.most_common(8)]
        each = f"{between.total() / number:.2f}"
        return {"update": ran.context.unit, "waits an update": each, "lines": "; ".join(lines)}


def what(work: Work) -> str:
    """Stages of one sort have one loop: students of the same labels, say."""
    values = work.node.settings.hashed()
    student = values.get("student", {}).get("labels", "")
    return f"{work.case if work.case in MORE else ''} {work.node.kind} {student}"


def machine(device: str) -> dict[str, Any]:
    begin = time.perf_counter()
    out: dict[str, Any] = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    if device == "cuda":
        ranks.join("cuda", "float32", 1)
        x = torch.randn(8, 3, 32, 32, device="cuda")
        torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3, device="cuda")).sum().item()
        out |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        out |= {"cudnn": torch.backends.cudnn.version(), "nccl": str(nccl.version())}
    return {**out, "seconds until the first convolution": round(time.perf_counter() - begin, 1)}


def killed(asked: argparse.Namespace, work: Work) -> None:
    """Run a stage until the middle, and die there."""

    def die(context: Watched) -> None:
        if context.updates >= max(context.total // 2, 2):
            said = f"{context.updates} of {context.total} {context.unit}"
            work.folder("killed.txt").write_text(said)
            os.kill(os.getpid(), signal.SIGKILL)

    run_stage(work, "killed", ranks.join(asked.device, "float32", 1), die, saves=True)


def resumed(asked: argparse.Namespace, work: Work) -> None:
    """Go on, and compare with the stage that nobody killed."""
    steps = [int(p.stem.split("-")[1]) for p in work.folder("killed").rglob("step-*.pt")]
    peers = ranks.join(asked.device, "float32", 1)
    run_stage(work, "killed", peers, saves=True, fresh=False)
    calm, again = work.folder("float32"), work.folder("killed")
    equal = "yes" if same(calm, again) else f"no ({apart(calm, again)})"
    Rows(asked.out).add(
        f"kill {work.node.where}",
        stage=work.title,
        **{
            "killed at": work.folder("killed.txt").read_text(),
            "gone on from": f"step {max(steps)}" if steps else "the start: no checkpoint",
            "same bytes": equal,
        },
    )


class Told(Ranks):
    """A rank that is told that it is one of two, in a group of one."""

    def gather(self, value: Any) -> list[Any]:
        return [value if v is None else v for v in super().gather(value)]


def group(asked: argparse.Namespace) -> None:
    """What ranks do together, each on its own, then in training. Nobody else is waited for."""
    rows, device = Rows(asked.out), torch.device(asked.device)
    alone = ranks.join(asked.device, "float32", 1)
    two = Told(0, 2, alone.device, None)
    found = works(asked.methods, asked.out / "work").values()
    observer = next((w for w in found if is_expert(w)), None)  # not every method has one
    with tempfile.TemporaryDirectory() as folder:
        own = ranks.compute(device.type, device.index or 0, "float32")
        here = place.Place(rank=0, world_size=1, launched=True, rendezvous=f"file://{folder}/meet")
        steps: dict[str, Callable[[], Any]] = {
            "meet": lambda: ranks._join_group(here, own, Path()),
            "barrier": two.barrier,
            "broadcast": lambda: two.broadcast({"a": 1}),
            "gather": lambda: two.gather({"a": 1}),
            "agree": lambda: agreed(two),
            "all_reduce": lambda: two.all_reduce(torch.ones(8, device=alone.device)).sum().item(),
        }
        if observer is not None:
            expert = observer
            steps[f"half of {expert.title}"] = lambda: run_stage(expert, "half", two)
        steps["leave"] = dist.destroy_process_group
        for name, step in steps.items():
            begin = time.perf_counter()
            try:
                step()
                rows.add(f"ranks {name}", seconds=f"{time.perf_counter() - begin:.2f}")
            except Exception as error:
                rows.add(f"ranks {name}", error=f"{type(error).__name__}: {str(error)[:200]}")
    rows.add("ranks", step="all", seconds="")


def agreed(two: Any) -> None:
    """Wishes that are asked for, and told at the next call."""
    agreement = ranks.Agreement(two)
    agreement(True, False)
    assert agreement(False, False) == (True, False)
    agreement.close()


def is_expert(work: Work) -> bool:
    return work.node.kind == "experts"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("first", "killed", "resumed", "ranks"))
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limits", type=float, nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--parts", nargs="*", default=[])
    parser.add_argument("--stage", default="")
    asked = parser.parse_args()
    match asked.what:
        case "first":
            First(asked).run()
        case "ranks":
            group(asked)
        case "killed" | "resumed":
            work = works(asked.methods, asked.out / "work")[asked.stage]
            (killed if asked.what == "killed" else resumed)(asked, work)


if __name__ == "__main__":
    main()
