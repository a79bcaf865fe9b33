"""The methods, a line each."""

from __future__ import annotations

from ltdd_scale.methods.contract import Method
from ltdd_scale.methods.damed.method import DAMED
from ltdd_scale.methods.dm.method import DM
from ltdd_scale.methods.gm.method import GM
from ltdd_scale.methods.mtt.method import MTT
from ltdd_scale.methods.rldd.method import RLDD

METHODS: dict[str, Method] = {m.name: m for m in (RLDD, DM, GM, MTT, DAMED)}
