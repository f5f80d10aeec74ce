"""The one exception that users are meant to read, and what it says of unknown names."""

import difflib
from collections.abc import Iterable

import click


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """What to say of a name that is none of the known ones, with the one that was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known {kind}s: {', '.join(known)})"


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class PaveError(click.ClickException):
    """What is wrong, where, and what to do about it.

    A `ClickException`, so that mergekit's commands print the message without a traceback and exit
    with code 1, and pydantic passes it through unchanged.
    """
