"""Sharding against its limits: decoding every image whole, and copying every byte, with as many
processes as cores.

python tools/bench_shard.py /path/to/jpegs [--images 2400] [--rounds 3]
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench import circumstances
from PIL import Image

from ltdd_scale.data import sharding, sources
from ltdd_scale.data.settings import Data
from ltdd_scale.runtime.progress import Progress


def decode(paths: list[Path]) -> None:
    for path in paths:
        Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def copy(paths: list[Path], target: str) -> None:
    with open(f"{target}/{os.getpid()}", "ab") as f:
        for path in paths:
            f.write(path.read_bytes())
        f.flush()
        os.fsync(f.fileno())


def silent(title: str, total: int, unit: str) -> Progress:
    return Progress(title, total, unit, quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jpegs", type=Path)
    parser.add_argument("--images", type=int, default=2400, help="made by repeating the given ones")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    real = sorted(p for p in args.jpegs.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
    with tempfile.TemporaryDirectory(dir=".") as scratch, ProcessPoolExecutor(cores) as pool:
        root = Path(scratch)
        for k in range(args.images):
            target = root / "tree" / "train" / str(k % 10) / f"{k:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(real[k % len(real)].absolute())
        for c in range(10):
            (root / "tree" / "test" / str(c)).mkdir(parents=True)
            (root / "tree" / "test" / str(c) / "0.jpg").symlink_to(real[c % len(real)].absolute())
        data = Data(
            source="folder",
            path=str(root / "tree"),
            profile="full",
            shard_images=args.images // 12,
        )
        source = sources.open_source(data)
        paths = [p for p in sorted((root / "tree" / "train").rglob("*.jpg"))]
        parts = [paths[i : i + 50] for i in range(0, len(paths), 50)]

        def ours() -> None:
            (root / "out").mkdir()
            sharding.write(root / "out", "bench", source, data, report=silent)
            shutil.rmtree(root / "out")

        def copying() -> None:
            (root / "copy").mkdir()
            list(pool.map(copy, parts, [str(root / "copy")] * len(parts)))
            shutil.rmtree(root / "copy")

        candidates = {
            "ours": ours,
            "limit: decoding whole images (Pillow)": lambda: list(pool.map(decode, parts)),
            "limit: copying, flushed to the disk": copying,
        }
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(args.rounds + 1):
            for name, work in candidates.items():
                begin = time.perf_counter()
                work()
                if turn:
                    rates[name].append(args.images / (time.perf_counter() - begin))
    print(
        f"{circumstances(1)}; {cores} cores, {args.images} images, 12 tars, n = {args.rounds}\n\n"
        "| | images/s, median | from – to |\n|---|---|---|"
    )
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.0f} | {min(found):.0f} – {max(found):.0f} |")
    limit = min(statistics.median(v) for k, v in rates.items() if k != "ours")
    print(f"\nours / the smaller limit: {statistics.median(rates['ours']) / limit:.2f}")


if __name__ == "__main__":
    main()
