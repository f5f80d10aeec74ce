"""Merges that differ in λ alone, where λ does nothing but scale what a merge adds to its base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import torch
from mergekit.common import ModelReference, dtype_from_name

from mergekit_pave.cache.checkpoint import Checkpoint
from mergekit_pave.planning.variants import Variant

# The result of these is base + λ · something that does not depend on λ. (`regmean` also merges vocabularies by data, with λ.)
_SMOOTH = {"task_arithmetic", "tsv"}
# In another precision these would choose other signs, trim other values or draw other numbers.
_CHOOSING = {"ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"}
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def scale(variant: Variant, checkpoint: Callable[[ModelReference], Checkpoint]) -> float | None:
    """λ, where it only scales, so that one merge serves for every λ; else None.

    The one merge is made in float32 and rounded once it is scaled. So merging may not round before that: the models have to be
    stored in the precision of the merge.

    Args:
        checkpoint: of a model.
    """
    config, block = variant.config, variant.config.pave
    scale = (config.parameters or {}).get("lambda", 1.0)
    is_plain = config.models and not config.tokenizer and not config.tokenizer_source and config.out_dtype in (None, config.dtype)
    if not is_plain or block.refine or block.merges_vocabulary(None) != "method":
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        return None
    dtype = precision(variant)
    if dtype is torch.float32:
        return scale if config.merge_method in _SMOOTH | _CHOOSING else None
    if config.merge_method not in _SMOOTH:
        return None
    stored = {tensor.dtype for model in config.referenced_models() for tensor in checkpoint(model).stored.values()}
    return scale if len(stored) == 1 and (dtype is None or stored == {_STORED.get(dtype)}) else None


def precision(variant: Variant) -> torch.dtype | None:
    """The precision of the merge; None if it is that of the models."""
    return dtype_from_name(variant.config.dtype)


def alike(variants: Iterable[Variant], checkpoint: Callable[[ModelReference], Checkpoint]) -> list[list[Variant]]:
    """The variants, those together that one merge can serve; of these the one with the largest λ comes first.

    Args:
        checkpoint: of a model.
    """
    groups: dict[str, list[tuple[float, Variant]]] = {}
    for number, variant in enumerate(variants):
        factor = scale(variant, checkpoint)
        merge, block = variant.meaning
        rest = {key: value for key, value in merge["parameters"].items() if key != "lambda"}
        key = str(number) if factor is None else json.dumps([merge | {"parameters": rest}, block], sort_keys=True)
        groups.setdefault(key, []).append((abs(factor or 0), variant))
    return [[variant for _, variant in sorted(group, key=lambda pair: -pair[0])] for group in groups.values()]
