"""Check what `make quickstart` promises: with each kind of labels the distilled set is above random real images, with plain ones by more than the noise, and the page shows it.

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
LABELS = ("hard", "single", "online")


def main(run: Path) -> None:
    summary = json.loads((run / "results.json").read_text())["summary"]
    cells = {(e["set"], e["labels"]): e for e in summary["students"]}
    failed = []
    for labels in LABELS:
        if not {("distilled", labels), ("random", labels)} <= set(cells):
            sys.exit(f"no students with {labels} labels")
        ours, real = cells["distilled", labels], cells["random", labels]
        gain = ours["balanced"] - real["balanced"]
        # Two standard errors of the difference of two means.
        variance = (ours["balanced_std"] ** 2 + real["balanced_std"] ** 2) / ours["num_seeds"]
        print(
            f"{labels}: distilled {ours['balanced']:.1f} ± {ours['balanced_std']:.1f} %, random "
            f"real {real['balanced']:.1f} ± {real['balanced_std']:.1f} %: {gain:+.1f}"
        )
        noise = 2 * variance**0.5 if labels == "hard" else 0.0
        failed += [labels] if gain <= noise else []
    for name in FILES:
        if not (run / name).exists():
            sys.exit(f"{run / name} is missing")
    if failed:
        sys.exit(f"no gain over random real images: {', '.join(failed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
