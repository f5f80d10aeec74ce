"""Calibration samples: from the `data` entry of a model to what its tokenizer takes."""

from __future__ import annotations

import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from mergekit_pave.config import Calibration, Data
from mergekit_pave.errors import PaveError

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Sample:
    """One row: a text, a pair of texts, or the messages of a chat."""

    text: str | None = None
    text_pair: str | None = None
    messages: list[dict[str, Any]] | None = None


def load_samples(data: Data, calibration: Calibration, model: str) -> list[Sample]:
    """Read a data set and pick samples from it.

    All rows are taken when there are no more than `calibration.samples`, otherwise as many by a seeded shuffle.

    Args:
        data: which data set, and which of its columns.
        calibration: settings, every one of them set.
        model: the model's name, for messages.

    Raises:
        PaveError: the data set cannot be loaded, has no rows or lacks a column that is asked for.
    """
    rows = _load(data, model)
    if data.streaming:
        rows = rows.shuffle(seed=calibration.seed, buffer_size=max(1000, 4 * calibration.samples))
        rows = list(rows.take(calibration.samples))
        columns = list(rows[0]) if rows else []
    else:
        columns = rows.column_names
        if len(rows) > calibration.samples:
            rows = rows.shuffle(seed=calibration.seed).select(range(calibration.samples))
    if not len(rows):
        raise PaveError(f"pave.models[{model}].data: {data.path} (split {data.split!r}) has no rows")

    where = f"pave.models[{model}].data"
    messages, text = data.messages, data.text
    if messages is None and text is None:
        text = "text" if "text" in columns else None
        messages = "messages" if text is None and "messages" in columns else None
        if text is None and messages is None:
            raise PaveError(
                f"{where}: {data.path} has neither a `text` nor a `messages` column; name the column with "
                f"`text` or `messages`, or give a template over the columns there are: {', '.join(columns)}"
            )
    if messages is not None:
        if messages not in columns:
            raise PaveError(_no_column(f"{where}.messages", messages, data.path, columns))
        return [Sample(messages=_chat(row[messages], f"{where}.messages")) for row in rows]
    first = _template(text, columns, f"{where}.text", data.path)
    second = _template(data.text_pair, columns, f"{where}.text_pair", data.path) if data.text_pair else None
    return [Sample(text=first.format_map(_Row(row)), text_pair=second.format_map(_Row(row)) if second else None) for row in rows]


def _load(data: Data, model: str) -> Any:
    where = f"pave.models[{model}].data.path"
    loader = _LOADERS.get(os.path.splitext(data.path)[1].lower())
    path = Path(data.path).expanduser()
    if loader and not path.is_file():
        raise PaveError(f"{where}: there is no file {data.path} (looked in {Path.cwd()})")
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
        return datasets.load_dataset(source, **options)
    except Exception as error:  # the library raises a dozen kinds, all of them about this one entry
        reason = " ".join(str(error.__cause__ or error).split())
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


class _Row(dict):
    """A row to format: an empty cell is an empty text."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return "" if value is None else value


def _chat(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise PaveError(f"{where}: a chat is a list of {{role, content}}, not {str(messages)[:80]!r}")
    return messages
