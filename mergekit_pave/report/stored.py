"""`pave_report.json` and `pave_scores.json` on the disk: read only if intact, and of the weights beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_pave.cache import weights_fingerprint
from mergekit_pave.cache.checkpoint import find_weights, is_pointer
from mergekit_pave.errors import PaveError
from mergekit_pave.files import replacing
from mergekit_pave.report.outputs import REPORT_NAME, SCORES_NAME
from mergekit_pave.report.schema import validate, validate_scores
from mergekit_pave.report.score import FORMAT as SCORES_FORMAT

FORMAT = 1  # raised when a reader of the format before would misread it; a report without a number has 1


class _Kind(NamedTuple):
    """A file of ours beside weights: its name, the number of its format, its check, and what errors about it say."""

    name: str
    format: int
    check: Callable[[Any], None]
    missing: str
    what: str  # it is
    renew: str  # what to do if it is damaged
    again: str  # and if it is of other weights


_REPORT = _Kind(
    REPORT_NAME,
    FORMAT,
    validate,
    "so it is not the output of a merge with a `pave:` block; nor has it been scored, with `mergekit-pave score`",
    "a report of mergekit-pave, or a damaged one",
    "merge again to get a new one",
    "Merge again with the `pave:` block; to see the old report",
)
_SCORES = _Kind(
    SCORES_NAME,
    SCORES_FORMAT,
    validate_scores,
    "which `mergekit-pave score CONFIG FOLDER` writes",
    "scores of mergekit-pave, or damaged ones",
    "score again to get new ones",
    "Score again; to see the old scores",
)


def read_report(out_path: str) -> dict[str, Any]:
    """The report of a merged model. If weights lie beside it, they have to be those that it was written for.

    Raises:
        PaveError: there is no report, or it is damaged, of a later version, or of other weights.
    """
    return _read(_REPORT, out_path)


def read_scores(out_path: str) -> dict[str, Any]:
    """The scores of a merged model. If weights lie beside them, they have to be those that were scored.

    Raises:
        PaveError: there are no scores, or they are damaged, of a later version, or of other weights.
    """
    return _read(_SCORES, out_path)


def read_either(out_path: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The report and the scores of a merged model, each None if there is none.

    Raises:
        PaveError: there is neither, or one is damaged, of a later version, or of other weights.
    """
    has_report, has_scores = (Path(out_path, name).exists() for name in (REPORT_NAME, SCORES_NAME))
    report = read_report(out_path) if has_report or not has_scores else None
    return report, read_scores(out_path) if has_scores else None


def write_scores(out_path: str, score: dict[str, Any]) -> None:
    """Write the scores of a merged model into its folder, with fingerprints of the weights beside them.

    Raises:
        PaveError: the file cannot be written.
    """
    folder = Path(out_path)
    content = score | {"weights": written_weights(folder, _weights_beside(folder))}
    try:
        with replacing(folder / SCORES_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PaveError(f"the scores cannot be written to {folder}: {error}") from error


def _read(kind: _Kind, out_path: str) -> dict[str, Any]:
    path = Path(out_path, kind.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # JSON can hold halves of letters, which no page can
    except FileNotFoundError as error:
        raise PaveError(f"{out_path} has no {kind.name}, {kind.missing}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PaveError(f"{path} cannot be read: {error}") from error
    number = content.get("format", 1) if isinstance(content, dict) else None
    if isinstance(number, int) and number > kind.format:
        raise PaveError(
            f"{path} has format {number}, which a later mergekit-pave wrote; this one reads formats up to {kind.format}: "
            "pip install --upgrade mergekit-pave"
        )
    try:
        kind.check(content)
    except ValueError as error:
        raise PaveError(f"{path} is not {kind.what} ({error}); {kind.renew}") from error
    _check_weights(path, content.pop("weights", None), kind.again)
    return content


def written_weights(folder: Path, files: Iterable[str]) -> dict[str, str | None]:
    """A fingerprint of each file of weights, by its name; None of a file that cannot be parsed."""
    return {file: _fingerprint(folder, file) for file in sorted(files)}


def _fingerprint(folder: Path, file: str) -> str | None:
    try:
        return weights_fingerprint(str(folder), [file])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError):
        return None


def _check_weights(path: Path, written: dict[str, str | None] | None, again: str) -> None:
    """Refuse a file of ours that lies beside weights of another merge. Older reports do not say which weights are theirs."""
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
                f"{path} is not of the weights beside it: {file} was written by another merge, or changed since. "
                f"{again}, copy {path.name} to a folder of its own"
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
