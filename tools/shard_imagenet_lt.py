"""Write the WebDataset shards of ImageNet-LT from its official lists and the ILSVRC tree.

    python tools/shard_imagenet_lt.py /data/imagenet --lists /data/lists --out shards/imagenet_lt

Then:

    ltdd-scale inspect shards/imagenet_lt
    ltdd-scale run configs/imagenet_lt_if256_ipc10.yaml \\
        --set data.source=shards data.path=shards/imagenet_lt

The same command goes on after an interruption. Lists may be gzipped; ILSVRC's val images may lie
flat or in folders by wnid.
"""

import argparse
import sys
from pathlib import Path

from ltdd_scale.data import profile, sharding, sources
from ltdd_scale.data.settings import Data
from ltdd_scale.errors import UserError
from ltdd_scale.settings import parse


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ilsvrc", type=Path, help="folder with train/<wnid>/*.JPEG and val/")
    parser.add_argument(
        "--lists", type=Path, help="folder of ImageNet_LT_{train,val,test}.txt (default: ILSVRC)"
    )
    parser.add_argument("--out", type=Path, default=Path("shards/imagenet_lt"))
    parser.add_argument(
        "--shard-images",
        type=int,
        default=Data().shard_images,
        help="images a tar (default: %(default)s, about 220 MB)",
    )
    parser.add_argument(
        "--side",
        type=int,
        default=0,
        help="store centre squares of this side instead of the original bytes",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=0,
        help="JPEG quality of those squares (default: lossless PNG)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core, up to 16)")
    args = parser.parse_args()
    lists = {
        f"{split}_list": str((args.lists or args.ilsvrc).absolute() / f"ImageNet_LT_{split}.txt")
        for split in ("train", "val", "test")
    }
    stored = {
        "shard_images": args.shard_images,
        "store_resolution": args.side,
        "store_quality": args.quality,
    }
    given = {"source": "list", "path": str(args.ilsvrc), "profile": "full", **lists, **stored}
    try:
        data = parse(Data, given, "data.")
        source = sources.open_source(data)
        args.out.mkdir(parents=True, exist_ok=True)
        sharding.write(args.out, "imagenet_lt", source, data, args.workers)
        sharding.clean(args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(profile.describe(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
