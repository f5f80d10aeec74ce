"""Which keys of a config may be set: those that something reads, and that nothing overrides."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, get_args, get_origin

from mergekit.config import MergeConfiguration
from pydantic import BaseModel

from mergekit_pave.config import PaveConfig, PaveModel
from mergekit_pave.errors import PaveError, unknown
from mergekit_pave.settings import Calibration, Refine


def parts_of(key: str, value: Any) -> Iterator[str]:
    """The keys that a key with a value sets: of `parameters={lambda: 1}` that is `parameters.lambda`."""
    children: Any = ()
    if isinstance(value, dict) and not any("." in str(name) for name in value):
        children = value.items()
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        children = enumerate(value)
    if not children:
        yield key
    for name, child in children:
        yield from parts_of(f"{key}.{name}", child)


def parameter_in(key: str) -> str | None:
    """The parameter of the merge method that a key is, or is a part of."""
    parts = key.split(".")
    if parts[0] == "pave" or "parameters" not in parts[:-1]:
        return None
    return parts[parts.index("parameters") + 1]


def full_key(key: str, parameters: Collection[str]) -> str:
    """A key in full, which may lack the `parameters.` or `pave.` before it. `page.labels` leaves these out.

    Args:
        parameters: those of the merge methods.

    Raises:
        PaveError: several keys end like this, or the only one lies deeper.
    """
    first = key.split(".")[0]
    if first in MergeConfiguration.model_fields:
        return key
    meant = [
        f"{place}.{key}" for place, names in (("parameters", parameters), ("pave", PaveConfig.model_fields)) if first in names
    ]
    if len(meant) == 1:
        return meant[0]
    for place, kind in (("calibration", Calibration), ("refine", Refine)) if not meant else ():
        if first in {field.alias or name for name, field in kind.model_fields.items()}:
            meant.append(f"{place}.{key}")
    if meant:
        raise PaveError(f"--set {key}: write in full what is meant: {' or '.join(meant)}")
    return key  # which is refused with all other keys that nobody reads


def check_key(key: str, content: dict[str, Any], parameters: set[str]) -> None:
    """Refuse a key that mergekit would not read. The classes of the block refuse theirs themselves.

    Args:
        parameters: those of the merge methods.
    """
    kind: Any = MergeConfiguration
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part not in kind.model_fields:
                place = f" in {'.'.join(parts[:depth])}" if depth else ""
                short = () if depth else (*parameters, *PaveConfig.model_fields)  # which stand alone, too
                raise PaveError(f"--set {key}: {unknown('key', part, dict.fromkeys((*kind.model_fields, *short)))}{place}")
            if kind is MergeConfiguration and part == "pave":
                return _check_block_key(key, content)
            if part == "parameters":
                break
            kind = _container(kind.model_fields[part].annotation)
        elif get_origin(kind) in (list, dict, tuple):
            kind = _container(get_args(kind)[-1])
        elif kind is Any:
            return None
        else:
            raise PaveError(f"--set {key}: {'.'.join(parts[:depth])} is a value, which has no keys")
    name = parameter_in(key)
    if name is None:
        return
    if name not in parameters:
        raise PaveError(f"--set {key}: {unknown('parameter', name, sorted(parameters))}")
    if parts[0] == "parameters" and (own := own_parameters(content, name)):
        raise PaveError(f"--set {key}: each model has a {name} of its own; set {_some(own)}")


def own_parameters(content: dict[str, Any], name: str) -> list[str]:
    """The keys of a parameter that each merged model has of its own, so that nothing reads it elsewhere; none otherwise."""
    keys = []
    for place, entry, inherited in _sources(content):
        if name not in (entry.get("parameters") or {}) and name not in inherited:
            return []
        keys.append(f"{place}.parameters.{name}")
    return keys


def _sources(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every model that is merged somewhere: its key, its entry, and the parameters of the slice and the module around it."""
    scopes = [("", content, {})]
    scopes += [
        (f"modules.{name}.", scope, scope.get("parameters") or {}) for name, scope in (content.get("modules") or {}).items()
    ]
    for before, scope, parameters in scopes:
        for i, entry in enumerate(scope.get("models") or ()):
            if entry["model"] != content.get("base_model"):
                yield f"{before}models.{i}", entry, parameters
        for i, output in enumerate(scope.get("slices") or ()):
            of_slice = parameters | (output.get("parameters") or {})
            for j, entry in enumerate(output["sources"]):
                if entry["model"] != (output.get("base_model") or content.get("base_model")):
                    yield f"{before}slices.{i}.sources.{j}", entry, of_slice


def _check_block_key(key: str, content: dict[str, Any]) -> None:
    """Refuse a key of the block that each model's entry overrides."""
    inner = key.split(".")[1:3] if key.startswith("pave.calibration.") else key.split(".")[1:2]
    if not inner or inner[0] not in PaveModel.model_fields or inner[0] == "model":
        return
    keys = []
    entries = (content.get("pave") or {}).get("models") or ()
    listed = [entry["model"] for entry in entries]
    if any(entry["model"] not in listed for _, entry, _ in _sources(content)):  # the block's `data` are those of the others
        return
    for i, entry in enumerate(entries):
        is_idle = inner[0] not in ("purify", "calibration") and entry.get("purify") is False
        if is_idle or entry["model"] == content.get("base_model"):
            continue
        value: Any = entry
        for part in inner:
            value = (value or {}).get(part)
        if value is None:
            return
        keys.append(f"pave.models.{i}.{'.'.join(inner)}")
    if keys:
        raise PaveError(f"--set {key}: each model has a {inner[-1]} of its own; set {_some(keys)}")


def _some(keys: list[str]) -> str:
    """Keys for a message, not too many."""
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def _container(annotation: Any) -> Any:
    """What of an annotation has keys: a class, a list or a mapping; `Any` of several, and None if it is a plain value."""
    kinds = [annotation, *(get_args(annotation) if get_origin(annotation) not in (list, dict, tuple) else ())]
    found = [k for k in kinds if get_origin(k) in (list, dict, tuple) or (isinstance(k, type) and issubclass(k, BaseModel))]
    return Any if len(found) > 1 else next(iter(found), None)
