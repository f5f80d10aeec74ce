"""Tables and names of others as Markdown, for the model card."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table of Markdown, with numbers to the right. A row may be shorter than the head."""
    lines = [[*map(str, row), *[""] * (len(head) - len(row))] for row in rows]
    numbers = [all(_is_number(line[i]) for line in lines) for i in range(len(head))]
    lines = [head, ["---:" if number else "---" for number in numbers], *lines]
    return [f"| {' | '.join(map(escape, line))} |" for line in lines]


def _is_number(cell: str) -> bool:
    return cell in ("-", "all", "") or cell.removeprefix("-")[:1].isdigit()


def escape(text: str) -> str:
    """Text as Markdown that shows it as it is, whatever is in a name or a path. A `key` or `key: value` of ours stays code."""
    pieces = re.split(r"((?<!`)`\w+(?:: [\w.]+)?`(?!`))", " ".join(text.split()))
    return "".join(piece if code else _literal(piece) for piece, code in zip(pieces, itertools.cycle((False, True))))


def _literal(text: str) -> str:
    # An underscore within a word is one, and tensors have many.
    text = re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return html.escape(text, quote=False)
