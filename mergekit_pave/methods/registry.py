"""The merge methods that this package adds to mergekit's registry."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from mergekit_pave import versions
from mergekit_pave.names import METHODS

LOG = logging.getLogger(__name__)

# Why they could not be registered, or None.
problem: str | None = None

# By name: the package whose method is registered instead of ours.
others: dict[str, str] = {}


def add(module: ModuleType) -> None:
    """Register them in `mergekit.merge_methods`. Idempotent.

    Whatever is wrong with this installation must not break mergekit for those who use its own methods. So a method that cannot be
    registered is one that mergekit does not know, and `mergekit-pave doctor` says why. If there is a method of the same name
    already, it stays: users who merge without a block have never asked for ours.
    """
    global problem
    try:
        from mergekit_pave.methods.emr import Emr
        from mergekit_pave.methods.regmean import RegMean
        from mergekit_pave.methods.tsv import Tsv

        registered = {method.spec.name: method for method in module.registered_methods()}
        for method in (RegMean(), Tsv(), Emr()):
            name = method.spec.name
            if name not in registered:
                if versions.problem() is None:
                    module.register(method)
            elif not isinstance(registered[name], type(method)):
                others[name] = _owner(registered[name])
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"


def _owner(method: Any) -> str:
    """The package that a method comes from."""
    code = getattr(method, "implementation", None) or type(method)
    return str(getattr(code, "__module__", "another package")).partition(".")[0]


def is_ours(name: str) -> bool:
    """Whether a config's merge method is one of these. Where it is another package's of the same name, the log says so."""
    if name in others:
        _log_owner(name, others[name])
    return name in METHODS and name not in others


@functools.cache
def _log_owner(name: str, owner: str) -> None:
    LOG.warning("`merge_method: %s` is that of %s here, not that of mergekit-pave, and so are its parameters", name, owner)
