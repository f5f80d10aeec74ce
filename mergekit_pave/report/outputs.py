"""The files that this package writes beside merged weights: their names, and their removal.

It needs nothing but Python, because it is loaded for every user of mergekit.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

REPORT_NAME = "pave_report.json"
PICTURE_NAME = "pave_ranks.png"
SCORES_NAME = "pave_scores.json"
SCORES_PICTURE_NAME = "pave_scores.png"
CARD = "README.md"
EMR_FOLDER = "emr"
EMR_FORMAT = "mergekit-pave-emr-1"
PAGE_FOLDER = "pave_report"
PAGE_NAME = "index.html"
GENERATOR = "mergekit-pave report"

# Around the section of a model card that shows scores: comments of HTML, which nobody sees in a card.
SCORES_BEGIN = "<!-- What it keeps: written by mergekit-pave, which replaces everything from here to the end of it -->"
SCORES_END = "<!-- End of what it keeps -->"


def remove(folder: Path) -> None:
    """Remove the report and the scores of a merge, the pictures in its card, its page, and what `emr` restores models with."""
    names = (REPORT_NAME, PICTURE_NAME, SCORES_NAME, SCORES_PICTURE_NAME)
    ours = [*(folder / name for name in names), *_page(folder / PAGE_FOLDER), *_task_files(folder / EMR_FOLDER)]
    for path in ours:
        path.unlink(missing_ok=True)
    _cut_scores(folder / CARD)
    for emptied in (folder / PAGE_FOLDER, folder / EMR_FOLDER):
        if emptied.is_dir() and not any(emptied.iterdir()):
            emptied.rmdir()


def _task_files(folder: Path) -> list[Path]:
    """The files in a folder that `emr` has written."""
    return [path for path in folder.glob("*.safetensors") if EMR_FORMAT.encode() in _beginning(path)]


def _beginning(path: Path) -> bytes:
    """Of a file, where a safetensors header has its metadata if they come first."""
    with path.open("rb") as file:
        return file.read(1000)


def _cut_scores(card: Path) -> None:
    """Remove the scores of the earlier merge from its card, which mergekit leaves there if it writes no new one."""
    text = card.read_bytes() if card.is_file() else b""
    before, begin, rest = text.partition(SCORES_BEGIN.encode())
    _, end, after = rest.partition(SCORES_END.encode())
    if begin and end:
        card.write_bytes(before + after.lstrip(b"\r\n"))


def is_page(path: Path) -> bool:
    """Whether `mergekit-pave report` wrote a file."""
    return path.is_file() and f'content="{GENERATOR}"' in path.read_text(encoding="utf-8", errors="replace")[:2000]


def _page(folder: Path) -> list[Path]:
    """The files of a page: the page itself, and the pictures that it links to."""
    page = folder / PAGE_NAME
    if not is_page(page):
        return []
    links = re.findall(r'<a href="([^"/\\]+\.png)">PNG</a>', page.read_text(encoding="utf-8", errors="replace"))
    names = map(html.unescape, links)
    return [*(folder / name for name in names if Path(name).name == name), page]
