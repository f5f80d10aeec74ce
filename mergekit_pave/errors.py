"""The one exception that is meant for users, and messages that several rooms need."""

import difflib
from collections.abc import Iterable

import click


def unknown(kind: str, name: object, valid_names: Iterable[str]) -> str:
    """The message about a name that is not valid, with the valid name that was probably meant."""
    valid_names = list(valid_names)
    close = difflib.get_close_matches(str(name), valid_names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known {kind}s: {', '.join(valid_names)})"


def in_a_line(error: BaseException) -> str:
    """The message of an error in one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class PaveError(click.ClickException):
    """Says what is wrong, where, and what to do about it.

    A `ClickException`, so that mergekit's commands print the message without a traceback and exit
    with code 1, and pydantic passes it through unchanged.
    """
