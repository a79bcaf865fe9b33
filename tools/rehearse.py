"""A whole run at ImageNet-LT's size, before the real one: what each stage takes and needs.

    python tools/rehearse.py --out rehearsal                       # all of it at 32 px with tiny nets, IPC 50
    python tools/rehearse.py --out rehearsal --scale 0.05          # a twentieth of each class's images, in minutes
    python tools/rehearse.py --out rehearsal --images /data/some   # these images, repeated, instead of made ones
    python tools/rehearse.py --out rehearsal --resolution 224 --set observer.net=resnet50

1,000 classes in ImageNet-LT's counts and list format (115,846 training, 20,000 validation and 50,000 test lines). The images are noise of a colour that is their class's, or
taken from a folder over and over; each is one file with many names, so the disk holds few. Nets are tiny and epochs few unless --set says otherwise. The same command goes
on after an interruption. The table comes from what the stages write down; it is printed and written to OUT/ipc50.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from ltdd_scale.runtime.files import write_json

ROOT = Path(__file__).parent.parent
FILES = 4  # made images of a class, at most
HELD = {"val": 20, "test": 50}  # images of each class


def tiny(images: int, distilled: int) -> list[str]:
    """Settings with which all stages are quick. `images`, `distilled`: how many there are."""
    batch = min(256, images)
    expert = f"net: convnet3, norm: batch, width: 8, epochs: 1, batch_size: {batch}"
    student = f"nets: [convnet3], width: 8, epochs: 2, batch_size: {min(256, distilled)}"
    return [
        f"observer={{{expert}}}",
        "calibrate.batch_size=256",
        "initialize.crops=1",
        "recover={batch_size: 100, iterations: 4, matching_width: 8, matching_real: 2}",
        f"evaluate={{{student}, seeds: 1, plain: none, embedding: false}}",
        "choose.how=never",
        "publish={pictures: false, formats: []}",
    ]


def counts(scale: float, classes: int) -> list[int]:
    """ImageNet-LT's images of each class, or a share of them: one at least."""
    listed = yaml.safe_load((ROOT / "configs/sets/imagenet_lt.yaml").read_text())["data"][
        "expected_counts"
    ]
    return [max(1, round(n * scale)) for n in listed[:classes]]


def pool(folder: Path, images: Path | None, classes: int, stored: int) -> list[list[Path]]:
    """The files that each class repeats: those of `images`, shared out, or made ones."""
    if images is not None:
        found = sorted(
            p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        if not found:
            sys.exit(f"error: {images} holds no .jpg or .png")
        return [[found[(c * FILES + k) % len(found)] for k in range(FILES)] for c in range(classes)]
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for c in range(classes):
        generator = np.random.default_rng(c)
        colour = generator.integers(64, 192, 3)
        of_class = []
        for k in range(FILES):
            path = folder / f"{c:04d}-{k}-{stored}.jpg"
            if not path.exists():
                noise = generator.normal(0, 32, (stored, stored, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path, quality=90)
            of_class.append(path)
        out.append(of_class)
    return out


def write_set(
    folder: Path, numbers: list[int], files: list[list[Path]], held: dict[str, int]
) -> None:
    """The tree of names, and its lists."""
    done = folder / "made.json"
    wanted = {"counts": numbers, "held": held, "files": [str(f) for f in files[0]]}
    # A set is known by its list: other images must have other names, or their shards would be taken.
    mark = hashlib.sha256(json.dumps([str(f) for of in files for f in of]).encode()).hexdigest()[:8]
    if done.exists() and json.loads(done.read_text()) == wanted:
        return
    if done.exists():  # of other images
        shutil.rmtree(folder)
    for split in ("train", *held):
        lines = []
        for c, of_class in enumerate(files):
            number = numbers[c] if split == "train" else held[split]
            place = folder / split / f"n{c:08d}"
            place.mkdir(parents=True, exist_ok=True)
            for k in range(number):
                path = place / f"n{c:08d}_{k}_{mark}{of_class[0].suffix}"
                if not path.exists():
                    _name(of_class[k % len(of_class)], path)
                lines.append(f"{path.relative_to(folder)} {c}")
        (folder / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    write_json(done, wanted)


def _name(source: Path, path: Path) -> None:
    """One more name of a file. A file has 65,000 at most, and none on another disk."""
    try:
        os.link(source.resolve(), path)
    except OSError:
        path.symlink_to(source.resolve())


def table(out: Path, ipc: int, numbers: list[int], classes: int) -> str:
    """What the stages of the run in `out` wrote down."""
    record = json.loads((out / "run.json").read_text())
    store = Path(record["store"])
    rows: dict[str, list[dict]] = {}
    for name, where in record["stages"].items():
        path = (
            (store / where / "stage.json")
            if not Path(where).is_absolute()
            else Path(where) / "stage.json"
        )
        if path.exists():
            rows.setdefault(name.partition("/")[0], []).append(json.loads(path.read_text()))
    images = {
        "relabel": classes * ipc,
        "recover": classes * ipc,
        "initialize": sum(numbers),
        "calibrate": sum(numbers),
        **dict.fromkeys(("shard", "observer", "teacher"), sum(numbers)),
    }
    lines = [
        f"{sum(numbers):,} training images of {classes:,} classes, {max(numbers):,} … {min(numbers)}; IPC {ipc}, {classes * ipc:,} images. "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}.",
        "",
        "| stage | seconds | core seconds | ranks | images | core ms an image | read, MB | peak memory of a rank, MB | of its GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, saved in rows.items():
        seconds, cores = (sum(s.get(key, 0) for s in saved) for key in ("seconds", "core_seconds"))
        number = images.get(name, 0)
        peak = [max(s["peak_mb"].get(k, 0) for s in saved) for k in ("cpu", "gpu")]
        cells = [
            name + (f" ({len(saved)})" if len(saved) > 1 else ""),
            f"{seconds:,.1f}",
            f"{cores:,.1f}",
            str(max(s["ranks"] for s in saved)),
            f"{number:,}" if number else "–",
            f"{1000 * cores / number:.2f}" if number else "–",
            f"{sum(s.get('read_mb', 0) for s in saved):,}",
            f"{peak[0]:,}",
            f"{peak[1]:,}" if peak[1] else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for images, store and run")
    parser.add_argument("--ipc", type=int, default=50, help="images a class (default: %(default)s)")
    parser.add_argument(
        "--classes",
        type=int,
        default=1000,
        help="the first classes of the list (default: %(default)s)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each class's images (default: all)"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        default=32,
        help="side in pixels that networks see (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=Path, help="folder of images to repeat; by default they are made"
    )
    parser.add_argument("--nproc", help="ranks on this machine (default: ltdd-scale's)")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the run, over the tiny ones",
    )
    given = parser.parse_args()
    folder = given.out.resolve()
    numbers = counts(given.scale, given.classes)
    files = pool(folder / "made", given.images, len(numbers), given.resolution * 5 // 4)
    held = {split: max(1, round(n * given.scale)) for split, n in HELD.items()}
    print(f"{sum(numbers):,} names of images …", file=sys.stderr)
    write_set(folder / "images", numbers, files, held)
    name = f"ipc{given.ipc}"
    config = folder / f"{name}.yaml"
    config.write_text(
        yaml.safe_dump({"ipc": given.ipc, "data": _data(folder / "images", given.resolution)})
    )
    command = [
        sys.executable,
        "-m",
        "ltdd_scale",
        "run",
        config,
        "--out",
        folder / name,
        "--store",
        folder / "store",
    ]
    command += ["--nproc", given.nproc] if given.nproc else []
    quick = tiny(sum(numbers), len(numbers) * given.ipc)
    done = subprocess.run([str(c) for c in [*command, "--set", *quick, *given.set]], cwd=ROOT)
    if done.returncode:
        return done.returncode
    text = table(folder / name, given.ipc, numbers, len(numbers))
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\n{folder / name}.md")
    return 0


def _data(images: Path, resolution: int) -> dict:
    lists = {f"{split}_list": f"ImageNet_LT_{split}.txt" for split in ("train", *HELD)}
    return {
        "source": "list",
        "path": str(images),
        **lists,
        "profile": "full",
        "resolution": resolution,
    }


if __name__ == "__main__":
    sys.exit(main())
