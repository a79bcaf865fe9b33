import numpy as np
import pytest
import torch
from conftest import image_folder

from ltdd_scale.config import Data
from ltdd_scale.data import loader, shards, sources
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.runtime.ranks import rng


@pytest.fixture
def split(tmp_path):
    image_folder(tmp_path / "real", {"a": 7, "b": 6}, size=24)
    image_folder(tmp_path / "real", {"a": 1, "b": 1}, "test", size=24)
    (tmp_path / "s").mkdir()
    shards.write(tmp_path / "s", "set", sources.open_source(Data(source="folder", path=str(tmp_path / "real"), profile="full")), 5, 0, 1, quiet=True)
    return ShardSplit(tmp_path / "s", "train")


def plans(spec, sizes):
    order = rng(3).permutation(len(sizes))
    return [(part, spec.draw(rng(4, k), sizes[part])) for k, part in enumerate(np.array_split(order, 4))]


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_held_images_are_the_same(split, workers):
    cpu = torch.device("cpu")
    for spec in (ViewSpec(24, None, 4), ViewSpec(24, (0.3, 1.0)), ViewSpec(24, (0.3, 1.0), mirror=False, randaugment=1)):
        held = loader.open_images(split, 24, cpu, 1.0, 0)
        streamed = loader.open_images(split, 24, cpu, 0.0, workers)
        assert isinstance(held, loader.MemoryImages) and isinstance(streamed, loader.StreamedImages)
        todo = plans(spec, held.sizes)
        for a, b in zip(held.stream(todo, spec), streamed.stream(todo, spec), strict=True):
            # The one resizes floats, the other bytes, and only the one sees beyond the window's edge.
            assert (a - b).abs().mean() < 0.02 and a.shape == b.shape
    whole = [(p[0], None) for p in todo]
    for a, b in zip(held.stream(whole, spec), streamed.stream(whole, spec), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_stopped_decoding_is_named(split, workers):
    where = split._where[3]
    tar = bytearray(split._paths[where[0]].read_bytes())
    tar[where[1] : where[1] + where[2]] = bytes(where[2])
    split._paths[where[0]].write_bytes(tar)
    images = loader.StreamedImages(split, 24, torch.device("cpu"), workers)
    with pytest.raises(UserError, match=rf"set-train-000000.tar, offset {where[1]} \(train/a/003.png\)") as caught:
        list(images.stream([(np.asarray([2, 3]), None), (np.asarray([4]), None), (np.asarray([5]), None)], ViewSpec(24)))
    assert "\n" not in str(caught.value)
