"""The host does not wait for a GPU in inner loops. No GPU is needed: tensors without numbers stand
for those on it, and what asks for their numbers would wait."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltdd_scale.data import augment, siamese
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.loader import normalizer
from ltdd_scale.experts import batches, engine, recipes, train
from ltdd_scale.experts.settings import Engine, Expert
from ltdd_scale.experts.trajectories import descent, orders
from ltdd_scale.experts.trajectories.settings import Trajectory
from ltdd_scale.judging import training
from ltdd_scale.judging.settings import Training
from ltdd_scale.labels import hard, learned, online, single, stored
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.settings import Relabel, Views
from ltdd_scale.labels.views import view_spec
from ltdd_scale.methods.dm import match
from ltdd_scale.methods.dm.settings import Dm
from ltdd_scale.methods.gm import match as gm
from ltdd_scale.methods.gm.settings import Gm
from ltdd_scale.methods.matching import segments
from ltdd_scale.methods.matching.real import Pixels, RealClass
from ltdd_scale.methods.matching.settings import Unrolled
from ltdd_scale.methods.matching.unroll import Segment
from ltdd_scale.methods.rldd import calibrate, initialize, matched, recover
from ltdd_scale.methods.rldd.settings import Initialize, Recover
from ltdd_scale.models import frozen, kernels, registry
from ltdd_scale.models.flat import Flat
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from tools.bench_traffic import shapes

GPU = torch.device("meta")
ALONE = Ranks(0, 1, GPU, None)
SIZE, CLASSES = 8, 5
aten = torch.ops.aten


class Waits(Exception):
    """The host would wait for the GPU here."""


class Sends(TorchFunctionMode):
    """Tensors that are made of lists on the GPU are copied to it, and waited for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        made = func in (torch.tensor, torch.as_tensor)
        if made and device is not None and torch.device(device) == GPU:
            raise Waits(func.__name__)
        return func(*args, **kwargs)


class Watching(TorchDispatchMode):
    """Raises `Waits` at an operation in which the host would wait. `kernels`: operations on the
    GPU so far.

    What is copied to a GPU without blocking is staged. What asks for numbers that are on it waits,
    and so do copies from it, and tensors of the host that an operation is given beside the GPU's.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self._sends = 0, Sends()

    def __enter__(self):
        self._sends.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._sends.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t.device == GPU for t in given]
        self.kernels += any(there)
        if self._waits(func, args, kwargs, given, there):
            raise Waits(str(func))
        return func(*args, **kwargs)

    def _waits(self, func, args, kwargs, given, there) -> bool:
        if func is aten._to_copy.default:
            crosses = (kwargs.get("device") or given[0].device) != given[0].device
            return crosses and (there[0] or not kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            blocking = len(args) < 3 or not args[2]
            return there[0] != there[1] and (there[1] or blocking)
        if not any(there):
            return False
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default):
            return True
        if func in (aten.index.Tensor, aten.index_put_.default):
            masks = any(t is not None and t.dtype == torch.bool for t in args[1])
            # One number where a mask is: the mask is read by a kernel.
            if masks and (func is aten.index.Tensor or args[2].numel() > 1):
                return True
        # A number alone is an argument of the kernel.
        return any(t.dim() and not gpu for t, gpu in zip(given, there, strict=True))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The device "meta" knows no autocast, not even to turn it off, and none of a GPU's kernels."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(kernels, "on_gpu", lambda x: x.device == GPU)
    library = shapes()
    yield
    library._destroy()


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)


def held(n: int = 11) -> MemoryImages:
    return MemoryImages(pixels(n), np.arange(n) % CLASSES, GPU)


def normal():
    return normalizer([0.5] * 3, [0.25] * 3, GPU)


def expert(norm: str = "batch", projection: int = 0) -> registry.TwoHeads:
    def made():
        features = registry.backbone("convnet3", 4, norm, SIZE)
        return registry.TwoHeads(features, CLASSES, projection)

    return ALONE.to_device(registry.seeded(made, "t"))


WAITING = {
    "a number": lambda x: float(x.sum()),
    "a question": lambda x: bool((x > 0).any()),
    "to the host": lambda x: x.cpu(),
    "into the host's": lambda x: torch.empty(4, 3).copy_(x, non_blocking=True),
    "from the host": lambda x: torch.zeros(3).to(GPU),
    "into the GPU's": lambda x: x.copy_(torch.zeros(4, 3)),
    "made of a list": lambda x: torch.tensor([1.0, 2.0], device=GPU),
    "a mask": lambda x: x[x > 0],
    "a mask written to": lambda x: x.__setitem__(x[:, 0] > 0, torch.ones(2, 3, device=GPU)),
    "NumPy's index": lambda x: x[np.asarray([0, 1])],
    "an index of the host": lambda x: x[torch.from_numpy(np.asarray([0, 1]))],
    "distinct values": lambda x: torch.unique(x),
    "a whole network": lambda x: nn.Linear(2, 2).to(GPU),
}


@pytest.mark.parametrize("what", WAITING)
def test_waits_are_seen(what):
    x = torch.zeros(4, 3, device=GPU)
    with pytest.raises(Waits), Watching():
        WAITING[what](x)


def test_what_does_not_wait_is_left_alone():
    x = torch.zeros(4, 3, device=GPU)
    with Watching() as watching:
        index = torch.from_numpy(np.asarray([0, 1])).to(GPU, non_blocking=True)
        x[index] = x[index] * 2 + 1.0
        x[:, 1:] = 3
        x[x > 0] = 1.0
        torch.where(x > 0, x, 0)
    assert watching.kernels > 5


@pytest.mark.parametrize("op", range(augment.NUM_OPS))
def test_augmentation(op):
    images, spec = torch.zeros(4, 3, SIZE, SIZE, device=GPU), ViewSpec(SIZE, (0.3, 1.0))
    views = spec.draw(rng(0), np.full((4, 2), SIZE))
    views.ops, views.signs = np.full((4, 1), op), np.asarray([[True], [False]] * 2)
    with Watching() as watching:
        assert augment.apply(images, views, spec).device == GPU
    assert watching.kernels > 20


@pytest.mark.parametrize("kind", siamese.KINDS)
def test_siamese_augmentation(kind):
    images = torch.zeros(4, 3, SIZE, SIZE, device=GPU)
    with Watching() as watching:
        siamese.apply(images, siamese.draw(rng(0), (kind,), SIZE))
        siamese.apply(images, siamese.draw_each(rng(0), (kind,), SIZE, 4))
    assert watching.kernels > 2


def maker_of(images: MemoryImages, views: Views, relabel: Relabel, **changes) -> Maker:
    teacher = frozen.Frozen(expert("instance").eval().requires_grad_(False), {}, ALONE)
    given = (images, teacher, normal(), view_spec(views, SIZE, True), views, relabel, CLASSES)
    more = {"temperature": None, "learned": np.zeros((11, CLASSES), np.float32), **changes}
    return Maker(*given, images.counts, 0, 2, ALONE, **more)


def labels_of(kind: str, images: MemoryImages, views: Training, topk: int):
    relabel = Relabel(topk=topk, adjust=False)
    maker = maker_of(images, views, relabel, temperature=views.kl_temperature)
    if kind == "stored":
        values = np.zeros((11, topk + 1 if topk else CLASSES), np.float16)
        packed = {"values": values, "classes": np.zeros((11, topk), np.int16)}
        packed = packed if topk else {"values": values}
        return stored.Stored(maker, [packed, packed], 0)
    made = {"hard": hard.Hard, "learned": learned.fresh}
    if kind in made:
        return made[kind](maker)
    if kind == "online":
        return online.Online(maker, 0.5)
    return single.Single(maker, torch.zeros(11, CLASSES, device=GPU))


@pytest.mark.parametrize("cutmix", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("kind", "topk"),
    [("hard", 0), ("single", 0), ("stored", 0), ("stored", 2), ("online", 0), ("learned", 0)],
)
def test_a_student(kind, topk, optimizer, cutmix):
    views = Training(batch_size=3, optimizer=optimizer, randaugment=2, cutmix=cutmix)
    images = held()
    labels = labels_of(kind, images, views, topk)
    spec = view_spec(views, SIZE, True)
    setup = training.Setup(images, labels, normal(), spec, views, 2, "key", "title")
    student = registry.Student(registry.backbone("convnet3", 4, "instance", SIZE), CLASSES)
    work = training._Work(setup, ALONE.to_device(student), ALONE)
    with Watching() as watching:
        for drawn, indices, x in work.rest_of_epoch():
            work.step(0, drawn, indices, x)
            if work.taken == setup.steps - 1:
                break  # the last step of an epoch says its loss, late
    assert watching.kernels > 200 and work.taken == 3
    assert all(p.device == GPU for p in work.average.network.parameters())


@pytest.mark.parametrize(
    "own", [{"recipe": "glmc"}, {"recipe": "balanced"}, {"recipe": "balanced", "cutmix": 0.0}]
)
def test_an_expert(own, tmp_path):
    shape = {"net": "convnet3", "width": 4, "epochs": 2, "batch_size": 6, "crop_padding": 1}
    own = Expert(**shape, randaugment=2, **own)
    recipe = recipes.RECIPES[own.recipe]
    images, spec = held(), ViewSpec(SIZE, None, 1, True, 2)
    course = batches.Course(images, spec, "s", 6, recipe.mixing(own), ALONE)
    setup = engine.Setup(own, Engine(clip=1.0), micro_batches=2)
    model = expert(projection=8 if recipe.projection(own) else 0)
    trainer = engine.make(train._Heads(model), setup, ALONE, Checkpoints(tmp_path, "me", 1e9))
    step = train.Step(trainer, recipe.objective(own, images.counts, GPU), setup, course)
    normalize = normal()
    with Watching() as watching:
        for batch in batches.from_step(course, 0, 2, normalize, CLASSES):
            assert step(batch).device == GPU
    assert watching.kernels > 200


def recovery(**changes):
    observer = expert().eval().requires_grad_(False)
    layers = registry.norm_layers(observer)
    bound = torch.ones(1, 3, 1, 1, device=GPU)
    settings = Recover(iterations=3, **changes)
    networks = (observer, expert("instance").eval().requires_grad_(False))
    objective = recover.Objective(*networks, -bound, bound, settings, SIZE, False, ALONE)
    moments = {n: torch.ones(CLASSES, 1 + 2 * layer.num_features) for n, layer in layers.items()}
    statistics = {"fair": True, "moments": moments}
    spec = ViewSpec(SIZE, (0.3, 1.0))
    made_of = (layers, statistics, "mixture", bound * 0, bound, spec, 0)
    held = torch.from_numpy(pixels(2 * CLASSES)).to(GPU)
    real = SimpleNamespace(some=lambda *_: (held, [2] * CLASSES))
    shown = (Pixels(bound * 0, bound), settings, 0, siamese.choices(siamese.ALL), ALONE)
    source = matched.Source(real, *shown) if settings.matching else None
    return recover.Material(objective, *made_of, source)


MORE = {"matching": 20.0, "matching_width": 4, "matching_real": 3, "guard": "sure"}


@pytest.mark.parametrize("changes", [{}, {"resolutions": [4, SIZE]}, MORE])
def test_a_chunk_of_recovered_images(changes):
    material = recovery(**changes)
    classes = tuple(range(CLASSES))
    chunk = SimpleNamespace(number=0, classes=classes, labels=np.arange(CLASSES))
    with Watching() as watching:
        batch = material.batch(chunk, pixels(CLASSES))
        with material.alignment(chunk) as alignment:
            images = recover.recover_chunk(material.objective, batch, alignment)
        images = material.objective.settled(batch, images)
    assert watching.kernels > 200 and images.device == GPU


def test_crops_that_a_teacher_judges():
    """All crops of a class: the host reads what it chooses by once, at the end."""
    teacher = frozen.Frozen(expert("instance").eval().requires_grad_(False), {}, ALONE)
    images, own = held(6), Initialize(batch_size=4)
    spec = ViewSpec(SIZE, (0.5, 1.0))
    crops = initialize.Crops(images, teacher, normal(), spec, own, 2, 0)
    indices = np.repeat(np.arange(6), 2)
    views = spec.draw(rng(0), images.sizes[indices])
    with Watching() as watching:
        scores, features = initialize.seen(crops, 1, indices, views)
    assert scores.shape == (12,) and len(features) == 12
    assert watching.kernels > 100


def test_labels_that_are_a_mean_over_views():
    images = held()
    maker = maker_of(images, Views(), Relabel(views=3, adjust=False))
    with Watching() as watching:
        assert single.mean_logits(maker).shape == (11, CLASSES)
    assert watching.kernels > 100


@pytest.mark.parametrize("optimizer", ["sgd", "gsam"])
def test_a_step_of_an_expert_trajectory(optimizer):
    own = Trajectory(optimizer=optimizer, batch_size=4, momentum=0.9, weight_decay=0.1)
    flat = Flat("convnet3", 4, "instance", SIZE, CLASSES)
    about = (normal(), siamese.choices(siamese.ALL), SIZE, GPU, ("t",))
    course = descent.Batches(held(), orders.Uniform(11, 4, "t"), *about)
    theta = flat.initial(0).to(GPU)
    velocity = torch.zeros_like(theta)

    def loss(at, x, y):
        return F.cross_entropy(flat.logits(at, x), y)

    with Watching() as watching:
        for x, y in course.steps(0, 2):
            value, gradient = descent.direction(own, theta, lambda at, x=x, y=y: loss(at, x, y))
            theta, velocity = descent.advance(own, theta, velocity, gradient)
    assert watching.kernels > 100 and value.device == theta.device == GPU


def test_calibration(tmp_path):
    model, images = expert().eval().requires_grad_(False), held(20)
    layers = registry.norm_layers(model)
    context = Context(ALONE, tmp_path, {}, "w", quiet=True)
    made_of = (model, images, normal(), ViewSpec(SIZE), 4, context)
    with Watching() as watching:
        found = calibrate.Measurement(*made_of).collect(layers, "calibrate")
    assert watching.kernels > 100 and {m.device for m in found.values()} == {GPU}


def test_distribution_matching():
    settings = Dm(iterations=2, width=4, real_batch=3)
    bound = torch.ones(1, 3, 1, 1, device=GPU)
    made_of = (settings, 0, SIZE, siamese.choices(settings.dsa), Pixels(bound, bound), ALONE)
    shown = torch.from_numpy(pixels(9)).to(GPU)
    classes = [RealClass(c, shown, np.arange(2)) for c in range(2)]
    with Watching() as watching:
        matched = match.match_chunk(match.Matching(*made_of), classes)
    assert watching.kernels > 200 and matched[0].device == GPU


def test_gradient_matching():
    """All of an outer step but the one wait for its distance."""
    settings = Gm(width=4, real_batch=3, inner_epochs=2, inner_batch=4)
    flat, bound = Flat("convnet3", 4, "instance", SIZE, 3), torch.ones(1, 3, 1, 1, device=GPU)
    shown = torch.from_numpy(pixels(9)).to(GPU)
    classes = [RealClass(c, shown, np.arange(2)) for c in range(3)]
    about = (settings, 0, SIZE, siamese.choices(settings.dsa), flat, Pixels(bound, bound))
    matching = gm.Matching(*about, classes, ALONE, gm.inner_step(flat, settings.inner_lr))
    images = torch.zeros(3, 2, 3, SIZE, SIZE, device=GPU)
    state = gm.State(images, torch.zeros_like(images), flat.initial(0).to(GPU))
    with Watching() as watching:
        gm.descend(matching, state, gm.gradients(matching, state, 0))
        assert gm.train(matching, state, 0).device == GPU
    assert watching.kernels > 200


def test_trajectory_matching():
    """The gradient of a segment."""
    own = Unrolled(inner_steps=3, batch_size=4)
    flat = Flat("convnet3", 4, "instance", SIZE, 3)
    images, labels = torch.zeros(6, 3, SIZE, SIZE, device=GPU), torch.ones(6, 3, device=GPU)
    synthetic = segments.Synthetic(images, labels, own, True, 0.5)
    begin, strategy = flat.initial(0).to(GPU), siamese.choices(siamese.ALL)

    def logits(theta, x, _):
        return flat.logits(theta, x)

    def loss(z, y):
        return -(y * F.log_softmax(z, 1)).sum(1).mean()

    with Watching() as watching:
        drawn = segments.draw(("t",), 2, (0, 1), (3, 4, 6), strategy, images)
        how = (drawn.batches, drawn.augment, logits, loss, begin[:0])
        segment = Segment("one", begin, begin + 1, slice(0, flat.size), *how)
        assert synthetic.gradient([segments.Weighted(1.0, segment)]).device == GPU
    assert watching.kernels > 200
