"""Calibration samples: from the `data` entry of a model to what its tokenizer takes."""

from __future__ import annotations

import json
import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mergekit_pave.config import Calibration, Data
from mergekit_pave.errors import PaveError

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Sample:
    """One row: a text, a pair of texts, the messages of a chat, an image, an image with a text, or why it is none of these.

    `origin` says where it comes from, for messages; `target` is the answer to a text or a chat, for an encoder-decoder model.
    """

    origin: str
    text: str | None = None
    text_pair: str | None = None
    target: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    image: Any = None
    problem: str | None = None

    @property
    def content(self) -> int:
        """A hash that samples with the same content share, wherever they come from."""
        shown = (self.text, self.text_pair, self.target, self.messages, self.tools)
        return hash((json.dumps(shown, default=str), self.image and self.image.tobytes()))


def load_samples(sources: list[Data], calibration: Calibration, model: str) -> list[Sample]:
    """Read the data sets of a model and pick samples from them, evenly.

    All rows are taken when there are no more than `calibration.samples`, otherwise as many by a seeded shuffle. A data
    set too small for an even share gives all of its rows, and the rest comes from the others.

    Args:
        sources: which data sets, and which of their columns.
        calibration: settings, every one of them set.
        model: the model's name, for messages.

    Raises:
        PaveError: a data set cannot be loaded, has no rows or lacks a column that is asked for.
    """
    loaded = [_Rows(data, calibration, model) for data in sources]
    shares = share_evenly([len(rows) for rows in loaded], calibration.samples)
    samples = [sample for rows, share in zip(loaded, shares) for sample in rows.samples(share)]
    if len({sample.text is None and sample.messages is None for sample in samples if sample.problem is None}) > 1:
        raise PaveError(f"pave.models[{model}].data: a model cannot be calibrated with both texts and images without a text")
    return samples


def share_evenly(sizes: list[int], budget: int) -> list[int]:
    """Share a budget among parts, none more than its size: what small parts leave goes to the larger ones."""
    shares = [0] * len(sizes)
    for remaining, i in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[i] = min(sizes[i], -(-budget // remaining))
        budget -= shares[i]
    return shares


class _Rows:
    """The rows of one `data` entry and how a sample is made of each."""

    def __init__(self, data: Data, calibration: Calibration, model: str):
        where = f"pave.models[{model}].data"
        self._seed, self._path = calibration.seed, data.path
        rows = _load(data, calibration, f"{where}.path")
        if not len(rows):
            raise PaveError(f"{where}: {data.path} (split {data.split!r}) has no rows")
        self._rows = rows
        columns = rows.column_names
        self._messages, self._image, text = data.messages, data.image, data.text
        if data.messages is None and data.image is None and text is None:
            text = "text" if "text" in columns else None
            self._messages = "messages" if text is None and "messages" in columns else None
            if text is None and self._messages is None:
                raise PaveError(
                    f"{where}: {data.path} has neither a `text` nor a `messages` column; name the column with "
                    f"`text`, `messages` or `image`, or give a template over the columns there are: {', '.join(columns)}"
                )
        for kind, column in (("messages", self._messages), ("image", self._image)):
            if column is not None and column not in columns:
                raise PaveError(_no_column(f"{where}.{kind}", column, data.path, columns))
        self._text = _template(text, columns, f"{where}.text", data.path) if text else None
        self._pair = _template(data.text_pair, columns, f"{where}.text_pair", data.path) if data.text_pair else None
        self._target = _template(data.target, columns, f"{where}.target", data.path) if data.target else None

    def __len__(self) -> int:
        return len(self._rows)

    def samples(self, count: int) -> list[Sample]:
        chosen = range(len(self))
        if count < len(self):
            chosen = sorted(np.random.default_rng(self._seed).permutation(len(self))[:count].tolist())
        return [self._sample(f"row {i} of {self._path}", row) for i, row in zip(chosen, self._rows.select(chosen))]

    def _sample(self, origin: str, row: dict[str, Any]) -> Sample:
        try:
            target = _fill(self._target, row) if self._target else None
            if target == "":
                return Sample(origin, problem="with an empty target")
            if self._messages is not None:
                chat = _chat(row[self._messages])
                return Sample(origin, messages=chat, tools=_tools(row.get("tools")), target=target)
            if self._image is not None:
                text = _fill(self._text, row) if self._text else None
                return Sample(origin, image=_picture(row[self._image], self._image), text=text)
            pair = _fill(self._pair, row) if self._pair else None
            return Sample(origin, text=_fill(self._text, row), text_pair=pair, target=target)
        except ValueError as error:
            return Sample(origin, problem=str(error))


def _load(data: Data, calibration: Calibration, where: str) -> datasets.Dataset:
    loader = _LOADERS.get(os.path.splitext(data.path)[1].lower())
    path = Path(data.path).expanduser()
    if loader and not path.is_file():
        raise PaveError(f"{where}: there is no file {data.path} (looked in {Path.cwd()})")
    if loader and not path.stat().st_size:
        raise PaveError(f"{where}: {data.path} is empty")
    if data.path.startswith((".", "/", "~")) and not path.exists():
        raise PaveError(f"{where}: there is no file or folder {data.path} (looked in {Path.cwd()})")
    options: dict[str, Any] = {"split": data.split, "streaming": data.streaming}
    if loader and data.data_files is not None:
        raise PaveError(f"{where}: {data.path} is a file itself; data_files goes with a folder or a Hub data set")
    if loader:
        source, options["data_files"] = loader, str(path)
    else:
        source = str(path) if path.exists() else data.path
        options |= {"name": data.name, "revision": data.revision, "data_files": data.data_files}
    try:
        rows = datasets.load_dataset(source, **options)
        if data.streaming:
            rows = rows.shuffle(seed=calibration.seed, buffer_size=max(1000, 4 * calibration.samples))
            rows = datasets.Dataset.from_list(list(rows.take(calibration.samples)))
        return rows
    except Exception as error:  # the library raises a dozen kinds, all of them about this one entry
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        if isinstance(cause, UnicodeDecodeError):
            reason += "; calibration data has to be UTF-8"
        raise PaveError(f"{where}: cannot load {data.path} (split {data.split!r}): {reason}") from error


def _template(text: str, columns: list[str], where: str, path: str) -> str:
    """A column's name or a format template, as a checked format template."""
    if text in columns:
        return "{" + text + "}"
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise PaveError(f"{where}: {text!r} is not a valid template: {error}") from None
    if not fields:
        raise PaveError(_no_column(where, text, path, columns))
    for field in fields:
        if field not in columns:
            raise PaveError(_no_column(where, field, path, columns))
    return text


def _no_column(where: str, name: str, path: str, columns: list[str]) -> str:
    return f"{where}: {path} has no column {name!r}; its columns are: {', '.join(columns)}"


def _fill(template: str, row: dict[str, Any]) -> str:
    """A row's text. An empty cell is an empty text; a list or a dict is no text.

    Raises:
        ValueError: the row does not make a text.
    """
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    cells = {name: "" if row[name] is None else row[name] for name in fields}
    for name, cell in cells.items():
        if not isinstance(cell, (str, int, float)):
            raise ValueError(f"(column {name!r} holds no text but a {type(cell).__name__})")
    return template.format_map(cells) if any(str(cell).strip() for cell in cells.values()) else ""


def _chat(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and turn.get("role") for turn in messages):
        raise ValueError("(no list of {role, content})")
    # A table gives every turn the keys of all turns; a chat template takes a key that is there for one that is meant.
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]


def _picture(image: Any, column: str) -> Any:
    if not hasattr(image, "convert"):
        raise ValueError(f"(column {column!r} holds no image but a {type(image).__name__})")
    return image.convert("RGB")


def _tools(tools: Any) -> list[Any] | None:
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    return tools or None
