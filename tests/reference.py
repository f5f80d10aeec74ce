"""PAVE by its definition, in float64, slowly, and without a line of the package under test.

The model itself runs over the raw rows, one at a time, so there is no padding; the inputs of each layer are kept whole;
W C_lambda gets a full SVD; C_lambda's inverse is applied explicitly; ranks are allocated by looking at every value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from models import KINDS, read_rows
from PIL import Image
from safetensors.torch import load_file


@dataclass(frozen=True)
class Purified:
    """One weight of one model. `weight`, `plain` and `base` are as stored in the checkpoint (GPT-2: transposed)."""

    weight: torch.Tensor
    plain: torch.Tensor
    base: torch.Tensor
    components: int
    kept: int
    energy_dropped: float
    tokens: int

    @property
    def removed_norm(self) -> float:
        return (self.weight - self.plain).norm().item()

    @property
    def change_norm(self) -> float:
        return (self.plain - self.base).norm().item()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def purify(kind, base, models, sources, ratios, *, allocation="spectral", regularization=None, target="weights", max_length=64):
    """W' of every tensor that is purified.

    Args:
        models: checkpoint folders, in the order of the config.
        sources: per model a key of what to read from it: (file, how, columns...); see `_encode`.
        ratios: (place of the model, tensor) -> rank_ratio, or None where the tensor is left alone.
        regularization: absolute number, ("relative", share), or one of these per model.
        target: for all models, or one per model.

    Returns:
        One dict a model, {tensor: Purified}.
    """
    count = len(models)
    lambdas = regularization if isinstance(regularization, list) else [regularization or ("relative", 0.01)] * count
    targets = target if isinstance(target, list) else [target] * count
    lengths = max_length if isinstance(max_length, list) else [max_length] * count
    plain, stored_base = [weights(m) for m in models], weights(base)
    seen = [layer_inputs(kind, m, s, length) for m, s, length in zip(models, sources, lengths)]
    results = [{} for _ in models]
    for tensor in stored_base:
        who = [i for i in range(count) if tensor.removesuffix(".weight") in seen[i] and ratios(i, tensor) is not None]
        spectra, shares, found = [], [], {}
        for i in who:
            turn = (lambda w: w.T) if KINDS[kind].transposed else (lambda w: w)
            weight, origin = turn(plain[i][tensor].double()), turn(stored_base[tensor].double())
            x = seen[i][tensor.removesuffix(".weight")]
            c = x.T @ x / len(x)
            shift = lambdas[i]
            if isinstance(shift, tuple):
                shift = shift[1] * c.diagonal().mean()
            c = c + shift * torch.eye(len(c), dtype=c.dtype)
            u, s, vt = torch.linalg.svd(weight @ c, full_matrices=False)
            n = min(weight.shape)
            shares.append(n - max(1, round(n * ratios(i, tensor))))
            spectra.append((s / s[0]).tolist())
            found[i] = (turn, weight, origin, c, u, s, vt, len(x))
        drops = _allocate(spectra, shares, allocation)
        for i, drop in zip(who, drops):
            turn, weight, origin, c, u, s, vt, tokens = found[i]
            n = len(s)
            if drop == 0 and shares[who.index(i)] == 0:
                continue
            r = n - drop
            if targets[i] == "weights":
                # U_r S_r V_r^T times the inverse of the symmetric C.
                low = torch.linalg.solve(c, (u[:, :r] * s[:r] @ vt[:r]).T).T
            else:
                low = weight - u[:, r:] @ u[:, r:].T @ (weight - origin)
            energy = (s[r:].square().sum() / s.square().sum()).item()
            results[i][tensor] = Purified(turn(low), turn(weight), turn(origin), n, r, energy, tokens)
    return results


def purified_alone(weight: torch.Tensor, x: torch.Tensor, ratio: float, shift: float) -> torch.Tensor:
    """W' of one (d_out, d_in) weight that drops its fair share, for inputs x (tokens, d_in) in float64."""
    weight = weight.double()
    shifted = x.T @ x / len(x) + shift * torch.eye(x.shape[1], dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight @ shifted, full_matrices=False)
    r = max(1, round(len(s) * ratio))
    return torch.linalg.solve(shifted, (u[:, :r] * s[:r] @ vt[:r]).T).T


def _allocate(spectra: list[list[float]], shares: list[int], allocation: str) -> list[int]:
    """Drops per model. `spectra` are descending and divided by their largest."""
    if allocation == "uniform" or len(spectra) == 1:
        return list(shares)
    drops = [0] * len(spectra)
    caps = [min(len(s) - 1, round(1.5 * k)) for s, k in zip(spectra, shares)]
    for _ in range(sum(shares)):
        left = [(spectra[i][-1 - drops[i]], i) for i in range(len(spectra)) if drops[i] < caps[i]]
        drops[min(left)[1]] += 1
    return drops


@cache
def layer_inputs(kind: str, folder: Path, source: tuple, max_length: int) -> dict[str, torch.Tensor]:
    """All inputs (tokens, width) of every linear layer of the backbone, by module."""
    model = getattr(transformers, KINDS[kind].model).from_pretrained(folder, dtype=torch.float64).eval()
    kept: dict[str, list[torch.Tensor]] = {}
    modules = dict(model.named_modules())
    for tensor, value in weights(folder).items():
        name = tensor.removesuffix(".weight")
        if KINDS[kind].is_linear(tensor):
            kept[name] = []
            # A module that goes by another name than its weight in the checkpoint is told by the weight itself.
            module = modules.get(name) or next(m for m in modules.values() if _has_weight(m, value))
            for layer in modules.values():
                if getattr(layer, "weight", None) is module.weight:  # all layers that share it
                    layer.register_forward_hook(
                        lambda m, args, out, name=name: kept[name].append(args[0].reshape(-1, args[0].shape[-1]))
                    )
    samples = _images(source[0], folder) if source[1] == "image" else _texts(source, folder, max_length)
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _has_weight(module: torch.nn.Module, value: torch.Tensor) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and torch.equal(weight, value.double())


def _images(source: Path, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for file in sorted(source.rglob("*.png")):
        yield {"pixel_values": processor(images=Image.open(file), return_tensors="pt")["pixel_values"].double()}


def _texts(source: tuple, folder: Path, max_length: int) -> Iterator[dict[str, torch.Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in read_rows(source[0]):
        ids = _encode(row, source[1:], tokenizer, max_length)
        if ids is not None:
            yield {key: torch.tensor([value]) for key, value in ids.items()}


def _encode(row: dict, how: tuple, tokenizer, max_length: int) -> dict[str, list[int]] | None:
    """("text", column), ("template", template), ("pair", column, column), ("messages", column) or ("ids", column)."""
    if how[0] == "ids":
        return {"input_ids": row[how[1]]}
    if how[0] == "messages":
        return {"input_ids": tokenizer.apply_chat_template(row[how[1]], tokenize=True, return_dict=False)[:max_length]}
    if how[0] == "pair":
        return dict(tokenizer(row[how[1]], row[how[2]]))
    text = row[how[1]] if how[0] == "text" else how[1].format(**row)
    return dict(tokenizer(text, truncation=True, max_length=max_length)) if text else None
