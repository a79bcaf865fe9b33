import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.config.reference import reference
from ltdd_scale.config.root import Config, check
from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import is_observer
from ltdd_scale.methods.catalog import METHODS


def write(tmp_path: Path, text: str, name: str = "a.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_numbers_that_yaml_reads_as_strings_are_floats(tmp_path):
    c = load.load(
        write(tmp_path, "teacher: {lr: 1e-3, weight_decay: 5E-4}\n"), ["recover.lr=2e-2", "ipc=50"]
    )
    assert (c.teacher.lr, c.teacher.weight_decay, c.recover.lr, c.ipc) == (1e-3, 5e-4, 2e-2, 50)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reocver: {lr: 1}", ["unknown config key 'reocver'"]),
        ("recover: {lrr: 1}", ["unknown config key 'recover.lrr'", "iterations"]),
        ("ipc: ten", ["ipc", "expected int", "'ten'"]),
        ("ipc: 0", ["ipc", "at least 1"]),
        ("ipc: 1.5", ["ipc", "expected int"]),
        ("teacher: {lr: fast}", ["teacher.lr", "expected float"]),
        ("data: {mirror: 1}", ["data.mirror", "expected bool"]),
        ("data: {source: on}", ["data.source", "quote it"]),
        ("data: {source: web}", ["data.source", "digits, folder, list"]),
        ("data: {source: folder}", ["data.path"]),
        ("recover: 3", ["recover", "expected settings"]),
        ("recover: {betas: [1]}", ["recover.betas"]),
        ("recover: {crop_scale: [0.9, 0.1]}", ["recover.crop_scale"]),
        ("recover: {crop_scale: []}", ["recover.crop_scale", "two areas"]),
        ("recover: {betas: [0.5, 1.0]}", ["recover.betas"]),
        ("ipc: .inf", ["ipc", "expected int"]),
        ("ipc: .nan", ["ipc", "expected int"]),
        ("data: {imbalance_factor: 0.5}", ["data.imbalance_factor", "at least 1"]),
        ("evaluate: {split: val}", ["val_per_class"]),
        ("a: [", ["not valid YAML"]),
        ("method: magic", ["method", "rldd"]),
        ("relabel: {labels: magic}", ["relabel.labels", "online, stored, single, hard"]),
        ("evaluate: {nets: []}", ["evaluate.nets"]),
        (
            "evaluate: {matrix_labels: [hard, magic]}",
            ["evaluate.matrix_labels", "'magic'", "single"],
        ),
        ("evaluate: {matrix_labels: []}", ["evaluate.matrix_labels", "evaluate.matrix=false"]),
        ("relabel: {labels: learned}", ["relabel.labels=learned", "method=rldd", "stored"]),
        ("{relabel: {labels: learned}, method: dm}", ["method=dm learns no labels"]),
        ("train: {debias: false}", ["train.debias is called observer.reweight_power and"]),
        ("initialize: {confident: false}", ["initialize.confident is called initialize.select"]),
    ],
)
def test_a_wrong_config_names_the_key(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        load.load(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_base_is_laid_under(tmp_path):
    write(tmp_path, "ipc: 10\nrecover: {lr: 0.1, iterations: 7}\n", "base.yaml")
    c = load.load(write(tmp_path, "base: base.yaml\nipc: 50\nrecover: {lr: 0.2}\n", "top.yaml"))
    assert (c.name, c.ipc, c.recover.lr, c.recover.iterations) == ("top", 50, 0.2, 7)
    write(tmp_path, "base: loop.yaml\n", "loop.yaml")
    with pytest.raises(UserError, match="leads back to itself"):
        load.load(tmp_path / "loop.yaml")


def test_what_is_not_said_of_the_teacher_is_as_the_observers(tmp_path):
    """Wherever it is said: in a file, in its base, in a later setting, in a config that was
    saved."""
    write(tmp_path, "observer: {net: resnet32, epochs: 7}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nobserver: {lr: 0.5}\n", "top.yaml")
    c = load.load(path, ["observer.batch_size=16"])
    assert c.teacher.weights == "" and is_observer(c) and check(c) == []
    assert (c.teacher.net, c.teacher.lr, c.teacher.batch_size) == ("resnet32", 0.5, 16)
    saved = load.from_text(load.to_yaml(c))
    assert saved == c and load.changed(saved, {"observer.epochs": 9}).teacher.epochs == 9
    own = load.load(path, ["teacher.epochs=9"])
    assert not is_observer(own) and (own.teacher.net, own.teacher.epochs) == ("resnet32", 9)
    assert load.changed(own, {"observer.epochs": 20}).teacher.epochs == 9
    # Of what is not the teacher's own, no warning names the teacher.
    glmc = ["observer.recipe=glmc", "observer.contrast=2", "teacher.recipe=balanced"]
    assert check(load.load(path, glmc)) == []
    # A setting that a training does not read sets nothing apart, and is said to do nothing.
    for setting in ("width=64", "norm=instance"):
        idle = load.load(path, [f"teacher.{setting}"])
        name = setting.partition("=")[0]
        assert is_observer(idle)
        assert check(idle) == [f"teacher.{name} has no effect beside teacher.net=resnet32"]
    # What the observer does not read, a teacher with a training of its own may.
    heir = load.load(path, ["observer.weights=w.pt", "teacher.weights=own"])
    assert not is_observer(heir) and check(heir) == []
    rows = ["observer.recipe=glmc", "observer.prior=0", "observer.contrast=2"]
    assert check(load.load(path, [*rows, "teacher.recipe=balanced"])) == []
    assert check(load.load(path, rows)) == [
        "observer.prior has no effect beside observer.recipe=glmc"
    ]
    # Images that grow are for networks that take any size.
    small = load.load(path, ["observer.begin_resolution=16"])
    assert is_observer(small) and small.teacher.begin_resolution == 16
    other = load.load(path, ["observer.begin_resolution=16", "teacher.net=convnet3"])
    assert other.teacher.begin_resolution == 0 and load.from_text(load.to_yaml(other)) == other
    # An expert from elsewhere is the teacher too.
    brought = load.load(path, ["observer.weights=w.pt"])
    assert is_observer(brought) and brought.teacher.weights == ""


def test_the_random_shift_is_an_eighth_of_the_image_where_nothing_is_said(tmp_path):
    path = write(tmp_path, "data: {resolution: 64}\nobserver: {net: resnet32}\n")
    c = load.load(path)
    assert (c.observer.crop_padding, c.teacher.crop_padding) == (8, 8) and check(c) == []
    assert load.load(path, ["data.resolution=16"]).observer.crop_padding == 2
    assert load.load(path, ["observer.crop_padding=3"]).teacher.crop_padding == 3
    own = load.load(path, ["teacher.crop_padding=3"])
    assert (own.observer.crop_padding, own.teacher.crop_padding) == (8, 3)
    # What nobody said is not said to do nothing.
    assert check(load.load(path, ["observer.crop_scale=[0.5,1.0]"])) == []


def test_settings_without_effect_are_said(tmp_path):
    c = load.load(write(tmp_path, "teacher: {net: resnet32, width: 64}\nrelabel: {topk: 5}\n"))
    said = " ".join(check(c))
    assert "teacher.width" in said and "relabel.topk" in said
    few = "evaluate: {matrix: true, matrix_labels: [hard]}\nrelabel: {topk: 5}\n"
    assert ["relabel.topk" in text for text in check(load.load(write(tmp_path, few)))] == [True]
    unused = load.load(write(tmp_path, "evaluate: {matrix_labels: [hard]}\n"))
    assert ["matrix_labels has no effect" in text for text in check(unused)] == [True]
    for text, name in (("momentum: 0.5", "momentum"), ("cutmix: 0, paste_power: 1", "paste_power")):
        (said,) = check(load.load(write(tmp_path, f"observer: {{{text}}}")))
        assert said.startswith(f"observer.{name} has no effect beside observer.")
    small = write(tmp_path, "data: {store_resolution: 16, resolution: 32}")
    assert ["networks would see enlarged images" in said for said in check(load.load(small))] == [
        True
    ]
    used = load.load(write(tmp_path, "evaluate: {matrix: true}\nrelabel: {topk: 5}\n"))
    assert check(used) == []


def test_a_setting_that_no_training_reads_makes_no_second_expert(tmp_path):
    config = load.load(write(tmp_path, "teacher: {momentum: 0.5, magnitude: 5}\n"))
    assert is_observer(config)
    assert not is_observer(load.load(write(tmp_path, "teacher: {lr: 0.1}\n")))


def test_learned_labels_are_for_methods_that_learn_them(tmp_path, monkeypatch):
    """A method's settings decide: here it learns labels with an IPC above 1."""
    method = dataclasses.replace(METHODS["dm"], learned=lambda config: config.ipc > 1)
    monkeypatch.setitem(METHODS, "dm", method)
    text = "{method: dm, relabel: {labels: learned}, evaluate: {plain: none}}"
    config = load.load(write(tmp_path, text))
    assert check(config) == [] and recipe.roles(config).learned
    stages = {s.name: s for s in recipe.stages(config, "")}
    assert recipe.experts(config) == () and stages["relabel"].inputs["distilled"] == "match"
    assert "student/distilled-learned-convnet3-s0" in stages
    with pytest.raises(UserError, match="learns no labels"):
        load.load(write(tmp_path, text), ["ipc=1"])


def test_every_config_loads_and_survives_a_round_trip():
    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(found) >= 10
    for path in found:
        c = load.load(path)
        assert load.from_text(load.to_yaml(c)) == c
        assert check(c) == []


def test_the_reference_has_every_key():
    text = reference()

    def walk(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                assert f"{prefix}{key} = " in text

    walk(Config().model_dump())


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().ipc = 3


def test_a_section_keeps_its_own_defaults(tmp_path):
    """Experts have BatchNorm and students have not, whatever else is set."""
    c = load.load(write(tmp_path, "observer: {epochs: 3}\nevaluate: {epochs: 7}\n"))
    assert (c.observer.norm, c.teacher.norm, c.evaluate.norm) == ("batch", "batch", "instance")
    assert (c.observer.epochs, c.evaluate.epochs) == (3, 7)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("relabel: {labels: hard, class_share: 0.1}", "relabel.class_share"),
        ("relabel: {labels: hard, views: 2}", "relabel.views"),
        ("{relabel: {labels: hard}, evaluate: {soft_loss: mse}}", "evaluate.soft_loss"),
        ("{relabel: {labels: hard}, evaluate: {order: soft_hard_soft}}", "evaluate.order"),
        ("evaluate: {soft_loss: mse, temperature: 4}", "evaluate.temperature"),
        ("evaluate: {order: soft_hard_soft, kappa_ce: 1}", "evaluate.kappa_ce"),
        ("{relabel: {labels: hard}, evaluate: {kappa_mse: 3}}", "evaluate.kappa_mse"),
        ("{relabel: {labels: hard}, evaluate: {temperature: 4}}", "evaluate.temperature"),
        ("relabel: {labels: hard, adjust: true}", "relabel.adjust"),
        ("relabel: {labels: single, epochs: 7}", "relabel.epochs"),
        ("evaluate: {momentum: 0.3}", "evaluate.momentum"),
        ("evaluate: {magnitude: 3}", "evaluate.magnitude"),
        ("choose: {how: never, seeds: 9}", "choose.seeds"),
        ("calibrate: {recalibrate: false, lead: 8}", "calibrate.lead"),
    ],
)
def test_soft_labels_settings_without_effect_are_said(tmp_path, text, key):
    (said,) = check(load.load(write(tmp_path, text)))
    assert said.startswith(f"{key} has no effect with ")


@pytest.mark.parametrize(
    "text",
    [
        "relabel: {labels: single, class_share: 0.1, views: 4}",
        "relabel: {labels: online, class_share: 0.1, views: 4}",  # single ones are beside them
        "{relabel: {labels: hard, views: 2, class_share: 0.1}, evaluate: {matrix: true}}",
        "evaluate: {temperature: 4, order: soft_hard_soft}",
        "{relabel: {labels: hard}, evaluate: {matrix: true, soft_loss: mse}}",
    ],
)
def test_soft_labels_settings_with_effect_are_not(tmp_path, text):
    assert check(load.load(write(tmp_path, text))) == []
