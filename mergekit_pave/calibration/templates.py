"""Templates over the columns of a data set: like `str.format`, but they only look up keys and places, never attributes."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_pave.errors import PaveError

_NESTED = re.compile(r"([^.\[\]]+)((?:\[[^\[\]]+\])+)")


@dataclass(frozen=True)
class Template:
    """A checked template. Each part is a literal text and the field after it, or None.

    A field is a path (the column, then keys or places within its cell), a conversion and a format, as in `str.format`.
    """

    parts: tuple[tuple[str, tuple[tuple[str, ...], str | None, str] | None], ...]

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text of a row. An empty cell is an empty text. If all cells are empty, so is the text.

        Raises:
            ValueError: a cell is not text, lacks a key or a place, or does not fit the format.
        """
        filled, shown = "", False
        for literal, field in self.parts:
            filled += literal
            if field:
                path, conversion, spec = field
                cell = _look_up(row, path)
                shown = shown or bool(str(cell).strip())
                try:
                    filled += format(string.Formatter().convert_field(cell, conversion), spec)
                except ValueError:
                    content = ("holds text" if isinstance(cell, str) else "holds a number") if cell != "" else "is empty"
                    raise ValueError(f"(column {_shown(path)!r} {content}, which the format {spec!r} does not fit)") from None
        return filled if shown else ""


def read_template(text: str, columns: list[str], where: str, path: str) -> Template:
    """A column's name or a template over columns, such as `"{question}\\n{answers[text][0]}"`.

    Args:
        where: its key in the YAML, for messages.
        path: the data set, for messages.

    Raises:
        PaveError: it is neither, or a column does not exist.
    """
    if text in columns:
        return Template((("", ((text,), None, "")),))
    braces = "; a brace that belongs to the text is doubled: {{ or }}" if re.search("[{}]", text) else ""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PaveError(f"{where}: {text!r} is not a valid template: {error}{braces}") from None
    parts, fields = [], 0
    for literal, name, spec, conversion in parsed:
        if name is None:
            parts.append((literal, None))
            continue
        if not name:
            raise PaveError(
                f"{where}: {text!r} is not a valid template: {{}} names no column; write {{{columns[0]}}}, say{braces}"
            )
        if conversion not in (None, "a", "r", "s"):
            raise PaveError(f"{where}: {text!r} is not a valid template: {{{name}}} has an unknown conversion !{conversion}")
        nested = _NESTED.fullmatch(name)
        steps = (name,)
        if name not in columns and nested:
            steps = (nested[1], *nested[2][1:-1].split("]["))
        if steps[0] not in columns:
            hint = braces
            if "." in name and name.split(".")[0] in columns:
                column, *keys = name.split(".")
                hint = f"; what is inside of a column is written {{{column}{''.join(f'[{key}]' for key in keys)}}}"
            raise PaveError(no_column(where, steps[0], path, columns) + hint)
        if "{" in spec:
            raise PaveError(f"{where}: {text!r} is not a valid template: a format takes no column{braces}")
        parts.append((literal, (steps, conversion, spec)))
        fields += 1
    if not fields:
        raise PaveError(no_column(where, text, path, columns) + braces)
    return Template(tuple(parts))


def no_column(where: str, name: str, path: str, columns: list[str]) -> str:
    """The message about a column that does not exist."""
    return f"{where}: {path} has no column {name!r}; its columns are: {', '.join(columns)}"


def _look_up(row: Mapping[str, Any], path: tuple[str, ...]) -> str | int | float:
    """The value at a path; an empty text if something on the way is empty."""
    cell = row[path[0]]
    for depth, step in enumerate(path[1:], 1):
        if cell is None:
            break
        place = int(step) if isinstance(cell, list) and step.isdecimal() else step
        if not isinstance(cell, (dict, list)) or place not in (cell if isinstance(cell, dict) else range(len(cell))):
            has = f"has no {step!r}" + (f" but {', '.join(map(str, cell))}" if isinstance(cell, dict) else "")
            raise ValueError(f"(column {_shown(path[:depth])!r} {has})")
        cell = cell[place]
    if cell is None:
        return ""
    if not isinstance(cell, (str, int, float)):
        raise ValueError(f"(column {_shown(path)!r} holds no text but a {type(cell).__name__})")
    return cell


def _shown(path: tuple[str, ...]) -> str:
    """A path as it is written in a template."""
    return path[0] + "".join(f"[{step}]" for step in path[1:])
