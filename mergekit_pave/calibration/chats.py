"""Chats: from what a data set keeps in a cell to turns, and from turns to the text that a model reads."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any
from unittest import mock

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

# ShareGPT's names of who speaks. Any other stays as it is: the template knows it, or refuses the chat.
_ROLES = {"human": "user", "observation": "tool", "function_response": "tool", "function_call": "assistant"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")
_NO_CHAT = "(no list of {role, content} or {from, value}, nor such a list as JSON)"


def read_chat(cell: Any) -> list[dict[str, Any]]:
    """The turns of a chat, each with a `role` and, where it says something, a text as `content`. An empty cell has none.

    Turns may be `{role, content}` or ShareGPT's `{from, value}`, the list of them written as JSON, and content a list of parts.

    Raises:
        ValueError: it is no chat, or a turn has content that is no text.
    """
    turns = _parsed(cell, _NO_CHAT)
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(_NO_CHAT)
    return [_read_turn(turn) for turn in without_nulls(turns)]


def read_tools(cell: Any) -> list[Any] | None:
    """The tools that go with a chat, given as a list or written as JSON.

    Raises:
        ValueError: they are written as something else.
    """
    return without_nulls(_parsed(cell, "(tools that are no list, nor a list as JSON)")) or None


def without_nulls(value: Any) -> Any:
    """The same without the keys that are null, however deep.

    A table gives every dict of a column the keys of all of them, and a template takes a key that is there for one that is meant.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def render(processor: Any, chat: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    """What the chat template of a tokenizer or a processor makes of turns. It is the same on every day.

    Raises:
        TemplateError, TypeError, ValueError, KeyError: the template refuses the chat.
    """
    with mock.patch.object(chat_template_utils, "datetime", _ThatDay, create=True):
        return processor.apply_chat_template(chat, tokenize=False, **({"tools": tools} if tools else {}))


def in_form(chat: list[dict[str, Any]], parts: bool) -> list[dict[str, Any]]:
    """The same turns, with texts as lists of one part where a template reads only such."""
    if not parts:
        return chat
    return [
        turn | {"content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn.get("content"), str) else turn
        for turn in chat
    ]


def takes_only_parts(tokenizer: Any) -> bool:
    """Whether a chat template passes over content that is a string and shows the same text as a part, as LLaVA's does."""
    probe = [{"role": "user", "content": "calibration"}]

    def shows(parts: bool) -> bool:
        try:
            return "calibration" in render(tokenizer, in_form(probe, parts))
        except (TemplateError, TypeError, ValueError, KeyError):
            return False

    return not shows(False) and shows(True)


class _ThatDay(datetime):
    """A clock that stands, in the place of the one that `strftime_now` in a template reads."""

    @classmethod
    def now(cls, tz=None) -> datetime:
        return datetime(2024, 7, 26, tzinfo=tz)


def _parsed(cell: Any, refusal: str) -> list[Any]:
    """A list that may be written as JSON; an empty cell is an empty list."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if cell.strip() else None
        except ValueError:
            raise ValueError(refusal) from None
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise ValueError(refusal)
    return cell


def _read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    if "role" not in turn and "from" in turn:
        turn = {"role": _ROLES.get(turn["from"], turn["from"])} | {key: turn[key] for key in turn if key != "from"}
    if "content" not in turn and "value" in turn:
        turn = {"content" if key == "value" else key: value for key, value in turn.items()}
    if not turn.get("role"):
        raise ValueError(_NO_CHAT)
    if isinstance(turn.get("content"), (list, dict)):
        turn = turn | {"content": _joined(turn["content"])}
    return turn


def _joined(content: list[Any] | dict[str, Any]) -> str:
    """The text of content that is given in parts."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and str(part.get("type", "text")).endswith("text") else part
        if not isinstance(text, str):
            kind = part.get("type", "dict") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"(content with a part that is no text but {kind!r})")
        texts.append(text)
    return "".join(texts)
