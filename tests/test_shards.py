import dataclasses
import errno
import gc
import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from conftest import image_folder
from PIL import Image

from ltdd_scale.data import admit, digest, sharding, shards, sources
from ltdd_scale.data.settings import Chosen, Data, Location
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.data.stage import stage as record
from ltdd_scale.errors import PassingError, UserError
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Facts, settings_of


@pytest.fixture
def source(tmp_path):
    image_folder(tmp_path / "real", {"a": 9, "b": 5, "c": 2}, size=12)
    image_folder(tmp_path / "real", {"a": 2, "b": 2, "c": 2}, "test", size=12, seed=1)
    return lambda: sources.open_source(
        Data(source="folder", path=str(tmp_path / "real"), profile="full")
    )


def silent(title, total, unit):
    return Progress(title, total, unit, quiet=True)


def write(folder, source, workers=1, **chosen):
    stored = Chosen(**{"shard_images": 5, **chosen})
    made = sharding.write(folder, "set", source, stored, workers, silent)
    sharding.clean(folder)
    return made


def written(folder, source, workers=1, **chosen):
    folder.mkdir()
    return write(folder, source, workers, **chosen)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_same_bytes_whatever_the_number_of_workers(tmp_path, source):
    written(tmp_path / "one", source(), 1)
    written(tmp_path / "two", source(), 2)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert [n for n in one if n.endswith("train-000003.tar")] and "manifest.json" in one


def test_an_interrupted_write_goes_on_where_it_was(tmp_path, source, monkeypatch):
    written(tmp_path / "whole", source())
    folder, real, calls = tmp_path / "cut", sharding._write_shard, []

    def dies(path, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path)
        return real(path, *args)

    monkeypatch.setattr(sharding, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        written(folder, source())
    calls.clear()
    monkeypatch.setattr(
        sharding, "_write_shard", lambda path, *args: calls.append(path) or real(path, *args)
    )
    write(folder, source())
    assert len(calls) == 4, "two of six shards were there already"
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # webdataset leaves files open
def test_webdataset_reads_them(tmp_path, source):
    manifest = written(tmp_path / "s", source())
    urls = [str(tmp_path / "s" / s["file"]) for s in manifest["splits"]["train"]["shards"]]
    read = list(
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("png", "cls")
    )
    gc.collect()
    split = ShardSplit(tmp_path / "s", "train")
    assert [label for _, label in read] == split.labels.tolist() and len(read) == 16
    for i, (image, _) in enumerate(read):
        assert (np.asarray(image) == np.asarray(split.image(i))).all()


def test_the_index_has_dalis_offsets(tmp_path, source):
    written(tmp_path / "s", source())
    tar = tmp_path / "s" / "set-train-000000.tar"
    content, lines = tar.read_bytes(), tar.with_suffix(".idx").read_text().splitlines()
    assert lines[0] == "v1.2 5" and len(lines) == 6
    with tarfile.open(tar) as archive:
        for line in lines[1:]:
            fields = line.split()
            for ext, offset, size, name in (fields[:4], fields[4:]):
                assert (
                    name.endswith(ext)
                    and archive.extractfile(name).read()
                    == content[int(offset) : int(offset) + int(size)]
                )


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path, source):
    written(tmp_path / "s", source())
    split = ShardSplit(tmp_path / "s", "train")
    pixels = (
        np.concatenate([np.asarray(split.image(i)).reshape(-1, 3) for i in range(len(split))]) / 255
    )
    assert np.allclose(split.mean, pixels.mean(0), atol=1e-6) and np.allclose(
        split.std, pixels.std(0), atol=1e-6
    )


def test_odd_images_are_kept_or_quarantined_with_the_reason(tmp_path, source):
    real = tmp_path / "real" / "train" / "a"
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    )
    picture.save(real / "jpeg-named.png", "JPEG")
    picture.convert("CMYK").save(real / "cmyk.jpg")
    picture.convert("L").save(real / "grey.jpg")
    picture.save(real / "other.bmp")
    (real / "zero.png").write_bytes(b"")
    (real / "text.jpg").write_text("not an image")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    (real / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    manifest = written(tmp_path / "s", source())
    quarantine = {
        row["name"].split("/")[-1]: row["reason"]
        for row in shards.files.read_json(tmp_path / "s" / "quarantine.json")
    }
    assert set(quarantine) == {"zero.png", "text.jpg", "cut.jpg"} and all(quarantine.values())
    assert manifest["splits"]["train"]["counts"] == [13, 5, 2] and manifest["splits"]["train"][
        "listed"
    ] == [16, 5, 2]
    split = ShardSplit(tmp_path / "s", "train")
    names = [n.split("/")[-1] for n in split.names]
    assert split.encoded(names.index("jpeg-named.png")) == (real / "jpeg-named.png").read_bytes()
    assert split.image(names.index("cmyk.jpg")).size == (30, 40) and split.sizes[
        names.index("grey.jpg")
    ].tolist() == [30, 40]


def test_a_class_that_quarantine_empties_is_an_error(tmp_path, source):
    for path in (tmp_path / "real" / "train" / "c").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"class 2 \(c\) has no train image that can be read"):
        written(tmp_path / "s", source())


def test_damage_is_seen(tmp_path, source):
    folder = tmp_path / "s"
    written(folder, source())
    assert shards.verify(folder) == []
    tar = folder / "set-train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert len(shards.verify(folder)) == 1 and "set-train-000001.tar" in shards.verify(folder)[0]
    tar.write_bytes(content[:-512])
    with pytest.raises(UserError, match="bytes, not"):
        ShardSplit(folder, "train")
    tar.unlink()
    with pytest.raises(UserError, match="is missing"):
        ShardSplit(folder, "train")
    with pytest.raises(UserError, match="no 'val' split"):
        ShardSplit(folder, "val")


def test_a_stale_index_is_refused(tmp_path, source):
    folder = tmp_path / "s"
    written(folder, source())
    index = folder / "set-test-000000.idx"
    index.write_text("\n".join(index.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="does not match its shard"):
        ShardSplit(folder, "test")


def test_stored_smaller(tmp_path, source):
    written(tmp_path / "s", source(), store_resolution=6)
    assert ShardSplit(tmp_path / "s", "train").image(3).size == (6, 6)


def test_what_decoders_read_differently_is_rewritten(tmp_path, source):
    """CMYK, palettes and 16 bits become RGB in a PNG, what EXIF turns a JPEG that stands upright."""
    real = tmp_path / "real" / "train" / "a"
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    picture.convert("CMYK").save(real / "cmyk.jpg")
    picture.convert("P").save(real / "palette.png")
    Image.fromarray(generator.integers(0, 65536, (40, 30), dtype=np.uint16)).save(real / "deep.png")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(real / "upright.jpg")
    picture.save(real / "turned.jpg", exif=exif)
    written(tmp_path / "s", source())
    split = ShardSplit(tmp_path / "s", "train")
    names = [n.split("/")[-1] for n in split.names]
    for name, written_as, size in (
        ("cmyk.jpg", "PNG", [30, 40]),
        ("palette.png", "PNG", [30, 40]),
        ("deep.png", "PNG", [30, 40]),
        ("turned.jpg", "JPEG", [40, 30]),
        ("upright.jpg", None, [30, 40]),
    ):
        i = names.index(name)
        assert (split.encoded(i) == (real / name).read_bytes()) == (written_as is None)
        assert split.sizes[i].tolist() == size
        image = Image.open(io.BytesIO(split.encoded(i)))
        assert list(image.size) == size and not image.getexif()
        assert written_as is None or (image.format, image.mode) == (written_as, "RGB")


def test_stored_squares_are_upright_and_transparent_images_on_white(tmp_path, source):
    real = tmp_path / "real" / "train" / "a"
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:20] = (200, 0, 0)  # red above; turned by EXIF, red is on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(real / "turned.png", exif=exif)
    clear = np.zeros((40, 40, 4), np.uint8)
    clear[:, :20, 3] = 255
    Image.fromarray(clear).save(real / "clear.png")
    both = np.dstack([picture, np.full((40, 40), 255, np.uint8)])
    Image.fromarray(both).save(real / "both.png", exif=exif)
    marked = Image.fromarray(picture[..., 0] // 200)
    marked.save(real / "marked.png", transparency=0)
    Image.fromarray(picture).save(real / "damaged.png", exif=b"Exif\0\0garbage")
    ramp = np.linspace(0, 65535, 1600).astype(np.uint16).reshape(40, 40)
    Image.fromarray(ramp).save(real / "ramp.png", transparency=0)
    manifest = written(tmp_path / "s", source(), store_resolution=40)
    assert not manifest["quarantined"]
    written(tmp_path / "whole", source())
    split = ShardSplit(tmp_path / "s", "train")
    names = [n.split("/")[-1] for n in split.names]
    shown = ("turned.png", "both.png", "clear.png", "damaged.png", "ramp.png")
    seen = {n: np.asarray(split.image(names.index(n))) for n in shown}
    for name in shown[:2]:
        assert (seen[name][:, 20:, 0] == 200).all() and not seen[name][:, :20].any()
    assert not seen["clear.png"][:, :20].any() and (seen["clear.png"][:, 20:] == 255).all()
    assert (seen["damaged.png"] == picture).all()
    assert (seen["ramp.png"][..., 0] == ramp >> 8).all()
    whole = ShardSplit(tmp_path / "whole", "train")
    for name in ("clear.png", "marked.png"):
        shown = np.asarray(whole.image(names.index(name)))
        assert (shown == 255).any() and (shown < 2).any()
        assert Image.open(io.BytesIO(whole.encoded(names.index(name)))).mode == "RGB"


def test_stored_as_jpeg_of_a_quality(tmp_path, source):
    manifest = written(tmp_path / "s", source(), store_resolution=6, store_quality=70)
    split = ShardSplit(tmp_path / "s", "train")
    assert (
        manifest["stored"] == {"side": 6, "jpeg_quality": 70}
        and Image.open(io.BytesIO(split.encoded(0))).format == "JPEG"
    )


def test_a_set_that_lies_elsewhere_is_taken_as_it_is(tmp_path, source):
    (tmp_path / "taken").mkdir()
    before = written(tmp_path / "s", source())
    assert (
        sharding.adopt(tmp_path / "s", tmp_path / "taken", quiet=True) == before
        and shards.verify(tmp_path / "taken") == []
    )
    first, second = ShardSplit(tmp_path / "s", "train"), ShardSplit(tmp_path / "taken", "train")
    assert first.encoded(3) == second.encoded(3) and first.names == second.names
    (tmp_path / "s" / "set-train-000000.idx").write_text("v1.2 0\n")
    with pytest.raises(UserError, match="hash does not match"):
        sharding.adopt(tmp_path / "s", tmp_path / "taken", quiet=True)
    with pytest.raises(UserError, match="no shard set in"):
        sharding.adopt(tmp_path, tmp_path / "taken", quiet=True)


def test_parts_of_other_settings_are_not_taken_over(tmp_path, source, monkeypatch):
    """A tool's folder, interrupted after a shard and written again with other sizes."""
    folder, real = tmp_path / "s", sharding._write_shard
    monkeypatch.setattr(
        sharding,
        "_write_shard",
        lambda path, first, *args: (
            (_ for _ in ()).throw(KeyboardInterrupt) if first else real(path, first, *args)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        written(folder, source(), shard_images=5)
    monkeypatch.setattr(sharding, "_write_shard", real)
    manifest = write(folder, source(), shard_images=4)
    assert (
        manifest["splits"]["train"]["num_images"] == 16
        and contents(folder)["manifest.json"] == contents_of_new(tmp_path, source)["manifest.json"]
    )


@pytest.mark.parametrize("change", ["labels", "names"])
def test_parts_of_another_split_are_not_taken_over(tmp_path, source, monkeypatch, change):
    """Images relabelled, or others under the same labels, between an interruption and the next run."""
    before, after = source(), source()
    if change == "labels":
        after.train.labels[:2] = 1
    else:
        after.train = after.train.take(np.asarray([1, 0, *range(2, 16)]))
    written(tmp_path / "new", after)

    def full(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sharding, "_write_tables", full)
        written(tmp_path / "s", before)
    write(tmp_path / "s", after)
    assert contents(tmp_path / "s") == contents(tmp_path / "new")


def contents_of_new(tmp_path, source):
    written(tmp_path / "new", source(), shard_images=4)
    return contents(tmp_path / "new")


def stage(tmp_path, data, out):
    """The stage, as a run calls it: settings without a place, the place from the context."""
    (tmp_path / out).mkdir()
    given = settings_of(record(digest.of(data)), SimpleNamespace(data=data))
    alone = Ranks(0, 1, torch.device("cpu"), None)
    place = Location(**{name: getattr(data, name) for name in Location.model_fields})
    context = Context(alone, tmp_path / out, {}, "owner", quiet=True, location=place)
    return sharding.run(given, context), given


def test_the_stage_writes_a_set_and_takes_one_over(tmp_path, source):
    source()
    data = Data(source="folder", path=str(tmp_path / "real"), profile="full", shard_images=5)
    facts, given = stage(tmp_path, data, "made")
    assert facts == {"train": 16, "largest": 9, "smallest": 2, "quarantined": 0}
    written(tmp_path / "same", sources.open_source(data))
    (tmp_path / "made" / ".progress.json").unlink()
    assert list((tmp_path / "made").glob("*.part.tmp")), "until it is sealed"
    sharding.clean(tmp_path / "made")
    assert contents(tmp_path / "made") == contents(tmp_path / "same")
    (tmp_path / "made" / ".lock").touch()
    known = shards.facts(tmp_path / "made")
    assert known == Facts((9, 5, 2), 6) == sources.facts(data)
    there = Data(source="shards", path=str(tmp_path / "made"))
    assert stage(tmp_path, there, "taken")[0] == facts and sources.facts(there) == known
    assert contents(tmp_path / "taken") == contents(tmp_path / "same")
    cost = sharding.cost(given, known)
    assert cost.disk > 0 and cost.memory > 0 and cost.flops == 0


def test_facts_of_no_shard_set(tmp_path):
    for ask in (shards.facts, lambda path: sources.facts(Data(source="shards", path=str(path)))):
        with pytest.raises(UserError, match="no shard set in"):
            ask(tmp_path)


def test_a_stop_ends_the_workers(tmp_path, source):
    """Whoever reports progress may stop the work: no further shard is begun."""

    class Stops(Progress):
        def update(self, done, note=""):
            if done:
                raise KeyboardInterrupt

    (tmp_path / "s").mkdir()
    with pytest.raises(KeyboardInterrupt):
        sharding.write(
            tmp_path / "s", "set", source(), Chosen(shard_images=1), 2, lambda *a: Stops(*a, True)
        )
    assert 0 < len(list((tmp_path / "s").glob("*.tar"))) < 16
    assert not (tmp_path / "s" / "manifest.json").exists()
    write(tmp_path / "s", source(), shard_images=1)
    written(tmp_path / "whole", source(), shard_images=1)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_sixteen_bits_are_shown_by_their_upper_eight_and_of_32_none_are():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(ramp).save(buffer, kind)
        content, ext, size, shown = admit.admit(buffer.getvalue(), Chosen())
        assert ext == "png" and size == (8, 8)
        with Image.open(io.BytesIO(content)) as stored:
            assert stored.mode == "RGB" and (np.asarray(stored) == np.asarray(shown)).all()
        assert (np.asarray(shown)[..., 0] == ramp >> 8).all()
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="32 bits a pixel"):
        admit.admit(buffer.getvalue(), Chosen())


def test_a_class_without_an_image_that_can_be_read_is_named(tmp_path):
    image_folder(tmp_path / "set", {"a": 3, "b": 1})
    image_folder(tmp_path / "set", {"a": 1, "b": 1}, "test")
    (tmp_path / "set" / "test" / "b" / "000.png").write_bytes(b"no image")
    (tmp_path / "shards").mkdir()
    data = Data(source="folder", path=str(tmp_path / "set"), profile="full")
    with pytest.raises(
        UserError, match=r"class 1 \(b\) has no test image .*test/b/000\.png"
    ) as wrong:
        sharding.write(tmp_path / "shards", "set", sources.open_source(data), data)
    assert "BytesIO" not in str(wrong.value)


def test_an_error_of_the_file_system_or_of_memory_is_none_of_the_image(tmp_path, source):
    """It would be left out for good: the set is sealed without it."""
    real = source()

    def failing(error):
        def read(i):
            if i == 2:
                raise error
            return real.train.read(i)

        return dataclasses.replace(real, train=dataclasses.replace(real.train, read=read))

    passing = OSError(errno.ESTALE, "Stale file handle")
    for k, (error, raised) in enumerate([(passing, PassingError), (MemoryError(), MemoryError)]):
        with pytest.raises(raised):
            written(tmp_path / str(k), failing(error))
    found = written(tmp_path / "s", failing(OSError(errno.EACCES, "Permission denied")))
    assert found["quarantined"] == 1


def test_a_shard_is_the_same_however_many_threads_decode_it(tmp_path, source, monkeypatch):
    told = []

    class Heard:
        def update(self, done):
            told.append(done)

    monkeypatch.setattr(sharding, "TOLD", 2)
    for workers in (1, 5):
        (folder := tmp_path / str(workers)).mkdir()
        stored = Chosen(source="folder")
        sharding.write(folder, "set", source(), stored, workers, lambda *_: Heard())
    assert contents(tmp_path / "1") == contents(tmp_path / "5")
    assert len(set(told)) > 6, "it says how far it is inside a shard"
