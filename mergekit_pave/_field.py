"""The field `pave` of mergekit's `MergeConfiguration`: what makes mergekit see the block at all.

Kept apart from `plugin`, which needs all of mergekit, because the field has to be there as soon as mergekit's
configuration is. The rest is loaded when a config with a block is validated, so whatever is wrong with this
installation touches nobody who merges without one.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any, Optional

from packaging.specifiers import SpecifierSet
from pydantic import BeforeValidator, WrapValidator
from pydantic.fields import FieldInfo

from mergekit_pave._autoload import is_half_loaded
from mergekit_pave.errors import PaveError

SUPPORTED = SpecifierSet(">=0.1.5,<0.2")

# Why a `pave:` block cannot be honoured here, or None.
problem: str | None = None


def add() -> None:
    """Add the field. Idempotent, and does nothing while mergekit's configuration is still being loaded."""
    module = sys.modules.get("mergekit.config")
    if not hasattr(module, "ConfigReader") or "pave" in module.MergeConfiguration.model_fields:
        return
    if is_half_loaded("mergekit_pave.config", "parse"):
        return
    annotation = _annotation()
    field = FieldInfo.from_annotated_attribute(annotation, None)
    field.validate_default = True  # merge methods of ours have to be heard of without a block, too
    module.MergeConfiguration.__pydantic_fields__["pave"] = field
    module.MergeConfiguration.model_rebuild(force=True)
    module.ConfigReader.model_rebuild(force=True)  # it embeds the schema of the other


def _annotation() -> Any:
    global problem
    installed = version("mergekit")
    if installed not in SUPPORTED:
        problem = (
            f"mergekit-pave {version('mergekit-pave')} works with mergekit {SUPPORTED}, but {installed} is installed. "
            f"Install a version that fits (pip install 'mergekit{SUPPORTED}'), or remove the `pave:` block"
        )
    else:
        try:
            from mergekit_pave.config import PaveConfig, parse

            return Annotated[Optional[PaveConfig], WrapValidator(parse)]
        except Exception as error:  # whatever it is, it must not break mergekit for those who have no block
            problem = f"mergekit-pave cannot be loaded ({type(error).__name__}: {error}); install it anew"
    return Annotated[Any, BeforeValidator(_refuse)]


def _refuse(value: Any) -> None:
    if value is not None:
        raise PaveError(problem)
