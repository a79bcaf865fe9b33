"""The config of one result: composed of the settings of every room."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from ltdd_scale.data.settings import Chosen, Data
from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import (
    OBSERVER,
    OWN,
    SAID,
    Architecture,
    Expert,
    Role,
    Teacher,
    Train,
    idle,
    is_brought,
    is_observer,
    trains_teacher,
    usual_padding,
)
from ltdd_scale.experts.trajectories.settings import Classifier, Trajectories, without_effect
from ltdd_scale.judging import choose
from ltdd_scale.judging.catalog import PROTOCOLS
from ltdd_scale.judging.settings import Choose, Evaluate
from ltdd_scale.labels.catalog import KINDS, SINGLE
from ltdd_scale.labels.settings import Relabel
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.publish.settings import Publish
from ltdd_scale.runtime.settings import Runtime
from ltdd_scale.settings import Settings, Text, Whole, option


class _Common(Settings):
    name: Text = option("", "name of the result: the file's name")
    method: Text = option("rldd", f"how the set is distilled: {', '.join(METHODS)}")
    protocol: Text = option("single_stage", f"how it is judged: {', '.join(PROTOCOLS)}")
    ipc: Whole = option(10, "images per class of the distilled set", low=1)
    seed: Whole = option(0, "seed of everything but the split", low=0)
    data: Data = Data()
    observer: Role = Role()
    teacher: Teacher = Teacher()
    train: Train = Train()
    trajectories: Trajectories = Trajectories()
    classifiers: Classifier = Classifier()


class _Above(Settings):
    relabel: Relabel = Relabel()
    choose: Choose = Choose()
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()
    runtime: Runtime = Runtime()


def _compose() -> type[Settings]:
    """`Config`: the common sections, then those of each method and protocol."""
    fields: dict[str, Any] = {}
    for owner in (*METHODS.values(), *PROTOCOLS.values()):
        for name, kind in owner.sections.items():
            fields[name] = (kind, Field(default=kind()))
    between = create_model("_Methods", __base__=Settings, **fields)
    made = create_model("Config", __base__=(_Above, between, _Common))
    made.__doc__ = "One result."
    return made


Config: Any = _compose()


def check(config: Any) -> list[str]:
    """Raise `UserError` on settings that cannot work together; return warnings about settings that
    have no effect."""
    warnings: list[str] = []
    choices = (("method", METHODS), ("protocol", PROTOCOLS))
    for name, catalog in choices:
        if getattr(config, name) not in catalog:
            raise UserError(f"{name}: {getattr(config, name)!r} is none of {', '.join(catalog)}")
    _check_labels(config, warnings)
    _check_data(config, warnings)
    _check_whitening(config, warnings)
    _check_publish(config, warnings)
    _check_idle(config, warnings)
    if config.runtime.ranks_per_gpu > 1 and config.runtime.device == "cpu":
        warnings.append("runtime.ranks_per_gpu has no effect with runtime.device=cpu")
    choose.check(config)
    if not config.evaluate.crop_scale:
        raise UserError("evaluate.crop_scale: expected two areas; [1.0, 1.0] keeps whole images")
    if config.evaluate.plain == "expert" and is_brought(config):
        raise UserError(
            "evaluate.plain=expert: how an expert from elsewhere was trained is not known, so none "
            "stands in for the plain network; set own or none"
        )
    if not config.evaluate.nets:
        raise UserError("evaluate.nets: name at least one network, such as [convnet3]")
    warnings += METHODS[config.method].check(config)
    protocol, experts = PROTOCOLS[config.protocol], METHODS[config.method].experts(config)
    warnings += protocol.check(config, experts)
    _check_protocols(config, warnings)
    warnings += without_effect(config)
    if config.train.engine == "deepspeed" and config.train.compile:
        raise UserError("train.compile works with train.engine=ddp only")
    if config.train.engine == "deepspeed" and config.runtime.ranks_per_gpu > 1:
        raise UserError(
            "runtime.ranks_per_gpu: DeepSpeed's ranks have a GPU each; set it to 1, or "
            "train.engine=ddp"
        )
    if config.train.engine != "deepspeed" and config.train.deepspeed != Train().deepspeed:
        warnings.append("train.deepspeed has no effect with train.engine=ddp")
    for role in ("observer", "teacher"):
        _check_expert(role, config, warnings)
    return warnings


def _check_expert(role: str, config: Any, warnings: list[str]) -> None:
    expert, observer = getattr(config, role), config.observer
    usual = Expert(crop_padding=usual_padding(config.data.resolution))
    unsaid = usual if role == "observer" else observer
    given = [n for n in Expert.model_fields if getattr(expert, n) != getattr(unsaid, n)]
    if role == "observer":
        given = [n for n in given if not _taken_over(n, config)]
        if expert.weights in (OBSERVER, OWN):
            raise UserError(
                f"observer.weights={expert.weights}: that is for the teacher; name a file"
            )
    if expert.weights not in ("", OWN):
        said = SAID
        if expert.weights == OBSERVER:
            _check_shared(expert, observer)
            said = {"weights", *Architecture.model_fields}
        names = ", ".join(f"{role}.{n}" for n in given if n not in said)
        if names:
            warnings.append(f"without effect beside {role}.weights, nothing is trained: {names}")
        return
    if expert.head_epochs:
        raise UserError(f"{role}.head_epochs goes with {role}.weights")
    unread = idle(expert)
    warnings += [
        f"{role}.{name} has no effect beside {role}.{unread[name]}"
        for name in given
        if name in unread
    ]


def _taken_over(name: str, config: Any) -> bool:
    """Whether a teacher with a training of its own has this setting of the observer, and reads
    it."""
    teacher = config.teacher
    same = getattr(teacher, name) == getattr(config.observer, name)
    return trains_teacher(config) and same and name not in idle(teacher)


def _check_shared(teacher: Role, observer: Role) -> None:
    if teacher.head_epochs:
        raise UserError(
            f"teacher.head_epochs goes with weights from a file: with teacher.weights={OBSERVER} "
            "teacher and observer are one network"
        )
    for name in Architecture.model_fields:
        if name in idle(teacher):
            continue
        own, other = getattr(teacher, name), getattr(observer, name)
        if own != other:
            raise UserError(
                f"teacher.weights={OBSERVER}, but teacher.{name}={own} and observer.{name}="
                f"{other}: leave out teacher.{name}, or teacher.weights"
            )


def _check_protocols(config: Any, warnings: list[str]) -> None:
    others = (p for name, p in PROTOCOLS.items() if name != config.protocol)
    for section, kind in ((s, k) for p in others for s, k in p.sections.items()):
        if getattr(config, section) != kind():
            warnings.append(f"{section} has no effect with protocol={config.protocol}")


def _check_labels(config: Any, warnings: list[str]) -> None:
    kind, matrix = config.relabel.labels, config.evaluate.matrix_labels
    for key, names in (("relabel.labels", [kind]), ("evaluate.matrix_labels", matrix)):
        for name in names:
            if name not in KINDS:
                raise UserError(f"{key}: {name!r} is none of {', '.join(KINDS)}")
    if KINDS[kind].of_set and not METHODS[config.method].learned(config):
        others = ", ".join(name for name, other in KINDS.items() if not other.of_set)
        raise UserError(
            f"relabel.labels={kind}: method={config.method} learns no labels with these settings; "
            f"choose one of {others}"
        )
    if not matrix:
        raise UserError(
            "evaluate.matrix_labels: name at least one kind, such as [hard]; "
            "evaluate.matrix=false leaves the matrix out"
        )
    if not config.evaluate.matrix and matrix != Evaluate().matrix_labels:
        warnings.append("evaluate.matrix_labels has no effect without evaluate.matrix=true")
    stored = kind == "stored" or (config.evaluate.matrix and "stored" in matrix)
    if config.relabel.topk and not stored:
        warnings.append(f"relabel.topk has no effect with relabel.labels={kind}")
    used = [KINDS[name] for name in (kind, *(matrix if config.evaluate.matrix else []))]
    soft = any(other.teacher for other in used)
    if soft and config.relabel.labeller == "both" and is_observer(config):
        raise UserError(
            "relabel.labeller=both wants two networks, and here the teacher is the observer; "
            f"teacher.weights={OWN} trains a second one"
        )
    # Labels of views have single ones beside them.
    single = KINDS[kind].of_views or any(other.name == SINGLE for other in used)
    if config.relabel.views > 1 and not single:
        warnings.append(f"relabel.views has no effect with relabel.labels={kind}")
    if config.relabel.epochs and not stored:
        warnings.append(f"relabel.epochs has no effect with relabel.labels={kind}")
    if not soft:
        warnings += [
            f"relabel.{name} has no effect with relabel.labels={kind}"
            for name in ("class_share", "labeller", "adjust", "batch_size")
            if getattr(config.relabel, name) != getattr(Relabel(), name)
        ]
    _check_soft(config.evaluate, None if soft else kind, warnings)


def _check_soft(asked: Evaluate, hard: str | None, warnings: list[str]) -> None:
    """How students learn from soft labels. `hard`: the configured kind, where no student has
    such."""
    if asked.soft_loss == "mse" and asked.temperature != Evaluate().temperature:
        warnings.append("evaluate.temperature has no effect with evaluate.soft_loss=mse")
    if hard is not None:
        warnings += [
            f"evaluate.{name} has no effect with relabel.labels={hard}"
            for name in ("soft_loss", "temperature", "order", "kappa_ce", "kappa_mse")
            if getattr(asked, name) != getattr(Evaluate(), name)
        ]
    elif asked.order != "both" and asked.kappa_ce != Evaluate().kappa_ce:
        warnings.append(f"evaluate.kappa_ce has no effect with evaluate.order={asked.order}")


def _check_idle(config: Any, warnings: list[str]) -> None:
    """Settings of students and of the choice that nothing reads beside others."""
    asked, choice = config.evaluate, config.choose
    for name, beside, unread in (
        ("momentum", "optimizer=adamw", asked.optimizer == "adamw"),
        ("magnitude", "randaugment=0", not asked.randaugment),
    ):
        if unread and getattr(asked, name) != getattr(Evaluate(), name):
            warnings.append(f"evaluate.{name} has no effect with evaluate.{beside}")
    if choice.how == "never":
        warnings += [
            f"choose.{name} has no effect with choose.how=never"
            for name in ("share", "steps", "seeds")
            if getattr(choice, name) != getattr(Choose(), name)
        ]


def _check_data(config: Any, warnings: list[str]) -> None:
    data = config.data
    if data.source == "list" and not (data.train_list and data.test_list):
        raise UserError("data.train_list, data.test_list: both are needed with data.source=list")
    if data.source != "digits" and not data.path:
        raise UserError(
            "data.path: say where the images are, for instance --set data.path=/data/cifar10"
        )
    if data.profile == "counts" and not data.counts:
        raise UserError("data.counts: needed with data.profile=counts")
    warnings += [
        f"data.{name} has no effect with data.source={data.source}"
        for name in ("test_fraction", "min_per_class", "val_folder")
        if getattr(data, name) and data.source != "folder"
    ]
    if 0 < data.store_resolution < data.resolution:
        warnings.append(
            f"data.store_resolution={data.store_resolution} is smaller than data.resolution="
            f"{data.resolution}: networks would see enlarged images"
        )
    held = [f"data.{n}" for n in ("val_per_class", "val_list", "val_folder") if getattr(data, n)]
    held += ["data.source=shards"] if data.source == "shards" else []
    if data.val_fraction and held:
        raise UserError(
            f"data.val_fraction: {' and '.join(held)} say which images are for validation; keep one"
        )
    if config.evaluate.split == "val" and not (held or data.val_fraction):
        raise UserError(
            "evaluate.split=val needs data.val_per_class, data.val_fraction, data.val_list or "
            "data.val_folder"
        )
    if data.source == "shards":
        names = ("profile", "imbalance_factor", "max_per_class", "val_per_class")
        given = [
            n for n in (*names, "store_resolution") if getattr(data, n) != getattr(Chosen(), n)
        ]
        warnings += [
            f"data.{n} has no effect with data.source=shards: the set is taken as it is"
            for n in given
        ]
    if data.store_quality and not data.store_resolution:
        warnings.append(
            "data.store_quality has no effect without data.store_resolution: original bytes "
            "are kept"
        )
    if data.profile != "exponential" and data.imbalance_factor != 1:
        warnings.append(f"data.imbalance_factor has no effect with data.profile={data.profile}")


def _check_whitening(config: Any, warnings: list[str]) -> None:
    if not config.data.zca:
        if config.data.zca_eps != Data().zca_eps:
            warnings.append("data.zca_eps has no effect with data.zca=false")
        return
    able = [name for name, method in METHODS.items() if method.whitened]
    if config.method not in able:
        raise UserError(
            f"data.zca: method={config.method} sees normalised images only; choose one of "
            f"{', '.join(able)}, or set data.zca=false"
        )
    # It would have to be trained on whitened images.
    labels = KINDS[config.relabel.labels].teacher
    if labels or PROTOCOLS[config.protocol].teacher(config):
        others = [name for name, kind in KINDS.items() if not kind.teacher]
        more = ["evaluate.matrix", "evaluate.plain"]
        if config.protocol == "two_stage":
            more.append(f"two_stage.network (now {config.two_stage.network})")
        raise UserError(
            "data.zca: a teacher sees normalised images only, so nothing must need one: set "
            f"relabel.labels (now {config.relabel.labels}) to {' or '.join(others)}, and "
            f"{', '.join(more[:-1])} and {more[-1]} accordingly; or set data.zca=false"
        )


def _check_publish(config: Any, warnings: list[str]) -> None:
    publish = config.publish
    if publish.images in ("png", "webp") and publish.quality != Publish().quality:
        warnings.append(f"publish.quality has no effect with publish.images={publish.images}")
    if publish.license_link and not publish.license:
        warnings.append("publish.license_link has no effect without publish.license")
