"""A small dense writer of merges by EMR-Merging, built on `core.emr` and `emr.file` alone, for tests of what restores them."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from reference import weights
from safetensors.torch import save_file

from mergekit_pave import cache
from mergekit_pave.core import emr
from mergekit_pave.emr import file, writing


def fingerprint(folder: Path) -> str:
    return cache.weights_fingerprint(str(folder), [path.name for path in folder.glob("*.safetensors")])


def sealed(metadata: dict, tensors: dict) -> dict:
    """Tensors with the hashes that a file has of them and of its metadata."""
    hashes = {"": hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).digest()}
    for name, tensor in tensors.items():
        hashes[name] = hashlib.sha256(bytes(tensor.contiguous().reshape(-1).view(torch.uint8))).digest()
    rows = [list(hashes[name]) for name in sorted(hashes)]
    return tensors | {"sha256": torch.tensor(rows, dtype=torch.uint8)}


def write_merge(base: Path, experts: list[Path], out: Path, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Path:
    """Merge checkpoints and write everything that restoring needs.

    Args:
        rows: of each tensor that has as many rows as the base model's vocabulary; the further ones are left out.
    """
    out.mkdir(parents=True)
    of_base, of_experts = weights(base), [weights(expert) for expert in experts]
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]

    def cut(tensor):
        return tensor[:rows] if rows and tensor.dim() and len(tensor) == vocabulary else tensor

    merged, masks, sums, own, copied = {}, [{} for _ in experts], [emr.Sums() for _ in experts], [{} for _ in experts], []
    for name, tensor in of_base.items():
        if all(name in of and of[name].shape == tensor.shape for of in of_experts):
            if not tensor.is_floating_point():
                merged[name] = tensor
                copied.append(name)
                continue
            merged[name], found, of_tensor = emr.unify(cut(tensor), [cut(of[name]) for of in of_experts], dtype)
            for i, (mask, more) in enumerate(zip(found, of_tensor)):
                masks[i][name], sums[i] = mask, sums[i] + more
        else:
            merged[name] = tensor.to(dtype)
    for i, of in enumerate(of_experts):
        own[i] = {name: tensor.to(dtype) for name, tensor in of.items() if name not in masks[i] and name not in copied}
    names = sorted(merged)  # in two files
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: merged[name].contiguous() for name in part}, out / shard, {"format": "pt"})
    shards = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    config = json.loads((base / "config.json").read_text())
    config |= {"dtype": str(dtype).removeprefix("torch."), "vocab_size": rows or vocabulary}
    (out / "config.json").write_text(json.dumps(config))
    for path in base.glob("*token*"):
        shutil.copy(path, out)
    for other in ("README.md", "mergekit_config.yml", "pave_report.json", ".gitattributes"):
        (out / other).write_text("of the merge")
    for expert, name in file.file_names(map(str, experts)).items():
        i = [str(path) for path in experts].index(expert)
        metadata = {
            "format": file.FORMAT,
            "name": name,
            "model": expert,
            "scale": repr(sums[i].scale),
            "base": str(base),
            "base_weights": fingerprint(base),
            "merged_weights": fingerprint(out),
            "names": "{}",
            "copied": json.dumps(copied),
            "config": (experts[i] / "config.json").read_text(),
        }
        if rows:
            metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"vocab_size": rows})
        for key, other in (("generation_config", "generation_config.json"), ("chat_template", "chat_template.jinja")):
            if (experts[i] / other).is_file():
                metadata[key] = (experts[i] / other).read_text()
        tensors = {file.MASK + tensor: mask for tensor, mask in masks[i].items()}
        tensors |= {file.OWN + tensor: value for tensor, value in own[i].items()}
        entries = [(key, value.dtype, tuple(value.shape), lambda value=value: value) for key, value in tensors.items()]
        writing.write(out / "emr" / f"{name}.safetensors", metadata, entries)
    return out
