"""The uni-level method (RLDD): statistical alignment between debiased experts and images.

Observer → fair BatchNorm statistics → crops that the teacher chooses → recovery of the images.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.settings import Seen
from ltdd_scale.errors import UserError
from ltdd_scale.methods.contract import Method
from ltdd_scale.methods.rldd.settings import Calibrate, Initialize, Net, Recover
from ltdd_scale.stage import Division, Section, Stage, places

HERE = "ltdd_scale.methods.rldd"
# What every stage that shows images to networks depends on.
SHOWN = {**places("seed", "runtime.precision"), "images": Section("data", Seen)}


def experts(config: Any) -> tuple[str, ...]:
    """The observer always; the teacher where it chooses crops or guards recovery."""
    teacher = config.initialize.needs_teacher or config.recover.needs_teacher
    return ("observer", "teacher") if teacher else ("observer",)


def stages(config: Any) -> tuple[Stage, ...]:
    guard = {"teacher": "teacher"} if config.recover.needs_teacher else {}
    judge = {"teacher": "teacher"} if config.initialize.needs_teacher else {}
    # Costs depend on the networks; fingerprints know them anyway, by the experts that are inputs.
    observer = {"observer": Section("observer", Net)}
    teacher = {"teacher": Section("teacher", Net)}
    calibrate = Stage(
        name="calibrate",
        kind="calibrate",
        version=5,  # 5: a lead corrects variances of zero, or is given up
        run=f"{HERE}.calibrate:run",
        reads={"calibrate": "calibrate", **observer, **SHOWN},
        inputs={"shard": "shard", "observer": "observer"},
        cost=f"{HERE}.cost:calibrate",
        help="measure fair BatchNorm statistics",
    )
    initialize = Stage(
        name="initialize",
        kind="initialize",
        version=4,  # 4: whole images are centre squares, however they are decoded
        run=f"{HERE}.initialize:run",
        reads={
            "initialize": "initialize",
            **places("ipc"),
            **(teacher if judge else {}),
            **SHOWN,
        },
        inputs={"shard": "shard", **judge},
        cost=f"{HERE}.cost:initialize",
        help="choose the real images to start from",
    )
    recover = Stage(
        name="recover",
        kind="recover",
        version=10,  # 10: a chunk has few classes with all their images
        run=f"{HERE}.recover:run",
        reads={
            "recover": "recover",
            **places("ipc", "calibrate.variance", "calibrate.conv_inputs"),
            **observer,
            **(teacher if guard else {}),
            **SHOWN,
        },
        inputs={"shard": "shard", "calibrate": "calibrate", "initialize": "initialize", **guard},
        division=Division.CHUNKS,
        pieces=f"{HERE}.chunks:pieces",
        cost=f"{HERE}.cost:recover",
        check=f"{HERE}.matched:check",
        help="align the images with the statistics",
        smaller="recover.batch_size or ipc",
    )
    return calibrate, initialize, recover


def _check_initialize(config: Any) -> list[str]:
    own, usual, warnings = config.initialize, Initialize(), []
    if config.data.resolution % own.mosaic:
        raise UserError(
            f"initialize.mosaic={own.mosaic}: data.resolution must be a multiple of it, "
            f"got {config.data.resolution}"
        )
    if own.pool != usual.pool and not own.by_features:
        warnings.append(f"initialize.pool has no effect with initialize.select={own.select}")
    if own.crop_scale and own.keep != usual.keep:
        warnings.append("initialize.keep has no effect beside initialize.crop_scale")
    if own.crops != usual.crops:
        if own.select == "random":
            warnings.append("initialize.crops has no effect with initialize.select=random")
        elif own.draws(own.crop_scale) != own.crops:
            warnings.append(
                f"initialize.crops has no effect with initialize.select={own.select} and whole "
                "images: one candidate each"
            )
    return warnings


def _check_terms(recover: Recover) -> list[str]:
    """The weights of the loss, and what hangs on them."""
    usual, warnings = Recover(), []
    others = recover.ce, recover.teacher_ce, recover.matching
    if recover.iterations and not (any(others) or recover.alignment):
        raise UserError(
            "recover.ce, recover.teacher_ce, recover.alignment, recover.matching: all are 0, so "
            "recovery would do nothing; set recover.iterations=0 if that is meant"
        )
    if not any(others) and recover.alignment not in (0.0, 1.0):
        warnings.append(
            "recover.alignment scales the whole loss when recover.ce, teacher_ce and matching are "
            "0: Adam does not see it"
        )
    if recover.guard != usual.guard and not recover.teacher_ce:
        warnings.append("recover.guard has no effect with recover.teacher_ce=0")
    if not recover.iterations and recover.settle != usual.settle:
        warnings.append("recover.settle has no effect with recover.iterations=0")
    if recover.stop == 1:
        warnings.append("recover.stop=1 never stops a chunk: 0 says so, and asks the teacher less")
    if not recover.matching:
        warnings += [
            f"recover.{name} has no effect with recover.matching=0"
            for name in ("matching_width", "matching_real")
            if getattr(recover, name) != getattr(usual, name)
        ]
    return warnings


def check(config: Any) -> list[str]:
    recover, warnings = config.recover, _check_initialize(config)
    if len(recover.betas) != 2 or not all(0 <= b < 1 for b in recover.betas):
        raise UserError(f"recover.betas: expected two numbers in [0, 1), got {recover.betas!r}")
    sides = recover.resolutions
    if sides and (min(sides) < 4 or len(sides) > recover.iterations > 0):
        raise UserError(
            "recover.resolutions: expected at most as many sides as iterations, each at least 4, "
            f"got {sides!r}"
        )
    if recover.residual and len(sides) < 2:
        warnings.append("recover.residual has no effect without two or more recover.resolutions")
    if not recover.crop_scale:
        raise UserError("recover.crop_scale: expected two areas; [1.0, 1.0] keeps whole images")
    warnings += _check_terms(recover)
    if not config.calibrate.fair and recover.classwise not in (0.0, Recover().classwise):
        warnings.append("recover.classwise has no effect with calibrate.fair=false")
    return warnings + _check_calibrate(config.calibrate)


def _check_calibrate(calibrate: Calibrate) -> list[str]:
    unread = () if calibrate.fair else ("lead", "conv_inputs", "variance", "recalibrate")
    warnings = [
        f"calibrate.{name} has no effect with calibrate.fair=false"
        for name in unread
        if getattr(calibrate, name) != getattr(Calibrate(), name)
    ]
    if calibrate.fair and calibrate.lead and not calibrate.recalibrate:
        warnings.append("calibrate.lead has no effect with calibrate.recalibrate=false")
    return warnings


RLDD = Method(
    name="rldd",
    title="uni-level statistical alignment with debiased experts",
    sections={"calibrate": Calibrate, "initialize": Initialize, "recover": Recover},
    stages=stages,
    distilled="recover",
    initial="initialize",
    experts=experts,
    judged={"calibrated observer": ("calibrate", "observer.pt")},
    check=check,
)
