"""Check what `make quickstart` promises: the distilled set reaches 95 % of training on the whole long-tailed set, and the page shows it beside random real images at two label budgets.

python tools/check_quickstart.py runs/quickstart
"""

import json
import sys
from pathlib import Path

FILES = (
    "report.html",
    "results.md",
    "distilled/README.md",
    "distilled/images",
    "pictures/message.svg",
)


def main(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    summary = results["summary"]
    # Random real images stand there with classes too: beside the set are those with its labels.
    labels = {"random": summary["baseline"]}
    mean = {
        which: [
            r["top1"]
            for r in results["rows"]
            if r["set"] == which and r["labels"] == labels.get(which, r["labels"])
        ]
        for which in ("distilled", "random", "full")
    }
    mean = {which: sum(values) / len(values) for which, values in mean.items()}
    share = 100 * mean["distilled"] / mean["full"]
    print(
        f"distilled {mean['distilled']:.1f} %, random real {mean['random']:.1f} %, whole set {mean['full']:.1f} %: the distilled set reaches {share:.1f} % of the whole"
    )
    single = {e["set"]: e["top1"] for e in summary["students"] if e["labels"] == "single"}
    if not {"distilled", "random"} <= set(single):
        sys.exit("no students with single labels beside those with online ones")
    print(
        f"with single labels: distilled {single['distilled']:.1f} %, random real {single['random']:.1f} %"
    )
    for name in FILES:
        if not (run / name).exists():
            sys.exit(f"{run / name} is missing")
    if share < 95:
        sys.exit("less than 95 %")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
