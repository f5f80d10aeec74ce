"""A config with some keys changed, written as a person would: comments, order and quotes of the old one stay."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.scalarstring import SingleQuotedScalarString
from ruamel.yaml.tokens import CommentToken
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
    end_of_line = "\r\n" if "\r\n" in text else "\n"
    text = _OLD_COMMENT.sub("", text.replace("\r\n", "\n"))
    _, indent, offset = load_yaml_guess_indent(text)
    parser = YAML()
    parser.preserve_quotes, parser.width = True, _WIDEST
    parser.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
    document = parser.load(text)
    before = yaml.safe_load(text)
    _update(document, before, wanted)
    stream = io.StringIO()
    parser.dump(document, stream)
    if _comparable(yaml.safe_load(stream.getvalue())) != _comparable(wanted):
        if any(getattr(event, "anchor", None) for event in yaml.parse(text)):
            raise PaveError(
                "the config cannot be changed in place, because a part of it stands for several (&, * or <<); write it out"
            )
        raise PaveError("the config cannot be changed in place; write the keys that are to change in the plainest way")
    comment = "".join(f"# {line}".rstrip() + "\n" for line in table.splitlines())
    return f"{_FIRST_LINE}\n{comment}\n{stream.getvalue()}".replace("\n", end_of_line)


def _comparable(content: Any) -> str:
    """Not a number is equal to itself there."""
    return json.dumps(content, sort_keys=True, default=str)


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
        _delete(at, key)
    for key, new in wanted.items():
        if key in before:
            _replace(at, key, before[key], new)
        else:
            _insert(at, key, _styled(new))


def _replace(at: Any, key: Any, old: Any, new: Any) -> None:
    if type(old) is type(new) and old == new:
        return
    alike = isinstance(old, dict) and isinstance(new, dict) and new
    if alike or (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        _update(at[key], old, new)
    else:
        behind, is_inside = _behind(at, key), _is_block(at[key])
        at[key] = _styled(new)
        if is_inside:
            at.ca.items.pop(key, None)
            _add_behind(at, key, behind)


def _delete(at: CommentedMap, key: str) -> None:
    """Remove a key, but not the lines behind it, which are about what follows."""
    behind, keys = _behind(at, key), list(at)
    number = keys.index(key)
    del at[key]
    at.ca.items.pop(key, None)
    if not behind:
        return
    if number:
        _add_behind(at, keys[number - 1], behind)
    elif len(keys) > 1:
        lines = behind.splitlines()
        texts = "\n".join(line.strip().removeprefix("#").removeprefix(" ") for line in lines)
        at.yaml_set_comment_before_after_key(keys[1], before=texts, indent=len(lines[-1]) - len(lines[-1].lstrip()))


def _is_block(value: Any) -> bool:
    """Whether a value is written in several lines."""
    return isinstance(value, (CommentedMap, CommentedSeq)) and bool(value) and not value.fa.flow_style()


def _slot(at: Any, key: Any) -> tuple[Any, Any, int]:
    """Where the parser keeps the comments behind a value: with the last value inside it."""
    while _is_block(at[key]):
        at = at[key]
        key = list(at)[-1] if isinstance(at, CommentedMap) else len(at) - 1
    return at, key, 2 if isinstance(at, CommentedMap) else 0


def _behind(at: Any, key: Any) -> str:
    """The lines between a value and the next key."""
    at, key, place = _slot(at, key)
    token = (at.ca.items.get(key) or [None] * 4)[place]
    return token.value.partition("\n")[2] if token else ""


def _add_behind(at: Any, key: Any, lines: str) -> None:
    at, key, place = _slot(at, key)
    tokens = at.ca.items.setdefault(key, [None] * 4)
    if tokens[place]:
        tokens[place].value = tokens[place].value.removesuffix("\n") + "\n" + lines
    elif lines:
        tokens[place] = CommentToken(f"\n{lines}", CommentMark(0), None)


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
