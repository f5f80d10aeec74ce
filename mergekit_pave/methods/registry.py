"""The merge methods that this package adds to mergekit's registry."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from mergekit_pave import versions
from mergekit_pave.settings import METHODS

LOG = logging.getLogger(__name__)

# Why they could not be registered, or None.
problem: str | None = None

# By name: whose method stands in the place of ours.
others: dict[str, str] = {}


def add() -> None:
    """Register them. Idempotent, and does nothing while mergekit's merge methods are still being loaded.

    Whatever is wrong with this installation must not break mergekit for those who use its own methods, so it shows
    as a method that mergekit does not know, and `mergekit-pave doctor` tells it. A method of the same name that is there
    already stays: who merges without a block has never asked for ours.
    """
    global problem
    module = sys.modules.get("mergekit.merge_methods")
    if not hasattr(module, "__all__"):
        return
    try:
        from mergekit_pave.methods.regmean import RegMean
        from mergekit_pave.methods.tsv import Tsv

        known = {method.spec.name: method for method in module.registered_methods()}
        for method in (RegMean(), Tsv()):
            name = method.spec.name
            if name not in known:
                if versions.problem() is None:
                    module.register(method)
            elif not isinstance(known[name], type(method)):
                others[name] = _owner(known[name])
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"


def _owner(method: Any) -> str:
    """The package that a method comes from."""
    made_of = getattr(method, "implementation", None) or type(method)
    return str(getattr(made_of, "__module__", "another package")).partition(".")[0]


def is_ours(name: str) -> bool:
    """Whether a config's merge method is one of these; of another one that has the name of one of them, the log says so."""
    if name in others:
        _tell(name, others[name])
    return name in METHODS and name not in others


@functools.cache
def _tell(name: str, owner: str) -> None:
    told = "`merge_method: %s` is that of %s here, not that of mergekit-pave: so are its parameters, and what it does"
    LOG.warning(told, name, owner)
