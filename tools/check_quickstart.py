"""Check what `make quickstart` promises: the distilled set reaches 95 % of training on the whole long-tailed set.

python tools/check_quickstart.py runs/quickstart
"""

import json
import sys
from pathlib import Path


def main(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    mean = {
        which: [r["top1"] for r in results["rows"] if r["set"] == which]
        for which in ("distilled", "random", "full")
    }
    mean = {which: sum(values) / len(values) for which, values in mean.items()}
    share = 100 * mean["distilled"] / mean["full"]
    print(
        f"distilled {mean['distilled']:.1f} %, random real {mean['random']:.1f} %, whole set {mean['full']:.1f} %: the distilled set reaches {share:.1f} % of the whole"
    )
    for name in ("report.html", "results.md", "distilled/README.md", "distilled/images"):
        if not (run / name).exists():
            sys.exit(f"{run / name} is missing")
    if share < 95:
        sys.exit("less than 95 %")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
