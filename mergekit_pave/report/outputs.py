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
PAGE_FOLDER = "pave_report"
PAGE_NAME = "index.html"
GENERATOR = "mergekit-pave report"


def remove(folder: Path) -> None:
    """Remove the report and the scores of a merge, the pictures in its card, and its page; nothing else."""
    names = (REPORT_NAME, PICTURE_NAME, SCORES_NAME, SCORES_PICTURE_NAME)
    ours = [*(folder / name for name in names), *_page(folder / PAGE_FOLDER)]
    for path in ours:
        path.unlink(missing_ok=True)
    pages = folder / PAGE_FOLDER
    if pages.is_dir() and not any(pages.iterdir()):
        pages.rmdir()


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
