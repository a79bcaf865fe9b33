"""Stages "student" and "evaluate": how good a set is, told by networks trained on it from scratch.

A student is one unit of work: (set, labels, net, seed). Sets are the distilled images, their initial images, random real images of the same
IPC, and the whole long-tailed set; labels are online, stored, single or hard. Nothing is chosen on the test set: the last weights count.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ltdd_scale import softlabels
from ltdd_scale.config import Config, Evaluate
from ltdd_scale.data import arrays
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import MemoryImages, normalizer, open_images, stream_images
from ltdd_scale.data.longtail import GROUPS
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.models import registry
from ltdd_scale.runtime import files, signals, tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng, torch_seed

NUMBERS = ("top1", "top5", "class_std", "many", "medium", "few")


def random_real(labels: np.ndarray, num_classes: int, ipc: int, seed: int) -> np.ndarray:
    """Indices of IPC random training images a class; a class with fewer gives each of them before any a second time."""
    chosen = []
    for c in range(num_classes):
        generator = rng(seed, "random real", c)
        members = np.flatnonzero(labels == c)
        chosen.append(
            np.concatenate(
                [generator.permutation(members) for _ in range(-(-ipc // len(members)))]
            )[:ipc]
        )
    return np.concatenate(chosen)


def learning_rate(settings: Evaluate, done: float) -> float:
    """`done` in [0, 1): cosine to 0; cosine2: EDC's smooth schedule with ζ = 2, to half the rate; steps: halved at 80, 90 and 95 %."""
    if settings.schedule in ("cosine", "cosine2"):
        return (
            settings.lr
            * 0.5
            * (1 + math.cos(math.pi * done / (2 if settings.schedule == "cosine2" else 1)))
        )
    return settings.lr * 0.5 ** sum(done >= mark for mark in (0.8, 0.9, 0.95))


def student_loss(
    logits: torch.Tensor,
    classes: torch.Tensor,
    teacher: torch.Tensor | None,
    kappa_ce: float,
    kappa_mse: float,
) -> torch.Tensor:
    """κ1 · CE(s(x), y) + κ2 · MSE(s(x), teacher logits); the plain cross-entropy where there are no soft labels.

    `classes` float [b, C] are the mixed classes, `teacher` float [b, C] the logits.
    """
    ce = -(classes * F.log_softmax(logits, 1)).sum(1).mean()
    return ce if teacher is None else kappa_ce * ce + kappa_mse * F.mse_loss(logits, teacher)


def train_student(
    student: nn.Module,
    images,
    labels: softlabels.Labels,
    teacher,
    normalize,
    spec: ViewSpec,
    settings: Evaluate,
    epochs: int,
    seed: str,
    context: Context,
    title: str,
):
    """Train on `images` (anything with `stream`, `sizes`, `labels`); return the averaged network and the loss of each epoch."""
    ranks, n = context.ranks, len(images.labels)
    steps = -(-n // settings.batch_size)
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            student.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
    average = copy.deepcopy(student).requires_grad_(False)
    history: list[float] = []
    taken, total = 0, torch.zeros((), device=ranks.device)  # steps; the sum of this epoch's losses
    checkpoints = context.checkpoints(title.replace(" ", "-"))
    saved = checkpoints.load()
    if saved:
        taken, state = saved
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
        total.copy_(state["total"])
    progress = context.progress(title, epochs, "epochs", len(history), stops=False)
    student.train()
    while taken < steps * epochs:
        epoch, first = divmod(taken, steps)
        order = rng(seed, "student order", epoch).permutation(n)
        batches = [
            order[i : i + settings.batch_size]
            for i in range(first * settings.batch_size, n, settings.batch_size)
        ]
        drawn = softlabels.draw_epoch(
            spec, images.sizes, *labels.view_key(seed, epoch), settings.cutmix
        )
        for indices, x in zip(
            batches, softlabels.render(images, drawn, batches, spec, normalize), strict=True
        ):
            torch.manual_seed(torch_seed(seed, "dropout", taken))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, (epoch + taken % steps / steps) / epochs)
            classes, soft = labels.targets(epoch, drawn, indices, x, teacher, ranks)
            if x.device.type == "cuda":
                x = x.contiguous(memory_format=torch.channels_last)
            with ranks.autocast():
                logits = student(x).float()
            loss = student_loss(logits, classes, soft, settings.kappa_ce, settings.kappa_mse)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            # The average warms up, so that short trainings are not judged on their initial weights.
            registry.update_ema(
                average,
                student,
                min(settings.ema, (1 + taken) / (10 + taken)) if settings.ema else 0.0,
            )
            total += loss.detach() / steps
            taken += 1
            if taken % steps == 0:
                history.append(float(total))
                total.zero_()
                progress.update(epoch + 1, f"loss {history[-1]:.3f}")
            if signals.requested() or checkpoints.due():
                state = {
                    "student": student.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": history,
                    "total": total,
                }
                checkpoints.save(taken, state, wait=signals.requested())
                signals.check()
    checkpoints.wait()
    return average.eval(), history


@torch.no_grad()
def predict(model: nn.Module, images, normalize, ranks, batch: int = 500) -> torch.Tensor:
    """Logits float32 [N, C] on the CPU, every image once."""
    n = len(images.labels)
    plans = [(np.arange(i, min(i + batch, n)), None) for i in range(0, n, batch)]
    out = []
    for x in images.stream(plans, ViewSpec(1)):
        signals.check()
        with ranks.autocast():
            out.append(model(normalize(x)).float().cpu())
    return torch.cat(out)


def metrics(logits: torch.Tensor, labels: np.ndarray, groups: list[str]) -> dict[str, Any]:
    """top1, top5, class_std (over classes, population), many/medium/few, per_class: all in per cent; groups without classes are None."""
    target = torch.from_numpy(labels)
    ranked = logits.topk(min(5, logits.shape[1]), 1).indices == target[:, None]
    per_class = np.asarray(
        [float(ranked[target == c, 0].float().mean()) * 100 for c in range(logits.shape[1])]
    )
    out: dict[str, Any] = {
        "top1": float(ranked[:, 0].float().mean()) * 100,
        "top5": float(ranked.any(1).float().mean()) * 100,
        "class_std": float(per_class.std()),
    }
    for group in GROUPS:
        members = [c for c, g in enumerate(groups) if g == group]
        out[group] = float(per_class[members].mean()) if members else None
    return {
        **{k: None if v is None else round(v, 3) for k, v in out.items()},
        "per_class": per_class.round(2).tolist(),
    }


def _labels(
    kind: str,
    which: str,
    images,
    teacher,
    normalize,
    spec,
    config: Config,
    context: Context,
    split: ShardSplit,
    epochs: int,
) -> softlabels.Labels:
    """The labels of a set: relabel's own where they are of this kind, else made here in the same way."""
    ranks, num_classes = context.ranks, len(split.classes)
    settings, made = config.relabel, None
    if "relabel" in context.inputs:
        made = files.read_json(context.input("relabel") / "labels.json")
    shift = None
    if settings.adjust and kind != "hard":
        if made:
            tau = made["tau"]
        else:
            tau = softlabels.adsa_tau(
                softlabels.single_logits(
                    images, teacher, normalize, spec, settings.batch_size, None, ranks
                ),
                images.labels,
                split.counts,
            )
        shift = softlabels.shift_of(tau, split.counts, ranks.device)
    seed, table = f"labels {config.seed}", None
    if kind == "single":
        if made:
            table = torch.from_numpy(arrays.load(context.input("relabel") / "single.npy")).to(
                ranks.device
            )
        else:
            table = softlabels.single_logits(
                images, teacher, normalize, spec, settings.batch_size, shift, ranks
            )
    elif kind == "stored":
        count = made["epochs"] if made else settings.epochs or epochs
        if made:
            table = softlabels.load_stored(context.input("relabel"), count)
        else:
            make = (images, teacher, normalize, spec, seed)
            rest = (config.evaluate.cutmix, settings.topk, settings.batch_size, shift, ranks)
            table = softlabels.MadeWhenAsked(
                count, lambda e: softlabels.store_epoch(*make, e, *rest)
            )
    return softlabels.Labels(kind, images.labels, num_classes, ranks.device, seed, table, shift)


def run_student(unit: dict[str, Any], config: Config, context: Context) -> dict[str, Any]:
    """Train and judge the student of `unit` (set, labels, net, seed); write ``result.json``."""
    ranks, settings, size = context.ranks, config.evaluate, config.data.resolution
    split = ShardSplit(context.input("shard"), "train")
    normalize = normalizer(split.mean, split.std, ranks.device)
    which, num_classes = unit["set"], len(split.classes)
    if which == "full":
        images: Any = open_images(split, config, ranks.device)
    elif which == "random":
        chosen = random_real(split.labels, num_classes, config.ipc, unit["seed"])
        plans = [(part, None) for part in np.split(chosen, range(256, len(chosen), 256))]
        parts = stream_images(split, config, ranks.device).stream(plans, ViewSpec(size))
        images = MemoryImages(
            np.concatenate([arrays.to_uint8(part) for part in parts]),
            split.labels[chosen],
            ranks.device,
        )
    else:
        folder = context.input("recover" if which == "distilled" else "initialize")
        images = MemoryImages(*arrays.load_classes(folder, num_classes), ranks.device)
    saved = tensors.load(context.input("teacher") / "weights.pt")
    teacher = ranks.to_device(registry.Network.build(saved["recipe"], saved["model"]))
    spec = softlabels.view_spec(settings, size, config.data.mirror)
    epochs = settings.full_epochs if which == "full" else settings.epochs
    labels = _labels(
        unit["labels"], which, images, teacher, normalize, spec, config, context, split, epochs
    )
    seed, expert = f"student {unit['seed']}", config.teacher
    build = lambda: registry.Student(
        registry.backbone(unit["net"], expert.width, expert.norm, size), num_classes
    )  # noqa: E731
    student = ranks.to_device(registry.seeded(build, seed, "weights"))
    title = f"{which} {unit['labels']} {unit['net']} seed {unit['seed']}"
    average, history = train_student(
        student, images, labels, teacher, normalize, spec, settings, epochs, seed, context, title
    )
    held = ShardSplit(context.input("shard"), settings.split)
    test = open_images(held, config, ranks.device)
    result = metrics(
        predict(average, test, normalize, ranks), held.labels, split.manifest["groups"]
    )
    if not math.isfinite(history[-1]):
        raise UserError(
            f"{title}: the loss is {history[-1]}; lower evaluate.lr (it is {settings.lr})"
        )
    row = {**unit, "ipc": None if which == "full" else config.ipc, **result}
    files.write_json(
        context.out / "result.json", {"row": row, "loss": [round(v, 5) for v in history]}
    )
    return {"top1": result["top1"], "class_std": result["class_std"]}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds for each (set, labels, net), in the rows' order."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["labels"], row["net"]), []).append(row)
    out = []
    for (which, kind, net), members in cells.items():
        entry: dict[str, Any] = {
            "set": which,
            "labels": kind,
            "net": net,
            "ipc": members[0]["ipc"],
            "num_seeds": len(members),
        }
        for number in NUMBERS:
            values = [m[number] for m in members if m[number] is not None]
            entry[number] = round(float(np.mean(values)), 2) if values else None
            entry[f"{number}_std"] = (
                round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None
            )
        entry["per_class"] = np.mean([m["per_class"] for m in members], 0).round(2).tolist()
        out.append(entry)
    return out


def run(config: Config, context: Context) -> dict[str, Any]:
    """Collect the students' results into ``results.json``: rows of the configured labels, the matrix, and the summary over seeds."""
    ranks = context.ranks
    if not ranks.first:
        return {}
    found = [
        files.read_json(folder / "result.json")
        for name, folder in context.inputs.items()
        if name.startswith("student/")
    ]
    rows = [f["row"] for f in found]
    kind = config.relabel.labels
    shown = [
        r
        for r in rows
        if r["set"] == "full" or (r["labels"] == kind and r["set"] in ("distilled", "random"))
    ]
    saved = tensors.load(context.input("teacher") / "weights.pt")
    split, held = (
        ShardSplit(context.input("shard"), "train"),
        ShardSplit(context.input("shard"), config.evaluate.split),
    )
    normalize = normalizer(split.mean, split.std, ranks.device)
    images = open_images(held, config, ranks.device)
    experts = {}
    for role, path in (
        ("teacher", context.input("teacher") / "weights.pt"),
        ("observer", context.input("observer") / "weights.pt"),
        ("calibrated observer", context.input("calibrate") / "observer.pt"),
    ):
        saved = tensors.load(path)
        model = ranks.to_device(registry.Network.build(saved["recipe"], saved["model"]))
        experts[role] = {
            "net": saved["recipe"]["net"],
            **metrics(
                predict(model, images, normalize, ranks), held.labels, split.manifest["groups"]
            ),
        }
    curves = {
        f"{r['set']} {r['labels']} {r['net']}": f["loss"]
        for r, f in zip(rows, found, strict=True)
        if r["seed"] == config.seed
    }
    files.write_json(
        context.out / "results.json",
        {
            "rows": shown,
            "summary": {
                "split": config.evaluate.split,
                "labels": kind,
                "students": summarize(rows),
                "experts": experts,
            },
            "matrix": rows if config.evaluate.matrix else [],
            "loss_curves": curves,
        },
    )
    return {}
