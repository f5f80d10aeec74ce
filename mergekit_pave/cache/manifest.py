"""What a manifest may say, and the one error for what is damaged.

Covariances are published, so a manifest may come from anybody. Nothing in it is used before `parse` has checked it: it names
files in its own folder only, every value has its type and its range, and it has to be complete. `tests/attacks.py` keeps
manifests that must not pass.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergekit_pave.cache.keys import FORMATS, digest
from mergekit_pave.errors import PaveError

MAX_BYTES = 100_000_000  # far more than the manifest of a model of a hundred thousand experts takes

_Natural = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$")]
_Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class DamagedError(PaveError):
    """An artefact is incomplete, damaged, or was never sound."""


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _File(_Checked):
    size: _Natural
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(_Checked):
    files: dict[_FileName, _File]
    model: str


class _Layer(_Checked):
    file: str | None  # None where the covariance was not kept
    tokens: _Positive
    dim: _Positive


class _Head(_Checked):
    layer: str
    file: str


class _Covariances(_Manifest):
    """Of any version of this package."""

    layers: dict[str, _Layer]
    tokens: _Natural
    counts: str | None = None
    head: _Head | None = None

    @model_validator(mode="after")
    def _layers_have_files(self) -> _Covariances:
        if others := sorted({layer.file for layer in self.layers.values() if layer.file}.difference(self.files)):
            raise ValueError(f"layers are in {others[0]!r}, which is not among the files")
        if self.counts is not None and self.counts not in self.files:
            raise ValueError(f"counts are in {self.counts!r}, which is not among the files")
        measured = {name for name, layer in self.layers.items() if layer.file}
        if self.head is not None and (self.head.file not in self.files or self.head.layer not in measured):
            raise ValueError(f"the head {self.head.layer!r} is not among the layers, or {self.head.file!r} not among the files")
        return self


class _CurrentCovariances(_Covariances):
    key: _Key
    weights: str
    data: list[dict[str, Any]]
    samples: _Natural
    dtype: str
    watched: list[str]
    versions: dict[str, str]


class _Slice(_Checked):
    expert: _Natural | None
    tokens: _Positive
    largest: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    energy: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Tail(_Manifest):
    tensor: str
    count: _Positive
    min_tokens: _Natural
    slices: list[_Slice]
    left: dict[Annotated[str, Field(pattern="^[0-9]*$")], _Natural]


class _Comparison(_Manifest):
    base: str
    equal: dict[str, list[_Natural]]


class _Recorded(_Manifest):
    """What a model gives on held-out rows, or how that of a merge compares."""

    rows: _Positive
    places: _Positive
    dtype: str


class _Texts(_Manifest):
    """What a model has written."""

    generated: str
    rows: _Positive
    tokens: _Natural


class _Samples(_Manifest):
    """The samples of a model as it takes them."""

    origins: list[str]
    inputs: list[str]
    tokens: _Natural
    skipped: str
    left: _Natural | None = None


def parse(content: bytes) -> dict[str, Any]:
    """A manifest of any kind of artefact, without its digest.

    Raises:
        ValueError: it is damaged, or not sound.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        manifest = json.loads(content)
        if not isinstance(manifest, dict) or manifest.pop("digest", None) != digest(manifest):
            raise ValueError("it is not what was written")
        _form(manifest).model_validate(manifest)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{place}: {first['msg']}") from None
    return manifest


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with a hash of itself."""
    return json.dumps(manifest | {"digest": digest(manifest)}, indent=1)


def _form(manifest: dict[str, Any]) -> type[_Manifest]:
    if "layers" in manifest:
        return _CurrentCovariances if manifest.get("format") == FORMATS["covariance"] else _Covariances
    if "places" in manifest:
        return _Recorded
    if "generated" in manifest:
        return _Texts
    if "origins" in manifest:
        return _Samples
    return _Tail if "slices" in manifest else _Comparison
