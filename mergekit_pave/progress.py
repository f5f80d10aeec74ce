"""A progress bar for each phase, in a terminal or a notebook. In a file it becomes a line from time to time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub.utils
import tqdm.auto
import transformers

_SECONDS = 30  # between two lines
_show_again: list[Callable[[], None]] | None = None  # while bars of others are hidden: what shows them again


def bar(total: int, description: str, unit: str, hidden: bool, delay: float = 0) -> tqdm.tqdm:
    """A progress bar over `total` units. It has to be closed, or used as a context.

    Args:
        delay: seconds before it appears. What takes less time shows no bar.
    """
    options = {"total": total, "desc": description, "unit": unit, "disable": hidden, "delay": delay}
    if sys.stderr.isatty() or any(cls.__module__ == "tqdm.notebook" for cls in tqdm.auto.tqdm.__mro__):
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
def no_bars_of_others(hidden: bool, downloads: bool = True) -> Iterator[None]:
    """Hide the bars of datasets, of transformers and of the client of the Hub, too.

    Args:
        downloads: otherwise the client of the Hub shows its bars, because a model may take it an hour.
    """
    global _show_again
    if not hidden:
        yield
        return
    mine: list[Callable[[], None]] = []
    is_first = _show_again is None
    if is_first:
        _show_again = mine
    try:
        if transformers.utils.logging.is_progress_bar_enabled():
            mine.append(transformers.utils.logging.enable_progress_bar)
            shows_downloads = not (downloads or huggingface_hub.utils.are_progress_bars_disabled())
            transformers.utils.logging.disable_progress_bar()  # and with its own those of the Hub's client
            if shows_downloads:
                huggingface_hub.utils.enable_progress_bars()
        for library in filter(None, (downloads and huggingface_hub.utils, sys.modules.get("datasets"))):
            _hide_bars(library, mine)
        yield
    finally:
        for show in mine:
            show()
        if is_first:
            _show_again = None


def _hide_bars(library: Any, show_again: list[Callable[[], None]]) -> None:
    if not library.are_progress_bars_disabled():
        show_again.append(library.enable_progress_bars)
        library.disable_progress_bars()


def datasets_library() -> Any:
    """The library `datasets`. Importing it takes a second, so that is left to who reads rows."""
    import datasets

    if _show_again is not None:
        _hide_bars(datasets, _show_again)
    return datasets
