"""The merge methods that this package adds to mergekit's registry."""

from __future__ import annotations

import sys
from importlib.metadata import version

from mergekit_pave._autoload import is_half_loaded

# Why they could not be registered, or None.
problem: str | None = None


def add() -> None:
    """Register them. Idempotent, and does nothing while mergekit's merge methods are still being loaded.

    Whatever is wrong with this installation must not break mergekit for those who use its own methods, so it shows
    as a method that mergekit does not know, and `mergekit-pave doctor` tells it.
    """
    global problem
    module = sys.modules.get("mergekit.merge_methods")
    if not hasattr(module, "__all__"):
        return
    if is_half_loaded("mergekit_pave.regmean", "RegMean") or is_half_loaded("mergekit_pave.tsv", "Tsv"):
        return
    try:
        from mergekit_pave._field import SUPPORTED
        from mergekit_pave.regmean import RegMean
        from mergekit_pave.tsv import Tsv

        known = {method.spec.name for method in module.registered_methods()}
        for method in (RegMean(), Tsv()):
            if version("mergekit") in SUPPORTED and method.spec.name not in known:
                module.register(method)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
