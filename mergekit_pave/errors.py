"""The one exception that users are meant to read."""

import click


class PaveError(click.ClickException):
    """What is wrong, where, and what to do about it.

    A `ClickException`, so that mergekit's commands print the message without a traceback and exit
    with code 1, and pydantic passes it through unchanged.
    """
