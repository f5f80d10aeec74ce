"""What a model goes on from when it writes its own samples: the beginning of a text, or of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from mergekit_pave.calibration.chats import in_form, render, takes_only_parts
from mergekit_pave.errors import PaveError, in_a_line

_WORD = "calibration"  # stands in the user's turn, to find what is before it and behind it


@dataclass(frozen=True)
class Start:
    """What a model's texts begin with, and where they end.

    Attributes:
        kind: `chat` for the user's turn of its chat template, `bos` or `eos` for that token, which is what stands between two
            documents, or `random` for a tokenizer that has neither: each text begins with a token that is drawn evenly.
        tokens: the beginning; empty if it is drawn.
        drawn: the tokens that it may be.
        reply: what stands between a user's turn and the model's reply; empty where no token marks the end of the turn, so that
            the model itself has to go on.
        stops: the tokens that end a text.
        unknown: ids that no token has, which a model is not to write. Many models have more rows than their tokenizer has tokens.
    """

    kind: str
    tokens: tuple[int, ...]
    drawn: tuple[int, ...]
    reply: tuple[int, ...]
    stops: tuple[int, ...]
    unknown: tuple[int, ...]


def find_start(tokenizer: Any, vocabulary: int, stops: Iterable[int], model: str) -> Start:
    """
    Args:
        vocabulary: the number of ids that the model knows.
        stops: the tokens that end a text by the model's own settings.
        model: its name, for messages.

    Raises:
        PaveError: the chat template refuses a turn of a user.
    """
    known = set(tokenizer.get_vocab().values())
    unknown = tuple(sorted(set(range(vocabulary)) - known))
    ends = {tokenizer.eos_token_id, *stops} - {None}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kind, tokens, drawn, reply = "random", (), (), ()
    if tokenizer.chat_template is not None:
        kind, (tokens, reply) = "chat", _of_chat(tokenizer, special, model)
        ends |= {*reply[:1]}
    if not tokens:  # also of a template that begins with what the user says
        by_token = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        kind, token = next(((kind, token) for kind, token in by_token.items() if token is not None), ("random", None))
        tokens, reply = (() if token is None else (token,)), ()
    if kind == "random":
        drawn = tuple(sorted(token for token in known - special if token < vocabulary))
    return Start(kind, tokens, drawn, reply, tuple(sorted(ends)), unknown)


def _of_chat(tokenizer: Any, special: set[int], model: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before what the user says, and those between it and the reply."""
    turn = [{"role": "user", "content": _WORD}]
    try:
        text = render(tokenizer, in_form(turn, takes_only_parts(tokenizer)), with_reply=True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = in_a_line(error)
        raise PaveError(
            f"{model}: its chat template refuses a user's turn ({reason}), so it cannot write its own chats"
        ) from error
    before, _, behind = text.rpartition(_WORD)
    # A blank that is a token of its own would keep the model from beginning with a word.
    opening, closing = (
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before.rstrip(" "), behind.strip(" "))
    )
    return opening, closing if closing[:1] and closing[0] in special else ()
