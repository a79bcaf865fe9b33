"""Images per second of the loaders on real JPEGs: ours with DALI, ours with PyTorch, webdataset and
ImageFolder with torchvision, and the limits.

    python tools/bench_loader.py /path/to/jpegs [--images 115846] [--cores 2]

All give RandomResizedCrop(224) and mirror images in [0, 1], batches of 64 images, on the same cores
in one run, in turns. The set is made by repeating the given images: as tars for the tars' readers, as
links in folders for ImageFolder. Each candidate runs in a process of its own, so that memory is its
own too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# For all candidates, as `ltdd-scale` sets it: torch reads it when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch

from ltdd_scale.data import backend, sharding, sources
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import stream_images
from ltdd_scale.data.settings import Data, Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.experts.batches import Course, EpochPlans
from ltdd_scale.experts.recipes import Mixing, unmixed
from ltdd_scale.runtime.ranks import Ranks

BATCH, SIDE = 64, 224
CPU = torch.device("cpu")
ONE = Mixing((0.0,), 1, unmixed)


def make_set(jpegs: Path, folder: Path, num_images: int) -> None:
    """`num_images` links to the given JPEGs in ten folders, and their tars."""
    real = sorted(p for p in jpegs.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
    for k in range(num_images):
        target = folder / "tree" / "train" / f"{k % 10}" / f"{k:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(real[k % len(real)].absolute())
    for c in range(10):
        (folder / "tree" / "test" / f"{c}").mkdir(parents=True)
        (folder / "tree" / "test" / f"{c}" / "0.jpg").symlink_to(real[c % len(real)].absolute())
    (folder / "shards").mkdir()
    data = Data(source="folder", path=str(folder / "tree"), profile="full")
    sharding.write(folder / "shards", "bench", sources.open_source(data), data)


def transform():
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIDE),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def ours(folder: Path, loader: str, cores: int, start: float = 0.0):
    split = ShardSplit(folder / "shards", "train")
    seen = Seen(resolution=SIDE, loader=loader, memory_gb=0)
    images, spec = stream_images(split, seen, CPU, cores), ViewSpec(SIDE, (0.08, 1.0))
    course = Course(images, spec, "bench", BATCH, ONE, Ranks(0, 1, CPU, None))
    return images.stream(EpochPlans(course, 0, int(start * course.steps)), spec)


def several(folder: Path, loader: str, cores: int, views: int, once: bool):
    """`views` crops of each image, in batches of crops. Not `once`: each is decoded by itself."""
    split = ShardSplit(folder / "shards", "train")
    seen = Seen(resolution=SIDE, loader=loader, memory_gb=0)
    images, spec = stream_images(split, seen, CPU, cores), ViewSpec(SIDE, (0.08, 1.0))
    order = np.random.default_rng(0).permutation(len(split))
    drawn = np.random.default_rng(1)

    def plans():
        for i in range(0, len(order) - BATCH, BATCH):
            part = np.repeat(order[i : i + BATCH], views)
            chosen = spec.draw(drawn, split.sizes[part])
            for k in range(1 if once else views):
                own = slice(None) if once else slice(k, None, views)
                yield part[own], chosen[own]

    return images.stream(plans(), spec)


def webdataset_torchvision(folder: Path, workers: int):
    import webdataset

    urls = sorted(map(str, (folder / "shards").glob("*-train-*.tar")))
    change = transform()
    data = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    data = data.map(lambda sample: (change(sample[0]),)).batched(BATCH)
    return (
        x
        for (x,) in webdataset.WebLoader(data, batch_size=None, num_workers=min(workers, len(urls)))
    )


def image_folder(folder: Path, workers: int):
    from torchvision.datasets import ImageFolder

    data = ImageFolder(folder / "tree" / "train", transform())
    return (
        x for x, _ in torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=workers)
    )


def dali_reader(folder: Path, cores: int):
    """DALI's own pipeline, no Python in it."""
    from nvidia.dali import Pipeline, fn, types

    tars = sorted((folder / "shards").glob("*-train-*.tar"))
    pipe = Pipeline(BATCH, cores, None, seed=0, exec_dynamic=True)
    with pipe:
        encoded, _ = fn.readers.webdataset(
            paths=[str(t) for t in tars],
            index_paths=[str(t.with_suffix(".idx")) for t in tars],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
        )
        images = fn.decoders.image_random_crop(
            encoded, output_type=types.RGB, random_area=[0.08, 1.0]
        )
        images = fn.resize(
            images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True
        )
        pipe.set_outputs(
            fn.crop_mirror_normalize(
                images,
                mirror=fn.random.coin_flip(),
                mean=0.0,
                std=255.0,
                dtype=types.FLOAT,
                output_layout="CHW",
            )
        )
    while True:
        yield torch.from_dlpack(pipe.run()[0].as_tensor())


def decoding(folder: Path, cores: int):
    """The limit of decoding whole images, by DALI."""
    from nvidia.dali import Pipeline, fn

    split = ShardSplit(folder / "shards", "train")
    order = np.random.default_rng(0).permutation(len(split))
    whole = range(0, len(order) - BATCH + 1, BATCH)
    parts = itertools.cycle([order[i : i + BATCH] for i in whole])
    pipe = Pipeline(BATCH, cores, None, exec_dynamic=True)
    with pipe:
        pipe.set_outputs(
            fn.decoders.image(
                fn.external_source(source=lambda: [split.view(int(i)) for i in next(parts)], ndim=1)
            )
        )
    while True:
        yield pipe.run()[0]


def reading(folder: Path):
    """The limit of reading: every byte of every image touched."""
    split = ShardSplit(folder / "shards", "train")
    order = np.random.default_rng(0).permutation(len(split))
    for i in range(0, len(order), BATCH):
        yield [split.encoded(int(k)) for k in order[i : i + BATCH]]


CANDIDATES = {
    "ours, DALI": lambda f, n: ours(f, "dali", n),
    "ours, PyTorch": lambda f, n: ours(f, "torch", n),
    "ours, DALI, resumed at 90 % of an epoch": lambda f, n: ours(f, "dali", n, 0.9),
    **{
        f"ours, {name}, {v} views of an image, {how}": lambda f, n, k=kind, v=v, once=once: several(
            f, k, n, v, once
        )
        for name, kind in (("DALI", "dali"), ("PyTorch", "torch"))
        for v in (2, 5)
        for how, once in (("decoded for each", False), ("decoded once", True))
    },
    "DALI's own reader, no Python": dali_reader,
    "limit: decoding whole images (DALI)": decoding,
    "limit: reading": lambda f, n: reading(f),
    **{
        f"webdataset + torchvision, {w} workers": lambda f, n, w=w: webdataset_torchvision(f, w)
        for w in (2, 4)
    },
    **{
        f"ImageFolder + torchvision, {w} workers": lambda f, n, w=w: image_folder(f, w)
        for w in (2, 4)
    },
}


def anonymous() -> float:
    """MB of memory that are this process's own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024


def measure(name: str, folder: Path, cores: int, batches: int) -> dict:
    """Run in a process of its own: rate after the first batches, time to the first, growth of
    memory over the last three quarters."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    stream = iter(CANDIDATES[name](folder, cores))
    next(stream)
    first = time.perf_counter() - begin
    for _ in range(2):
        next(stream)
    begin, done, early = time.perf_counter(), 0, 0.0
    for batch in stream:
        done += len(batch)
        if not early and done >= batches * BATCH // 4:
            early = anonymous()  # by now buffers have found their size
        if done >= batches * BATCH:
            break
    took = time.perf_counter() - begin
    return {
        "rate": done / took,
        "first": first,
        "grew": anonymous() - early,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jpegs", type=Path)
    parser.add_argument(
        "--images",
        type=int,
        default=20000,
        help="images of the set that is made by repeating the given ones",
    )
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--batches",
        type=int,
        default=60,
        help="batches measured a candidate and round; few would count what workers had ready",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="candidates whose names hold this text")
    parser.add_argument(
        "--keep", type=Path, help="where the set is made and kept for the next time"
    )
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.candidate:
        print(json.dumps(measure(args.candidate, args.keep, args.cores, args.batches)), flush=True)
        os._exit(0)
    # A tenth of an epoch is what the resumed candidate has left.
    least = 10 * BATCH * (3 + args.batches // 2)
    if args.images < least:
        parser.error(
            f"--images {args.images}: too few for --batches {args.batches}, at least {least}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        if not (folder / "shards" / "manifest.json").exists():
            begin = time.perf_counter()
            make_set(args.jpegs, folder, args.images)
            rate = args.images / (time.perf_counter() - begin)
            print(f"sharding: {rate:.0f} images/s, links included\n")
        total = 0
        # Into memory, where it fits: the reader of tars walks through few of them, ours through all.
        for tar in sorted((folder / "shards").glob("*.tar")):
            with open(tar, "rb") as f:
                while part := len(f.read(1 << 24)):
                    total += part
        print(f"{total / 1e9:.1f} GB of tars\n")
        found: dict[str, list[dict]] = {name: [] for name in CANDIDATES}
        skipped = () if backend.dali_is_installed() else ("DALI",)
        for _ in range(args.rounds):
            for name in CANDIDATES:
                if args.only not in name or any(word in name for word in skipped):
                    continue
                call = [
                    sys.executable,
                    __file__,
                    str(args.jpegs),
                    "--keep",
                    str(folder),
                    "--cores",
                    str(args.cores),
                    "--batches",
                    str(args.batches),
                    "--candidate",
                    name,
                ]
                found[name].append(
                    json.loads(
                        subprocess.run(
                            call, capture_output=True, text=True, check=True
                        ).stdout.splitlines()[-1]
                    )
                )
        head = "views/s, median | from – to | first batch, s | memory grew, MB | peak, MB"
        print(f"| | {head} |\n|---|---|---|---|---|---|")
        for name, runs in found.items():
            if runs:
                print(f"| {name} | {summary(runs)} |")


def summary(runs: list[dict]) -> str:
    """A candidate's cells of the table, over its rounds."""

    def middle(key: str) -> float:
        return statistics.median(r[key] for r in runs)

    rates = [r["rate"] for r in runs]
    memory = f"{middle('grew'):.0f} | {middle('peak'):.0f}"
    spread = f"{min(rates):.0f} – {max(rates):.0f}"
    return f"{middle('rate'):.0f} | {spread} | {middle('first'):.2f} | {memory}"


if __name__ == "__main__":
    main()
