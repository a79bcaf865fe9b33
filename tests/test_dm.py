import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale.data import distilled, sharding, shards, siamese, sources
from ltdd_scale.data.settings import Data, Location
from ltdd_scale.errors import UserError
from ltdd_scale.methods.dm import chunks, match
from ltdd_scale.methods.dm.match import Matching
from ltdd_scale.methods.dm.method import DM
from ltdd_scale.methods.dm.settings import Dm
from ltdd_scale.methods.matching.real import Pixels, RealClass
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, settings_of

ALONE = Ranks(0, 1, torch.device("cpu"), None)
SIZE = 16


def matching(**changes) -> Matching:
    settings = Dm(**{"iterations": 6, "lr": 10.0, "width": 8, **changes})
    mean, std = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    return Matching(settings, 0, SIZE, siamese.choices(settings.dsa), Pixels(mean, std), ALONE)


def real(label: int, n: int, ipc: int) -> RealClass:
    generator = np.random.default_rng(label)
    pixels = generator.integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)
    pixels //= label + 1  # classes differ
    return RealClass(label, torch.from_numpy(pixels), np.arange(ipc) % n)


def loss_of(made: Matching, one: RealClass, images: torch.Tensor) -> float:
    """Over networks and augmentations that matching has not seen."""
    values = [
        match.class_loss(made, one, images, t, made.network(t), made.draw(t))
        for t in range(1000, 1040)
    ]
    return float(torch.stack(values).mean())


def test_matching_lowers_the_loss_and_keeps_pixels_valid():
    made, one = matching(iterations=100, width=16), real(0, 40, 4)
    one.pixels[4:, :, ::2] //= 8  # the images that it starts from are unlike the rest
    start = made.pixels.normalized(one.pixels[:4])
    (images,) = match.match_chunk(made, [one])
    assert loss_of(made, one, images) < 0.7 * loss_of(made, one, start)
    shown = images * made.pixels.std + made.pixels.mean
    assert shown.min() >= -1e-6 and shown.max() <= 1 + 1e-6


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_class_that_the_set_has_whole_does_not_move(n):
    made, one = matching(), real(1, n, 4)
    start = made.pixels.normalized(one.pixels[torch.from_numpy(one.start)])
    for t in range(6):
        images = start.clone().requires_grad_()
        loss = match.class_loss(made, one, images, t, made.network(t), made.draw(t))
        (grad,) = torch.autograd.grad(loss, images)
        assert float(loss.detach()) == 0 and not grad.any()
    (images,) = match.match_chunk(made, [one])
    assert torch.equal(images, start)


def test_what_shares_a_chunk_changes_no_bit():
    made, classes = matching(), [real(c, n, 4) for c, n in enumerate((40, 9, 4, 2))]
    together = match.match_chunk(made, classes)
    for one, images in zip(classes, together, strict=True):
        assert torch.equal(match.match_chunk(made, [one])[0], images)
    assert not torch.equal(together[0], made.pixels.normalized(classes[0].pixels[:4]))


def test_network_and_draw_depend_on_the_iteration_alone_and_batches_on_the_class_too():
    made, one = matching(), real(0, 40, 4)
    weights = [next(made.network(t).parameters()) for t in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert made.draw(3) == matching().draw(3)
    batches = [
        one.batch(10, 0, "dm real", 5),
        one.batch(10, 0, "dm real", 5),
        one.batch(10, 0, "dm real", 6),
    ]
    assert np.array_equal(batches[0], batches[1]) and not np.array_equal(batches[0], batches[2])
    assert len(set(batches[0])) == 10
    assert not np.array_equal(batches[0], real(1, 40, 4).batch(10, 0, "dm real", 5))


def test_a_chunk_resumes_to_the_bit():
    made, classes = matching(), [real(c, 20, 3) for c in range(2)]
    saved: dict = {}

    def tick(t, state):
        if t == 3:
            copy = state()
            saved["iteration"] = copy["iteration"]
            saved["images"] = [x.clone() for x in copy["images"]]
            saved["optimizer"] = torch.load(_written(copy["optimizer"]))

    whole = match.match_chunk(made, classes, tick)
    assert saved["iteration"] == 3
    rest = match.match_chunk(made, classes, resume=saved)
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def _written(value) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@given(st.integers(1, 3000))
def test_chunks_hold_every_class_once(num_classes):
    work = chunks.divide(num_classes)
    assert sorted(c for chunk in work for c in chunk) == list(range(num_classes))
    assert len(work) <= chunks.MOST and (num_classes > chunks.MOST or len(work) == num_classes)
    assert chunks.pieces(None, Facts((1,) * num_classes)) == len(work)
    assert max(map(len, work)) - min(map(len, work)) <= 1


def given_settings(**changes):
    config = SimpleNamespace(
        dm=Dm(**{"iterations": 5, "lr": 10.0, "width": 8, "real_batch": 12, **changes}),
        seed=0,
        ipc=3,
        runtime=SimpleNamespace(precision="float32"),
        data=Data(resolution=SIZE, mirror=False),
    )
    (stage,) = DM.stages(config)
    return settings_of(stage, config)


def test_settings_that_cannot_work_are_refused():
    chunks.check(given_settings())
    with pytest.raises(UserError, match="'blur' is none of"):
        chunks.check(given_settings(dsa="crop_blur"))
    with pytest.raises(UserError, match=r"dm\.net=resnet32 has BatchNorm"):
        chunks.check(given_settings(net="resnet32"))


def test_the_cost_grows_with_what_is_looked_at():
    facts = Facts((40, 20, 2))
    few, many = (chunks.cost(given_settings(real_batch=n), facts) for n in (4, 40))
    assert 0 < few.flops < many.flops and few.activations < many.activations
    assert few.disk == many.disk == 3 * 3 * 3 * SIZE * SIZE
    assert chunks.cost(given_settings(iterations=10), facts).flops == pytest.approx(
        2 * chunks.cost(given_settings(), facts).flops
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    data = Data(source="digits", max_per_class=20, imbalance_factor=10, test_per_class=5)
    sharding.write(folder, "digits", sources.open_source(data), data, workers=1)
    return folder


def context(shard: Path, out: Path, **changes) -> Context:
    out.mkdir(exist_ok=True)
    place = {"ranks": ALONE, "out": out, "inputs": {"shard": shard}, "owner": "me"}
    return Context(**place, quiet=True, workers=0, location=Location(), **changes)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("0*")}


def test_a_run_in_parts_and_one_that_was_cut_give_the_same_bytes(shard, tmp_path, monkeypatch):
    settings = given_settings()
    facts = match.run(settings, context(shard, tmp_path / "whole"))
    whole = bytes_of(tmp_path / "whole")
    assert facts == {"chunks": 10, "images": 30} and len(whole) == 20
    for k in range(2):
        assert match.run(settings, context(shard, tmp_path / "parts", part=(k, 2))) == {}
    assert bytes_of(tmp_path / "parts") == whole

    cut, steps = match.distance, []

    def failing(*means):
        steps.append(1)
        if len(steps) == 18:  # in the fourth chunk
            raise KeyboardInterrupt
        return cut(*means)

    monkeypatch.setattr(match, "distance", failing)
    with pytest.raises(KeyboardInterrupt):
        match.run(settings, context(shard, tmp_path / "cut", checkpoint_seconds=0.0))
    assert len(bytes_of(tmp_path / "cut")) == 6
    assert match.run(settings, context(shard, tmp_path / "cut")) == facts
    assert bytes_of(tmp_path / "cut") == whole
    assert len(steps) < 18 + 35, "finished chunks and iterations are not done again"


def test_what_is_written_is_a_distilled_set_that_started_from_real_images(shard, tmp_path):
    match.run(given_settings(iterations=0), context(shard, tmp_path / "start"))
    match.run(given_settings(), context(shard, tmp_path / "moved"))
    split = shards.ShardSplit(shard, "train")
    start, moved = (distilled.Distilled(tmp_path / name, 10) for name in ("start", "moved"))
    for c in range(10):
        rows = moved.provenance(c)
        assert rows == start.provenance(c) and len(rows) == 3
        members = [row["image"] for row in rows]
        assert all(split.labels[i] == c for i in members)
        assert [split.names[i] for i in members] == [row["source"] for row in rows]
        for pixels, i in zip(start.load(c), members, strict=True):
            real_image = np.asarray(shards.square(split.image(i), SIZE))
            assert np.array_equal(pixels, real_image.transpose(2, 0, 1))
        same = np.array_equal(start.load(c), moved.load(c))
        assert same == (split.counts[c] <= 3)
    assert min(split.counts) <= 3 < max(split.counts)


def test_dm_trains_no_expert():
    assert DM.experts(None) == () and DM.initial == "" and DM.distilled == "match"
