"""What RLDD and DAMED cost with their published recipes: seconds of a unit of work, times their number.

python tools/bench_published_cost.py [--rounds 2] [--threads 1] [--ipc 1 10 50]
python tools/bench_published_cost.py --memory

Units are measured in turns, on noise in place of images; on a GPU where there is one. How often each is done
stands in configs/published (CIFAR-10-LT, IF 100). Students are not counted, as in the papers.

--memory: peak memory of one segment of trajectory matching instead, exact and by autograd through all steps, each
in a process of its own on the CPU; and what autograd would take with the published steps and batches.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from bench import circumstances, in_turns, peak_mb
from bench_match import a_segment, whole_unroll
from torch import Tensor, nn

from ltdd_scale import recipe
from ltdd_scale.data import siamese, sources
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.loader import Normalize, normalizer
from ltdd_scale.experts import batches, engine, train
from ltdd_scale.experts.recipes import RECIPES
from ltdd_scale.experts.trajectories import descent, orders
from ltdd_scale.launch import sweep
from ltdd_scale.launch.parts import part_of
from ltdd_scale.methods.damed import match
from ltdd_scale.methods.matching.experts import Experts
from ltdd_scale.methods.matching.segments import Synthetic
from ltdd_scale.methods.matching.unroll import Segment, Unroll
from ltdd_scale.methods.rldd import calibrate, initialize, recover
from ltdd_scale.methods.rldd.align import Alignment
from ltdd_scale.models import frozen, registry
from ltdd_scale.models.flat import Flat, in_tf32
from ltdd_scale.publish.tables import markdown
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, join, rng
from ltdd_scale.stage import Facts, Given, function, settings_of

SWEEPS = Path(__file__).parent.parent / "configs" / "published" / "sweeps"
IMBALANCE = 100
CALIBRATED = 64  # images of a measured calibration
RECOVERED = 100  # images of a measured iteration of recovery, as published
LARGE = 500  # from this batch on a segment is not warmed up: smaller ones have done it
# Seconds of one RTX 3090 at IPC 1, from RLDD's table of costs.
PRINTED = {
    "rldd": {"experts": 2395, "synthesis": 118},
    "damed": {"experts": 31388, "synthesis": 30141},
}
OTHER = " (not as published)"


@dataclass(frozen=True)
class Unit:
    """`work` does `items` of what `name` says."""

    name: str
    work: Callable[[], object]
    items: float = 1.0
    warm: bool = True


@dataclass(frozen=True)
class Line:
    """A stage `job` of `part` does `number` units `unit`."""

    part: str
    job: str
    unit: Unit
    number: float


@dataclass(frozen=True)
class Bench:
    """What units are measured with: noise that is as long-tailed as the real set."""

    facts: Facts
    images: MemoryImages
    normalize: Normalize
    ranks: Ranks
    context: Context

    @staticmethod
    def of(facts: Facts, size: int, ranks: Ranks) -> Bench:
        labels = np.repeat(np.arange(facts.num_classes), facts.counts)
        pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3, size, size), np.uint8)
        images = MemoryImages(pixels, labels, ranks.device)
        normalize = normalizer([0.5] * 3, [0.25] * 3, ranks.device)
        context = Context(ranks, Path("has no folder"), {}, "bench", quiet=True)
        return Bench(facts, images, normalize, ranks, context)

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def net(self, net: Any, size: int) -> frozen.Frozen:
        """An observer or a teacher with its initial weights."""
        made_of, classes = (net.net, net.width, net.norm, size), self.facts.num_classes

        def build() -> nn.Module:
            return registry.TwoHeads(registry.backbone(*made_of), classes, 0)

        model = self.ranks.to_device(registry.seeded(build, "bench")).eval().requires_grad_(False)
        return frozen.Frozen(model, frozen.recipe(*made_of, classes), self.ranks)


def published(method: str, ipc: int) -> Any:
    """The config of the method's point in its published table, with nothing of it changed."""
    configs, _ = sweep.load(SWEEPS / f"{method}_cifar10_lt.yaml").load_points([])
    wanted = (IMBALANCE, ipc)
    return next(c for c in configs.values() if (c.data.imbalance_factor, c.ipc) == wanted)


def given(config: Any, name: str) -> Given:
    return settings_of(next(s for s in recipe.stages(config, "") if s.name == name), config)


def of_expert(role: str, config: Any, bench: Bench) -> Unit:
    """RLDD: a step with its batch, the passes of both views, the optimizer."""
    settings, ranks, classes = given(config, role), bench.ranks, bench.facts.num_classes
    expert, seen = settings.expert, settings.images
    model, setup = (
        train.build(settings, classes, ranks).train(),
        engine.Setup(expert, settings.train),
    )
    trainer = engine.make(train._Heads(model), setup, ranks, bench.context.checkpoints())
    recipe = RECIPES[expert.recipe]
    spec = ViewSpec(seen.resolution, None, expert.crop_padding, seen.mirror)
    how = (bench.images, spec, "bench", expert.batch_size, recipe.mixing(expert))
    course = batches.Course(*how, ranks=ranks)
    loss = recipe.objective(expert, np.asarray(bench.facts.counts), ranks.device)
    step, end = train.Step(trainer, loss, setup, course), course.steps * expert.epochs
    stream = batches.from_step(course, 0, end, bench.normalize, classes)
    name = f"{role}: a step ({expert.net}, batch {expert.batch_size})"
    return Unit(name, lambda: step(next(stream)))


def of_calibration(config: Any, bench: Bench) -> Unit:
    """RLDD: all of it, layer after layer, with few images."""
    size, own = config.data.resolution, config.calibrate
    observer, whole = bench.net(config.observer, size).model, bench.images
    few = MemoryImages(whole.pixels[:CALIBRATED], whole.labels[:CALIBRATED], bench.device)
    seen = (few, bench.normalize, ViewSpec(size), own.batch_size, bench.context)
    measurement, norms = calibrate.Measurement(observer, *seen), registry.norm_layers(observer)
    name = f"calibration: an image up to a layer ({config.observer.net}, {len(norms)} layers)"
    items = CALIBRATED * len(norms)
    return Unit(name, lambda: calibrate.measure(measurement, None, norms, {}, own), items)


def of_initialization(config: Any, bench: Bench) -> Unit:
    """RLDD: the teacher's scores of a batch of crops."""
    own, size = config.initialize, config.data.resolution
    teacher, spec = bench.net(config.teacher, size), ViewSpec(size, tuple(own.crop_scale))
    crops = initialize.Crops(bench.images, teacher, bench.normalize, spec, own, config.ipc, 0)
    indices = np.arange(own.batch_size) // own.crops
    views = spec.draw(rng("bench"), bench.images.sizes[indices])
    name = f"initialisation: a crop ({config.teacher.net})"
    return Unit(name, lambda: initialize.score(crops, 0, indices, views), own.batch_size)


def of_recovery(config: Any, bench: Bench, guarded: bool) -> Unit:
    """RLDD: one iteration of one chunk; `guarded`: with the teacher's cross-entropy."""
    size, device, n = config.data.resolution, bench.device, RECOVERED
    own = config.recover.model_copy(update={"iterations": 1, "teacher_ce": float(guarded)})
    observer = bench.net(config.observer, size).model
    teacher = bench.net(config.teacher, size).model if guarded else None
    layers, shares = registry.norm_layers(observer), (1 - own.classwise, own.classwise)

    def goal(layer: Any) -> tuple[Tensor, Tensor]:
        plain = torch.ones(layer.num_features, device=device)
        return 0 * plain, plain

    targets = {name: [(w, *goal(layer)) for w in shares] for name, layer in layers.items()}
    drawn = ViewSpec(size, tuple(own.crop_scale)).draw(rng("bench"), np.full((n, 2), size))
    shown = (torch.from_numpy(v[None]).to(device) for v in (drawn.windows, drawn.mirrored))
    labels = torch.arange(n, device=device) % bench.facts.num_classes
    batch = recover.Batch(torch.randn(n, 3, size, size, device=device), labels, *shown)
    low, high = (torch.full((1, 3, 1, 1), bound, device=device) for bound in (-2.0, 2.0))
    objective = recover.Objective(observer, teacher, low, high, own, size, True, bench.ranks)

    def work() -> None:
        with Alignment(layers, targets, own) as alignment:
            recover.recover_chunk(objective, batch, alignment)

    name = f"recovery: an iteration of {n} images"
    return Unit(f"{name} with the teacher's term{OTHER}" if guarded else name, work)


def flat_of(config: Any, bench: Bench) -> Flat:
    made_of, classes = config.trajectories, bench.facts.num_classes
    return Flat(made_of.net, made_of.width, made_of.norm, config.data.resolution, classes)


def of_descent(config: Any, bench: Bench, head: bool, **changed: Any) -> Unit:
    """DAMED: a step of an expert; with `head` of its classifier, on the frozen backbone."""
    section = config.classifiers if head else config.trajectories
    own, images, flat = section.model_copy(update=changed), bench.images, flat_of(config, bench)
    theta = flat.initial("bench").to(bench.device)
    order: orders.Order = orders.Uniform(len(images.labels), own.batch_size, "bench")
    if head:
        order = orders.ClassAware(images.labels, own.batch_size, own.images_per_class, "bench")
    strategy, size = siamese.choices(config.trajectories.dsa), config.data.resolution
    seen = (images, order, bench.normalize, strategy, size, bench.device, ("bench",))
    steps, start = descent.Batches(*seen).steps(0, own.steps), theta[flat.head] if head else theta

    def loss(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(flat.classify(at, x) if head else flat.logits(at, x), y)

    one = descent.one_step(own, loss)
    state = [start, torch.zeros_like(start if own.momentum else start[:0])]

    def work() -> None:
        with in_tf32():
            x, y = next(steps)
            if head:
                with torch.no_grad():
                    x = flat.features(theta, x)
            state[0], state[1], _ = one(*state, x, y)

    what = f"{'classifier' if head else 'expert'}: a step (batch {own.batch_size}, {own.optimizer})"
    return Unit(what + OTHER * bool(changed), work)


@dataclass(frozen=True)
class Noise:
    """The way of an expert that nobody has trained: `Kept` as far as segments ask."""

    weights: Tensor

    def vector(self, k: int, device: torch.device) -> Tensor:
        return self.weights * (1 + 0.01 * k)

    def last(self, device: torch.device) -> Tensor:
        return self.weights


def of_segments(config: Any, bench: Bench, batch: int, **changed: Any) -> list[Unit]:
    """DAMED: a student's step and the way back over it, of the backbone's segment and of the
    classifier's."""
    one_step = {"inner_steps": 1, "classifier_steps": 1, "batch_size": batch}
    own = config.damed.model_copy(update={**one_step, **changed})
    flat, size, classes = flat_of(config, bench), config.data.resolution, bench.facts.num_classes
    theta = flat.initial("bench").to(bench.device)
    ways = Experts(flat, cast(Any, [Noise(theta)]), cast(Any, [Noise(theta[flat.head])]))
    images = torch.randn(batch, 3, size, size, device=bench.device)
    labels = torch.randn(batch, classes, device=bench.device)
    weights = match.class_weights(np.asarray(bench.facts.counts)).to(bench.device)
    pair = match.Pair(own, ways, images, weights, siamese.choices(own.dsa), 0)
    synthetic = Synthetic(images, labels, own, own.learn_labels, own.lr_labels)

    def unit(what: str, make: Callable[[int, int], Segment]) -> Unit:
        numbers = itertools.count()

        def work() -> None:
            with in_tf32():
                segment, rate = make(next(numbers), 0), synthetic.log_rate.exp()
                synthetic.unroll.gradient(segment, images, labels, rate)

        name = f"{what} segment: a step, batch {batch}, {own.gradient}{OTHER * bool(changed)}"
        return Unit(name, work, warm=batch < LARGE)

    return [unit("backbone's", pair.network), unit("classifier's", pair.classifier)]


@dataclass
class Point:
    """A method's recipe at one IPC. `lines`: what it does how often."""

    config: Any
    facts: Facts
    lines: list[Line] = field(default_factory=list)

    @property
    def batch(self) -> int:
        """Of a segment."""
        return min(self.config.damed.batch_size, self.facts.num_classes * self.config.ipc)

    @cached_property
    def flops(self) -> dict[str, float]:
        """By job, as the stages' own estimates have them."""
        out = dict.fromkeys((x.job for x in self.lines), 0.0)
        for stage in recipe.stages(self.config, ""):
            if part_of(stage) in ("experts", "synthesis") and stage.cost:
                settings = settings_of(stage, self.config)
                out[stage.job] += function(stage.cost)(settings, self.facts).flops
        return out

    def hours(self, seconds: dict[str, float], *wanted: str) -> float:
        """Of the parts or stages `wanted`."""
        found = [x for x in self.lines if x.part in wanted or x.job in wanted]
        return sum(seconds[x.unit.name] * x.number for x in found) / 3600


def rldd_lines(point: Point, units: list[Unit]) -> list[Line]:
    config, n = point.config, point.facts.num_images
    steps = [e.epochs * (n // e.batch_size) for e in (config.observer, config.teacher)]
    chunks = point.facts.num_classes * config.ipc / RECOVERED
    return [
        Line("experts", "observer", units[0], steps[0]),
        Line("experts", "teacher", units[1], steps[1]),
        Line("synthesis", "calibrate", units[2], n * units[2].items / CALIBRATED),
        Line("synthesis", "initialize", units[3], n * config.initialize.crops),
        Line("synthesis", "recover", units[4], config.recover.iterations * chunks),
    ]


def damed_lines(point: Point, descents: list[Unit], segments: list[Unit]) -> list[Line]:
    own, experts = point.config.damed, point.config.trajectories.experts
    rounds = own.iterations * own.segments
    return [
        Line("experts", "trajectories", descents[0], experts * point.config.trajectories.steps),
        Line("experts", "classifiers", descents[1], experts * point.config.classifiers.steps),
        Line("synthesis", "match", segments[0], rounds * own.inner_steps),
        Line("synthesis", "match", segments[1], rounds * own.classifier_steps),
    ]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measured(units: list[Unit], rounds: int, gpu: bool) -> dict[str, float]:
    """Seconds of each unit: medians. Prints a table. On a CPU they are seconds of a core, to which
    other work on the machine adds less than to those of the clock."""
    cores: dict[str, list[float]] = {u.name: [] for u in units}

    def timed(unit: Unit) -> Callable[[], None]:
        def work() -> None:
            begin, first = time.process_time(), not cores[unit.name]
            if unit.warm or not first:
                unit.work()
            cores[unit.name].append(time.process_time() - begin)

        return work

    clock = in_turns({u.name: timed(u) for u in units}, rounds)
    times = clock if gpu else {name: found[1:] for name, found in cores.items()}
    rows = [["unit", "ms" if gpu else "ms of a core", "lowest – highest", "ms of the clock"]]
    for u in units:
        each, also = ([1000 * t / u.items for t in of[u.name]] for of in (times, clock))
        spread = f"{number(min(each))} – {number(max(each))}"
        rows.append([u.name, number(median(each)), spread, number(median(also))])
    print(f"### Units of work, {rounds} rounds in turns, medians\n\n{markdown(rows)}\n", flush=True)
    return {u.name: median(times[u.name]) / u.items for u in units}


def show(points: dict[str, dict[int, Point]], seconds: dict[str, float]) -> None:
    """What is done how often; hours, FLOPs and speed of the stages; both methods side by side."""
    ipcs = list(points["rldd"])
    rows = [["method", "stage", "unit", "ms", *(f"times at IPC {i}" for i in ipcs)]]
    stages = [f"{what}, IPC {i}" for i in ipcs for what in ("hours", "PFLOP", "GFLOP/s")]
    speeds = [["method", "stage", *stages]]
    for method, by_ipc in points.items():
        lines = [{x.unit.name: x for x in p.lines} for p in by_ipc.values()]
        for name, line in {n: x for of in lines for n, x in of.items()}.items():
            times = [f"{of[name].number:,.6g}" if name in of else "–" for of in lines]
            rows.append([method, line.job, name, number(1000 * seconds[name]), *times])
        for job in dict.fromkeys(x.job for x in by_ipc[ipcs[0]].lines):
            both = [(p.hours(seconds, job), p.flops[job]) for p in by_ipc.values()]
            cells = [number(v) for h, f in both for v in (h, f / 1e15, f / 1e9 / 3600 / h)]
            speeds.append([method, job, *cells])
    print(f"### The recipes, CIFAR-10-LT IF {IMBALANCE}\n\n{markdown(rows)}\n")
    print(f"### Stages\n\n{markdown(speeds)}\n")
    rows, both = [["", "RLDD", "DAMED", "RLDD / DAMED"]], ("experts", "synthesis")

    def add(what: str, of: Callable[[str], float]) -> None:
        one, other = map(of, points)
        rows.append([what, number(one), number(other), f"1/{number(other / one)}"])

    for i in ipcs:
        for parts in ((both[0],), (both[1],), both):
            title = f"IPC {i}: {' and '.join(parts)}, hours here"
            add(title, lambda m, i=i, parts=parts: points[m][i].hours(seconds, *parts))
        add(f"IPC {i}: both, PFLOP", lambda m, i=i: sum(points[m][i].flops.values()) / 1e15)
    for parts in ((both[0],), (both[1],), both):
        title = f"published, IPC 1: {' and '.join(parts)}, s of an RTX 3090"
        add(title, lambda m, parts=parts: sum(PRINTED[m][p] for p in parts))
    print(f"### Side by side\n\n{markdown(rows)}")


def costs(rounds: int, ipcs: list[int], ranks: Ranks) -> None:
    facts = sources.expected(published("rldd", ipcs[0]).data)
    assert facts is not None
    points = {m: {i: Point(published(m, i), facts) for i in ipcs} for m in PRINTED}
    rldd, damed = (points[m][ipcs[0]].config for m in PRINTED)
    bench = Bench.of(facts, rldd.data.resolution, ranks)
    ours = [of_expert(role, rldd, bench) for role in ("observer", "teacher")]
    ours += [of_calibration(rldd, bench), of_initialization(rldd, bench)]
    ours += [of_recovery(rldd, bench, guarded) for guarded in (False, True)]
    theirs = [of_descent(damed, bench, head) for head in (False, True)]
    theirs.append(of_descent(damed, bench, head=False, optimizer="sgd"))
    sizes = sorted({p.batch for p in points["damed"].values()})
    segments = {b: of_segments(damed, bench, b) for b in sizes}
    exact = of_segments(damed, bench, 100, gradient="exact")
    units = [*ours, *theirs, *itertools.chain(*segments.values()), *exact]
    for i in ipcs:
        points["rldd"][i].lines = rldd_lines(points["rldd"][i], ours)
        other = points["damed"][i]
        other.lines = damed_lines(other, theirs, segments[other.batch])
    show(points, measured(units, rounds, ranks.device.type == "cuda"))


def segment_peak(how: str, width: int, steps: int, batch: int) -> tuple[float, float]:
    """(MB before, MB at the peak) of the gradient of one segment, "exact" or by "autograd"."""
    torch.set_num_threads(1)
    flat, exact, rate = Flat("convnet3", width, "instance", 32, 10), Unroll(), torch.tensor(0.01)
    images, labels = torch.randn(batch, 3, 32, 32), F.one_hot(torch.arange(batch) % 10, 10).float()
    few = a_segment(flat, images[:2], 1, 2)
    exact.gradient(few, images[:2], labels[:2], rate)  # libraries are loaded when they are used
    segment, before = a_segment(flat, images, steps, batch), peak_mb(lambda: None)
    work = exact.gradient if how == "exact" else whole_unroll
    return before, peak_mb(lambda: work(segment, images, labels, rate))


def memory() -> None:
    """Autograd keeps the graph of each step and image: MB = a + p b + c N b, fitted."""
    few = [(1, 25), (2, 25), (4, 25), (8, 25), (2, 50), (4, 50), (1, 100), (2, 100)]
    cases = {"exact": [(5, 100), (20, 100), (80, 20), (2, 500)], "autograd": few}
    rows, said = [["width", "gradient", "N", "batch", "MB of the segment", "MB before"]], []
    for width in (64, 128):
        found = []
        for how, (steps, batch) in ((h, s) for h, sizes in cases.items() for s in sizes):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                before, peak = pool.submit(segment_peak, how, width, steps, batch).result()
            cells = (steps, batch, peak - before, before)
            rows.append([str(width), how, *map(number, cells)])
            if how == "autograd":
                found.append(peak - before)
        known = np.asarray([(1, b, n * b) for n, b in few], float)
        (a, p, c), y = np.linalg.lstsq(known, np.asarray(found), rcond=None)[0], np.asarray(found)
        off = 100 * float(np.max(np.abs(known @ (a, p, c) / y - 1)))
        wanted = [(n, b) for n in (30, 80) for b in (100, 500)]
        ends = "; ".join(
            f"N {n}, b {b}: {(a + p * b + c * n * b) / 1e3:,.0f} GB" for n, b in wanted
        )
        fit = f"{a:.0f} MB + {p:.2f} MB · b + {c:.2f} MB · N · b, off by {off:.0f} % at most"
        said.append(f"- {width} wide: {fit}. {ends}")
    print(markdown(rows) + "\n\nAutograd through all steps, batch b:\n\n" + "\n".join(said))


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("--rounds", type=int, default=2, help="of all units, after one that warms up (default: 2)")
    add("--threads", type=int, default=1, help="of the CPU (default: 1)")
    some, ipcs = "images a class (default: 1 10 50)", [1, 10, 20, 50]
    add("--ipc", type=int, nargs="+", default=[1, 10, 50], choices=ipcs, help=some)
    add("--memory", action="store_true", help="peak memory of a segment instead")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(circumstances(asked.threads), "\n", flush=True)
    if asked.memory:
        memory()
        return
    costs(asked.rounds, asked.ipc, join("auto", "float32", asked.threads))


if __name__ == "__main__":
    main()
