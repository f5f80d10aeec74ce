"""The parameters that a config gives to its merge method. mergekit ignores those that the method does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import BasePolicy, ParameterScope, ParameterSpec
from mergekit.plan import MergePlanner
from pydantic import ValidationError

from mergekit_pave.errors import PaveError, unknown
from mergekit_pave.methods import registry
from mergekit_pave.methods.regmean import check_names
from mergekit_pave.settings import wrong_value


def check_method(config: MergeConfiguration) -> None:
    """Refuse a merge method that is not there, or that lacks what it needs. mergekit would name a tensor, not a key.

    Raises:
        PaveError: naming the key, and what to write there.
    """
    specs = {each.spec.name: each.spec for each in registered_methods()}
    if config.merge_method not in specs:
        raise PaveError(unknown("merge_method", config.merge_method, specs))
    spec = specs[config.merge_method]
    for place, entry, base, scopes in _inputs(config):
        if spec.contract.base == BasePolicy.REQUIRED and base is None:
            raise PaveError(f"{spec.name} needs a base_model: name the model that the others were fine-tuned from")
        for parameter in spec.parameters:
            values = [scope[parameter.name] for scope in scopes if parameter.name in scope]
            is_read = entry.model != base or parameter.scope is not ParameterScope.NON_BASE
            if parameter.required and is_read and not values:
                raise PaveError(
                    f"{place}: {entry.model} has no `{parameter.name}`, which {spec.name} needs. Write "
                    f"`parameters: {{{parameter.name}: ...}}` below its `model`, or once for all models outside of `models`"
                )
            for value in values:
                _check_value(f"{place}: {parameter.name} of {entry.model}", parameter, value)


def _inputs(config: MergeConfiguration) -> Iterator[tuple[str, Any, ModelReference | None, list[dict[str, Any]]]]:
    """Each input that is merged somewhere: its key, its entry, its base model, and the parameters that hold for it."""
    for before, part in (("", config), *((f"modules.{name}.", part) for name, part in (config.modules or {}).items())):
        around = [config.parameters or {}] if part is config else [part.parameters or {}, config.parameters or {}]
        for i, entry in enumerate(part.models or ()):
            yield f"{before}models[{i}]", entry, config.base_model, [entry.parameters or {}, *around]
        for i, output in enumerate(part.slices or ()):
            for j, entry in enumerate(output.sources):
                scopes = [entry.parameters or {}, output.parameters or {}, *around]
                yield f"{before}slices[{i}].sources[{j}]", entry, output.base_model or config.base_model, scopes


def _check_value(place: str, parameter: ParameterSpec, value: Any) -> None:
    """Refuse a text in the place of a number, also in a gradient or behind a filter."""
    if isinstance(value, ConditionalParameter):
        _check_value(place, parameter, value.value)
    elif isinstance(value, list):
        for part in value:
            _check_value(place, parameter, part)
    elif isinstance(value, str):
        try:
            parameter.validate(value)
        except ValidationError as error:
            raise PaveError(f"{place} {wrong_value(error.errors()[0])}") from error


def check_parameters(planner: MergePlanner) -> None:
    """Refuse parameters that our own merge methods do not have.

    Raises:
        PaveError: naming the first, and the one that was probably meant.
    """
    if registry.is_ours(planner._method.spec.name):
        check_names(planner._method.spec, _given(planner.config))


def unread_parameters(planner: MergePlanner) -> list[str]:
    """A warning for each parameter that no merge method has, as it is probably misspelt.

    Configs for one method often keep parameters of another, so these are passed over.
    """
    method = planner._method.spec
    known = {parameter.name for each in registered_methods() for parameter in each.spec.parameters}
    names = [parameter.name for parameter in method.parameters]
    return [
        f"{method.name} ignores a parameter of the config: {unknown('parameter', name, names)}"
        for name in dict.fromkeys(_given(planner.config))
        if name not in known
    ]


def _given(config: MergeConfiguration) -> Iterator[str]:
    """The names of all parameters that a config sets, wherever that is."""
    for part in (config, *(config.modules or {}).values()):
        outputs = part.slices or ()
        inputs = [*(part.models or ()), *(source for output in outputs for source in output.sources)]
        for holder in (part, *outputs, *inputs):
            yield from holder.parameters or ()
