"""The field `pave` of mergekit's `MergeConfiguration`: what makes mergekit see the block at all.

It is added for everybody who uses mergekit, as soon as the configuration class is there, so it imports little and may break
nothing. What honours the block is loaded when a config with a block, or with one of our merge methods, is validated.
"""

from __future__ import annotations

from types import ModuleType
from typing import Annotated, Any

from pydantic import WrapValidator
from pydantic.fields import FieldInfo

from mergekit_pave import versions
from mergekit_pave.errors import PaveError
from mergekit_pave.names import EMR, METHODS


def add(module: ModuleType) -> None:
    """Add the field to `mergekit.config`. Idempotent."""
    if "pave" in module.MergeConfiguration.model_fields:
        return
    field = FieldInfo.from_annotated_attribute(Annotated[Any, WrapValidator(_read)], None)
    field.validate_default = True  # so that `_read` also sees configs without a block, which may use a merge method of ours
    module.MergeConfiguration.__pydantic_fields__["pave"] = field
    module.MergeConfiguration.model_rebuild(force=True)
    module.ConfigReader.model_rebuild(force=True)  # it embeds the schema of the other


def _read(value: Any, _, info) -> Any:
    """The block as a `PaveConfig`, checked against the rest of the config; None where there is no block.

    From here on mergekit honours the block, and plans what our merge methods need.

    Raises:
        PaveError: the block does not fit, or cannot be honoured here. pydantic passes it on as it is.
    """
    merge: dict[str, Any] = info.data
    if value is None:
        _register_method(merge.get("merge_method"), "use another merge_method")
        return _implied(merge)
    if problem := versions.problem():
        raise PaveError(f"{problem}, or remove the `pave:` block")
    try:
        from mergekit_pave.config import check_models, read_block
    except Exception as error:
        raise PaveError(_not_loaded(error, "remove the `pave:` block")) from error
    config = read_block(value)
    if {"modules", "slices", "models", "base_model"} <= merge.keys():  # where one is not valid, mergekit says so
        _register("remove the `pave:` block")
        _register_method(merge.get("merge_method"), "remove the `pave:` block")
        config = config.with_merged(merge)
        check_models(config, merge)
    return config


def _implied(merge: dict[str, Any]) -> Any:
    """The block of an `emr` merge that has none: it measures nothing, and its report and card tell how models are restored."""
    if merge.get("merge_method") != EMR or not {"modules", "slices", "models", "base_model"} <= merge.keys():
        return None
    from mergekit_pave.config import PaveConfig, merged_models
    from mergekit_pave.methods import registry

    if versions.problem() or not registry.is_ours(EMR):
        return None
    models = dict.fromkeys(merged_models(merge, merge["base_model"]))
    return PaveConfig(models=[{"model": model, "purify": False} for model in models]) if models else None


def _register_method(merge_method: str | None, otherwise: str) -> None:
    """Plan merges by one of our methods. Another package may have a method of that name; then the log says so."""
    if merge_method in METHODS:
        from mergekit_pave.methods import registry

        if registry.is_ours(merge_method):
            _register(otherwise)


def _register(otherwise: str) -> None:
    try:
        from mergekit_pave.hook import host

        host.register()
    except ImportError as error:
        raise PaveError(_not_loaded(error, otherwise)) from error


def _not_loaded(error: Exception, otherwise: str) -> str:
    return f"mergekit-pave cannot be loaded ({type(error).__name__}: {error}); install it anew, or {otherwise}"
