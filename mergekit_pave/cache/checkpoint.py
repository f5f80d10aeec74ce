"""The files of a model, and the headers of its safetensors files."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from mergekit_pave.errors import PaveError

# What a checkpoint's weights are stored as, if not in several files.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Stored(NamedTuple):
    """A tensor in a file: its type by safetensors' name, such as BF16, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, with adapters merged, and the name of the file that holds each tensor."""

    folder: str
    files: dict[str, str]

    @functools.cached_property
    def stored(self) -> dict[str, Stored]:
        """The tensors in its safetensors files. Those in other files are left out, because they would have to be read.

        Raises:
            PaveError: a file cannot be parsed.
        """
        tensors: dict[str, Stored] = {}
        for file in sorted(set(self.files.values())):
            path = Path(self.folder, file)
            if path.suffix == ".safetensors":
                tensors |= stored_in(path)
        return tensors

    def first_stored(self, names: Iterable[str]) -> Stored | None:
        """The first of these tensors that a safetensors file has."""
        return next((self.stored[name] for name in names if name in self.stored), None)


def find_weights(folder: Path, names: Iterable[str] = WEIGHTS, *, index_first: bool) -> Path | None:
    """The file that a checkpoint's weights are in, or the index of several such files.

    Args:
        names: of such files, in the order in which they are looked for.
        index_first: where there are both, the index counts, as for mergekit. For transformers it is the file.
    """
    for name in names:
        paths = [folder / f"{name}.index.json", folder / name]
        for path in paths if index_first else reversed(paths):
            if path.exists():
                return path
    return None


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors in one safetensors file.

    Raises:
        PaveError: the file is missing or cannot be parsed.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except (OSError, SafetensorError) as error:
        if is_pointer(path):
            raise PaveError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder") from error
        raise PaveError(f"{path} cannot be read ({error}); fetch it again") from error


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS, which stands for the file itself."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."
