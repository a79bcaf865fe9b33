"""What is to be done to a run folder: one frozen record, JSON both ways.

The command line makes it; a rank, a job on a cluster and `session.execute` take it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ltdd_scale.errors import UserError

WHOLE = "run"  # the target that stands for everything, the report included


@dataclass(frozen=True)
class Request:
    """`config` is the whole config as YAML, with nothing left to resolve; `targets` are names of
    stages or of groups; `source` is the digest of the real images (``data/digest.py``).
    `part` (k, n): only the k-th of n shares of the target's pieces. `report`: write the report
    afterwards. `out` and `store` are absolute paths. `force`: go on where the machine seems too
    small. `asked`: hash of the config as it was asked for, before anything was resolved.
    """

    config: str
    targets: tuple[str, ...]
    out: str
    store: str
    source: str
    part: tuple[int, int] | None = None
    report: bool = False
    quiet: bool = False
    force: bool = False
    asked: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Request:
        """Raises `UserError` where `text` is not a request."""
        try:
            values = json.loads(text)
            part = values.pop("part")
            targets = tuple(values.pop("targets"))
            return Request(part=part and (part[0], part[1]), targets=targets, **values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"this is not a request of ltdd_scale: {error}") from None

    def replace(self, **changes) -> Request:
        return dataclasses.replace(self, **changes)
