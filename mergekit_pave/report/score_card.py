"""The section of a model card that shows what the merge keeps of each model. It is written again each time, in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_pave.errors import PaveError
from mergekit_pave.files import replacing
from mergekit_pave.report import markdown
from mergekit_pave.report.outputs import CARD, SCORES_BEGIN, SCORES_END
from mergekit_pave.report.page.picture import draw_shares
from mergekit_pave.report.scores import columns, misfits, notes, table


def add_to_card(folder: str, score: dict[str, Any]) -> None:
    """Show a score, and a picture of it, in the model card of a merge. All else in the card stays as it is, byte for byte.

    Args:
        folder: of the merge.

    Raises:
        PaveError: there is no card, it cannot be read or written, or an earlier section in it has lost its end.
    """
    check_card(folder)  # before there is a picture
    path = Path(folder, CARD)
    text = _read(path)
    section = _section(score, draw_shares(score, folder))
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(_place(path, text, section))
    except OSError as error:
        raise PaveError(f"{path} cannot be written: {error}") from error


def check_card(folder: str) -> None:
    """Refuse what `add_to_card` would refuse, before there is a score.

    Raises:
        PaveError: see there.
    """
    path = Path(folder, CARD)
    _place(path, _read(path), "")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise PaveError(
            f"{path.parent} has no {CARD} to put the scores into; merge without --no-write-model-card, or score without --card"
        ) from error
    except OSError as error:
        raise PaveError(f"{path} cannot be read: {error}") from error


def _place(path: Path, text: bytes, section: str) -> bytes:
    """The card with the section in the place of an earlier one, or else at its end."""
    begin, end = SCORES_BEGIN.encode(), SCORES_END.encode()
    newline = b"\r\n" if b"\r\n" in text else b"\n"
    new = section.encode().replace(b"\n", newline)
    if begin not in text and end not in text:
        gap = b"" if not text else newline if text.endswith(newline) else 2 * newline
        return text + gap + new + newline
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found or begin in rest or end in before + after:
        raise PaveError(
            f"{path} has a section of scores whose begin or end is missing, or several; remove them, each from the line "
            f"`{SCORES_BEGIN}` to the line `{SCORES_END}`"
        )
    return before + new + after


def _section(score: dict[str, Any], picture: str | None) -> str:
    """The section's Markdown.

    Args:
        picture: the file beside the card that shows the shares, if there is one.
    """
    lines = [SCORES_BEGIN, "### What it keeps", "", *markdown.table(*table(score)), ""]
    if picture:
        lines += [f"![Share kept of each model, with its standard error]({picture})", ""]
    lines += [f"- {column.heading}: {column.meaning}." for column in columns([score])]
    lines += [f"- Warning: {markdown.escape(warning)}." for warning in misfits([score])]
    version = score["versions"]["mergekit-pave"]
    lines += ["", f"Measured by mergekit-pave {markdown.escape(version)}. {' '.join(notes([score]))}", SCORES_END]
    return "\n".join(lines)
