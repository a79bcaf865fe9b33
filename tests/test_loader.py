import gc
import io
import itertools

import numpy as np
import pytest
import torch
from conftest import image_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from ltdd_scale.data import backend, dali, loader, sharding, sources
from ltdd_scale.data.augment import ViewSpec, centre_boxes, pixel_boxes
from ltdd_scale.data.images import MemoryImages, runs
from ltdd_scale.data.settings import Data, Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.data.streamed import StreamedImages
from ltdd_scale.errors import UserError
from ltdd_scale.experts.batches import Course, EpochPlans
from ltdd_scale.experts.recipes import Mixing, two_views
from ltdd_scale.runtime.ranks import Ranks, rng

CPU = torch.device("cpu")
TWO = Mixing((0.0, 0.2), 2, two_views)
needs_dali = pytest.mark.skipif(
    not backend.dali_is_installed(), reason="nvidia-dali is not installed"
)


def write(folder, root):
    folder.mkdir()
    data = Data(source="folder", path=str(root), profile="full", shard_images=5)
    sharding.write(folder, "set", sources.open_source(data), data, 1)
    return ShardSplit(folder, "train")


@pytest.fixture
def split(tmp_path):
    image_folder(tmp_path / "real", {"a": 7, "b": 6}, size=24)
    image_folder(tmp_path / "real", {"a": 1, "b": 1}, "test", size=24)
    return write(tmp_path / "s", tmp_path / "real")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Pieces of scikit-learn's two photographs as JPEGs of many sizes, colours and greys, two of them turned by EXIF."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name, picture in zip("ab", load_sample_images().images, strict=True):
        for part, count in (("train", 13), ("test", 1)):
            (root / "real" / part / name).mkdir(parents=True)
            for k in range(count):
                h, w = generator.integers(60, 400, 2)
                top, left = generator.integers(0, 427 - h), generator.integers(0, 640 - w)
                image = Image.fromarray(picture[top : top + h, left : left + w])
                exif = image.getexif()
                if k == 3:
                    exif[0x0112] = 6
                image = image.convert("L") if k == 5 else image
                image.save(root / "real" / part / name / f"{k}.jpg", quality=92, exif=exif)
    return write(root / "s", root / "real")


def plans(spec, sizes, parts=4):
    order = rng(3).permutation(len(sizes))
    return [
        (part, spec.draw(rng(4, k), sizes[part]))
        for k, part in enumerate(np.array_split(order, parts))
    ]


def seen(**settings) -> Seen:
    return Seen(resolution=24, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_held_images_are_the_same(split, workers):
    held = loader.open_images(split, seen(), CPU, 4)
    streamed = StreamedImages(split, 24, CPU, workers)
    assert isinstance(held, MemoryImages)
    for spec in (
        ViewSpec(24, None, 4),
        ViewSpec(24, (0.3, 1.0)),
        ViewSpec(24, (0.3, 1.0), mirror=False, randaugment=1),
    ):
        todo = plans(spec, held.sizes)
        for a, b in zip(held.stream(todo, spec), streamed.stream(todo, spec), strict=True):
            # The one cuts between pixels and resizes floats, the other cuts at pixels and resizes bytes.
            assert (a - b).abs().mean() < 0.1 and a.shape == b.shape
    whole = [(p[0], None) for p in todo]
    for a, b in zip(held.stream(whole, spec), streamed.stream(whole, spec), strict=True):
        assert torch.equal(a, b)


def test_the_backend_is_the_one_asked_for_where_the_set_does_not_fit(split, monkeypatch):
    large = {"memory_gb": 0}
    fits = seen(memory_gb=len(split) * 3 * 24**2 / 2**30)
    assert backend.fits_memory(split, fits) and isinstance(
        loader.open_images(split, fits, CPU, 0), MemoryImages
    )
    assert not backend.fits_memory(split, seen(memory_gb=fits.memory_gb * 0.999))
    for installed in (True, False):
        monkeypatch.setattr(backend, "dali_is_installed", lambda found=installed: found)
        auto = "dali" if installed else "torch"
        assert backend.resolve_loader(seen()) == backend.backend(split, seen(**large)) == auto
        assert backend.resolve_loader(seen(loader="torch")) == "torch"
        if installed:
            for asked in ("dali", "dali-cpu"):
                assert backend.resolve_loader(seen(loader=asked)) == asked
        assert backend.backend(split, seen()) == "torch", "a set that fits is looked at once"
        assert isinstance(
            loader.open_images(split, seen(loader="torch", **large), CPU, 0), StreamedImages
        )
    for asked in ("dali", "dali-cpu"):
        said = f"data.loader={asked}, but .*pip install nvidia-dali-cuda130"
        with pytest.raises(UserError, match=said):
            loader.stream_images(split, seen(loader=asked, **large), CPU, 0)
    # A set that fits needs no DALI, whatever was resolved where the run began.
    assert isinstance(loader.stream_images(split, seen(loader="dali"), CPU, 0), StreamedImages)


@needs_dali
def test_dali_is_opened(split):
    for asked in (seen(memory_gb=0), seen(memory_gb=0, loader="dali")):
        assert isinstance(loader.open_images(split, asked, CPU, 1), dali.DaliImages)
    assert isinstance(loader.stream_images(split, seen(loader="dali"), CPU, 1), StreamedImages)


def test_images_are_normalised_by_the_training_images(split):
    x = torch.rand(2, 3, 4, 4)
    m, s = (torch.tensor(v).view(3, 1, 1) for v in (split.mean, split.std))
    assert torch.equal(loader.prepare(split, CPU)(x), (x - m) / s)


@needs_dali
@pytest.mark.parametrize("size", [64, 224])
def test_dali_shows_what_pytorch_shows(photographs, size):
    """The same order and windows; pixels differ by how a JPEG's colours are brought to full size and by rounding."""
    ours, theirs = (
        dali.DaliImages(photographs, size, CPU, 2),
        StreamedImages(photographs, size, CPU, 0),
    )
    for spec in (
        ViewSpec(size, (0.3, 1.0)),
        ViewSpec(size, None, 4),
        ViewSpec(size, (0.3, 1.0), randaugment=2),
    ):
        todo = plans(spec, photographs.sizes)
        found = list(ours.stream(todo, spec))
        for (indices, _), a, b in zip(todo, found, theirs.stream(todo, spec), strict=True):
            assert a.shape == b.shape == (len(indices), 3, size, size) and a.dtype == torch.float32
            difference = (a - b).abs().mean((1, 2, 3))
            # The next image of the batch is far away: neither order nor window can be another's. (Equalising makes more of a difference.)
            assert (difference < (0.08 if spec.randaugment else 0.03)).all() and (
                a - b.roll(1, 0)
            ).abs().mean() > 0.1, difference
    todo = [(p[0], None) for p in todo]
    for a, b in zip(ours.stream(todo, spec), theirs.stream(todo, spec), strict=True):
        assert (a - b).abs().mean((1, 2, 3)).max() < 0.03
    assert len(found) == 4 and not torch.equal(found[0][0], found[1][0])


@needs_dali
def test_dali_gives_tensors_that_stay(photographs):
    """Batches are handed over without a copy: none may be written again while it is held."""
    images, spec = dali.DaliImages(photographs, 64, CPU, 2), ViewSpec(64, (0.3, 1.0))
    todo = plans(spec, photographs.sizes, 13)
    held, copies = [], []
    for x in itertools.chain(images.stream(todo, spec), images.stream(todo, spec)):
        held.append(x)
        copies.append(x.clone())
    gc.collect()
    assert len(held) == 26 and all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held[:13], held[13:], strict=True))


@needs_dali
def test_dali_under_inference_mode(photographs):
    """The mode is a thread's own, and images are resized in others."""
    images, spec = dali.DaliImages(photographs, 32, CPU, 2), ViewSpec(32, (0.3, 1.0))
    plan = [(np.arange(8), spec.draw(rng("inference"), photographs.sizes[:8]))]
    (plain,) = images.stream(plan, spec)
    with torch.inference_mode():
        (same,) = images.stream(plan, spec)
    assert torch.equal(plain, same)


@needs_dali
def test_dali_streams_may_be_left_nested_and_of_any_batch(photographs):
    images, spec = dali.DaliImages(photographs, 32, CPU, 2), ViewSpec(32, (0.3, 1.0))
    todo = plans(spec, photographs.sizes)
    expected = list(images.stream(todo, spec))
    stream = images.stream(todo, spec)
    assert torch.equal(next(stream), expected[0])
    inner = list(images.stream(todo, spec))  # while the other is under way
    stream.close()
    assert all(torch.equal(a, b) for a, b in zip(inner, expected, strict=True))
    assert list(images.stream([], spec)) == []
    both = (
        np.concatenate([todo[0][0], todo[1][0]]),
        spec.draw(rng(9), photographs.sizes[np.concatenate([todo[0][0], todo[1][0]])]),
    )
    small_first = list(images.stream([todo[0], both], spec))
    assert [len(x) for x in small_first] == [len(todo[0][0]), len(both[0])]
    assert torch.equal(small_first[1], next(iter(images.stream([both], spec))))


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 4))
def test_runs_are_of_one_image_and_no_longer_than_asked(indices, longest):
    indices = np.asarray(indices, np.int64)
    parts = np.split(indices, runs(indices, longest)[1:]) if len(indices) else []
    assert np.array_equal(np.concatenate([*parts, indices[:0]]), indices)
    assert all(len(set(part)) == 1 for part in parts)
    assert not longest or all(len(part) <= longest for part in parts)
    for a, b in itertools.pairwise(parts):
        assert a[0] != b[0] or len(a) == longest, "a run ends where it must"


def several_views(sizes, spec):
    """Plans of runs of three views, one of a single view, one of views of whole images."""
    three = [np.repeat([4, 2, 4, 9], 3), np.asarray([7, 7, 7, 1, 3, 3])]
    return [(part, spec.draw(rng("several", k), sizes[part])) for k, part in enumerate(three)]


KINDS = ["torch 0", "torch 2", *(pytest.param(d, marks=needs_dali) for d in ("dali", "dali cuts"))]


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("crop_scale", [(0.3, 1.0), None])
def test_views_of_an_image_that_follow_each_other_are_cut_from_one_decoding(
    photographs, backend, crop_scale, monkeypatch
):
    """They show what views decoded one by one show. "dali cuts" is what DALI does on a GPU."""
    spec, decoded = ViewSpec(48, crop_scale, 4), []
    kind, _, workers = backend.partition(" ")
    if kind == "torch":
        images = StreamedImages(photographs, 48, CPU, int(workers))
    else:
        images = dali.DaliImages(photographs, 48, CPU, 2)
        if workers:
            monkeypatch.setattr(dali, "cuts_itself", lambda device: True)
    todo = several_views(photographs.sizes, spec)
    alone = [
        next(images.stream([(part[[k]], views[[k]])], spec))
        for part, views in todo
        for k in range(len(part))
    ]
    read = photographs.view
    monkeypatch.setattr(photographs, "view", lambda i: decoded.append(i) or read(i))
    found = list(images.stream(todo, spec))
    assert [len(x) for x in found] == [12, 6]
    difference = (torch.cat(found) - torch.cat(alone)).abs().mean((1, 2, 3))
    # A piece of an image may be decoded a little otherwise at its edges, and coarser by Pillow.
    assert difference.max() < 0.02, difference
    assert (torch.cat(found) - torch.cat(alone).roll(1, 0)).abs().mean() > 0.05
    if backend != "torch 2":  # decoded in other processes
        assert decoded == [4, 2, 4, 9, 7, 1, 3]
    if crop_scale:
        again = list(images.stream([(todo[0][0][:3], todo[0][1][:3])], spec))
        assert (again[0] - found[0][:3]).abs().max() < 1e-6, "alone or in a batch: the same"


def test_what_a_gpu_decodes_with_is_known_to_dali():
    from nvidia.dali import ops

    ops.decoders.ImageSlice(device="mixed", **dali.MIXED)
    with pytest.raises(KeyError):
        ops.decoders.ImageSlice(device="mixed", another=1, **dali.MIXED)


class Sizes:
    """What a plan needs of a set."""

    def __init__(self, n):
        self.labels, self.sizes = np.arange(n) % 3, np.full((n, 2), 40)
        self.counts = np.bincount(self.labels)


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 60), st.integers(2, 9), st.integers(1, 4), st.data())
def test_every_rank_and_every_resume_see_the_same_epoch(n, batch, world, data):
    """Each epoch's uniform order is a permutation, ranks' parts are disjoint and complete, and a cut changes nothing, ends included."""
    batch, images, spec = min(batch, n), Sizes(n), ViewSpec(8, (0.5, 1.0))
    steps = n // batch
    cut = data.draw(st.integers(0, steps))

    def make(first, rank, world_size):
        course = Course(images, spec, "s", batch, TWO, Ranks(rank, world_size, CPU, None))
        return EpochPlans(course, 1, first)

    alone, parts = make(0, 0, 1), [make(0, r, world) for r in range(world)]
    seen = np.concatenate([alone[k][0][::2] for k in range(0, len(alone), 2)])
    assert len(set(seen)) == len(seen) == steps * batch and len(alone) == 2 * steps
    for k in range(len(alone)):
        assert [i for p in parts for i in p[k][0]] == list(alone[k][0])
        assert (
            np.concatenate([p[k][1].windows for p in parts]).tobytes()
            == alone[k][1].windows.tobytes()
        )
    rest = make(cut, 0, 1)
    assert len(rest) == len(alone) - 2 * cut
    for k in range(len(rest)):
        (i, v), (j, w) = rest[k], alone[k + 2 * cut]
        assert (i == j).all() and v.windows.tobytes() == w.windows.tobytes()
    with pytest.raises(IndexError):
        alone[len(alone)]


@given(st.integers(0, 999), st.floats(0.01, 1))
def test_boxes_are_inside_their_images(seed, low):
    sizes = np.random.default_rng(seed).integers(1, 3000, (20, 2))
    for boxes in (
        pixel_boxes(ViewSpec(8, (low, 1.0)).draw(rng(seed), sizes).windows, sizes),
        centre_boxes(sizes),
    ):
        assert (
            (boxes[:, :2] >= 0).all()
            and (boxes[:, 2:] >= 1).all()
            and (boxes[:, :2] + boxes[:, 2:] <= sizes[:, ::-1]).all()
        )
    assert (boxes[:, 2] == boxes[:, 3]).all()


def spoil(split, i):
    where = split._where[i]
    tar = bytearray(split._paths[where[0]].read_bytes())
    tar[where[1] : where[1] + where[2]] = bytes(where[2])
    split._paths[where[0]].write_bytes(tar)
    return where[1]


@pytest.mark.parametrize("backend", ["torch 0", "torch 2", pytest.param("dali", marks=needs_dali)])
def test_an_image_that_stopped_decoding_is_named(split, backend):
    offset = spoil(split, 3)
    images = (
        dali.DaliImages(split, 24, CPU, 2)
        if backend == "dali"
        else StreamedImages(split, 24, CPU, int(backend[-1]))
    )
    spec, todo = ViewSpec(24, (0.5, 1.0)), [np.asarray([2, 3]), np.asarray([4]), np.asarray([5])]
    for given_views in (False, True):
        with pytest.raises(
            UserError,
            match=rf"set-train-000000.tar, offset {offset}, 00000003.png \(train/a/003.png\)",
        ) as caught:
            list(
                images.stream(
                    [(i, spec.draw(rng(0), split.sizes[i]) if given_views else None) for i in todo],
                    spec,
                )
            )
        assert "\n" not in str(caught.value)
    assert (
        len(next(iter(images.stream([(np.asarray([0, 1]), None)], spec)))) == 2
    )  # the others are there


@pytest.mark.parametrize(
    "kind", [pytest.param("dali", marks=needs_dali), "held", "torch, 0 workers", "torch, 2 workers"]
)
@pytest.mark.parametrize("crop", [None, (0.3, 1.0)])
def test_views_have_the_size_that_is_asked_for(photographs, kind, crop):
    """A set of 48 pixels, seen at 24: what its 48 pixels show, halved."""
    if kind == "dali":
        images = dali.DaliImages(photographs, 48, CPU, 1)
    elif kind == "held":
        images = loader.open_images(photographs, Seen(resolution=48), CPU, 0)
    else:
        images = StreamedImages(photographs, 48, CPU, int(kind[7]))
    full, half = (ViewSpec(side, crop, 4) for side in (48, 24))
    todo = plans(full, images.sizes)
    for large, small in zip(images.stream(todo, full), images.stream(todo, half), strict=True):
        assert small.shape[-1] == 24 and large.shape[-1] == 48 and len(small) == len(large)
        apart = (torch.nn.functional.avg_pool2d(large, 2) - small)[..., 3:-3, 3:-3]
        assert apart.abs().mean() < 0.03
    again = list(images.stream(todo, full))
    assert all(torch.equal(a, b) for a, b in zip(again, images.stream(todo, full), strict=True))


@needs_dali
def test_training_goes_the_same_way_with_either_decoder(photographs, tmp_path):
    """What reaches the network is alike enough: mean pixels of an epoch's batches agree."""
    spec = ViewSpec(48, (0.3, 1.0))
    images, alone = StreamedImages(photographs, 48, CPU, 0), Ranks(0, 1, CPU, None)
    todo = EpochPlans(Course(images, spec, "s", 8, TWO, alone), 0, 0)
    means = [
        [float(x.mean()) for x in kind.stream(todo, spec)]
        for kind in (
            dali.DaliImages(photographs, 48, CPU, 1),
            StreamedImages(photographs, 48, CPU, 2),
        )
    ]
    assert len(means[0]) == 6 and np.abs(np.subtract(*means)).max() < 0.01


def test_encoded_bytes_are_those_of_the_file(photographs):
    assert photographs.view(2).tobytes() == photographs.encoded(2)
    assert Image.open(io.BytesIO(photographs.encoded(2))).size == tuple(photographs.sizes[2])
