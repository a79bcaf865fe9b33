import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ltdd_scale.data import chosen, distilled
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.errors import UserError
from ltdd_scale.runtime.ranks import rng

CPU = torch.device("cpu")
COUNTS = (4, 1, 6)


def write(folder, counts=COUNTS, side=8, provenance=True):
    generator = np.random.default_rng(0)
    for label, n in enumerate(counts):
        pixels = generator.integers(0, 256, (n, 3, side, side), dtype=np.uint8)
        rows = [{"image": k} for k in range(n)] if provenance else None
        distilled.write_class(folder, label, pixels, rows)
    return Distilled(folder, len(counts))


def test_what_is_written_is_read(tmp_path):
    there = write(tmp_path)
    assert there.image_counts == list(COUNTS) and there.resolution == 8 and len(there) == 11
    assert there.labels.tolist() == [0] * 4 + [1] + [2] * 6 and there.labels.dtype == np.int64
    assert isinstance(there.load(2), np.memmap) and there.load(2).shape == (6, 3, 8, 8)
    assert (there.load(2) == distilled.load(distilled.class_file(tmp_path, 2))).all()
    assert there.provenance(0) == [{"image": k} for k in range(4)]
    assert there.hints() == {} and there.learned() is None
    logits = np.random.default_rng(0).normal(size=(11, 3))
    distilled.write_learned(tmp_path, logits)
    distilled.write_hints(tmp_path, {"lr": 0.1})
    assert there.hints() == {"lr": 0.1} and there.learned().dtype == np.float32
    assert (there.learned() == logits.astype(np.float32)).all()


def test_provenance_may_be_left_out(tmp_path):
    assert write(tmp_path, provenance=False).provenance(0) == []


def test_what_is_read_can_be_changed_but_not_on_the_disk(tmp_path):
    """So that torch takes it without a warning."""
    there = write(tmp_path)
    before = there.load(0).copy()
    torch.from_numpy(there.load(0)).zero_()
    assert (there.load(0) == before).all()


@pytest.mark.parametrize("pixels", [np.zeros((1, 3, 8, 8)), np.zeros((3, 8, 8), np.uint8)])
def test_other_arrays_are_not_written(tmp_path, pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        distilled.write_class(tmp_path, 0, pixels)
    with pytest.raises(ValueError, match="2 rows of provenance for 1 images"):
        distilled.write_class(tmp_path, 0, np.zeros((1, 3, 8, 8), np.uint8), [{}, {}])


def spoilt(array):
    return lambda folder: distilled.save(distilled.class_file(folder, 1), array)


WRONG = {
    "a class less": (lambda f: (f / "00001.npy").unlink(), "00001.npy is missing"),
    "a class more": (
        lambda f: distilled.write_class(f, 3, np.zeros((1, 3, 8, 8), np.uint8)),
        "00003.npy: the real set has 3 classes only",
    ),
    "floats": (spoilt(np.zeros((1, 3, 8, 8), np.float32)), "got float32"),
    "channels last": (spoilt(np.zeros((1, 8, 8, 3), np.uint8)), r"got uint8 \[1, 8, 8, 3\]"),
    "one image": (spoilt(np.zeros((3, 8, 8), np.uint8)), r"got uint8 \[3, 8, 8\]"),
    "no image": (spoilt(np.zeros((0, 3, 8, 8), np.uint8)), "00001.npy"),
    "another side": (spoilt(np.zeros((1, 3, 9, 9), np.uint8)), "class 0 are 8 pixels wide, of cl"),
    "objects": (spoilt(np.asarray([{}])), "00001.npy is damaged"),
    "torn": (
        lambda f: (f / "00001.npy").write_bytes((f / "00001.npy").read_bytes()[:-1]),
        "00001.npy is damaged",
    ),
    "empty": (lambda f: (f / "00001.npy").write_bytes(b""), "00001.npy is damaged"),
    "no array": (lambda f: (f / "00001.npy").write_bytes(b"x" * 999), "00001.npy is damaged"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_set_says_what_is_wrong(tmp_path, wrong):
    write(tmp_path)
    spoil, words = WRONG[wrong]
    spoil(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        Distilled(tmp_path, 3)
    assert "\n" not in str(caught.value) and "run the stage again" in str(caught.value)


def test_tables_that_do_not_fit(tmp_path):
    there = write(tmp_path)
    distilled.save(tmp_path / "labels.npy", np.zeros((11, 2), np.float32))
    with pytest.raises(UserError, match=r"float32 \[11, 3\], got float32 \[11, 2\]"):
        there.learned()
    distilled.save(tmp_path / "labels.npy", np.zeros((11, 3)))
    with pytest.raises(UserError, match="got float64"):
        there.learned()
    (tmp_path / "00000.json").write_text("[{}]")
    with pytest.raises(UserError, match="1 rows for 4 images"):
        there.provenance(0)


def test_held_where_it_fits(tmp_path):
    there = write(tmp_path)
    size = 11 * 3 * 8 * 8 / 2**30
    assert isinstance(there.images(CPU, size), MemoryImages)
    assert isinstance(there.images(CPU, size * 0.99), distilled.StreamedClasses)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 9))
def test_streamed_and_held_images_give_the_same_batches(tmp_path_factory, counts, batch, seed):
    there = write(tmp_path_factory.mktemp("d"), counts)
    held, streamed = there.images(CPU, 1), there.images(CPU, 0)
    for name in ("labels", "sizes", "counts"):
        assert (getattr(held, name) == getattr(streamed, name)).all()
    n, spec = len(there), ViewSpec(8, (0.3, 1.0), randaugment=1)
    order = np.concatenate([rng(seed).permutation(n), rng(seed).integers(0, n, 5)])
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    for drawn in (True, False):
        plans = [
            (p, spec.draw(rng(seed, k), held.sizes[p]) if drawn else None)
            for k, p in enumerate(parts)
        ]
        found = 0
        for a, b in zip(held.stream(plans, spec), streamed.stream(iter(plans), spec), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype == torch.float32
            found += 1
        assert found == len(plans)


def test_a_stream_may_be_left_and_a_file_may_go(tmp_path):
    images = write(tmp_path).images(CPU, 0)
    plans = [(np.asarray([k]), None) for k in range(11)]
    stream = images.stream(plans, ViewSpec(8))
    next(stream)
    stream.close()
    (tmp_path / "00002.npy").unlink()
    with pytest.raises(UserError, match=r"00002.npy is missing"):
        list(images.stream(plans, ViewSpec(8)))


PEAK = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.distilled import Distilled

peaks = []
for folder, classes in ((sys.argv[1], 2), (sys.argv[2], 60)):
    images = Distilled(Path(folder), classes).images(torch.device("cpu"), 0)
    order = np.random.default_rng(0).permutation(len(images.labels))
    plans = [(order[i : i + 16], None) for i in range(0, len(order), 16)]
    for epoch in range(2):
        for x in images.stream(plans, ViewSpec(64)):
            pass
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_streamed_set(tmp_path):
    for name, classes in (("small", 2), ("large", 60)):
        (tmp_path / name).mkdir()
        for label in range(classes):
            distilled.write_class(tmp_path / name, label, np.zeros((150, 3, 64, 64), np.uint8))
    size = sum(p.stat().st_size for p in (tmp_path / "large").iterdir()) / 2**20
    command = [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert size > 100 and float(done.stdout) < 12, "MB more for 107 MB more"


def test_every_member_once_before_any_a_second_time():
    for n, ipc in ((3, 10), (10, 3), (4, 4)):
        members = np.arange(100, 100 + n)
        taken = chosen.repeated(members, rng(0), ipc)
        times = np.bincount(taken - 100, minlength=n)
        assert len(taken) == ipc and times.max() - times.min() <= 1
    labels = np.repeat([0, 1, 2], [5, 2, 9])
    picked = chosen.random_real(labels, 3, 4, seed=1)
    assert labels[picked].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (picked == chosen.random_real(labels, 3, 4, seed=1)).all()
    assert (picked != chosen.random_real(labels, 3, 4, seed=2)).any()
    with pytest.raises(UserError, match="no training images"):
        chosen.repeated(np.asarray([], int), rng(0), 1)
