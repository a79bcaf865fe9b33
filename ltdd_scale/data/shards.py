"""WebDataset shards: their format, reading and verifying them. `data.sharding` writes them.

A shard set is a folder with ``NAME-train-000000.tar`` … (``key.jpg``/``key.png`` and zero-padded
ASCII ``key.cls``; byte-identical on every run), DALI's ``.idx`` beside each,
``NAME-train-meta.npy`` (int32 [N, 3]: label, width, height), ``NAME-train-names.txt`` (where each
image came from), ``manifest.json`` and ``quarantine.json``.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ltdd_scale.data.settings import Data
from ltdd_scale.data.split import Source
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files
from ltdd_scale.runtime.progress import Progress
from ltdd_scale.stage import Facts


def open_all(data: Data) -> Source:
    raise UserError(f"{data.path}: a shard set is taken as it is; its sources are not known")


def digest(data: Data) -> str:
    """Of the manifest, which has the hashes of all shards."""
    return files.sha256(manifest_file(Path(data.path)))


def facts(folder: Path) -> Facts:
    """What is known of a written shard set. Raises `UserError` where there is none."""
    splits = files.read_json(manifest_file(folder))["splits"]
    return Facts(tuple(splits["train"]["counts"]), splits["test"]["num_images"])


def manifest_file(folder: Path) -> Path:
    """Raises `UserError` where it is missing."""
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(
            f"no shard set in {folder} (no manifest.json); tools/shard_imagenet_lt.py or "
            "'ltdd-scale shard' make one"
        )
    return path


# EXIF's orientation → what makes the image stand upright. 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image stand upright, None where it does. EXIF that is damaged says nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, struct.error):
        return None


def upright(image: Image.Image) -> Image.Image:
    """An image as `rgb`, turned as EXIF says."""
    way, shown = turn(image), rgb(image)
    return shown if way is None else shown.transpose(way)


def rgb(image: Image.Image) -> Image.Image:
    """An image as RGB of 8 bits, on white where it is transparent. Of 16 bits the upper 8 are shown
    (Pillow would cut). Raises `ValueError` for pixels of 32 bits, which do not say how bright they
    are."""
    # Older Pillows open a PNG of 16 bits as one of 32, which there is none of.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel: write it with 8 or 16")
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> Image.Image:
    """Short side to `side`, then the centre square."""
    if image.size == (side, side):
        return image
    short = min(image.size)
    # Whole pixels, as every decoder cuts.
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize(
        (side, side),
        Image.Resampling.BILINEAR,
        box=(left, top, left + short, top + short),
        reducing_gap=3.0,
    )


def verify(folder: str | Path, quiet: bool = True) -> list[str]:
    """Re-hash every shard, index and table against the manifest, on all cores; return what is
    wrong, one line each.

    SHA-256 because processors hash it at over a gigabyte a second (a disk gives less) and everyone
    has a tool that checks it.
    """
    folder = Path(folder)
    expected = _expected(folder, files.read_json(folder / "manifest.json"))
    wrong, progress = [], Progress("verify", len(expected), "files", quiet)
    # Hashing lets go of the interpreter's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done, line in enumerate(pool.map(_compare, expected), 1):
            wrong += [line] if line else []
            progress.update(done)
    return wrong


def _expected(folder: Path, manifest: dict[str, Any]) -> list[tuple[Path, str]]:
    """Every file of a shard set with its SHA-256."""
    out: list[tuple[Path, str]] = []
    for split, info in manifest["splits"].items():
        for shard in info["shards"]:
            path = folder / shard["file"]
            out += [(path, shard["sha256"]), (path.with_suffix(".idx"), shard["idx"])]
        stem = f"{manifest['name']}-{split}"
        out.append((folder / f"{stem}-meta.npy", info["meta"]))
        out.append((folder / f"{stem}-names.txt", info["names"]))
    return out


def _compare(expected: tuple[Path, str]) -> str | None:
    path, digest = expected
    if not path.exists():
        return f"{path}: missing"
    if files.sha256(path) == digest:
        return None
    return f"{path}: its hash does not match the manifest; delete the folder and shard again"


class ShardSplit:
    """Random access to the encoded images of one split through memory-mapped tars.

    `labels` int64 [N], `sizes` int64 [N, 2] (width, height), `counts` images of each class.
    `mean` and `std` are those of the training images' pixels in [0, 1]. Raises `UserError` where a
    shard is missing or not of the size that the manifest states.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = files.read_json(self.folder / "manifest.json")
        splits = self.manifest["splits"]
        if split not in splits:
            raise UserError(f"{folder} has no '{split}' split: {', '.join(splits)} only")
        meta = np.load(self._table("meta.npy")).astype(np.int64)
        self.labels, self.sizes = meta[:, 0], meta[:, 1:]
        self.classes: list[str] = self.manifest["classes"]
        self.counts = np.bincount(self.labels, minlength=len(self.classes))
        self.mean, self.std = splits["train"]["mean"], splits["train"]["std"]
        self._paths = [self.folder / shard["file"] for shard in splits[split]["shards"]]
        where: list[tuple[int, int, int]] = []  # shard, offset and size of each image
        for k, shard in enumerate(splits[split]["shards"]):
            where += [(k, *place) for place in self._places(self._paths[k], shard)]
        self._where = np.asarray(where, np.int64).reshape(-1, 3)
        if len(self._where) != len(self.labels):
            raise UserError(
                f"{self.folder}: {len(self._where)} images in the shards of '{split}', "
                f"{len(self.labels)} in its table; shard again"
            )
        self._maps: dict[int, mmap.mmap] = {}

    def _table(self, name: str) -> Path:
        return self.folder / f"{self.manifest['name']}-{self.split}-{name}"

    def _places(self, path: Path, shard: dict[str, Any]) -> list[tuple[int, int]]:
        """Offset and size of each image of a shard, by its index."""
        cure = f"delete {self.folder} and run 'shard' again"
        if not path.exists():
            raise UserError(f"shard {path} is missing; {cure}")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise UserError(f"shard {path} has {size} bytes, not {shard['bytes']}; {cure}")
        index = path.with_suffix(".idx")
        lines = index.read_text().splitlines() if index.exists() else []
        head = f"v1.2 {shard['num_images']}"
        if not lines or lines[0] != head or len(lines) != shard["num_images"] + 1:
            raise UserError(f"the index {index} does not match its shard; {cure}")
        out = []
        for line in lines[1:]:
            fields = line.split(" ")
            image = 4 if fields[0] == "cls" else 0
            out.append((int(fields[image + 1]), int(fields[image + 2])))
        return out

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """Where each image came from."""
        return self._table("names.txt").read_text().splitlines()

    def view(self, i: int) -> np.ndarray:
        """The encoded bytes of image `i`, uint8 [n], not copied: pages are read when they are
        looked at."""
        k, offset, size = (int(v) for v in self._where[i])
        if k not in self._maps:
            with open(self._paths[k], "rb") as f:
                self._maps[k] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[k], np.uint8, size, offset)

    def encoded(self, i: int) -> bytes:
        return self.view(i).tobytes()

    def image(self, i: int) -> Image.Image:
        """The RGB image. An error names the tar, the offset, the key and the source."""
        try:
            return Image.open(io.BytesIO(self.encoded(i))).convert("RGB")
        except Exception as error:
            raise self.undecodable(i, error) from error

    def undecodable(self, i: int, error: Exception) -> UserError:
        """What to say of an image that decoded once and does no more."""
        k, offset, _ = self._where[i]
        with tarfile.open(self._paths[k]) as tar:
            key = next((m.name for m in tar if m.offset_data == offset), "?")
        return UserError(
            f"{self._paths[k]}, offset {offset}, {key} ({self.names[i]}): {error}; run "
            f"'ltdd-scale verify {self.folder}'"
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}
