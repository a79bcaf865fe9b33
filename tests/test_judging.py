import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs_tools import point

from ltdd_scale import fit
from ltdd_scale.config.root import Config
from ltdd_scale.data import distilled, sharding, sources
from ltdd_scale.data.loader import normalizer
from ltdd_scale.data.settings import Data
from ltdd_scale.errors import UserError
from ltdd_scale.experts import recipes
from ltdd_scale.experts.settings import Priors, Role
from ltdd_scale.judging import cost, single_stage, student, training, verdict
from ltdd_scale.judging.contract import Roles
from ltdd_scale.judging.metrics import logit_adjusted, mean_of, metrics, summarize
from ltdd_scale.judging.settings import Evaluate, Training
from ltdd_scale.labels import relabel
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.stage import stage as relabel_stage
from ltdd_scale.labels.views import draw_epoch, view_spec
from ltdd_scale.models import flops, frozen, registry
from ltdd_scale.publish import tables
from ltdd_scale.results import NUMBERS, Student, labels_of
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, settings_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
ROLES = Roles("recover", "initialize", judged={"teacher": ("teacher", "weights.pt")})
LEARNED = dataclasses.replace(ROLES, learned=True)


def test_metrics_by_hand():
    logits = torch.tensor(
        [
            [3.0, 2, 1, 0, -1, -2],
            [3, 2, 1, 0, -1, -2],
            [0, 3, 0, 0, 0, 0],
            [5, 4, 3, 2, 1, 0],
            [0, 0, 9, 0, 0, 0],
            [0, 0, 0, 9, 0, 0],
            [0, 0, 0, 0, 9, 0],
            [9, 8, 7, 6, 5, 4],
        ]
    )
    labels = np.asarray([0, 1, 1, 5, 2, 3, 4, 0])
    found = metrics(logits, labels, ["many", "many", "medium", "medium", "few", "few"])
    per_class = [100.0, 50.0, 100.0, 100.0, 100.0, 0.0]
    assert found["per_class"] == per_class and found["top1"] == 75.0 and found["top5"] == 87.5
    assert found["balanced"] == 75.0
    assert found["class_std"] == pytest.approx(np.std(per_class), abs=1e-3)
    assert (found["many"], found["medium"], found["few"]) == (75.0, 100.0, 50.0)
    assert metrics(logits, labels, ["few"] * 6)["many"] is None
    assert set(found) == {*NUMBERS, "per_class"}


def test_classes_without_test_images_count_for_nothing():
    """Three images of class 0, two of them right; one of class 2; none of class 1 and 3."""
    logits = torch.eye(4)[[0, 0, 1, 2]]
    found = metrics(logits, np.asarray([0, 0, 0, 2]), ["many", "many", "few", "medium"])
    assert found["per_class"] == [66.67, None, 100.0, None] and found["top1"] == 75.0
    assert found["balanced"] == pytest.approx((200 / 3 + 100) / 2, abs=1e-3)
    assert found["medium"] is None and found["few"] == 100.0
    json.dumps(found, allow_nan=False)
    assert mean_of([found, found])["per_class"] == [66.67, None, 100.0, None]


def test_logit_adjustment_takes_the_prior_out():
    """A classifier whose logits are log p(x|y) + log π ends as one with a uniform prior."""
    counts = np.asarray([90, 9, 1])
    likelihood = torch.randn(50, 3)
    biased = likelihood + torch.from_numpy(np.log(counts / 100)).float()
    assert torch.allclose(logit_adjusted(biased, counts), likelihood, atol=1e-5)
    assert logit_adjusted(biased, counts).dtype == torch.float32


def test_student_loss_is_its_formula():
    torch.manual_seed(0)
    s, y, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.randn(4, 3)
    onehot = F.one_hot(y, 3).float()
    soft = 0.025 * F.cross_entropy(s, y) + ((s - t) ** 2).mean()
    assert torch.allclose(training.student_loss(s, onehot, t, 0.025, 1.0), soft)
    plain = training.student_loss(s, onehot, None, 0.025, 1.0)
    assert torch.allclose(plain, F.cross_entropy(s, y))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_the_divergence_is_its_formula(temperature):
    torch.manual_seed(0)
    s, t = torch.randn(4, 3).double(), 3 * torch.randn(4, 3).double()
    y = torch.tensor([0, 2, 1, 1])
    p, q = (np.exp(z.numpy() / temperature) for z in (t, s))
    p, q = (e / e.sum(1, keepdims=True) for e in (p, q))
    kl = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    found = training.student_loss(
        s, F.one_hot(y, 3).double(), t, 0.25, 3.0, soft_loss="kl", temperature=temperature
    )
    assert float(found) == pytest.approx(0.25 * float(F.cross_entropy(s, y)) + 3 * kl)
    none = training.student_loss(s, F.one_hot(y, 3).double(), s + 5, 0.0, 1.0, "kl", temperature)
    assert float(none) == pytest.approx(0, abs=1e-12)


def test_soft_then_hard_then_soft():
    """A quarter, a half, a quarter, whatever the number of epochs; `both` is the default."""
    order = Training(order="soft_hard_soft")

    def line(epochs):
        return "".join(training.learned_from(order, e, epochs)[0] for e in range(epochs))

    assert line(8) == "sshhhhss" and line(300) == "s" * 75 + "h" * 150 + "s" * 75
    assert [line(n) for n in (1, 2, 3, 5, 7)] == ["s", "hs", "shs", "shhss", "sshhhss"]
    assert {training.learned_from(Training(), e, 8) for e in range(8)} == {"both"}


def test_the_loss_of_an_epoch_is_that_of_what_it_learns_from():
    torch.manual_seed(0)
    s, t, y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    onehot = F.one_hot(y, 3).float()
    asked = Training(kappa_ce=0.5, kappa_mse=2.0, soft_loss="mse")
    ce, mse = F.cross_entropy(s, y), ((s - t) ** 2).mean()
    for source, expected in (("both", 0.5 * ce + 2 * mse), ("soft", 2 * mse), ("hard", ce)):
        assert torch.allclose(training.epoch_loss(s, onehot, t, asked, source), expected)
        assert torch.allclose(training.epoch_loss(s, onehot, None, asked, source), ce)


def test_schedules():
    smooth = Training(schedule="cosine2", lr=1.0)
    rates = [round(training.learning_rate(smooth, t), 6) for t in (0, 0.5, 1)]
    assert rates == [1.0, 0.853553, 0.5]
    steps, cosine = Training(schedule="steps", lr=1.0), Training(schedule="cosine", lr=1.0)
    marks = (0, 0.79, 0.8, 0.9, 0.95)
    assert [training.learning_rate(steps, d) for d in marks] == [1, 1, 0.5, 0.25, 0.125]
    assert training.learning_rate(cosine, 0) == 1
    assert training.learning_rate(cosine, 0.5) == pytest.approx(0.5)


def test_units_of_the_matrix_are_all_cells_once():
    config = Config(evaluate=Evaluate(matrix=True, seeds=2, full_epochs=3))
    found = [(s.set, s.labels, s.seed) for s, _ in single_stage.students(config, ROLES)]
    assert len(found) == len(set(found)) == (3 * 4 + 1) * 2
    config = Config(evaluate=Evaluate(seeds=2, full_epochs=3))
    cells = {(s.set, s.labels) for s, _ in single_stage.students(config, ROLES)}
    small = {("distilled", "online"), ("random", "online"), ("random", "hard")}
    assert cells == {*small, ("full", "online")}


def test_random_images_have_a_student_with_classes_of_every_net_and_seed():
    """Once, where the labels are classes anyway; not at all without random images."""
    config = with_labels("single", nets=["convnet3", "resnet32"], seeds=2, plain="none")
    found = single_stage.students(config, ROLES)
    assert cells_of(with_labels("single", plain="none"), ROLES) == [
        ("distilled", "single"),
        ("random", "single"),
        ("random", "hard"),
    ]
    own = [(s.net, s.seed, e) for s, e in found if (s.set, s.labels) == ("random", "hard")]
    assert own == [(n, s, 3) for n in ("convnet3", "resnet32") for s in (0, 1)]
    assert cells_of(with_labels("hard", plain="none"), ROLES)[1:] == [("random", "hard")]
    assert cells_of(with_labels("single", random=False, plain="none"), ROLES) == [
        ("distilled", "single")
    ]


def with_labels(kind, **evaluate):
    """A config with labels of `kind`."""
    relabel = Config().relabel.model_copy(update={"labels": kind})
    return config_of(**evaluate).model_copy(update={"relabel": relabel})


def cells_of(config, roles):
    return [(s.set, s.labels) for s, _ in single_stage.students(config, roles)]


def test_real_images_stand_beside_a_set_with_learned_labels_with_classes():
    config = with_labels("learned", full_epochs=2, plain="none")
    wanted = [("distilled", "learned"), ("random", "hard"), ("full", "hard")]
    assert cells_of(config, LEARNED) == wanted
    assert not single_stage.needs_teacher(config)
    stages = {s.name: s for s in single_stage.stages(config, LEARNED)}
    own = stages["student/distilled-learned-convnet3-s0"]
    assert own.inputs == {"shard": "shard", "images": "recover", "labels": "relabel"}
    assert stages["student/random-hard-convnet3-s0"].inputs == {"shard": "shard"}


def test_learned_labels_join_the_matrix_of_the_set_that_brings_them():
    config = with_labels("hard", matrix=True, matrix_labels=["single", "hard", "single"])
    wanted = [("distilled", "hard"), ("random", "hard")]
    wanted += [("random", "single"), ("initial", "single"), ("initial", "hard")]
    wanted += [("distilled", "single")]
    assert cells_of(config, ROLES) == wanted
    assert cells_of(config, LEARNED) == [*wanted, ("distilled", "learned")]
    named = with_labels("hard", matrix=True, matrix_labels=["single", "hard", "learned"])
    assert cells_of(named, ROLES) == wanted
    assert cells_of(named, LEARNED) == [*wanted, ("distilled", "learned")]
    stages = {s.name: s for s in single_stage.stages(config, LEARNED)}
    assert stages["student/distilled-learned-convnet3-s0"].inputs == {
        "shard": "shard",
        "images": "recover",
    }
    assert single_stage.needs_teacher(config)
    assert not single_stage.needs_teacher(with_labels("hard", matrix=True, matrix_labels=["hard"]))


def test_summary_is_mean_and_sample_deviation():
    values = {"top5": 90.0, "class_std": 1.0, "balanced": 30.0, "many": None}
    rows = [
        {**Student("distilled", "online", "n", s).to_dict(), "ipc": 1, **values}
        | {"top1": v, "medium": v, "few": v, "per_class": [v, v]}
        for s, v in enumerate((40.0, 42.0, 47.0))
    ]
    (entry,) = summarize(rows)
    assert entry["top1"] == 43.0
    assert entry["top1_std"] == pytest.approx(np.std([40, 42, 47], ddof=1), abs=0.01)
    assert entry["many"] is None and entry["num_seeds"] == 3 and entry["balanced_std"] == 0


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The folders of the stages below: shards of digits, a teacher, ten distilled images."""
    folder = tmp_path_factory.mktemp("house")
    data = Data(resolution=8, mirror=False, max_per_class=20, imbalance_factor=4, test_per_class=6)
    (folder / "shard").mkdir()
    sharding.write(folder / "shard", "digits", sources.open_source(data), data, workers=1)

    def made():
        return registry.TwoHeads(registry.backbone("convnet3", 4, "instance", 8), 10, 0)

    (folder / "teacher").mkdir()
    recipe = frozen.recipe("convnet3", 4, "instance", 8, 10)
    frozen.save(folder / "teacher" / "weights.pt", recipe, registry.seeded(made, "t"))
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 2, 3, 8, 8), dtype=np.uint8)
    for c in range(10):
        distilled.write_class(folder / "images", c, pixels[c], None)
    return folder


@pytest.fixture(scope="module")
def learned_house(house, tmp_path_factory):
    """The same folders, and the images bring learned labels: mostly wrong ones."""
    folder = tmp_path_factory.mktemp("learned")
    for name in ("shard", "teacher"):
        (folder / name).symlink_to(house / name)
    shutil.copytree(house / "images", folder / "images")
    logits = np.random.default_rng(1).normal(0, 3, (20, 10))
    distilled.write_learned(folder / "images", logits)
    return folder


def run_relabel(config, house, out):
    """The stage relabel, run in `out`: its record."""
    stage = relabel_stage(config, "recover")
    assert set(stage.inputs) == {"shard", "distilled"}, "no teacher"
    out.mkdir(parents=True)
    inputs = {"shard": house / "shard", "distilled": house / "images"}
    relabel.run(settings_of(stage, config), Context(ALONE, out, inputs, "w", quiet=True))
    return files.read_json(out / "labels.json")


def config_of(**evaluate):
    return Config(
        ipc=2,
        data=Data(resolution=8, mirror=False),
        evaluate=Evaluate(
            **{
                "width": 4,
                "epochs": 3,
                "seeds": 1,
                "batch_size": 8,
                "embedding": False,
                **evaluate,
            }
        ),
    )


def run_student(config, which: str, house, out, name="", labels=None):
    """The stage of the first student of the set `which`, run in `out`: (settings, facts, result)."""
    nodes = {s.name: s for s in single_stage.stages(config, LEARNED)}
    stage = nodes[name or next(n for n in nodes if n.startswith(f"student/{which}"))]
    folders = {"recover": house / "images", "initialize": house / "images", "relabel": labels}
    inputs = {k: folders.get(v, house / v) for k, v in stage.inputs.items() if k != "labels"}
    if labels:
        inputs["labels"] = labels
    settings = settings_of(stage, config)
    out.mkdir(parents=True, exist_ok=True)
    student.check(settings)
    context = Context(ALONE, out, inputs, "w", quiet=True, workers=0)
    facts = student.run(settings, context)
    return settings, facts, files.read_json(out / "result.json")


@pytest.mark.parametrize(
    "own", [{"prior": 1.0}, {"prior": 0.0}, {"prior": 0.5, "sample_power": 1.0, "cutmix": 0.0}]
)
def test_a_stand_in_has_the_prior_of_the_set_and_not_of_what_training_showed(own):
    """However the expert was balanced: with what it was shown taken out, a network that says just
    that is a network of chance, and with the set's prior put back it says the prior."""
    counts = np.array([90, 9, 1])
    told = Priors(**{"sample_power": 0.0, "paste_power": 0.0, "cutmix": 0.5, **own})
    shown = recipes.prior(counts, (told.sample_power, told.paste_power), told.cutmix)
    logits = torch.from_numpy((1 - told.prior) * np.log(shown)).float().expand(6, 3)
    seen = []

    class Test:
        train_counts, labels, groups = counts, np.arange(6) % 3, ["many", "medium", "few"]

        def judge(self, network):
            return {}, logits

    def keep(z, *_):
        seen.append(z[0].softmax(0))
        return metrics(z, Test.labels, Test.groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "metrics", keep)
        settings = SimpleNamespace(recipe="balanced", trained=told)
        found = verdict._stand_in(
            SimpleNamespace(recipe={"net": "n"}, logits=None), settings, Test()
        )
    assert torch.allclose(seen[0], torch.tensor([0.9, 0.09, 0.01]), atol=1e-5)
    assert len(found) == 1 + (told.prior != 1)
    if told.prior != 1:
        assert torch.allclose(seen[1], torch.full((3,), 1 / 3), atol=1e-5)


def test_an_image_that_an_epoch_leaves_alone_joins_the_step_before(house, tmp_path):
    """Twenty images in steps of 19: BatchNorm learns nothing of one image whose maps are one
    pixel."""
    config = config_of(nets=["resnet18_cifar"], batch_size=19, epochs=1)
    _, _, result = run_student(config, "distilled", house, tmp_path)
    assert np.isfinite(result["loss"]).all()


def test_a_student_of_each_set(house, tmp_path):
    config = config_of(full_epochs=2, plain="own", plain_epochs=2, matrix=True)
    for which in ("distilled", "initial", "random", "full", "plain"):
        out = tmp_path / which
        settings, facts, result = run_student(config, which, house, out)
        row = result["row"]
        assert row["set"] == which and len(result["loss"]) == settings.epochs
        assert row["ipc"] == (None if which in ("full", "plain") else 2)
        assert set(facts) == {"top1", "balanced", "class_std", "note"}
        assert facts["note"].startswith(f"{row['top1']:.1f} % (balanced ")
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [e["loss"] for e in log] == result["loss"]
        assert ("adjusted" in row) == (which == "plain")
    plain = files.read_json(tmp_path / "plain" / "result.json")["row"]
    assert set(plain["adjusted"]) == {*NUMBERS, "per_class"}


def test_a_student_interrupted_at_any_step_ends_in_the_same_numbers(house, tmp_path, monkeypatch):
    config = config_of()
    *_, undisturbed = run_student(config, "distilled", house, tmp_path / "a")
    steps, asked = 0, iter([1, 2, 4, 5])
    stop_at = next(asked)

    def requested():
        return steps == stop_at

    real = training._Work.step

    def step(work, *arguments):
        nonlocal steps
        real(work, *arguments)
        steps += 1

    def check():
        if requested():
            raise signals.Preempted("SIGTERM")

    monkeypatch.setattr(training._Work, "step", step)
    monkeypatch.setattr(signals, "requested", requested)
    monkeypatch.setattr(signals, "check", check)
    for _ in range(4):
        with pytest.raises(signals.Preempted):
            run_student(config, "distilled", house, tmp_path / "b")
        stop_at = next(asked, -1)
    *_, resumed = run_student(config, "distilled", house, tmp_path / "b")
    assert resumed == undisturbed and steps == 3 * 3
    logs = [(tmp_path / run / "log.jsonl").read_bytes() for run in "ab"]
    assert logs[0] == logs[1]


def test_a_student_uses_the_labels_that_relabel_made(house, tmp_path):
    """With single labels of zeros, it learns to say nothing: the loss ends near the classes' own."""
    zeros = tmp_path / "labels"
    zeros.mkdir()
    distilled.save(zeros / "single.npy", np.zeros((20, 10), np.float32))
    facts = {"labels": "single", "seed": "labels 0", "epochs": 0, "tau": 0.0}
    files.write_json(zeros / "labels.json", facts)
    config = config_of(epochs=1).model_copy(
        update={"relabel": Config().relabel.model_copy(update={"labels": "single"})}
    )
    *_, with_zeros = run_student(config, "distilled", house, tmp_path / "z", labels=zeros)
    *_, made_here = run_student(config, "distilled", house, tmp_path / "m")
    assert with_zeros["loss"] != made_here["loss"]


def test_single_labels_are_the_same_from_relabel_beside_others_and_made_by_a_student(
    house, tmp_path
):
    """Mean over views, with a share of the class: written as the set's labels, written beside
    online ones, and made by a student that finds none."""
    own, student = {"views": 3, "class_share": 0.2, "adjust": True}, {}
    for kind in ("single", "online"):
        base = with_labels(kind, epochs=1, crop_scale=[0.3, 0.6], plain="none")
        update = {"relabel": base.relabel.model_copy(update=own)}
        student[kind] = base.model_copy(update=update)
        stage, out = relabel_stage(student[kind], "recover"), tmp_path / kind
        out.mkdir()
        inputs = {"shard": house / "shard", "distilled": house / "images"}
        context = Context(ALONE, out, {**inputs, "teacher": house / "teacher"}, "w", quiet=True)
        relabel.run(settings_of(stage, student[kind]), context)
    assert files.read_json(tmp_path / "online" / "labels.json")["class_share"] == 0.2
    names = [tmp_path / kind / "single.npy" for kind in student]
    assert files.sha256(names[0]) == files.sha256(names[1])
    for kind, config in student.items():
        read = run_student(
            config, "distilled", house, tmp_path / f"{kind}-r", labels=tmp_path / kind
        )
        made = run_student(config, "distilled", house, tmp_path / f"{kind}-m")
        assert read[2] == made[2]


def test_the_order_decides_which_labels_an_epoch_sees(house, tmp_path):
    """One step an epoch, so that the first epochs' losses are of the same weights: soft labels that
    differ show in the first epoch, κ1 nowhere, and a student of two epochs begins with classes."""
    labels = {}
    for name, value in (("zeros", 0.0), ("twos", 2.0)):
        labels[name] = tmp_path / name
        labels[name].mkdir()
        distilled.save(labels[name] / "single.npy", np.full((20, 10), value, np.float32))
        facts = {"labels": "single", "seed": "labels 0", "epochs": 0, "tau": 0.0}
        files.write_json(labels[name] / "labels.json", facts)

    def losses(which, kappa_ce=0.025, epochs=4):
        order = {"order": "soft_hard_soft", "batch_size": 20, "kappa_ce": kappa_ce}
        order["soft_loss"] = "mse"  # of equal logits it sees the value, a softmax does not
        config = with_labels("single", epochs=epochs, **order)
        out = tmp_path / f"{which} {kappa_ce} {epochs}"
        *_, result = run_student(config, "distilled", house, out, labels=labels[which])
        return result["loss"]

    zeros, twos = losses("zeros"), losses("twos")
    assert len(zeros) == 4 and zeros[0] != twos[0]
    assert losses("zeros", kappa_ce=9.0) == zeros
    first, last = losses("zeros", epochs=2), losses("twos", epochs=2)
    assert first[0] == last[0] and first[1] != last[1]


def test_single_labels_that_are_sure_teach_what_classes_do(house, tmp_path):
    """By KL, CutMix or not: of a mixed image both are the two classes by their shares. The softmax
    of mixed logits would be the class of the larger share."""
    labels = tmp_path / "labels"
    labels.mkdir()
    sure = 60 * np.eye(10, dtype=np.float32)[np.repeat(np.arange(10), 2)]
    distilled.save(labels / "single.npy", sure)
    facts = {"labels": "single", "seed": "labels 0", "epochs": 0, "tau": 0.0}
    files.write_json(labels / "labels.json", facts)
    own = {"epochs": 4, "kappa_ce": 0.0, "optimizer": "sgd", "lr": 0.05}
    found = {}
    for kind, given in (("single", labels), ("hard", None)):
        run_student(with_labels(kind, **own), "distilled", house, tmp_path / kind, labels=given)
        found[kind] = distilled.load(tmp_path / kind / "logits.npy").astype(np.float32)
    assert np.abs(found["hard"]).max() > 0.1
    assert np.allclose(found["single"], found["hard"], atol=5e-3)


def test_learned_labels_are_the_same_from_relabel_and_from_the_set(house, learned_house, tmp_path):
    """A student that reads what relabel copied, and one of the matrix that reads the set itself."""
    config = with_labels("learned", plain="none")
    facts = run_relabel(config, learned_house, tmp_path / "labels")
    assert facts == {"labels": "learned", "seed": "labels 0", "epochs": 0, "tau": 0.0}
    name = "student/distilled-learned-convnet3-s0"
    run = (learned_house, tmp_path / "a", name, tmp_path / "labels")
    *_, copied = run_student(config, "", *run)
    matrix = with_labels("hard", plain="none", matrix=True, matrix_labels=["hard"])
    *_, read = run_student(matrix, "", learned_house, tmp_path / "b", name)
    hard = "student/distilled-hard-convnet3-s0"
    *_, classes = run_student(matrix, "", learned_house, tmp_path / "c", hard)
    assert copied == read and copied["loss"] != classes["loss"]
    with pytest.raises(UserError, match="brings no learned labels"):
        run_relabel(config, house, tmp_path / "none")
    with pytest.raises(UserError, match="brings no learned labels"):
        run_student(matrix, "", house, tmp_path / "d", name)


def test_the_log_is_written_seldom(house, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Context, "log", lambda self, history: written.append(len(history)))
    run_student(config_of(epochs=40, batch_size=25), "distilled", house, tmp_path / "s")
    assert written == [40]


def test_a_student_that_cannot_take_the_images_is_refused_before_anything_starts(house, tmp_path):
    config = config_of(nets=["convnet4"])
    with pytest.raises(UserError, match=r"convnet4.*8"):
        run_student(config, "distilled", house, tmp_path / "s")


def test_a_diverged_student_is_an_error(house, tmp_path):
    with pytest.raises(UserError, match=r"lower evaluate\.lr"):
        run_student(config_of(lr=1e30, optimizer="sgd"), "distilled", house, tmp_path / "s")


@pytest.mark.parametrize(
    ("plain", "recipe"),
    [("own", "balanced"), ("expert", "balanced"), ("expert", "glmc"), ("none", "glmc")],
)
def test_verdict(plain, recipe, house, tmp_path, capsys):
    config = config_of(plain=plain, plain_epochs=1, epochs=1, matrix=plain == "own", seeds=2)
    config = config.model_copy(update={"teacher": Role(recipe=recipe)})
    found = single_stage.stages(config, ROLES)
    folders = {name: house / name for name in ("shard", "teacher")}
    for unit in found[:-1]:
        folders[unit.name] = tmp_path / unit.name
        run_student(config, "", house, tmp_path / unit.name, name=unit.name)
    context = Context(ALONE, tmp_path, {k: folders[v] for k, v in found[-1].inputs.items()}, "w")
    assert verdict.run(settings_of(found[-1], config), context) == {}
    log = capsys.readouterr().err
    results = files.read_json(tmp_path / "results.json")
    summary = results["summary"]
    assert summary["balanced_test"] is True and summary["split"] == "test"
    assert set(summary["experts"]) == {"teacher"}
    assert {e["set"] for e in summary["students"]} <= {"distilled", "random", "initial"}
    cells = {(r["set"], r["labels"]) for r in results["rows"]}
    small = {("distilled", "online"), ("random", "online"), ("random", "hard")}
    assert cells - {("plain", "hard")} == small
    assert (summary["labels"], summary["baseline"]) == ("online", "online")
    assert all("balanced" in r for r in results["rows"])
    assert len(results["matrix"]) == (3 * 4 * 2 if plain == "own" else 0)
    assert all(set(c) == {"set", "labels", "net", "seed", "loss"} for c in results["loss_curves"])
    assert {c["seed"] for c in results["loss_curves"]} == {0}
    titles = {
        ("own", "balanced"): ["plain, whole set", "plain, logit-adjusted"],
        # With all of the prior out of the logits, the adjusted network is the teacher itself.
        ("expert", "balanced"): ["teacher, prior put back"],
        ("expert", "glmc"): ["teacher's plain head", "teacher's plain head, logit-adjusted"],
    }
    assert [e["title"] for e in summary.get("plain", [])] == titles.get((plain, recipe), [])
    assert ("plain" in summary) == (plain != "none")
    for entry in summary.get("plain", []):
        assert entry["net"] == "convnet3" and set(NUMBERS) <= set(entry)
        assert entry["top1_std"] is None and entry["num_seeds"] == 1
    rungs = summary["ladder"]
    random = next(e for e in summary["students"] if (e["set"], e["labels"]) == ("random", "hard"))
    wanted = [*summary.get("plain", []), random, summary["experts"]["teacher"]]
    assert [r["title"] for r in rungs] == [
        *titles.get((plain, recipe), []),
        "random real, plain labels",
        "teacher",
    ]
    assert [[r[n] for n in NUMBERS] for r in rungs] == [[e[n] for n in NUMBERS] for e in wanted]
    assert rungs[-2]["num_seeds"] == 2 and rungs[-1]["num_seeds"] == 1
    # The teacher of this house is not trained: random images are above it, or as bad.
    (warning,) = summary["warnings"]
    assert warning.startswith("the teacher (10.0) is ") and warning.endswith(
        ": its labels cost accuracy"
    )
    assert f"  warning: {warning}\n" in log
    told = tables.table(results)
    assert told.startswith(f"Warning: {warning}.\n\n| set ")
    assert told.count("| random real, plain labels ") == 1


def test_an_observer_that_is_the_teacher_is_judged_once(house, tmp_path, monkeypatch):
    """One file of weights, one pass over the test images, a row for each of the two."""
    config = config_of(plain="none", epochs=1, random=False)
    judged = {**ROLES.judged, "observer": ("observer", "weights.pt")}
    found = single_stage.stages(config, dataclasses.replace(ROLES, judged=judged))
    folders = {"shard": house / "shard", "teacher": house / "teacher"}
    folders["observer"] = shutil.copytree(house / "teacher", tmp_path / "observer")
    for unit in found[:-1]:
        folders[unit.name] = tmp_path / unit.name
        run_student(config, "", house, tmp_path / unit.name, name=unit.name)
    passes, predict = [], frozen.predict
    monkeypatch.setattr(frozen, "predict", lambda *of: passes.append(of[0]) or predict(*of))
    context = Context(ALONE, tmp_path, {k: folders[v] for k, v in found[-1].inputs.items()}, "w")
    verdict.run(settings_of(found[-1], config), context)
    results = files.read_json(tmp_path / "results.json")
    experts = results["summary"]["experts"]
    assert len(passes) == 1 and set(experts) == {"teacher", "observer"}
    assert experts["observer"] == {**experts["teacher"], "same_as": "teacher"}
    assert "\n| observer (the teacher itself) | " in tables.table(results)


def test_verdict_of_a_set_with_learned_labels(learned_house, tmp_path):
    """The result is the set with its labels and random images with classes, and not the matrix."""
    config = with_labels("learned", epochs=1, plain="none", matrix=True, matrix_labels=["single"])
    run_relabel(config, learned_house, tmp_path / "labels")
    found = single_stage.stages(config, LEARNED)
    folders = {name: learned_house / name for name in ("shard", "teacher")}
    for unit in found[:-1]:
        folders[unit.name] = tmp_path / unit.name
        made = tmp_path / "labels" if "labels" in unit.inputs else None
        run_student(config, "", learned_house, tmp_path / unit.name, unit.name, made)
    context = Context(ALONE, tmp_path, {k: folders[v] for k, v in found[-1].inputs.items()}, "w")
    verdict.run(settings_of(found[-1], config), context)
    results = files.read_json(tmp_path / "results.json")
    summary = results["summary"]
    assert (summary["labels"], summary["baseline"]) == ("learned", "hard")
    shown = [("distilled", "learned"), ("random", "hard")]
    assert [(r["set"], r["labels"]) for r in results["rows"]] == shown
    singles = [(s, "single") for s in ("random", "initial", "distilled")]
    assert [(r["set"], r["labels"]) for r in results["matrix"]] == shown + singles
    assert [(s, labels_of(s, summary)) for s in ("distilled", "random")] == shown
    assert labels_of("initial", summary) == "hard"
    row = next(
        line for line in tables.table(results).splitlines() if line.startswith("| random real")
    )
    assert [c.strip() for c in row.split("|")[2:4]] == ["hard", "convnet3"]


def test_a_test_set_is_balanced_or_not():
    assert verdict.is_balanced(np.asarray([0, 1, 2, 2, 1, 0]), 3)
    assert not verdict.is_balanced(np.asarray([0, 1, 2, 2, 1]), 3)
    assert not verdict.is_balanced(np.asarray([0, 1]), 3)


def test_cost_of_students():
    config, facts = config_of(plain="own", plain_epochs=5), Facts((100, 50, 10), 30)
    config = config.model_copy(
        update={"relabel": Config().relabel.model_copy(update={"labels": "hard"})}
    )
    units = {
        s.name.split("-")[0]: settings_of(s, config)
        for s in single_stage.stages(config, ROLES)[:-1]
    }
    small, whole = (
        cost.student(units["student/distilled"], facts),
        cost.student(units["student/plain"], facts),
    )
    assert whole.flops / small.flops == pytest.approx(5 * 160 / (3 * 6))
    online = settings_of(single_stage.stages(config_of(), ROLES)[0], config_of())
    teacher = config_of().teacher
    net = (teacher.net, teacher.width, teacher.norm, config.data.resolution)
    assert net[1] != config.evaluate.width, "the teacher's own net counts, not the student's"
    more = cost.student(online, facts).flops - small.flops
    assert more == pytest.approx(3 * 6 * flops.forward(*net))
    assert small.memory > 0 and small.disk > 0


@pytest.mark.parametrize("which", ["plain", "random"])
def test_students_with_classes_do_not_depend_on_what_soft_labels_need(which, tmp_path):
    """An ablation of the soft loss, or a sweep over seeds, trains them once."""

    def fingerprints(*sets):
        more = ("evaluate.plain=own", "evaluate.seeds=2", "relabel.labels=online", *sets)
        nodes = point(tmp_path, "a", *more).nodes
        return {n: node.fingerprint for n, node in nodes.items() if n.startswith("student/")}

    ours = fingerprints()
    hard = {n for n in ours if "-hard-" in n and which in n}
    soft = {n for n in ours if "-online-" in n}
    assert hard and soft
    for sets in (["evaluate.temperature=2"], ["evaluate.kappa_ce=1"], ["relabel.adjust=true"]):
        others = fingerprints(*sets)
        assert all(others[n] == ours[n] for n in hard) and all(others[n] != ours[n] for n in soft)
    later = fingerprints("seed=1")
    assert [later[n] == ours[n] for n in hard if n in later] == [True] * len(hard & set(later))
    assert fingerprints("evaluate.lr=0.1").items().isdisjoint(ours.items())


def published(folder, house, kind: str, teacher: bool):
    """A distilled folder as publish writes it, with what fit reads of it."""
    from PIL import Image

    config = config_of(epochs=2)
    images = distilled.Distilled(house / "images", 10)
    for c in range(10):
        (folder / "images" / str(c)).mkdir(parents=True)
        for k, pixels in enumerate(images.load(c)):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "images" / str(c) / f"{k}.png")
    names = [str(c) for c in range(10)]
    told = {"classes": names, "folders": names, "train_counts": [5] * 10, "resolution": 8}
    told |= {"mean": [0.5] * 3, "std": [0.25] * 3, "config": config.model_dump(mode="json")}
    told["mixed"] = "softmax"
    files.write_json(folder / "set.json", told)
    (folder / "labels").mkdir()
    facts = {"labels": kind, "seed": "labels 0", "epochs": 0, "tau": 0.0}
    files.write_json(folder / "labels" / "labels.json", facts)
    if teacher:
        (folder / "teacher.pt").write_bytes((house / "teacher" / "weights.pt").read_bytes())
    return folder


def test_fit_trains_on_a_set_with_hard_labels_and_no_teacher(house, tmp_path, capsys, same_threads):
    folder = published(tmp_path / "set", house, "hard", teacher=False)
    saved = tmp_path / "s.pt"
    assert fit.run(folder, None, None, 0, folder / "images", saved) == 0
    assert "balanced" in capsys.readouterr().out
    trained = frozen.load(saved, ALONE)
    assert trained.recipe == frozen.recipe("convnet3", 4, "instance", 8, 10)


@pytest.mark.parametrize("kind", ["online", "single", "learned"])
def test_fit_is_the_student_stage_on_the_published_set(kind, learned_house, tmp_path, same_threads):
    """The same images, labels, seed and settings give the same weights; learned labels come with
    the set, which brings no teacher then."""
    house = learned_house
    folder = published(tmp_path / "set", house, kind, teacher=kind == "online")
    if kind == "learned":
        shutil.rmtree(folder / "labels")
        run_relabel(with_labels("learned"), house, folder / "labels")
    if kind == "single":
        table = np.random.default_rng(0).normal(0, 3, (20, 10)).astype(np.float32)
        distilled.save(folder / "labels" / "single.npy", table)
    fit.run(folder, None, None, 0, None, tmp_path / "s.pt")
    held = distilled.Distilled(house / "images", 10)
    settings = Training(batch_size=8)
    maker = Maker(
        images=held.images(CPU, 1.0),
        teacher=frozen.load(house / "teacher" / "weights.pt", ALONE),
        normalize=normalizer([0.5] * 3, [0.25] * 3, CPU),
        spec=view_spec(settings, 8, False),
        views=settings,
        relabel=Config().relabel,
        num_classes=10,
        train_counts=np.full(10, 5),
        seed=0,
        epochs=2,
        ranks=ALONE,
        temperature=settings.kl_temperature,
        learned=held.learned(),
    )
    code = KINDS[kind].code()
    of_set = (folder / "labels", files.read_json(folder / "labels" / "labels.json"), maker)
    setup = training.Setup(
        images=maker.images,
        labels=code.load(*of_set) if kind == "single" else code.fresh(maker),
        normalize=maker.normalize,
        spec=maker.spec,
        training=settings,
        epochs=2,
        key=student.key_of(0),
        title="t",
    )
    if kind == "learned":
        hard = KINDS["hard"].code().fresh(maker)
        drawn, every = draw_epoch(maker.spec, maker.images.sizes, "k", 0, True), np.arange(20)
        targets = [
            labels.targets(0, drawn, every, None, ALONE)[0] for labels in (setup.labels, hard)
        ]
        assert (targets[0] - targets[1]).abs().max() > 0.5, "the labels are not the classes"
    net = student.build(frozen.recipe("convnet3", 4, "instance", 8, 10), setup.key)
    average, _ = training.train(setup, net, Context(ALONE, tmp_path, {}, "w", quiet=True))
    weights = frozen.load(tmp_path / "s.pt", ALONE).model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in average.state_dict().items())


def test_fit_leaves_no_image_to_batchnorm_alone(house, tmp_path, same_threads):
    """As students do: 20 images in batches of 19, and maps of one pixel."""
    folder = published(tmp_path / "set", house, "hard", teacher=False)
    told = files.read_json(folder / "set.json")
    told["config"]["evaluate"]["batch_size"] = 19
    files.write_json(folder / "set.json", told)
    assert fit.run(folder, "resnet18", 1, 0, None, tmp_path / "s.pt") == 0


def test_an_image_that_cannot_be_read_is_named(house, tmp_path, same_threads):
    folder = published(tmp_path / "set", house, "hard", teacher=False)
    bad = folder / "images" / "3" / "0.png"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3/0\.png: not an image that can be read"):
        fit.run(folder, None, 1, 0, None, tmp_path / "s.pt")


def test_fit_says_plainly_what_is_wrong(house, tmp_path, same_threads):
    with pytest.raises(UserError, match="not a distilled set"):
        fit.run(tmp_path, None, None, 0, None, None)
    folder = published(tmp_path / "set", house, "online", teacher=False)
    with pytest.raises(UserError, match=r"teacher\.safetensors"):
        fit.run(folder, None, None, 0, None, None)
    with pytest.raises(UserError, match=r"no images of class 0"):  # before it trains
        fit.run(folder, None, None, 0, tmp_path / "mistyped", None)
    with pytest.raises(UserError, match="there is no folder"):
        fit.run(folder, None, None, 0, None, tmp_path / "nowhere" / "s.pt")
    with pytest.raises(UserError, match="--epochs 0"):
        fit.run(folder, None, 0, 0, None, None)
    with pytest.raises(UserError, match="vgg11_cifar"):  # five times halved, eight pixels are none
        fit.run(folder, "vgg11_cifar", None, 0, None, None)
    told = files.read_json(folder / "set.json")
    was = fit.describe(folder).training
    for name in fit.BEFORE:  # a set from before there were these
        del told["config"]["evaluate"][name]
    files.write_json(folder / "set.json", told)
    assert was == Training(batch_size=8)
    assert fit.describe(folder).training == Training(batch_size=8, soft_loss="mse")
    del told["config"]["evaluate"]["width"]
    files.write_json(folder / "set.json", told)
    with pytest.raises(UserError, match="width"):
        fit.run(folder, None, None, 0, None, None)
