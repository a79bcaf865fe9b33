"""The protocols, a line each. Each adds its own results to the verdict."""

from __future__ import annotations

from ltdd_scale.judging.contract import Protocol
from ltdd_scale.judging.single_stage import SINGLE_STAGE
from ltdd_scale.judging.two_stage import TWO_STAGE

PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (SINGLE_STAGE, TWO_STAGE)}
