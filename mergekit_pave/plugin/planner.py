"""What of a merge is ours to plan."""

from __future__ import annotations

from mergekit.plan import MergePlanner

from mergekit_pave.methods.regmean import RegMean


def is_ours(planner: MergePlanner) -> bool:
    return planner.config.pave is not None or is_regmean(planner)


def is_regmean(planner: MergePlanner) -> bool:
    return isinstance(planner._method, RegMean)
