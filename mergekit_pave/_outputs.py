"""What this package writes beside merged weights, and its end when other weights take their place.

mergekit writes into a folder that is there already and leaves what else it finds. So a report and pictures of an earlier
merge would pass for those of the new one, whether that has a `pave:` block or not. They go when the new weights are complete,
since until then the old ones are there: a merge that fails destroys nothing.

Like `_field`, this is there for everybody who uses mergekit, so it needs nothing but Python, and may break nothing.
"""

from __future__ import annotations

import functools
import html
import logging
import re
import sys
from pathlib import Path

LOG = logging.getLogger(__name__)

REPORT_NAME = "pave_report.json"
PICTURE_NAME = "pave_ranks.png"
PAGE_FOLDER = "pave_report"
PAGE_NAME = "index.html"
GENERATOR = "mergekit-pave report"


def add() -> None:
    """Let mergekit's writer of weights remove what does not belong to them. Idempotent."""
    writer = getattr(sys.modules.get("mergekit.io.tensor_writer"), "TensorWriter", None)
    finalize = getattr(writer, "finalize", None)
    if finalize is None or hasattr(finalize, "removes_evidence"):
        return

    @functools.wraps(finalize)
    def wrapper(self, *args, **kwargs):
        done = finalize(self, *args, **kwargs)
        try:
            if not self.override_basename:  # such as an adapter's, which leaves the model beside it as it was
                remove(Path(self.out_path))
        except Exception as error:
            LOG.warning("%s: what tells of an earlier merge could not be removed (%s)", REPORT_NAME, error)
        return done

    wrapper.removes_evidence = True
    writer.finalize = wrapper


def remove(folder: Path) -> None:
    """Remove the report of a merge, the picture in its card, and the page that was drawn of it; nothing else."""
    ours = [folder / REPORT_NAME, folder / PICTURE_NAME, *_page(folder / PAGE_FOLDER)]
    for path in ours:
        path.unlink(missing_ok=True)
    pages = folder / PAGE_FOLDER
    if pages.is_dir() and not any(pages.iterdir()):
        pages.rmdir()


def is_page(path: Path) -> bool:
    """Whether a file is a page that `mergekit-pave report` has written."""
    return path.is_file() and f'content="{GENERATOR}"' in path.read_text(encoding="utf-8", errors="replace")[:2000]


def _page(folder: Path) -> list[Path]:
    """The files of a page: itself, and the pictures that it links to."""
    page = folder / PAGE_NAME
    if not is_page(page):
        return []
    links = re.findall(r'<a href="([^"/\\]+\.png)">PNG</a>', page.read_text(encoding="utf-8", errors="replace"))
    names = map(html.unescape, links)
    return [*(folder / name for name in names if Path(name).name == name), page]
