"""Configuration: dataclasses <- YAML (with ``base:``) <- ``--set a.b=c``.

Every field is documented where it is defined; ``ltdd-scale config`` prints this page from the definitions. Values are
coerced by the field's type, because PyYAML reads ``1e-3`` as a string and ``on`` as a boolean.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from ltdd_scale.errors import UserError


def option(
    default: Any, doc: str, choices: tuple = (), low: float | None = None, high: float | None = None
):
    """A dataclass field with its documentation and its limits (inclusive)."""
    meta = {"doc": doc, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class Data:
    """The real, long-tailed set."""

    source: str = option(
        "digits", "where the images come from", choices=("digits", "folder", "list", "shards")
    )
    path: str = option(
        "",
        "folder: <split>/<class>/…, torchvision's CIFAR folder or Tiny-ImageNet's; list: the root that list lines start from; shards: a shard set",
    )
    train_list: str = option(
        "",
        "list: file of 'path label' lines, plain or .gz; relative names are looked up under data.path",
    )
    val_list: str = option("", "list: the same for validation; empty: none")
    test_list: str = option("", "list: the same for testing")
    profile: str = option(
        "exponential",
        "exponential: n_c = int(n_max · IF^(−c/(C−1))); counts: as given; full: all there is",
        choices=("exponential", "counts", "full"),
    )
    imbalance_factor: float = option(1.0, "exponential: largest over smallest class", low=1)
    max_per_class: int = option(0, "exponential: n_max; 0: the size of the largest class", low=0)
    counts: list[int] = option([], "counts: images of each class, in label order")
    test_per_class: int = option(
        0, "images a class held out for testing where the source has no test split (digits)", low=0
    )
    val_per_class: int = option(
        0, "training images a class held out for validation before the long tail is drawn", low=0
    )
    split_seed: int = option(
        42, "seed of the choice of images; the same seed gives nested sets for growing imbalance"
    )
    resolution: int = option(32, "side in pixels that networks see", low=4)
    store_resolution: int = option(
        0,
        "side in pixels of the images in the shards (short side, centre crop, PNG); 0: original bytes",
        low=0,
    )
    memory_gb: float = option(
        4.0,
        "sets that fit in this when decoded are held in memory, as centre squares; larger ones are cropped from the originals",
        low=0,
    )
    loader: str = option(
        "auto",
        "what decodes sets too large for memory; auto: DALI where it is installed, else PyTorch",
        choices=("auto", "dali", "torch"),
    )
    mirror: bool = option(True, "a mirrored image is still of its class (not so for digits)")
    store_quality: int = option(
        0, "JPEG quality of images stored at store_resolution; 0: lossless PNG", low=0, high=100
    )
    shard_images: int = option(2000, "images a shard (2,000 of ImageNet are about 220 MB)", low=1)


@dataclass
class Expert:
    """Training of the observer or the teacher (GLMC-style, RLDD §Debiased experts)."""

    net: str = option(
        "convnet3",
        "convnet3, convnet4, resnet32, resnet18_cifar, or any torchvision classifier by name",
    )
    width: int = option(128, "channels of a ConvNet", low=1)
    norm: str = option("instance", "normalisation of a ConvNet", choices=("instance", "batch"))
    epochs: int = option(200, "passes over the uniform stream", low=1)
    batch_size: int = option(64, "global batch: the same on any number of ranks", low=2)
    lr: float = option(0.01, "peak learning rate of SGD", low=0)
    momentum: float = option(0.9, "SGD momentum", low=0, high=1)
    weight_decay: float = option(5e-3, "SGD weight decay", low=0)
    warmup_epochs: int = option(0, "linear warm-up before the cosine", low=0)
    reweight_power: float = option(
        0.8, "q in the class weights w_k ∝ r_k^(−q) of the rebalanced head", low=0
    )
    contrast: float = option(1.0, "γ1, weight of L_robust; 0 switches it off", low=0)
    debias: float = option(1.0, "γ2, weight of L_debias", low=0)
    resample_power: float = option(
        0.2, "per-image weight n_c^(−power) of the re-sampled stream", low=0
    )
    crop_scale: list[float] = option([], "area range of RandomResizedCrop; empty: none")
    crop_padding: int = option(
        4, "border in pixels of the random shift, where crop_scale is empty", low=0
    )
    randaugment: int = option(0, "RandAugment operations an image", low=0)
    magnitude: int = option(9, "RandAugment magnitude of 30", low=0, high=30)


@dataclass
class Train:
    """The engine that trains both experts."""

    engine: str = option(
        "ddp", "ddp: DistributedDataParallel; deepspeed: ZeRO", choices=("ddp", "deepspeed")
    )
    deepspeed: str = option(
        "configs/deepspeed/zero1.json",
        "deepspeed: its options; batches, precision and clipping are set from here",
    )
    micro_batch: int = option(
        0,
        "images of each view that a rank puts through the network at once; more are accumulated; 0: its whole part of the batch",
        low=0,
    )
    clip: float = option(0.0, "largest norm of the gradient; 0: no clipping", low=0)
    sync_bn: bool = option(
        True,
        "BatchNorm over the batches of all ranks, so that training does not depend on their number",
    )
    compile: bool = option(
        False,
        "torch.compile: faster on GPUs after a minute or more at each start; changes the last bits",
    )


@dataclass
class Strategies:
    """The three strategies of RLDD, each to be switched off by one --set."""

    debias: bool = option(
        True, "debiased experts; false: plain cross-entropy on the uniform stream"
    )
    calibrate: bool = option(
        True, "fair BN statistics; false: the observer's own running statistics, no class-wise term"
    )
    confident_init: bool = option(True, "confident crops; false: random crops of random images")


@dataclass
class Calibrate:
    """Fair BatchNorm statistics."""

    variance: str = option(
        "mixture",
        "mixture: of the class-balanced population; within: mean of the class variances",
        choices=("mixture", "within"),
    )
    conv_inputs: bool = option(False, "collect (and align) the inputs of convolutions too")
    recalibrate: bool = option(
        True,
        "give the observer the fair statistics, layer after layer (a pass over the set for each, up to it); false: one pass, it keeps its own",
    )
    batch_size: int = option(128, "images a forward pass", low=1)


@dataclass
class Initialize:
    """Confidence-guided multi-round initialisation."""

    crops: int = option(5, "K, crops drawn of each real image", low=1)
    crop_scale: list[float] = option([0.5, 1.0], "area range of the crops")
    batch_size: int = option(256, "crops a teacher pass", low=1)


@dataclass
class Recover:
    """Statistical alignment of the images. Weights are settings because the published ones can hurt: see the configs."""

    iterations: int = option(200, "Adam steps a chunk; 0 keeps the initial images", low=0)
    batch_size: int = option(100, "images a chunk; a chunk is one batch", low=1)
    chunk_classes: int = option(
        0, "classes a chunk, taken at a stride so that head and tail meet; 0: as many as fit", low=0
    )
    lr: float = option(
        0.005, "Adam learning rate, in units of normalised pixels; cosine to 0", low=0
    )
    betas: list[float] = option([0.5, 0.9], "Adam betas")
    ce: float = option(0.0, "weight of the observer's cross-entropy", low=0)
    teacher_ce: float = option(
        1.0,
        "weight of the teacher's cross-entropy: it keeps images what the teacher, who labels them, takes for their class",
        low=0,
    )
    alignment: float = option(1.0, "r, weight of the alignment term", low=0)
    classwise: float = option(
        0.5,
        "share of the class-wise statistics in the alignment; the rest is global",
        low=0,
        high=1,
    )
    first_layer: float = option(10.0, "weight of the first layer in the alignment", low=0)
    ema: float = option(
        0.8, "straight-through moving average of the batch statistics; 0: none", low=0, high=0.9999
    )
    crop_scale: list[float] = option([0.5, 1.0], "area range of the crop in each step")
    resolutions: list[int] = option(
        [],
        "FADRM: sides of the images in stages of equal length, such as [200, 224, 200, 224]; empty: one stage at data.resolution",
    )
    residual: float = option(
        0.0, "FADRM: share of the initial image that is mixed in between stages", low=0, high=1
    )


@dataclass
class Relabel:
    """Soft labels."""

    labels: str = option(
        "online",
        "online: teacher at student time; stored: top-k logits of every epoch's view; single: one soft label an image; hard: classes",
        choices=("online", "stored", "single", "hard"),
    )
    topk: int = option(0, "stored: logits kept an image and epoch; 0: all", low=0)
    epochs: int = option(
        0, "stored: epochs of labels, used in turn; 0: as many as the student has", low=0
    )
    adjust: bool = option(
        False, "ADSA: subtract τ·log π from the teacher's logits, τ found on the distilled images"
    )
    batch_size: int = option(256, "images a teacher pass", low=1)


@dataclass
class Evaluate:
    """Students, trained from scratch on the distilled set and on the baselines."""

    nets: list[str] = option([], "networks judged; empty: the teacher's")
    epochs: int = option(1000, "student epochs", low=1)
    batch_size: int = option(25, "images a step", low=1)
    optimizer: str = option("adamw", "optimizer", choices=("adamw", "sgd"))
    lr: float = option(1e-3, "learning rate", low=0)
    momentum: float = option(0.9, "SGD momentum (Nesterov's)", low=0, high=1)
    weight_decay: float = option(0.01, "weight decay", low=0)
    schedule: str = option(
        "cosine",
        "cosine to 0; cosine2: half of a cosine, to half the rate; steps: halved at 80, 90 and 95 % of the epochs",
        choices=("cosine", "cosine2", "steps"),
    )
    kappa_ce: float = option(0.025, "κ1, weight of the cross-entropy with the class", low=0)
    kappa_mse: float = option(1.0, "κ2, weight of the squared error to the teacher's logits", low=0)
    ema: float = option(
        0.99, "moving average of the student's weights; 0: none", low=0, high=0.99999
    )
    seeds: int = option(3, "repeats", low=1)
    crop_scale: list[float] = option([0.5, 1.0], "area range of the student's RandomResizedCrop")
    randaugment: int = option(0, "RandAugment operations an image", low=0)
    magnitude: int = option(9, "RandAugment magnitude of 30", low=0, high=30)
    cutmix: bool = option(True, "CutMix between images of the set")
    random: bool = option(True, "random real images of the same IPC beside the distilled set")
    full_epochs: int = option(
        0,
        "epochs of training on the whole long-tailed set with the same teacher; 0: leave it out",
        low=0,
    )
    matrix: bool = option(
        False, "the label matrix: {random, initial, distilled} × {online, stored, single, hard}"
    )
    split: str = option(
        "test",
        "what students are judged on; choose settings on 'val' only",
        choices=("test", "val"),
    )


@dataclass
class Runtime:
    """How, not what: nothing here changes a fingerprint, except precision."""

    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    precision: str = option(
        "auto",
        "auto: bfloat16 autocast on GPUs, float32 on CPUs",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = option(1, "CPU threads a process; more than one may change the last bits", low=1)
    workers: int = option(4, "decoding threads (DALI) or processes (PyTorch) a rank", low=0)
    checkpoint_seconds: float = option(60.0, "time between checkpoints", low=0)


@dataclass
class Config:
    """One result."""

    name: str = option("", "name of the result: the file's name")
    ipc: int = option(10, "images per class of the distilled set", low=1)
    seed: int = option(0, "seed of everything but the split", low=0)
    data: Data = dataclasses.field(default_factory=Data)
    observer: Expert = dataclasses.field(default_factory=lambda: Expert(norm="batch"))
    teacher: Expert = dataclasses.field(default_factory=Expert)
    train: Train = dataclasses.field(default_factory=Train)
    strategies: Strategies = dataclasses.field(default_factory=Strategies)
    calibrate: Calibrate = dataclasses.field(default_factory=Calibrate)
    initialize: Initialize = dataclasses.field(default_factory=Initialize)
    recover: Recover = dataclasses.field(default_factory=Recover)
    relabel: Relabel = dataclasses.field(default_factory=Relabel)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    runtime: Runtime = dataclasses.field(default_factory=Runtime)


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`, or an error that names the key."""
    shown = kind.__name__ if isinstance(kind, type) else str(kind)
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}: expected a list, got {value!r}")
        return [_coerce(v, get_args(kind)[0], f"{key}[{i}]") for i, v in enumerate(value)]
    if get_origin(kind) in (Union, types.UnionType):
        return None if value is None else _coerce(value, get_args(kind)[0], key)
    if kind in (bool, dict):
        if isinstance(value, kind):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            return int(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind is str:
        if isinstance(value, str):
            return value
        if value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    raise UserError(
        f"{key}: expected {shown}, got {value!r}"
        + (" (quote it: YAML reads on/off/yes/no as booleans)" if kind is str else "")
    )


def fill(target: Any, values: Any, prefix: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'}: expected settings, got {values!r}")
    hints = typing.get_type_hints(type(target))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            close = ", ".join(sorted(hints))
            raise UserError(f"unknown config key '{key}' (known here: {close})")
        if dataclasses.is_dataclass(hints[name]):
            fill(getattr(target, name), value, f"{key}.")
        else:
            setattr(target, name, _coerce(value, hints[name], key))


def check_values(target: Any, prefix: str = "") -> None:
    for f in dataclasses.fields(target):
        value, key, meta = getattr(target, f.name), f"{prefix}{f.name}", f.metadata
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.")
            continue
        if meta.get("choices") and value not in meta["choices"]:
            raise UserError(f"{key}: {value!r} is none of {', '.join(map(str, meta['choices']))}")
        if meta.get("low") is not None and not value >= meta["low"]:
            raise UserError(f"{key}: must be at least {meta['low']:g}, got {value!r}")
        if meta.get("high") is not None and not value <= meta["high"]:
            raise UserError(f"{key}: must be at most {meta['high']:g}, got {value!r}")
        if (
            f.name == "crop_scale"
            and value
            and not (len(value) == 2 and 0 < value[0] <= value[1] <= 1)
        ):
            raise UserError(f"{key}: expected two areas 0 < low <= high <= 1, got {value!r}")


def check(config: Config) -> list[str]:
    """Raise `UserError` on a wrong setting; return warnings about settings that have no effect."""
    check_values(config)
    data, warnings = config.data, []
    if data.source == "list" and not (data.train_list and data.test_list):
        raise UserError("data.train_list, data.test_list: both are needed with data.source=list")
    if data.source != "digits" and not data.path:
        raise UserError(
            "data.path: say where the images are, for instance --set data.path=/data/cifar10"
        )
    if data.profile == "counts" and not data.counts:
        raise UserError("data.counts: needed with data.profile=counts")
    if len(config.recover.betas) != 2 or not all(0 <= b < 1 for b in config.recover.betas):
        raise UserError(
            f"recover.betas: expected two numbers in [0, 1), got {config.recover.betas!r}"
        )
    if config.recover.resolutions and (
        min(config.recover.resolutions) < 4
        or len(config.recover.resolutions) > config.recover.iterations > 0
    ):
        raise UserError(
            f"recover.resolutions: expected at most as many sides as iterations, each at least 4, got {config.recover.resolutions!r}"
        )
    if config.recover.residual and len(config.recover.resolutions) < 2:
        warnings.append("recover.residual has no effect without two or more recover.resolutions")
    for section in ("initialize", "recover", "evaluate"):
        if not getattr(config, section).crop_scale:
            raise UserError(
                f"{section}.crop_scale: expected two areas; [1.0, 1.0] keeps whole images"
            )
    if config.evaluate.split == "val" and not (
        data.val_per_class or data.val_list or data.source == "shards"
    ):
        raise UserError("evaluate.split=val needs data.val_per_class or data.val_list")
    if config.recover.iterations and not (
        config.recover.ce or config.recover.teacher_ce or config.recover.alignment
    ):
        raise UserError(
            "recover.ce, recover.teacher_ce, recover.alignment: all are 0, so recovery would do nothing; set recover.iterations=0 if that is meant"
        )
    if config.recover.ce == config.recover.teacher_ce == 0 and config.recover.alignment not in (
        0.0,
        1.0,
    ):
        warnings.append(
            "recover.alignment scales the whole loss when recover.ce and teacher_ce are 0: Adam does not see it"
        )
    if config.train.engine == "deepspeed" and config.train.compile:
        raise UserError("train.compile works with train.engine=ddp only")
    if config.train.engine != "deepspeed" and config.train.deepspeed != Train.deepspeed:
        warnings.append("train.deepspeed has no effect with train.engine=ddp")
    for role in ("observer", "teacher"):
        expert = getattr(config, role)
        if expert.crop_scale and expert.crop_padding != Expert.crop_padding:
            warnings.append(f"{role}.crop_padding has no effect beside {role}.crop_scale")
        if not expert.net.startswith("convnet") and expert.width != Expert.width:
            warnings.append(f"{role}.width has no effect on {expert.net}")
        if not config.strategies.debias and expert.contrast != 1.0:
            warnings.append(f"{role}.contrast has no effect with strategies.debias=false")
    if not config.strategies.calibrate and config.recover.classwise not in (
        0.0,
        Recover.__dataclass_fields__["classwise"].default,
    ):
        warnings.append("recover.classwise has no effect with strategies.calibrate=false")
    if config.relabel.labels != "stored" and not config.evaluate.matrix and config.relabel.topk:
        warnings.append(f"relabel.topk has no effect with relabel.labels={config.relabel.labels}")
    if data.source == "shards":
        given = [
            n
            for n in (
                "profile",
                "imbalance_factor",
                "max_per_class",
                "val_per_class",
                "store_resolution",
            )
            if getattr(data, n) != getattr(Data(), n)
        ]
        warnings += [
            f"data.{n} has no effect with data.source=shards: the set is taken as it is"
            for n in given
        ]
    if data.store_quality and not data.store_resolution:
        warnings.append(
            "data.store_quality has no effect without data.store_resolution: original bytes are kept"
        )
    if data.profile != "exponential" and data.imbalance_factor != 1:
        warnings.append(f"data.imbalance_factor has no effect with data.profile={data.profile}")
    return warnings


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> list[dict]:
    """The layers of a config file, its ``base`` first."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: 'base' leads back to itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines")
    base = values.pop("base", None)
    return [*(_read_yaml(path.parent / str(base), (*seen, path)) if base else []), values]


def load(path: str | Path, sets: typing.Sequence[str] = ()) -> Config:
    """The config in `path` with ``a.b=c`` settings laid over it.

    Raises `UserError` naming the key of whatever is unknown, of the wrong type or out of range.
    """
    path, config = Path(path), Config()
    for layer in _read_yaml(path):
        fill(config, layer, "")
    for item in sets:
        key, sep, text = item.partition("=")
        if not sep:
            raise UserError(f"--set {item}: expected a.b=value")
        try:
            nested: Any = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise UserError(
                f"--set {item}: {text!r} is not a value (quote lists, and leave no blanks in them: 'a.b=[1,2]')"
            ) from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        fill(config, nested, "")
    config.name = config.name or path.stem
    check(config)
    return config


def from_dict(values: dict) -> Config:
    """The config that `to_dict` gave."""
    config = Config()
    fill(config, values, "")
    return config


def to_dict(config: Any) -> dict:
    """Plain dictionaries, in the order of definition."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def reference() -> str:
    """Every key with its type, default and meaning, as ``ltdd-scale config`` prints it."""
    lines: list[str] = []

    def walk(target: Any, prefix: str) -> None:
        hints = typing.get_type_hints(type(target))
        nested = []
        for f in dataclasses.fields(target):
            value = getattr(target, f.name)
            if dataclasses.is_dataclass(value):
                nested.append((value, f"{prefix}{f.name}."))
                continue
            kind = hints[f.name]
            shown = (
                kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
            )
            lines.append(f"{prefix}{f.name} = {value!r} ({shown})\n      {f.metadata['doc']}")
        for value, inner in nested:
            lines.append(f"\n# {inner.rstrip('.')}: {type(value).__doc__.splitlines()[0]}")
            walk(value, inner)

    walk(Config(), "")
    return "\n".join(lines)
