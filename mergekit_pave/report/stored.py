"""`pave_report.json` on the disk. It is read back only if it is intact and belongs to the weights beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergekit_pave.cache import weights_fingerprint
from mergekit_pave.cache.checkpoint import find_weights, is_pointer
from mergekit_pave.errors import PaveError
from mergekit_pave.report.outputs import REPORT_NAME
from mergekit_pave.report.schema import validate

FORMAT = 1  # raised when a reader of the format before would misread it; a report without a number has 1


def read_report(out_path: str) -> dict[str, Any]:
    """The report of a merged model. If weights lie beside it, they have to be those that it was written for.

    Raises:
        PaveError: there is no report, or it is damaged, of a later version, or of other weights.
    """
    path = Path(out_path, REPORT_NAME)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(report, ensure_ascii=False).encode()  # JSON can hold halves of letters, which no page can
    except FileNotFoundError as error:
        raise PaveError(f"{out_path} has no {REPORT_NAME}, so it is not the output of a merge with a `pave:` block") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PaveError(f"{path} cannot be read: {error}") from error
    number = report.get("format", 1) if isinstance(report, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise PaveError(
            f"{path} has format {number}, which a later mergekit-pave wrote; this one reads formats up to {FORMAT}: "
            "pip install --upgrade mergekit-pave"
        )
    try:
        validate(report)
    except ValueError as error:
        raise PaveError(
            f"{path} is not a report of mergekit-pave, or a damaged one ({error}); merge again to get a new one"
        ) from error
    _check_weights(path, report.pop("weights", None))
    return report


def written_weights(folder: Path, files: Iterable[str]) -> dict[str, str | None]:
    """A fingerprint of each file of weights, by its name; None of a file that cannot be parsed."""
    return {file: _fingerprint(folder, file) for file in sorted(files)}


def _fingerprint(folder: Path, file: str) -> str | None:
    try:
        return weights_fingerprint(str(folder), [file])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError):
        return None


def _check_weights(path: Path, written: dict[str, str | None] | None) -> None:
    """Refuse a report that lies beside weights of another merge. Older reports do not say which weights are theirs."""
    if written is None:
        return
    for file, fingerprint in written_weights(path.parent, _weights_beside(path.parent)).items():
        if file not in written and not file.endswith(".json"):
            raise PaveError(
                f"{path} is not of all weights beside it: {file} is from another merge, and may be loaded first. Remove the "
                "weights of that merge from the folder"
            )
        if fingerprint is None or written.get(file) != fingerprint:
            raise PaveError(
                f"{path} is not of the weights beside it: {file} was written by another merge, or changed since. Merge again "
                f"with the `pave:` block; to see the old report, copy {REPORT_NAME} to a folder of its own"
            )


def _weights_beside(folder: Path) -> list[str]:
    """The files of a model's weights that transformers would load from a folder, and that are there."""
    path = find_weights(folder, index_first=False)
    if path is None:
        return []
    files = _files_in(path) if path.suffix == ".json" else {path.name}
    return [file for file in files if (folder / file).is_file() and not is_pointer(folder / file)]


def _files_in(index: Path) -> set[str]:
    """The files that an index names; the index itself if it is damaged."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {index.name}
    return files if all(isinstance(file, str) for file in files) else {index.name}
