"""A page as a file: sections in a template, and a PNG of each plot beside it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mergekit_pave.errors import PaveError
from mergekit_pave.files import replacing
from mergekit_pave.report.outputs import GENERATOR, PAGE_NAME, is_page
from mergekit_pave.report.page.drawing import Plot, png, svg

Table = tuple[Sequence[str], list[Sequence[Any]]]  # head, rows

# A number, with its error or with others in brackets, and with a unit.
_NUMBER = re.compile(r"-|best|[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.]+| \([\d., e+-]+\))?( %| of \d+| bytes| [KMGT]B)?( \*)?")


@dataclass(frozen=True)
class Section:
    """A heading with an anchor, and what is below it: a text, plots, tables, notes."""

    key: str
    heading: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(folder: Path, template: str, sections: list[Section], option: str = "-o", **more: Any) -> Path:
    """Write a page, and a PNG of each plot in it. Each file is written whole or not at all.

    Args:
        template: the name of its file.
        option: of the command that names the folder.
        more: what the template shows besides the sections.

    Returns:
        The path of the page.

    Raises:
        PaveError: a file of somebody else is in the way, or the folder cannot be written.
    """
    files = {f"{plot.name}.png": png(plot) for section in sections for plot in section.plots}
    page = _templates().get_template(template).render(generator=GENERATOR, sections=sections, table=_table, svg=svg, **more)
    files[PAGE_NAME] = page.encode()
    check(folder, files, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            with replacing(folder / file) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise PaveError(f"the report cannot be written to {folder}: {error}") from error
    return folder / PAGE_NAME


def check(folder: Path, files: Iterable[str] = (PAGE_NAME,), option: str = "-o") -> None:
    """Refuse to overwrite files that no earlier report wrote.

    Args:
        option: of the command that names the folder.

    Raises:
        PaveError: there is such a file.
    """
    if folder.exists() and not folder.is_dir():
        raise PaveError(f"{folder} is a file; name a folder for the report with {option}")
    if is_page(folder / PAGE_NAME):
        return
    if taken := [file for file in files if (folder / file).exists()]:
        raise PaveError(f"{folder / taken[0]} is not from an earlier report; name another folder with {option}")


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def _table(table: Table) -> Markup:
    head, rows = table
    texts = [not all(_NUMBER.fullmatch(str(row[i])) for row in rows if i < len(row)) for i in range(len(head))]

    def line(tag: str, cells: Sequence[Any]) -> str:
        classes = (" class=text" if text else "" for text in texts)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(classes, cells)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return Markup(f'<div class="scroll" tabindex="0"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>')
