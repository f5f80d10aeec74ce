"""Manifests that nobody may use: each is complete and carries the right hash of itself, as somebody with bad intentions makes it.

Run as a program it writes each as published covariances into a folder of its own, to be tried on anything that reads such.
"""

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mergekit_pave.cache import FORMATS, MANIFEST, Artefact, digest
from mergekit_pave.core.covariance import Covariance

Manifest = dict[str, Any]
_LAYER = {"file": "00000.safetensors", "tokens": 3, "dim": 4}
_ODD_VALUES = (None, True, -1, 1.5, "", "..", [], {}, [[]], {"": None}, float("nan"), 10**30)


def publish(folder: Path) -> Artefact:
    """Sound covariances of one layer, as `mergekit-pave cache export` writes them."""
    artefact = Artefact(folder)
    entry = artefact.write("00000.safetensors", Covariance.from_rows(torch.ones(3, 4)).to_tensors())
    artefact.complete(
        {
            "files": {"00000.safetensors": entry},
            "layers": {"model.layers.0.mlp.up_proj": _LAYER},
            "key": "0" * 32,
            "format": FORMATS["covariance"],
            "model": "someone/model",
            "weights": "0" * 32,
            "data": [{"path": "someone/data", "split": "train"}],
            "samples": 1,
            "tokens": 3,
            "dtype": "float32",
            "watched": ["model.layers.0.mlp.up_proj"],
            "versions": {"transformers": "5.0.0"},
        }
    )
    return artefact


def _rename(name: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["files"][name] = manifest["files"].pop("00000.safetensors")
        manifest["layers"]["model.layers.0.mlp.up_proj"]["file"] = name

    return change


def _file(**values: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["files"]["00000.safetensors"].update(values)


def _layer(**values: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["layers"]["model.layers.0.mlp.up_proj"].update(values)


def _without(key: str) -> Callable[[Manifest], None]:
    return lambda manifest: manifest.pop(key)


# What is seen when the manifest is read.
MANIFESTS: dict[str, Callable[[Manifest], Any]] = {
    "a file above the folder": _rename("../00000.safetensors"),
    "a file in a folder within": _rename("a/00000.safetensors"),
    "a file of the system": _rename("/etc/passwd"),
    "a file of Windows": _rename("..\\00000.safetensors"),
    "the folder itself": _rename("."),
    "the manifest itself": _rename(MANIFEST),
    "a hidden file": _rename(".00000.safetensors"),
    "a pickle": _rename("00000.bin"),
    "a name with a line end": _rename("00000.safetensors\n"),
    "a name with a zero": _rename("0\0.safetensors"),
    "a negative size": _file(size=-1),
    "no size": lambda manifest: manifest["files"]["00000.safetensors"].pop("size"),
    "no hash": lambda manifest: manifest["files"]["00000.safetensors"].pop("sha256"),
    "a hash that is none": _file(sha256="x" * 64),
    "a file that is a list": lambda manifest: manifest["files"].update({"00000.safetensors": []}),
    "a layer in no file": _layer(file="00001.safetensors"),
    "counts in no file": lambda manifest: manifest.update(counts="counts.safetensors"),
    "a layer without tokens": _layer(tokens=0),
    "a layer without width": _layer(dim=0),
    **{f"no {key}": _without(key) for key in ("files", "layers", "model", "weights", "data", "samples", "tokens", "dtype")},
    **{f"no {key}": _without(key) for key in ("watched", "versions", "key")},
}
# What is seen when the files are looked at.
FILES: dict[str, Callable[[Manifest], Any]] = {
    "a huge size": _file(size=1 << 62),
    "a size beyond 64 bits": _file(size=10**30),
    "another hash": _file(sha256="0" * 64),
    "a file that is not there": lambda manifest: manifest["files"].update({"x.safetensors": {"size": 1, "sha256": "0" * 64}}),
}
# What is seen when a covariance is read.
COVARIANCES: dict[str, Callable[[Manifest], Any]] = {
    "a huge width": _layer(dim=1 << 31),
    "a width beyond 64 bits": _layer(dim=10**30),
    "another width": _layer(dim=5),
    "more tokens than rows": _layer(tokens=4),
}


def _rewrite(change: Callable[[Manifest], Any], text: Callable[[str], str] = lambda text: text) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["digest"]
        change(manifest)
        (folder / MANIFEST).write_text(text(json.dumps(manifest | {"digest": digest(manifest)})))

    return attack


def _header(header: Any, size: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    """Puts a file of this header in the place of the only one, with the right hash."""

    def attack(folder: Path) -> None:
        written = json.dumps(header).encode()
        content = struct.pack("<Q", len(written) if size is None else size) + written + data
        (folder / "00000.safetensors").write_bytes(content)
        _rewrite(_file(size=len(content), sha256=hashlib.sha256(content).hexdigest()))(folder)

    return attack


def _tensors(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        entry = Artefact(folder).write("00000.safetensors", tensors)
        _rewrite(_file(**entry))(folder)

    return attack


# By what notices it, the change that makes an attack of the folder of sound covariances.
ATTACKS: dict[str, dict[str, Callable[[Path], None]]] = {
    "manifest": {
        **{name: _rewrite(change) for name, change in MANIFESTS.items()},
        "deep nesting": lambda folder: (folder / MANIFEST).write_text('{"files":' + "[" * 10**6),
        "deep nesting in an extra key": _rewrite(
            lambda m: None, lambda text: text[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}"
        ),
        "a number of many digits": _rewrite(lambda m: None, lambda text: text[:-1] + ', "x": ' + "9" * 10**5 + "}"),
        "a file of a gigabyte": lambda folder: _grow(folder / MANIFEST, 10**9),
        "a folder in its place": lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
    },
    "files": {name: _rewrite(change) for name, change in FILES.items()},
    "covariance": {
        **{name: _rewrite(change) for name, change in COVARIANCES.items()},
        "a header of a terabyte": _header({}, size=1 << 40),
        "a tensor beyond the end": _header({"rows": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}),
        "a shape beyond 64 bits": _header({"rows": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 0]}}),
        "an unknown type": _header({"rows": {"dtype": "F6_E2M3", "shape": [3, 4], "data_offsets": [0, 9]}}, data=b"\0" * 9),
        "no tensor": _tensors(),
        "a tensor of another name": _tensors(row=torch.ones(3, 4)),
        "one tensor too many": _tensors(rows=torch.ones(3, 4), triangle=torch.ones(10, dtype=torch.float64)),
        "rows of numbers that are whole": _tensors(rows=torch.ones(3, 4, dtype=torch.int32)),
        "a triangle in float32": _tensors(triangle=torch.ones(10)),
        "a triangle too short": _tensors(triangle=torch.ones(9, dtype=torch.float64)),
    },
}


def _grow(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)  # zeros, which take no room on most disks


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value within a manifest."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def spoilt(manifest: Manifest) -> Iterator[tuple[tuple, Any, Manifest]]:
    """A manifest with every odd value in the place of every value, one at a time."""
    for path in places(manifest):
        for odd in _ODD_VALUES:
            changed = json.loads(json.dumps(manifest))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            yield path, odd, changed


if __name__ == "__main__":
    for kind, attacks in ATTACKS.items():
        for name, attack in attacks.items():
            folder = Path(sys.argv[1]) / kind / name.replace(" ", "-")
            publish(folder)
            attack(folder)
            print(folder)
