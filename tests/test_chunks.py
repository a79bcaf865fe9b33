from pathlib import Path

import numpy as np
import pytest
import rldd_tools
from hypothesis import given
from hypothesis import strategies as st

from ltdd_scale.data import distilled
from ltdd_scale.methods.rldd import chunks, recover
from ltdd_scale.methods.rldd.method import RLDD
from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.stage import Facts, function, settings_of

SHAPES = st.integers(1, 60), st.integers(1, 30), st.integers(1, 100), st.integers(0, 20)


@given(*SHAPES)
def test_chunks_hold_every_image_once(num_classes, ipc, batch_size, chunk_classes):
    work = chunks.chunks(num_classes, ipc, batch_size, chunk_classes)
    groups, each = chunks.groups(num_classes, ipc, batch_size, chunk_classes)
    assert [c.classes for c in work[::each]] == [tuple(g) for g in groups]
    assert len(work) == len(groups) * each
    held = [(c, i) for chunk in work for c in chunk.classes for i in range(chunk.first, chunk.last)]
    assert sorted(held) == [(c, i) for c in range(num_classes) for i in range(ipc)]
    assert all(len(chunk.labels) <= batch_size for chunk in work)
    assert [c.number for c in work] == list(range(len(work)))


@given(*SHAPES)
def test_a_class_has_about_as_many_images_in_each_chunk(
    num_classes, ipc, batch_size, chunk_classes
):
    work = chunks.chunks(num_classes, ipc, batch_size, chunk_classes)
    of_first = [chunk.last - chunk.first for chunk in work if 0 in chunk.classes]
    fit = max(1, batch_size // len(work[0].classes))
    assert len(of_first) == -(-ipc // fit), "no more chunks than are needed"
    assert max(of_first) - min(of_first) <= 1


def test_one_image_is_not_left_over():
    """121 classes in groups of 11, nine images of which fit a chunk of 100."""
    sizes = {chunk.last - chunk.first for chunk in chunks.chunks(121, 10, 100, 12)}
    assert sizes == {5}


def test_a_chunk_mixes_head_and_tail():
    chunk = chunks.chunks(1000, 10, 100)[0]
    assert len(chunk.classes) == 10 and chunk.classes[0] == 0 and chunk.classes[-1] == 900


@pytest.mark.parametrize(
    ("num_classes", "ipc", "size"),
    [(1000, 10, (10, 10)), (1000, 50, (10, 10)), (10, 10, (10, 10)), (7, 10, (7, 10)), (20, 10, (10, 10)), (121, 10, (10, 10)), (1000, 1, (100, 1)), (200, 2, (50, 2))],
)  # fmt: skip
def test_a_chunk_has_few_classes_with_many_images_where_nothing_is_said(num_classes, ipc, size):
    first = chunks.chunks(num_classes, ipc, 100)[0]
    assert (len(first.classes), first.last - first.first) == size


def test_as_published_a_chunk_has_one_image_of_many_classes():
    first = chunks.chunks(1000, 10, 80, 80)[0]
    assert (len(first.classes), first.last - first.first) == (77, 1)


@given(*SHAPES)
def test_the_pieces_are_counted_without_a_list_of_them(num_classes, ipc, batch_size, chunk_classes):
    own = Recover(batch_size=batch_size, chunk_classes=chunk_classes)
    of = rldd_tools.config(ipc=ipc, recover=own)
    stage = next(s for s in RLDD.stages(of) if s.kind == "recover")
    found = function(stage.pieces)(settings_of(stage, of), Facts((1,) * num_classes))
    assert found == len(chunks.chunks(num_classes, ipc, batch_size, chunk_classes))


def test_a_class_is_put_together_without_reading_whole_chunks(tmp_path):
    """At IPC 50 a thousand classes have each an image in fifty chunks of a hundred: to read the
    chunks for each of them would be a hundred times the set."""
    work = chunks.chunks(num_classes=64, ipc=4, batch_size=64)
    generator = np.random.default_rng(0)
    whole = generator.integers(0, 256, (64, 4, 3, 32, 32), dtype=np.uint8)
    for chunk in work:
        pixels = whole[list(chunk.classes), chunk.first : chunk.last].reshape(-1, 3, 32, 32)
        distilled.save(recover._chunk_file(tmp_path, chunk), pixels)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = read()
    found = [recover._class_images(tmp_path, work, label) for label in range(64)]
    assert read() - before < 4 * whole.nbytes
    assert np.array_equal(np.stack(found), whole)
