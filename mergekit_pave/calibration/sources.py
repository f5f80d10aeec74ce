"""Where rows come from: files, globs, URLs, folders, saved data sets and the Hub, all through the `datasets` library."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.files import looks_local
from mergekit_pave.progress import datasets_library
from mergekit_pave.settings import Data

if TYPE_CHECKING:  # see `datasets_library`
    import datasets

_LOADERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def load_rows(data: Data, where: str) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of one `data` entry.

    Args:
        where: its key in the YAML, for messages.

    Raises:
        PaveError: the data set does not exist, or cannot be read.
    """
    path = Path(data.path).expanduser()
    loader = None if path.is_dir() else _loader(data.path)
    remote = "://" in data.path
    here = not remote and path.exists()
    is_pattern = not remote and not here and glob.has_magic(data.path)
    if not loader and (path.is_file() or (remote and not data.path.startswith("hf://"))):
        raise PaveError(
            f"{where}: the ending of {data.path} is not that of a known format: {' '.join(_LOADERS)}, "
            f"also compressed ({' '.join(_COMPRESSED)})"
        )
    if is_pattern:
        loader = _loader_of_all(data.path, str(path), where)
    elif not here and not remote and (loader or looks_local(data.path)):
        raise PaveError(f"{where}: there is no file {'' if loader else 'or folder '}{data.path} (looked in {Path.cwd()})")
    if path.is_file() and not path.stat().st_size:
        raise PaveError(f"{where}: {data.path} is empty")
    whole = "is a file itself" if loader else "was saved by `save_to_disk`" if path.is_dir() and _is_saved(path) else ""
    if whole and data.data_files is not None:
        raise PaveError(f"{where}: {data.path} {whole}; data_files goes with a folder or a Hub data set")
    try:
        if whole and not loader:
            return _saved(path, data.split)
        options: dict[str, Any] = {"split": data.split, "streaming": data.streaming}
        if loader:
            kind, more = loader
            files = glob.escape(str(path)) if here else data.path if remote else str(path)
            return datasets_library().load_dataset(kind, data_files=files, **options, **more)
        options |= {"name": data.name, "revision": data.revision, "data_files": data.data_files}
        return datasets_library().load_dataset(str(path) if here else data.path, **options)
    except Exception as error:  # the library raises many kinds of errors, all of which are about this entry
        cause = error.__cause__ or error
        reason = in_a_line(cause)
        if isinstance(cause, UnicodeDecodeError):
            reason += "; calibration data has to be UTF-8"
        raise PaveError(f"{where}: cannot load {data.path} (split {data.split!r}): {reason}") from error


def _loader(name: str) -> tuple[str, dict[str, str]] | None:
    """The loader for a file, by its ending, and the options of the loader."""
    if "://" in name:
        name = name.split("?")[0].split("#")[0]
    stem, ending = os.path.splitext(name.lower())
    return _LOADERS.get(os.path.splitext(stem)[1] if ending in _COMPRESSED else ending)


def _loader_of_all(shown: str, pattern: str, where: str) -> tuple[str, dict[str, str]]:
    """The loader for all files that a pattern matches, which has to be the same.

    Args:
        shown: the pattern in the YAML, for messages.
    """
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise PaveError(f"{where}: there is no file that matches {shown} (looked in {Path.cwd()})")
    loaders = {file: _loader(file) for file in files}
    other = next((file for file in files if loaders[file] is None or loaders[file] != loaders[files[0]]), None)
    if other:
        raise PaveError(f"{where}: {shown} matches {other}, whose format is unknown or differs from that of other files")
    return loaders[files[0]]


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / f"{name}.json").is_file() for name in ("dataset_info", "state")
    )


def _saved(folder: Path, split: str) -> datasets.Dataset:
    """The rows that `save_to_disk` wrote, of a data set or of one with several splits. A single one counts as `train`."""
    datasets = datasets_library()
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {"train": saved, str(saved.split or "train"): saved}
    ranges = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in ranges])
