"""`pave_report.json` on the disk: read back only beside the weights that it is of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergekit_pave.cache import weights_fingerprint
from mergekit_pave.cache.checkpoint import find_weights, is_pointer
from mergekit_pave.errors import PaveError
from mergekit_pave.report.outputs import REPORT_NAME

FORMAT = 1  # of the report: raised when a reader of the one before would misread it. A report without a number has 1.


def read_report(out_path: str) -> dict[str, Any]:
    """The report of a merged model, which has to be of the weights beside it, if there are any.

    Raises:
        PaveError: the folder has none, a damaged one, one of a later version, or other weights.
    """
    path = Path(out_path, REPORT_NAME)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        number = report.get("format", 1)
        written = report.pop("weights", None)
        if number <= FORMAT:
            report["purified"], report["models"]
    except FileNotFoundError as error:
        raise PaveError(f"{out_path} has no {REPORT_NAME}, so it is not the output of a merge with a `pave:` block") from error
    except (OSError, ValueError) as error:
        raise PaveError(f"{path} cannot be read: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise PaveError(f"{path} is not a report of mergekit-pave, or a damaged one; merge again to have it anew") from error
    if number > FORMAT:
        raise PaveError(
            f"{path} has format {number}, which a later mergekit-pave has written; this one reads formats up to {FORMAT}: "
            "pip install --upgrade mergekit-pave"
        )
    _check_weights(path, written)
    return report


def written_weights(folder: Path, files: Iterable[str]) -> dict[str, str | None]:
    """What tells files of weights from others, by their names: None of a file that cannot be parsed."""
    return {file: _fingerprint(folder, file) for file in sorted(files)}


def _fingerprint(folder: Path, file: str) -> str | None:
    try:
        return weights_fingerprint(str(folder), [file])
    except (OSError, ValueError, KeyError, AttributeError, OverflowError, MemoryError):
        return None


def _check_weights(path: Path, written: dict[str, str] | None) -> None:
    """Refuse a report that lies beside weights of another merge. Older reports do not say which theirs are."""
    if written is None:
        return
    for file, found in written_weights(path.parent, _weights_beside(path.parent)).items():
        if file not in written and not file.endswith(".json"):
            raise PaveError(
                f"{path} is not of all weights beside it: {file} is from another merge, and may be loaded first. Remove the "
                "weights of that merge from the folder"
            )
        if found is None or written.get(file) != found:
            raise PaveError(
                f"{path} is not of the weights beside it: {file} was written by another merge, or changed since. Merge again "
                f"with the `pave:` block; to see the old report, copy {REPORT_NAME} to a folder of its own"
            )


def _weights_beside(folder: Path) -> list[str]:
    """The files of a model's weights that transformers would load from a folder, and that are there."""
    path = find_weights(folder, index_first=False)
    if path is None:
        return []
    files = _named(path) if path.suffix == ".json" else {path.name}
    return [file for file in files if (folder / file).is_file() and not is_pointer(folder / file)]


def _named(index: Path) -> set[str]:
    """The files that an index names, or itself where it is damaged."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return {index.name}
