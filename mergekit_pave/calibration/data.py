"""Calibration samples: from the `data` entry of a model to the inputs of its tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_pave.cache import digest
from mergekit_pave.calibration.chats import read_chat, read_tools, says_something
from mergekit_pave.calibration.sources import load_rows
from mergekit_pave.calibration.templates import Template, no_column, read_template
from mergekit_pave.errors import PaveError
from mergekit_pave.progress import datasets_library
from mergekit_pave.settings import Calibration, Data

if TYPE_CHECKING:  # see `datasets_library`
    import datasets


@dataclass(frozen=True)
class Sample:
    """One row: a text, a pair of texts, the messages of a chat, an image, an image with a text, or the tokens of a text.

    Attributes:
        origin: the row and its data set, for messages.
        tokens: what a model has written itself.
        target: the answer to the text or the chat, for an encoder-decoder model.
        problem: why the row is none of these.
        blank: the row is empty.
    """

    origin: str
    text: str | None = None
    text_pair: str | None = None
    target: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    image: Any = None
    tokens: list[int] | None = None
    problem: str | None = None
    blank: bool = False

    @property
    def content(self) -> int:
        """A hash of the content, whichever row it comes from."""
        shown = (self.text, self.text_pair, self.target, self.messages, self.tools, self.tokens)
        return int(digest(json.dumps(shown, default=str), self.image.tobytes() if self.image else b"")[:15], 16)


def load_samples(sources: list[Data], calibration: Calibration, where: str) -> list[Sample]:
    """Read the data sets of a model and pick samples from them, evenly.

    If there are no more than `calibration.samples` rows, all are taken, otherwise as many by a seeded shuffle. If a data set is
    too small for an even share, all of its rows are taken, and the rest comes from the other data sets. Further rows take the
    place of blank rows, which are returned, too. For that, at most twice as many rows are read, or a few dozen.

    Args:
        sources: the data sets and their columns.
        calibration: settings, all of which are set.
        where: the key of the data in the YAML, for messages.

    Raises:
        PaveError: a data set cannot be loaded, has no rows or lacks a column that is asked for.
    """
    return draw_samples(sources, calibration, where)[0]


def draw_samples(sources: list[Data], calibration: Calibration, where: str) -> tuple[list[Sample], int | None]:
    """As `load_samples`, and how many rows are left beside these; None where there is a stream, whose length nobody knows."""
    drawn = _draw(sources, calibration, where)
    samples = [sample for rows in drawn for sample in rows.drawn()]
    if len({sample.text is None and sample.messages is None for sample in samples if sample.problem is None}) > 1:
        raise PaveError(f"{where}: a model cannot be calibrated with both texts and images without a text")
    left = [rows.left for rows in drawn]
    return samples, None if None in left else sum(left)


def load_held_out(sources: list[Data], calibration: Calibration, where: str, rows: int, used: Container[int]) -> list[Sample]:
    """The rows that follow those of `load_samples` in the same shuffles, evenly from all data sets.

    Args:
        rows: how many are wanted. There are fewer if the data sets have no more.
        used: contents that are passed over. A content is also passed over once it has been taken.
    """
    found: dict[int, Sample] = {}

    def fresh(of_source: _Rows) -> Iterator[Sample]:
        for sample in islice(of_source.further(), _most(50 * rows)):
            if sample.problem is None and sample.content not in used and sample.content not in found:
                yield sample

    turns = itertools.zip_longest(*map(fresh, _draw(sources, calibration, where)))
    for sample in filter(None, itertools.chain.from_iterable(turns)):
        found.setdefault(sample.content, sample)
        if len(found) == rows:
            break
    return list(found.values())


def _draw(sources: list[Data], calibration: Calibration, where: str) -> list[_Rows]:
    """The data sets, with the rows drawn that `load_samples` gives."""
    loaded = [_Rows(data, calibration, where) for data in sources]
    available, is_short = [len(rows) for rows in loaded], True
    while is_short:
        shares = share_evenly(available, calibration.samples)
        drawn = [rows.draw(share) for rows, share in zip(loaded, shares)]
        is_short = any(count < share for count, share in zip(drawn, shares))
        available = [count if count < share else most for count, share, most in zip(drawn, shares, available)]
    return loaded


def share_evenly(limits: list[int], budget: int) -> list[int]:
    """Share a budget evenly, but nobody gets more than a limit of its own: what is left goes to those with larger limits."""
    shares = [0] * len(limits)
    for remaining, i in zip(range(len(limits), 0, -1), sorted(range(len(limits)), key=limits.__getitem__)):
        shares[i] = min(limits[i], -(-budget // remaining))
        budget -= shares[i]
    return shares


class _Rows:
    """The rows of one `data` entry, drawn in the order of a seeded shuffle."""

    def __init__(self, data: Data, calibration: Calibration, where: str):
        rows = load_rows(data, f"{where}.path")
        # A blank line of a text file is not a row.
        lines = rows.info.builder_name == "text" and "text" in (rows.column_names or ["text"])
        ahead: Iterator[dict[str, Any]] = iter(())
        if isinstance(rows, datasets_library().IterableDataset):
            shuffled = rows.shuffle(seed=calibration.seed, buffer_size=max(1000, 4 * calibration.samples))
            ahead = (row for row in shuffled if not lines or row["text"].strip())
            rows = list(islice(ahead, calibration.samples))
        self._rows: datasets.Dataset | list[dict[str, Any]] = rows
        numbers = np.arange(len(rows)) if isinstance(rows, list) or not lines else _lines_with_text(rows)
        if not len(numbers):
            raise PaveError(f"{where}: {data.path} (split {data.split!r}) has no rows")
        columns = list(rows[0]) if isinstance(rows, list) else rows.column_names
        self._read = _Reader(data, columns, where)
        if isinstance(rows, list):
            self._follow(ahead, calibration.samples)
            numbers = np.arange(len(rows))
        self._ahead = ahead
        self._order = np.random.default_rng(calibration.seed).permutation(numbers).tolist()
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._order)

    def draw(self, count: int) -> int:
        """Draw further rows until `count` are not blank, or `_most` or all rows are drawn. Returns how many are not blank."""
        while missing := max(0, count - sum(not sample.blank for sample in self._drawn.values())):
            so_far = len(self._drawn)
            chosen = sorted(self._order[so_far : min(so_far + missing, _most(count))])
            if not chosen:
                break
            rows = [self._rows[i] for i in chosen] if isinstance(self._rows, list) else self._rows.select(chosen)
            self._drawn |= {i: self._read(i, row) for i, row in zip(chosen, rows)}
        return count - missing

    @property
    def left(self) -> int | None:
        """How many rows are not drawn; None of a stream."""
        return None if isinstance(self._rows, list) else len(self._order) - len(self._drawn)

    def drawn(self) -> list[Sample]:
        """All rows that were drawn, also blank ones, in the order of the data set."""
        return [self._drawn[i] for i in sorted(self._drawn)]

    def further(self) -> Iterator[Sample]:
        """The rows behind those that were drawn, in the order of the shuffle, and behind these the rest of a stream."""
        for i in self._order[len(self._drawn) :]:
            yield self._read(i, self._rows[i])
        for i, row in enumerate(self._ahead, len(self._order)):
            yield self._read(i, row)

    def _follow(self, ahead: Iterator[dict[str, Any]], count: int) -> None:
        """Read further rows of a stream, in the place of its blank rows."""
        more = self._rows
        while (blank := sum(self._read(0, row).blank for row in more)) and len(self._rows) < _most(count):
            more = list(islice(ahead, min(blank, _most(count) - len(self._rows))))
            self._rows += more


def _most(count: int) -> int:
    """The most rows that are read to get so many that are not blank."""
    return max(2 * count, 32)


def _lines_with_text(rows: datasets.Dataset) -> np.ndarray:
    """The numbers of the lines of a text file that are not blank."""
    import pyarrow.compute

    column = rows.with_format("arrow")[:]["text"]
    return np.flatnonzero(pyarrow.compute.not_equal(pyarrow.compute.utf8_trim_whitespace(column), "").to_numpy())


class _Blank(Exception):
    """A row is empty."""


class _Reader:
    """Makes samples of rows."""

    def __init__(self, data: Data, columns: list[str], where: str):
        self._path, self._messages, self._image, text = data.path, data.messages, data.image, data.text
        self._turns: tuple[str, ...] = ()
        if data.messages is None and data.image is None and text is None:
            text = "text" if "text" in columns else None
            if text is None:
                self._messages = next((name for name in ("messages", "conversations") if name in columns), None)
            if text is None and self._messages is None and {"prompt", "completion"} <= set(columns):
                self._turns = ("prompt",) if data.target else ("prompt", "completion")
            if text is None and self._messages is None and not self._turns:
                raise PaveError(
                    f"{where}: {data.path} has no column `text`, `messages` or `conversations`, nor `prompt` and `completion`; "
                    "name the column with `text`, `messages` or `image`, or give a template over the columns there are: "
                    f"{', '.join(columns)}"
                )
        for kind, column in (("messages", self._messages), ("image", self._image)):
            if column is not None and column not in columns:
                raise PaveError(no_column(f"{where}.{kind}", column, data.path, columns))

        def template(kind: str, given: str | None) -> Template | None:
            return read_template(given, columns, f"{where}.{kind}", data.path) if given else None

        self._text, self._pair = template("text", text), template("text_pair", data.text_pair)
        self._target = template("target", data.target)

    def __call__(self, number: int, row: dict[str, Any]) -> Sample:
        origin = f"row {number} of {self._path}"
        try:
            return Sample(origin, **self._parts(row))
        except _Blank as blank:
            return Sample(origin, problem=str(blank), blank=True)
        except ValueError as error:
            return Sample(origin, problem=str(error))

    def _parts(self, row: dict[str, Any]) -> dict[str, Any]:
        """The parts of a sample, by name.

        Raises:
            _Blank: the row is empty.
            ValueError: the row cannot be used.
        """
        parts = {}
        if self._target:
            parts["target"] = _required(self._target.fill(row), "with an empty target")
        if self._messages is not None:
            chat = read_chat(row[self._messages])
            return parts | {"messages": _required(says_something(chat) and chat), "tools": read_tools(row.get("tools"))}
        if self._turns:
            return parts | _required(_prompted([row[column] for column in self._turns])) | {"tools": read_tools(row.get("tools"))}
        if self._image is not None:
            if self._text:
                parts["text"] = _required(self._text.fill(row))
            return parts | {"image": _picture(_required(row[self._image]), self._image)}
        parts["text"] = self._text.fill(row)
        if self._pair:
            parts["text_pair"] = self._pair.fill(row)
        _required(parts["text"] or parts.get("text_pair"))
        return parts


def _required(part: Any, otherwise: str = "empty") -> Any:
    if not part:
        raise _Blank(otherwise)
    return part


def _prompted(cells: list[Any]) -> dict[str, Any]:
    """A prompt and its completion: texts make one text, lists of turns make one chat."""
    if all(cell is None or isinstance(cell, str) for cell in cells):
        text = "".join(cell or "" for cell in cells)
        return {"text": text} if text.strip() else {}
    if any(isinstance(cell, str) for cell in cells):
        raise ValueError("(of prompt and completion one is a text, the other is not)")
    chat = [turn for cell in cells for turn in read_chat(cell)]
    return {"messages": chat} if says_something(chat) else {}


def _picture(image: Any, column: str) -> Any:
    if not hasattr(image, "convert"):
        raise ValueError(f"(column {column!r} holds no image but a {type(image).__name__})")
    return image.convert("RGB")
