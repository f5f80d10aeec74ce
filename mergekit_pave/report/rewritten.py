"""A config with some keys changed, written as a person would: comments, order and quotes of the old one stay."""

from __future__ import annotations

import io
import re
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import SingleQuotedScalarString
from ruamel.yaml.util import load_yaml_guess_indent

from mergekit_pave.errors import PaveError

_FIRST_LINE = "# Written by `mergekit-pave tune`."
_OLD_COMMENT = re.compile(rf"\A{re.escape(_FIRST_LINE)}\n(#.*\n)*\n?")
_WIDEST = 1 << 20  # lines are as long as they were
_NAMES = ("merge_method", "model")  # keys that come first


def rewrite(text: str, wanted: dict[str, Any], table: str) -> str:
    """The YAML with another content, and a table as a comment before it.

    Args:
        text: the old YAML. A table that an earlier call has written is replaced.
        wanted: what the new one is to hold.

    Raises:
        PaveError: it cannot be changed in place.
    """
    text = _OLD_COMMENT.sub("", text)
    _, indent, offset = load_yaml_guess_indent(text)
    parser = YAML()
    parser.preserve_quotes, parser.width = True, _WIDEST
    parser.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
    document = parser.load(text)
    before = yaml.safe_load(text)
    _update(document, before, wanted)
    stream = io.StringIO()
    parser.dump(document, stream)
    if yaml.safe_load(stream.getvalue()) != wanted:
        raise PaveError(
            "the config cannot be changed in place, because a part of it stands for several (&, * or <<); write it out"
        )
    comment = "".join(f"# {line}".rstrip() + "\n" for line in table.splitlines())
    return f"{_FIRST_LINE}\n{comment}\n{stream.getvalue()}"


def _update(at: Any, before: Any, wanted: Any) -> None:
    """Change what differs.

    Args:
        at: a part of the document.
        before: what PyYAML reads there, which mergekit uses. It may read an untouched scalar in another way than the parser.
        wanted: what it is to read.
    """
    if isinstance(wanted, list):
        for i, (old, new) in enumerate(zip(before, wanted)):
            _replace(at, i, old, new)
        return
    for key in [key for key in before if key not in wanted]:
        del at[key]
    for key, new in wanted.items():
        if key in before:
            _replace(at, key, before[key], new)
        else:
            _insert(at, key, _styled(new))


def _replace(at: Any, key: Any, old: Any, new: Any) -> None:
    if type(old) is type(new) and old == new:
        return
    alike = isinstance(old, dict) and isinstance(new, dict)
    if alike or (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        _update(at[key], old, new)
    else:
        at[key] = _styled(new)


def _insert(at: CommentedMap, key: str, value: Any) -> None:
    """Add a key after the name of the method or of the model, or as the first."""
    name = next((name for name in _NAMES if name in at), None)
    if at.fa.flow_style():
        at[key] = value
        return
    at.insert(0 if name is None else list(at).index(name) + 1, key, value)
    token = (at.ca.items.get(name) or [None] * 3)[2]
    line, end, rest = token.value.partition("\n") if token else ("", "", "")
    if rest:  # the lines after the name stay before the key that they were before
        at.ca.items[key] = [None, None, type(token)(f"\n{rest}", token.start_mark, None), None]
        token.value = f"{line}{end}"
        if not line:
            del at.ca.items[name]


def _styled(value: Any) -> Any:
    """A new value in one line, as `{lambda: 1.2}`."""
    if isinstance(value, dict):
        styled = CommentedMap({key: _styled(child) for key, child in value.items()})
        styled.fa.set_flow_style()
        return styled
    if isinstance(value, list):
        styled = CommentedSeq(map(_styled, value))
        styled.fa.set_flow_style()
        return styled
    if isinstance(value, str) and yaml.safe_load(value) != value:
        return SingleQuotedScalarString(value)
    # PyYAML takes 1e-05 for a text, so it writes 1.0e-05, which stays as it is once it has been read.
    return YAML().load(yaml.safe_dump(value)) if isinstance(value, float) else value
