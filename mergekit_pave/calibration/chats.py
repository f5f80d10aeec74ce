"""Chats: from a cell of a data set to turns, and from turns to the text that a model reads."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

# ShareGPT's names of roles. Turns of {role, content} have the names of the model's own template.
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "observation": "tool", "function_response": "tool", "function_call": "assistant"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")
_DAY = datetime(2024, 7, 26)  # the default of Llama's templates
_DIRECTIVES = {f"%{letter}": _DAY.strftime(f"%{letter}") for letter in "aAbBcdDeFGhHIjmMprRSTuUVwWxXyYzZ"}
_DIRECTIVES |= {f"%-{key[1]}": shown.lstrip("0 ") or "0" for key, shown in _DIRECTIVES.items()} | {"%f": "000000", "%%": "%"}
# Takes the place of the function that gives templates today's date. (transformers passes no function on as a keyword.)
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}"
    f"{{% for directive, shown in {list(_DIRECTIVES.items())} %}}"
    "{% set date.text = date.text | replace(directive, shown) %}"
    "{% endfor %}{{ date.text }}{% endmacro %}\n"
)
_NO_CHAT = "(no list of {role, content} or {from, value}, nor such a list as JSON)"


def read_chat(cell: Any) -> list[dict[str, Any]]:
    """The turns of a chat, each with a `role` and, if it has a text, `content`. An empty cell has no turns.

    Turns may be `{role, content}` or ShareGPT's `{from, value}`, the list may be written as JSON, and content may be in parts.

    Raises:
        ValueError: the cell is no chat, or a turn has content that is not text.
    """
    turns = _parsed(cell, _NO_CHAT)
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(_NO_CHAT)
    return [_read_turn(turn) for turn in turns]


def read_tools(cell: Any) -> list[Any] | None:
    """The tools of a chat, from a list or from JSON.

    Raises:
        ValueError: the cell is something else.
    """
    problem = "(tools that are no list, nor a list as JSON)"
    tools = [_from_json(tool, problem) if isinstance(tool, str) else tool for tool in _parsed(cell, problem)]
    return tools or None


def says_something(chat: list[dict[str, Any]]) -> bool:
    """Whether any turn of a chat has more than its role."""
    return any(value is not None and str(value).strip() for turn in chat for key, value in turn.items() if key != "role")


def render(processor: Any, chat: list[dict[str, Any]], with_reply: bool = False) -> str:
    """The text of turns by the chat template of a tokenizer or a processor. It is the same on every day.

    Args:
        with_reply: the beginning of the model's reply follows.

    Raises:
        TemplateError, TypeError, ValueError, KeyError: the template refuses the chat.
    """
    return processor.apply_chat_template(
        chat, tokenize=False, chat_template=_template(processor), add_generation_prompt=with_reply
    )


def tokenize(tokenizer: Any, chat: list[dict[str, Any]], tools: list[Any] | None, longest: int) -> dict[str, list[int]]:
    """The token ids of that text, and what goes with them, cut to `longest`.

    Raises:
        TemplateError, TypeError, ValueError, KeyError: the template refuses the chat.
    """
    return tokenizer.apply_chat_template(
        chat,
        tools=tools,
        chat_template=_template(tokenizer, with_tools=bool(tools)),
        tokenize=True,
        return_dict=True,
        truncation=True,
        max_length=longest,
    )


def _template(processor: Any, with_tools: bool = False) -> str | None:
    """The chat template that transformers would choose, changed so that it shows the same date every day."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = (with_tools and template.get("tool_use")) or template.get("default")
    return _FIXED_DATE + template if template and "strftime_now" in template else template


def in_form(chat: list[dict[str, Any]], parts: bool) -> list[dict[str, Any]]:
    """The same turns, with texts as lists of one part for a template that reads only parts."""
    if not parts:
        return chat
    return [
        turn | {"content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn.get("content"), str) else turn
        for turn in chat
    ]


def takes_only_parts(tokenizer: Any) -> bool:
    """Whether a chat template ignores content that is a string and shows the same text as a part, as LLaVA's does."""
    probe = [{"role": "user", "content": "calibration"}]

    def shows(parts: bool) -> bool:
        try:
            return "calibration" in render(tokenizer, in_form(probe, parts))
        except (TemplateError, TypeError, ValueError, KeyError):
            return False

    return not shows(False) and shows(True)


def _parsed(cell: Any, problem: str) -> list[Any]:
    """A list, which may be written as JSON. An empty cell is an empty list."""
    cell = _from_json(cell.strip() or "null", problem) if isinstance(cell, str) else _without_padding(cell)
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise ValueError(problem)
    return cell


def _without_padding(value: Any) -> Any:
    """A value of a table without the keys that are null, at any depth.

    A table gives every dict of a column the keys of all of them. A template would show them.
    """
    if isinstance(value, dict):
        return {key: _without_padding(inner) for key, inner in value.items() if inner is not None}
    return [_without_padding(inner) for inner in value] if isinstance(value, list) else value


def _from_json(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(problem) from None


def _read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    # Templates print a content that is null, and look into calls of tools that are.
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn:
        name = str(turn["from"]).lower()
        if name not in _ROLES:
            raise ValueError(f"(a turn that is from {turn['from']!r}, which is none of {', '.join(_ROLES)})")
        turn = {"role": _ROLES[name]} | {key: turn[key] for key in turn if key != "from"}
    if "content" not in turn and "value" in turn:
        turn = {"content" if key == "value" else key: value for key, value in turn.items()}
    if not turn.get("role"):
        raise ValueError(_NO_CHAT)
    content = turn.get("content")
    if isinstance(content, (list, dict)):
        return turn | {"content": _joined(content)}
    return turn | {"content": str(content)} if isinstance(content, (int, float)) else turn


def _joined(content: list[Any] | dict[str, Any]) -> str:
    """The text of content in parts."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and str(part.get("type", "text")).endswith("text") else part
        if not isinstance(text, str):
            kind = part.get("type", "dict") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"(content with a part that is no text but {kind!r})")
        texts.append(text)
    return "".join(texts)
