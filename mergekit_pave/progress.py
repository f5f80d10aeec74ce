"""A progress bar for each phase, in a terminal or a notebook. In a file it becomes a line from time to time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import datasets
import huggingface_hub.utils
import tqdm.auto
import tqdm.notebook
import transformers

_SECONDS = 30  # between two lines


def bar(total: int, description: str, unit: str, hidden: bool, delay: float = 0) -> tqdm.tqdm:
    """A progress bar over `total` units. It has to be closed, or used as a context.

    Args:
        delay: seconds before it appears. What takes less time shows no bar.
    """
    options = {"total": total, "desc": description, "unit": unit, "disable": hidden, "delay": delay}
    if sys.stderr.isatty() or issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm_notebook):
        return tqdm.auto.tqdm(**options)
    line = "{desc}: {n_fmt} of {total_fmt} {unit} after {elapsed}, {remaining} left{postfix}"
    return tqdm.tqdm(**options, file=_Lines(), bar_format=line, mininterval=_SECONDS, maxinterval=_SECONDS, miniters=1)


class _Lines:
    """Turns tqdm's output, which overwrites one line again and again, into lines of a file."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def no_bars_of_others(hidden: bool) -> Iterator[None]:
    """Hide the bars of datasets, of transformers and of the client of the Hub, too."""
    switches = []
    if hidden and transformers.utils.logging.is_progress_bar_enabled():
        switches.append((transformers.utils.logging.disable_progress_bar, transformers.utils.logging.enable_progress_bar))
    for library in (datasets, huggingface_hub.utils) if hidden else ():
        if not library.are_progress_bars_disabled():
            switches.append((library.disable_progress_bars, library.enable_progress_bars))
    for disable, _ in switches:
        disable()
    try:
        yield
    finally:
        for _, enable in switches:
            enable()
