"""ZCA whitening: the numbers, where it acts, what it refuses, and that nothing changes without."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, cli, digests, folder_of, said_plainly

from ltdd_scale import recipe
from ltdd_scale.config import load
from ltdd_scale.config.root import check
from ltdd_scale.data import augment, distilled, loader, whitening
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories import train
from ltdd_scale.experts.trajectories.orders import Uniform
from ltdd_scale.judging.student import LOGITS, WEIGHTS
from ltdd_scale.labels.views import EpochViews, render
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.methods.matching import segments
from ltdd_scale.methods.matching.real import Pixels, open_real
from ltdd_scale.models import frozen
from ltdd_scale.pipeline import graph
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, Section, settings_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
SIZE = 4  # 48 dimensions
ABLE = [name for name, method in METHODS.items() if method.whitened]
UNROLLED = {"iterations": 6, "inner_steps": 2, "max_start": 1, "batch_size": 16, "lr_images": 2.0}
VALUES = {
    **yaml.safe_load(TINY),
    "data": {**yaml.safe_load(TINY)["data"], "max_per_class": 60, "imbalance_factor": 4},
    "trajectories": {"experts": 2, "width": 8, "steps": 6, "every": 2, "batch_size": 16, "dsa": ""},
    "classifiers": {"steps": 6, "every": 2, "batch_size": 16},
    "mtt": {**UNROLLED, "segments": 2, "rate": 0.1},
    "damed": {**UNROLLED, "classifier_steps": 2, "rate": 0.1},
    "gm": {"networks": 1, "outer_steps": 2, "inner_epochs": 1, "width": 8, "lr": 0.5},
    "dm": {"iterations": 2, "width": 8, "lr": 20.0},
    "relabel": {"labels": "hard"},
}
VALUES["data"]["zca"] = True


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As ranks have it: the tests compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """uint8 [900, 3, 4, 4] whose numbers depend on each other."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(900, 48)) @ generator.normal(size=(48, 48))
    pixels = np.clip(128 + 8 * noise, 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels.reshape(-1, 3, SIZE, SIZE))


def fitted(images: torch.Tensor, eps: float, size: int = 256) -> whitening.Whitening:
    return whitening.fit(images.split(size), eps, CPU)


def covariance(x: torch.Tensor) -> torch.Tensor:
    return torch.cov(x.flatten(1).double().T)


def test_whitened_images_have_the_identity_as_covariance_up_to_eps(images):
    z = fitted(images, 1e-6)(images / 255)
    torch.testing.assert_close(covariance(z), torch.eye(48).double(), atol=2e-3, rtol=0)
    assert z.mean(0).abs().max() < 1e-3
    # With ε the variance along each eigenvector is λ / (λ + ε).
    own, eps = fitted(images, 0.1), 0.1
    c = covariance(images / 255)
    expected = c @ torch.linalg.inv(c + eps * torch.eye(48))
    found = covariance(own(images / 255))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.diag().min() < 0.9 and torch.equal(own.matrix, own.matrix.T)


def test_batches_change_no_bit(images, tmp_path):
    whole, parts = fitted(images, 0.1, 900), fitted(images, 0.1, 7)
    assert torch.equal(whole.matrix, parts.matrix) and torch.equal(whole.mean, parts.mean)
    for name, one in (("a", whole), ("b", parts)):
        whitening.save(tmp_path / name, one)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = whitening.load(tmp_path / "a", CPU)
    assert torch.equal(again.matrix, whole.matrix) and torch.equal(again.mean, whole.mean)


def test_a_damaged_file_is_one_line(images, tmp_path):
    path = tmp_path / whitening.FILE
    with pytest.raises(UserError, match="is missing; delete its folder"):
        whitening.load(path, CPU)
    whitening.save(path, fitted(images, 0.1))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="is damaged"):
        whitening.load(path, CPU)
    np.savez(path, mean=np.zeros((3, 2, 2), np.float32), matrix=np.eye(11, dtype=np.float32))
    with pytest.raises(UserError, match=r"is damaged \(mean \[3, 2, 2\], matrix \[11, 11\]\)"):
        whitening.load(path, CPU)


def test_learned_images_stay_valid_pixels(images):
    """There and back is the same picture; a step beyond ends at the edge."""
    pixels = Pixels(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), fitted(images, 0.1))
    z = pixels.normalized(images[:20])
    assert np.array_equal(pixels.to_uint8(z), images[:20].numpy())
    before = z.clone()
    pixels.clamp(z)
    torch.testing.assert_close(z, before, atol=1e-5, rtol=0)
    # Several dimensions before the image's own, as GM has them.
    moved = (before + 3 * torch.randn(before.shape)).view(4, 5, 3, SIZE, SIZE)
    wanted = pixels.whitening.back(moved)
    assert wanted.min() < -0.1 and wanted.max() > 1.1
    pixels.clamp(moved, ALONE)
    shown = pixels.whitening.back(moved)
    torch.testing.assert_close(shown, wanted.clamp(0, 1), atol=1e-4, rtol=0)
    assert pixels.to_uint8(moved).dtype == np.uint8


def config_of(folder: Path, method: str = "mtt", **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "zca.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "method": method, **changes}))
    return path


def nodes_of(path: Path, *sets: str) -> dict[str, graph.Node]:
    config = load.load(path, sets)
    return graph.build(recipe.stages(config, ""), config)


@pytest.mark.parametrize("method", METHODS)
def test_without_it_nothing_knows_of_it(method, tmp_path):
    """No stage reads it, so no fingerprint depends on it."""
    path = config_of(tmp_path, method)
    plain = nodes_of(path, "data.zca=false")
    other = nodes_of(path, "data.zca=false", "data.zca_eps=0.3")
    assert {n: x.where for n, x in plain.items()} == {n: x.where for n, x in other.items()}
    assert "whiten" not in plain
    for node in plain.values():
        assert "zca" not in node.settings and "zca" not in node.stage.inputs, node.name
    assert (
        "data.zca_eps has no effect"
        in check(load.load(path, ["data.zca=false", "data.zca_eps=1"]))[-1]
    )


@pytest.mark.parametrize("method", ABLE)
def test_with_it_all_who_show_images_to_networks_read_it(method, tmp_path):
    path = config_of(tmp_path, method)
    plain, nodes = nodes_of(path, "data.zca=false"), nodes_of(path)
    show = {n for n, x in nodes.items() if x.stage.reads.get("images") == Section("data", Seen)}
    # relabel only notes the kind of labels, or copies what the set brings: see the config check.
    assert {n for n in show if nodes[n].stage.inputs.get("zca") != "whiten"} == {"relabel"}
    same = {n for n in plain if plain[n].where == nodes[n].where}
    assert same == {"shard"}
    changed = nodes_of(path, "data.zca_eps=0.2")
    assert all(changed[n].where != nodes[n].where for n in show) and len(show) > 3


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["method=rldd"], "method=rldd sees normalised images only; choose one of"),
        (["relabel.labels=online"], "set relabel.labels (now online) to hard or learned"),
        (["evaluate.matrix=true"], "evaluate.matrix and evaluate.plain accordingly"),
        (["evaluate.plain=expert"], "a teacher sees normalised images only"),
    ],
)
def test_networks_that_see_other_images_are_refused(sets, said, tmp_path):
    path = config_of(tmp_path)
    with pytest.raises(UserError) as error:
        load.load(path, sets)
    assert str(error.value).startswith("data.zca: ") and said in str(error.value)
    assert "\n" not in str(error.value)
    load.load(path, [*sets, "data.zca=false"])


def test_too_few_images_are_refused_before_anything_starts(tmp_path):
    """Fewer than dimensions: 3 · 8² = 192."""
    path = config_of(tmp_path / "c")
    where = ["--out", tmp_path / "run", "--nproc", 1]
    for more in ([], ["--dry-run", "--cluster", "local"]):
        done = cli("run", path, *where, *more, "--set", "data.max_per_class=30")
        said_plainly(done, "data.zca", "training images do not span the 3·8² = 192 dim", "=false")
    assert not (tmp_path / "store").exists()
    enough = nodes_of(path)["whiten"]
    assert whitening.cost(enough.settings, Facts((96, 96))).memory > 0
    with pytest.raises(UserError, match="191 training images"):
        whitening.cost(enough.settings, Facts((96, 95)))
    # What no machine can do is refused whatever there is of images.
    large = nodes_of(path, "data.resolution=224")["whiten"]
    with pytest.raises(UserError, match=r"lower data\.resolution to 103"):
        whitening.check(large.settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """(config, run folder) of MTT with whitening, judged."""
    folder = tmp_path_factory.mktemp("zca")
    path = config_of(folder)
    done = cli("evaluate", path, "--out", folder / "run", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    return path, folder / "run"


def seen(run: Path) -> tuple[ShardSplit, whitening.Whitening]:
    split = ShardSplit(folder_of(run, "shard"), "train")
    return split, whitening.load(folder_of(run, "whiten") / whitening.FILE, CPU)


def test_the_stage_whitens_the_training_images(run):
    split, own = seen(run[1])
    pixels = torch.from_numpy(loader.decode(split, 8, 0))
    again = fitted(pixels, 0.1)
    assert torch.equal(own.matrix, again.matrix) and torch.equal(own.mean, again.mean)
    facts = json.loads((folder_of(run[1], "whiten") / "stage.json").read_text())["facts"]
    assert facts == {"images": len(split), "dimensions": 192}


def test_a_student_sees_whitened_images(run):
    """Its weights give its logits on whitened images, and on no others."""
    _, own = seen(run[1])
    test = ShardSplit(folder_of(run[1], "shard"), "test")
    pixels = torch.from_numpy(loader.decode(test, 8, 0)) / 255
    for name in ("distilled-hard-convnet3-s0", "random-hard-convnet3-s0", "plain-hard-convnet3-s0"):
        folder = folder_of(run[1], f"student/{name}")
        student = frozen.load(folder / WEIGHTS, ALONE)
        kept = np.load(folder / LOGITS)
        assert np.array_equal(student.logits(own(pixels)).half().numpy(), kept)
        plain = student.logits(loader.prepare(test, CPU)(pixels)).half().numpy()
        assert not np.allclose(plain, kept, atol=1e-2)


def test_the_set_that_is_given_away_has_its_whitening(run, tmp_path, monkeypatch):
    """`fit` on a moved copy is the student of the run; the other formats say what they cannot."""
    path, folder = run
    done = cli("report", path, "--out", folder, "--nproc", 1)
    assert done.returncode == 0, done.stderr
    given = tmp_path / "given"
    shutil.copytree(folder / "distilled", given)
    assert "ZCA whitening" in (given / "README.md").read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the run's rank: the bits are compared
    done = cli("fit", given, "--save", tmp_path / "s.pt")
    assert done.returncode == 0, done.stderr
    kept = folder_of(folder, "student/distilled-hard-convnet3-s0") / WEIGHTS
    ours, theirs = (frozen.load(p, ALONE).model.state_dict() for p in (tmp_path / "s.pt", kept))
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    said_plainly(cli("export", given, "--format", "ddranking"), "whitened images", "data.zca=false")
    done = cli("export", given, "--format", "set", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    matrix = (given / whitening.FILE).read_bytes()
    assert (tmp_path / "again" / whitening.FILE).read_bytes() == matrix


def test_experts_and_matching_see_whitened_images(run):
    config = load.load(run[0])
    stages = {s.name: s for s in recipe.stages(config, "")}
    inputs = {role: folder_of(run[1], n) for role, n in stages["match"].inputs.items()}
    context = Context(ALONE, run[1], inputs, "me", workers=0, quiet=True)
    split, own = seen(run[1])
    settings = settings_of(stages["trajectory/000"], config)
    order = Uniform(len(split), 16, "any")
    made = train.batches(settings, settings.trajectory, order, split, context, ("any",))
    x, _ = next(made.steps(0, 1))
    pixels = torch.from_numpy(loader.decode(split, 8, 0))[order.batch(0)]
    assert torch.equal(x, own(pixels / 255))
    learned, real = open_real(4, 0, settings.images, context)
    start = torch.from_numpy(real.initial())
    assert torch.equal(learned.normalized(start), own(start / 255))


@pytest.mark.slow
def test_ranks_and_interruptions_change_no_byte(run, tmp_path, monkeypatch):
    path, first = run
    shutil.copytree(first.parent / "store", tmp_path / "store")
    match = folder_of(first, "match").relative_to(first.parent / "store")
    expected = digests(first.parent / "store")[str(match)]
    where = ("--out", tmp_path / "r", "--store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / match)
    done = cli("match", path, *where, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "store")[str(match)] == expected
    shutil.rmtree(tmp_path / "store" / match)
    iterate = segments.Matching.iterate

    def dying(self, t):
        if t == 4:
            raise UserError("the end")
        return iterate(self, t)

    always = ("--set", "runtime.checkpoint_seconds=0")
    with monkeypatch.context() as patched:
        patched.setattr(segments.Matching, "iterate", dying)
        assert cli("match", path, *where, "--nproc", 1, *always).returncode == 1
    done = cli("match", path, *where, "--nproc", 1, *always)
    assert done.returncode == 0 and "resumed at iteration" in done.stderr, done.stderr
    assert digests(tmp_path / "store")[str(match)] == expected


@pytest.mark.parametrize("method", ABLE)
def test_every_method_moves_whitened_images_and_writes_pictures(method, run, tmp_path):
    path = config_of(tmp_path, method)
    sets = ["relabel.labels=learned"] if method == "damed" else []
    where = ["--out", tmp_path / "r", "--store", run[1].parent / "store", "--nproc", 1]
    done = cli("relabel", path, *where, *(["--set", *sets] if sets else []))
    assert done.returncode == 0, done.stderr
    held = distilled.Distilled(folder_of(tmp_path / "r", "match"), 10)
    found = np.concatenate([held.load(c) for c in range(10)])
    split = ShardSplit(folder_of(tmp_path / "r", "shard"), "train")
    began = [row["image"] for c in range(10) for row in held.provenance(c)]
    start = loader.decode(split, 8, 0)[began]
    assert found.dtype == np.uint8 and found.shape == start.shape
    assert (found != start).mean() > 0.2 and ((found > 0) & (found < 255)).mean() > 0.2
    # A set that is not moved is the real images, to the byte.
    still = {"gm": "gm.networks=0", "dm": "dm.iterations=0"}.get(method, f"{method}.iterations=0")
    done = cli("match", path, *where[:1], tmp_path / "s", *where[2:], "--set", still, *sets)
    assert done.returncode == 0, done.stderr
    held = distilled.Distilled(folder_of(tmp_path / "s", "match"), 10)
    assert np.array_equal(np.concatenate([held.load(c) for c in range(10)]), start)


def test_views_are_drawn_before_they_are_whitened(images):
    """A view of a batch, whitened, is what `prepare` gives for it: no view of whitened pixels."""
    own = fitted(images, 0.1)
    spec = ViewSpec(SIZE, (0.5, 1.0))
    views = spec.draw(np.random.default_rng(0), np.full((8, 2), SIZE))
    held = MemoryImages(images[:8], np.zeros(8), CPU)
    drawn = EpochViews(views, np.arange(8), np.zeros((8, 4), np.int64), np.ones(8, np.float32))
    (x,) = render(held, drawn, [np.arange(8)], spec, own)
    torch.testing.assert_close(x, own(augment.apply(images[:8] / 255, views, spec)))
    assert not torch.allclose(x, augment.apply(own(images[:8] / 255), views, spec), atol=0.1)
