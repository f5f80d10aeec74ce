"""Whether two versions of transformers, or of a model's own code, compute the same with the same weights.

The source of the code that is run decides, and the settings that this source reads. The source is compared as syntax, so that
comments, docstrings, annotations and decorators do not matter. A setting that a release adds to every model changes nothing.
Only a model's own definition counts. The code that all models share in transformers (attention, masks) changes in every release,
but has to give the same results. If it counted, every release would make all measurements useless.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn

from mergekit_pave.cache import digest

# Packages whose code is not a model's own, and the parts of them that are.
_SHARED = {"torch", "transformers", "builtins", *sys.stdlib_module_names}
_OWN = ("transformers.models.", "transformers.activations")
_PLAIN = (bool, int, float, str, tuple)
# Settings that shared code reads to make masks, and settings that do not matter for what is computed here.
_OF_MASKS = frozenset({"attention_chunk_size", "is_causal", "sliding_window"})
_IGNORED = frozenset({"dtype", "initializer_range", "transformers_version", "use_cache"})


def computation(model: nn.Module, config: transformers.PretrainedConfig) -> str:
    """A digest of what a model computes, apart from its weights.

    Args:
        model: the part of the model that is run. It needs no weights.
        config: the whole model's configuration.
    """
    code, names = _definitions({type(module) for module in model.modules()})
    return digest(code, repr(_read(config.to_dict(), (names | _OF_MASKS) - _IGNORED)))


def _read(settings: dict[Any, Any], names: frozenset[str]) -> list[tuple[str, Any]]:
    """The settings of these names, also within the settings of a part of the model."""
    values = []
    for name in sorted(names.intersection(settings)):
        value = settings[name]
        values.append((name, _read(value, names) if isinstance(value, dict) and "model_type" in value else value))
    return values


def _definitions(classes: set[type]) -> tuple[str, frozenset[str]]:
    """A digest of the source of classes and of all code of the model that it uses, and every name in it."""
    bodies: dict[str, list[Any]] = {}
    names: set[str] = set()
    waiting: list[Any] = list(classes)
    while waiting:
        definition = waiting.pop()
        name = f"{definition.__module__}.{definition.__qualname__}"
        if name in bodies or not _is_own(definition.__module__ or ""):
            continue
        waiting += getattr(definition, "__bases__", ())
        bodies[name] = []
        for leaf, function in _functions(definition):
            syntax, used = _syntax(function)
            values = {name: function.__globals__.get(name) for name in sorted(used)}
            plain = [(name, repr(value)) for name, value in values.items() if isinstance(value, _PLAIN)]
            waiting += [value for value in values.values() if isinstance(value, (type, types.FunctionType))]
            bodies[name].append([leaf, syntax, plain])
            names |= used
    # The name of a module of remote code has the revision in it, so it is left out.
    return digest(sorted([name.rpartition(".")[2], body] for name, body in bodies.items())), frozenset(names)


def _is_own(module: str) -> bool:
    return module.startswith(_OWN) or module.partition(".")[0] not in _SHARED


def _functions(definition: Any) -> Iterator[tuple[str, types.FunctionType]]:
    """A function, or the functions of a class, by name."""
    members = sorted(vars(definition).items()) if isinstance(definition, type) else [("", definition)]
    for name, member in members:
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, types.FunctionType):
            yield name, function


@functools.cache
def _syntax(function: types.FunctionType) -> tuple[str, set[str]]:
    """A digest of a function's source, and every name and string in it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # a function without source, made at run time
        code = function.__code__
        return digest(code.co_code, repr(code.co_consts)), set(code.co_names)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            node.decorator_list = []
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        for annotation in ("annotation", "returns"):
            if hasattr(node, annotation):
                setattr(node, annotation, None)
    for node in ast.walk(tree):
        names.update(value for value in (getattr(node, key, None) for key in ("id", "attr", "value")) if isinstance(value, str))
    return digest(_shape(tree)), names


def _shape(node: Any) -> Any:
    """A syntax tree as JSON. Absent parts are left out, so that it is the same in all versions of Python."""
    if isinstance(node, list):
        return [_shape(part) for part in node]
    if isinstance(node, ast.AST):
        return [type(node).__name__, [[name, _shape(part)] for name, part in ast.iter_fields(node) if part not in (None, [])]]
    return repr(node)
