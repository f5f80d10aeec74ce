"""The parameters that a config gives to its merge method. mergekit ignores those that the method does not have."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.plan import MergePlanner

from mergekit_pave.errors import unknown
from mergekit_pave.methods import registry
from mergekit_pave.methods.regmean import check_names


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
