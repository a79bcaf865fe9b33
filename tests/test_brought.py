"""Experts with weights from elsewhere."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import cli, said_plainly
from rldd_tools import ALONE

from ltdd_scale import recipe
from ltdd_scale.config.root import Config, check
from ltdd_scale.data.settings import Location
from ltdd_scale.errors import UserError
from ltdd_scale.experts import brought, layouts
from ltdd_scale.experts.settings import Expert, Head
from ltdd_scale.models import frozen, registry, safe
from ltdd_scale.publish import set as published
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import settings_of

DIGITS = """
data: {source: digits, resolution: 8, mirror: false, max_per_class: 60, imbalance_factor: 6, test_per_class: 10, val_per_class: 20}
teacher: {net: convnet3, norm: batch, width: 16, epochs: 12, batch_size: 16, lr: 3e-3, crop_padding: 1}
choose: {how: never}
"""
NET = ("convnet3", 16, "batch", 8)


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with a config, and a teacher that was trained by it."""
    folder = tmp_path_factory.mktemp("brought")
    (folder / "digits.yaml").write_text(DIGITS)
    assert train(folder, "trained", [], 1).returncode == 0
    return folder


def train(folder: Path, name: str, sets: list[str], nproc: int = 1):
    more = ["--set", *sets] if sets else []
    where = ("--out", folder / name, "--store", folder / "store", "--nproc", nproc)
    return cli("train", "teacher", folder / "digits.yaml", *where, *more)


def made(folder: Path, name: str) -> Path:
    """The folder of a run's teacher."""
    return (
        folder / "store" / json.loads((folder / name / "run.json").read_text())["stages"]["teacher"]
    )


def facts(folder: Path, name: str) -> dict:
    return json.loads((made(folder, name) / "stage.json").read_text())["facts"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The trained teacher as others would save it: backbone, and the head that is used."""
    _, weights = frozen.read(made(folder, "trained") / "weights.pt")
    return {
        name.removeprefix("backbone.").replace("fc_cb", "classifier"): value
        for name, value in weights.items()
        if not name.startswith("fc.")
    }


def test_our_own_file_is_the_same_expert(at):
    place = made(at, "trained") / "weights.pt"
    done = train(at, "own", [f"teacher.weights={place}"])
    assert done.returncode == 0, done.stderr
    assert "teacher: weights found by name, under 'model.backbone.'" in done.stderr
    assert "nothing is trained: teacher.epochs\n" in done.stderr
    trained, found = facts(at, "trained"), facts(at, "own")
    assert found["val_balanced"] == trained["val_balanced"] > 50
    assert found["train_balanced"] > 50 and "steps" not in found


def test_a_file_counts_by_what_it_holds(at, monkeypatch):
    value = tensors(at)
    torch.save({"state_dict": {f"module.{n}": t for n, t in value.items()}}, at / "one.pth")
    assert train(at, "one", [f"teacher.weights={at / 'one.pth'}"]).returncode == 0
    (at / "one.pth").rename(at / "two.pth")
    monkeypatch.chdir(at)
    again = train(at, "two", ["teacher.weights=two.pth"])
    assert "weights found" not in again.stderr and made(at, "one") == made(at, "two")
    assert f"weights: {at / 'two.pth'}" in (at / "two" / "config.yaml").read_text()
    layouts.digest.cache_clear()  # of a process that is over
    value["classifier.bias"] = value["classifier.bias"] + 1
    torch.save(value, at / "two.pth")
    assert train(at, "three", [f"teacher.weights={at / 'two.pth'}"]).returncode == 0
    assert made(at, "three") != made(at, "one")
    assert facts(at, "three")["val_balanced"] == facts(at, "one")["val_balanced"]


def test_a_last_layer_has_no_rate_of_sgd():
    """AdamW's rates are a hundredth of SGD's, and a teacher has the observer's settings."""
    of = {"head_epochs": 5, "batch_size": 8, "prior": 1.0, "lr": 0.2, "weight_decay": 2e-4}
    assert Head(**of, optimizer="adamw").rate_and_decay == (0.2, 2e-4)
    assert Head(**of, optimizer="sgd").rate_and_decay == (Expert().lr, Expert().weight_decay)


@pytest.mark.slow
def test_a_head_of_its_own_is_debiased_and_the_same_on_two_ranks(at):
    value = {n: t for n, t in tensors(at).items() if not n.startswith("classifier")}
    safetensors.torch.save_file(value, at / "backbone.safetensors")
    bring = [f"teacher.weights={at / 'backbone.safetensors'}"]
    done = train(at, "headless", bring)
    said_plainly(done, "has no last layer for these features", "set teacher.head_epochs=20")
    assert train(at, "head", [*bring, "teacher.head_epochs=40"]).returncode == 0
    assert facts(at, "head")["val_balanced"] > 50
    assert not list(made(at, "head").glob("features-*"))
    first = (made(at, "head") / "weights.pt").read_bytes()
    other = ("--store", at / "other", "--nproc", 2)
    sets = ("--set", *bring, "teacher.head_epochs=40")
    done = cli("train", "teacher", at / "digits.yaml", "--out", at / "head2", *other, *sets)
    assert done.returncode == 0, done.stderr
    (second,) = (at / "other").glob("brought/*/weights.pt")
    assert second.read_bytes() == first
    plain = train(at, "biased", [*bring, "teacher.head_epochs=40", "teacher.prior=0"])
    assert plain.returncode == 0
    few = facts(at, "biased")
    assert few["val_balanced"] < facts(at, "head")["val_balanced"]
    assert few["val_class_std"] > facts(at, "head")["val_class_std"]


def test_a_head_that_knows_other_classes_is_refused(at):
    value = tensors(at)
    for name in ("classifier.weight", "classifier.bias"):
        value[name] = value[name].roll(3, 0)
    torch.save(value, at / "rolled.pth")
    done = train(at, "rolled", [f"teacher.weights={at / 'rolled.pth'}"])
    said_plainly(done, "chance is 10.0 %", "in another order", "teacher.head_epochs=20")
    value["classifier.weight"] = value["classifier.weight"][:7]
    torch.save(value, at / "few.pth")
    done = train(at, "few", [f"teacher.weights={at / 'few.pth'}"])
    said_plainly(done, "has 7 classes, the set 10 classes")


class Elsewhere:
    """What only its own code can read."""


def test_what_cannot_be_used_is_said_before_anything_starts(at):
    torch.save({"model": tensors(at), "args": Elsewhere()}, at / "code.pth")
    (at / "text.pth").write_text("no weights")
    torch.save([1, 2], at / "list.pth")
    (at / "text.safetensors").write_text("no weights")
    for sets, words in (
        ([f"teacher.weights={at / 'code.pth'}"], ["run code", "save its state dict alone"]),
        ([f"teacher.weights={at / 'text.pth'}"], ["text.pth"]),
        ([f"teacher.weights={at / 'list.pth'}"], ["holds no tensors"]),
        ([f"teacher.weights={at / 'text.safetensors'}"], ["no safetensors file"]),
        ([f"teacher.weights={at / 'none.pth'}"], ["teacher.weights: cannot read"]),
        (["teacher.weights=torchvision:V1", "teacher.net=resnet18"], ["it has IMAGENET1K_V1"]),
        (["teacher.weights=torchvision:V1"], ["no weights 'V1' of convnet3: none"]),
        (["teacher.head_epochs=3"], ["teacher.head_epochs goes with teacher.weights"]),
    ):
        done = train(at, "refused", sets)
        said_plainly(done, *words)
        assert "teacher …" not in done.stderr


def test_torchvisions_weights_come_from_its_cache(at, monkeypatch):
    """A file of random weights under the name that torchvision looks for."""
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cache = at / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(at / "torch"))
    net = registry.seeded(torchvision.models.resnet18, "test")
    torch.save(net.state_dict(), cache / Path(entry.url).name)
    bring = ["teacher.net=resnet18", "teacher.weights=torchvision:IMAGENET1K_V1"]
    bring += ["data.resolution=32"]
    said_plainly(train(at, "tv0", bring), "has 1000 classes, the set 10 classes")
    done = train(at, "tv", [*bring, "teacher.head_epochs=5"])
    assert done.returncode == 0, done.stderr
    _, weights = frozen.read(made(at, "tv") / "weights.pt")
    assert torch.equal(weights["backbone.conv1.weight"], net.conv1.weight.detach())
    assert facts(at, "tv")["val_balanced"] > 15, "features of random weights still tell something"


def groups(value) -> dict[str, layouts.Group]:
    return dict(layouts._groups(value, ""))


def test_layouts_of_public_experts():
    model = registry.Student(registry.backbone("resnet32", 0, "", 32), 7)
    state = {n: t for n, t in model.state_dict().items() if n.startswith("backbone.")}
    plain = {n.removeprefix("backbone."): t for n, t in state.items()}
    head = model.fc.weight.detach()
    # LDAM-DRW, GLMC: names of their own, in the order of construction
    named = ((f"module.layer{k}.{n.rpartition('.')[2]}", n) for k, n in enumerate(plain))
    renamed = {theirs: plain[ours] for theirs, ours in named}
    ldam = {"epoch": 200, "state_dict": {**renamed, "module.linear.weight": head}}
    # OLTR, Decoupling: a module each
    oltr = {
        "state_dict_best": {
            "feat_model": {f"module.{n}": t for n, t in plain.items()},
            "classifier": {"module.fc.weight": head, "module.fc.bias": model.fc.bias.detach()},
        }
    }
    # MoCo's kind: an encoder beside a projector, whose layers are no classifiers
    moco = {"state_dict": {f"encoder_q.{n}": t for n, t in plain.items()}}
    moco["state_dict"]["encoder_q.mlp.weight"] = torch.zeros(5, 9)
    # Two heads: the rebalanced one counts
    glmc = {**plain, "fc.weight": head * 0, "fc_cb.weight": head}
    for value, how in (
        (ldam, "by shapes in order, in 'state_dict'"),
        (oltr, "by name, under 'state_dict_best.feat_model.module.'"),
        (moco, "by name, under 'state_dict.encoder_q.'"),
        (glmc, "by name"),
    ):
        found = layouts.fit(groups(value), ("resnet32", 0, "", 32))
        assert found.how == how
        assert found.backbone.keys() == {n for n in plain if not n.endswith(layouts.COUNTER)}
        assert all(torch.equal(t, plain[n]) for n, t in found.backbone.items())
        if value is moco:
            assert found.head is None
        else:
            assert found.head is not None and torch.equal(found.head.weight, head)
    with pytest.raises(UserError, match=r"not those of resnet32: it has 2 tensors, the network"):
        layouts.fit({"": dict(list(plain.items())[:2])}, ("resnet32", 0, "", 32))


@pytest.mark.parametrize("net", ["resnet50", "densenet121", "vgg11", "convnext_tiny", "vit_b_16"])
def test_torchvisions_classifiers_fit_by_name(net):
    with registry.on_meta(net):
        state = torchvision.models.get_model(net).state_dict()
    found = layouts.fit({"": state}, (net, 0, "", 224))
    assert found.how == "by name"
    assert found.head is not None and len(found.head.weight) == 1000


def test_a_set_with_brought_experts_needs_no_others():
    config = Config(teacher={"weights": "x.pt", "norm": "batch", "recipe": "glmc", "lr": 0.01})
    assert check(config) == [
        "without effect beside teacher.weights, nothing is trained: teacher.recipe"
    ]
    with pytest.raises(UserError, match=r"observer\.head_epochs goes with observer\.weights"):
        check(Config(observer={"norm": "batch", "head_epochs": 3}))


def test_a_set_that_is_given_away_names_the_file_and_no_path():
    told = published._elsewhere(Config(teacher={"weights": "/home/me/expert.pth"}).model_dump())
    assert told["teacher"]["weights"] == "expert.pth" and told["observer"]["weights"] == ""


def test_safetensors_of_ours_are_read(at):
    made_of, weights = frozen.read(made(at, "trained") / "weights.pt")
    safe.save(at / "own.safetensors", made_of, weights)
    found = layouts.fit(layouts.read(str(at / "own.safetensors"), "convnet3"), NET)
    assert found.how == "by name, under 'backbone.'"


def test_one_training_gives_both_experts(at):
    """A teacher that is to be trained as the observer is the observer: the same bytes, and what was
    found of the one holds for the other."""
    like = {"width": 16, "epochs": 12, "batch_size": 16, "lr": 3e-3, "crop_padding": 1}
    done = train(at, "both", [f"observer.{k}={v}" for k, v in like.items()])
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    stages = json.loads((at / "both" / "run.json").read_text())["stages"]
    observer, teacher = (at / "store" / stages[role] for role in ("observer", "teacher"))
    assert (observer / "weights.pt").read_bytes() == (teacher / "weights.pt").read_bytes()
    found = [json.loads((f / "stage.json").read_text())["facts"] for f in (observer, teacher)]
    assert found[0].pop("steps") > 0 and found[0] == found[1] and found[0]["val_balanced"] > 50


@pytest.mark.parametrize("method, labels", [("rldd", "single"), ("dm", "online")])
@pytest.mark.parametrize("teacher", [{}, {"weights": "observer", "epochs": 7}])
def test_who_reads_the_teacher_gets_the_observer(method, labels, teacher):
    own = {"method": method, "relabel": {"labels": labels}}
    wanted = recipe.stages(Config(**own, teacher=teacher), "")
    by_name = {stage.name: stage for stage in wanted}
    assert by_name["teacher"].inputs == {"observer": "observer"}
    assert [s.name for s in wanted].index("observer") < [s.name for s in wanted].index("teacher")
    assert by_name["observer"].kind == "experts"


@pytest.mark.parametrize("teacher", [{"weights": "own"}, {"epochs": 7}, {"norm": "instance"}])
def test_a_teacher_with_a_training_of_its_own_is_trained(teacher):
    stages = {s.name: s for s in recipe.stages(Config(teacher=teacher), "")}
    assert stages["teacher"].kind == "experts" and "observer" not in stages["teacher"].inputs


def test_a_shared_network_is_judged_by_the_recipe_it_was_trained_by():
    """As a stand-in for the plain network: by the plain head of glmc, or with the prior put back."""
    own = {"observer": {"recipe": "glmc"}, "evaluate": {"plain": "expert"}}
    for weights, trained in (("observer", "glmc"), ("own", "balanced")):
        config = Config(**own, teacher={"weights": weights})
        verdict = next(s for s in recipe.stages(config, "") if s.name == "evaluate")
        assert settings_of(verdict, config).recipe == trained


def test_an_expert_from_elsewhere_stands_in_for_no_plain_network():
    for at in ("observer", "teacher"):
        with pytest.raises(UserError, match="how an expert from elsewhere was trained"):
            check(Config(**{at: {"weights": "w.pt"}}, evaluate={"plain": "expert"}))
    check(Config(observer={"weights": "w.pt"}, teacher={"weights": "own"}))


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"observer": {"weights": "observer"}}, "that is for the teacher; name a file"),
        ({"observer": {"weights": "own"}}, "that is for the teacher; name a file"),
        ({"observer": {"width": 8}}, "teacher.width=128 and observer.width=8: leave out teacher.w"),
        ({"teacher": {"weights": "observer", "head_epochs": 5}}, "are one network"),
        ({"relabel": {"labeller": "both"}}, "labeller=both wants two networks"),
        ({"relabel": {"labeller": "both"}, "teacher": {}}, "teacher.weights=own trains a second"),
    ],
)
def test_what_cannot_be_one_network_is_refused(sections, said):
    with pytest.raises(UserError, match=said):
        check(Config(**{"teacher": {"weights": "observer"}, **sections}))


def test_what_does_nothing_beside_a_shared_training_is_said():
    shared = {"weights": "observer", "epochs": 7}
    assert check(Config(teacher=shared)) == [
        "without effect beside teacher.weights, nothing is trained: teacher.epochs"
    ]


def test_few_classes_leave_room_for_a_good_network():
    """Twice chance is all there is of two classes."""
    for classes, refused, taken in ((2, 0.54, 0.56), (3, 0.39, 0.41), (10, 0.18, 0.2)):
        assert brought.knows(taken, classes) and not brought.knows(refused, classes)
    assert brought.knows(0.003, 1000) and not brought.knows(0.002, 1000)


def test_the_training_of_a_head_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """To the bit, after a signal in any step."""
    features = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    np.save(tmp_path / "features-000000.npy", features)

    class Split:
        labels, classes = np.arange(50) % 3, list("abc")
        counts = np.bincount(labels)

        def __len__(self):
            return 50

    own = Head(
        head_epochs=4, batch_size=8, prior=1.0, lr=0.01, weight_decay=0.01, optimizer="adamw"
    )
    settings = SimpleNamespace(head=own, seed=1, role="teacher")

    def trained(folder):
        folder.mkdir(exist_ok=True)
        context = Context(ALONE, folder, {}, "x", 3600, 0, True, None, Location())
        return brought.train_head(settings, Split(), brought._Features(tmp_path), context)

    whole, steps = trained(tmp_path / "whole"), []
    asked = [False]
    monkeypatch.setattr(brought.signals, "requested", lambda: asked[0])

    def check():
        if asked[0]:
            asked[0] = False
            raise brought.signals.Preempted("asked")

    monkeypatch.setattr(brought.signals, "check", check)
    real = brought.soft_cross_entropy

    def counted(*a):
        steps.append(0)
        asked[0] = len(steps) in (3, 7)
        return real(*a)

    monkeypatch.setattr(brought, "soft_cross_entropy", counted)
    for _ in range(2):
        with pytest.raises(brought.signals.Preempted):
            trained(tmp_path / "cut")
    again = trained(tmp_path / "cut")
    assert len(steps) == 4 * 6, "no step is done twice"
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
