"""Merges that differ in λ alone, where λ does nothing but scale what a merge adds to its base model."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from mergekit.common import dtype_from_name

from mergekit_pave.planning.variants import Variant

# The result of these is base + λ · something that does not depend on λ. (`regmean` also merges vocabularies by data, with λ.)
_SCALED = {
    "task_arithmetic",
    "tsv",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
}


def scale(variant: Variant) -> float | None:
    """λ, where it only scales, so that one merge serves for every λ; else None.

    In float32 alone: 16 bits round so much of what a merge adds that scaling does not give what merging anew gives.
    """
    config, block = variant.config, variant.config.pave
    scale = (config.parameters or {}).get("lambda", 1.0)
    is_plain = config.models and not config.tokenizer and not config.tokenizer_source and config.out_dtype in (None, config.dtype)
    if not is_plain or block.refine or block.merges_vocabulary(None) != "method":
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or dtype_from_name(config.dtype) is not torch.float32:
        return None
    return scale if config.merge_method in _SCALED else None


def alike(variants: Iterable[Variant]) -> list[list[Variant]]:
    """The variants, those together that one merge can serve; of these the one with the largest λ comes first."""
    groups: dict[str, list[tuple[float, Variant]]] = {}
    for number, variant in enumerate(variants):
        factor = scale(variant)
        merge, block = variant.meaning
        rest = {key: value for key, value in merge["parameters"].items() if key != "lambda"}
        key = str(number) if factor is None else json.dumps([merge | {"parameters": rest}, block], sort_keys=True)
        groups.setdefault(key, []).append((abs(factor or 0), variant))
    return [[variant for _, variant in sorted(group, key=lambda pair: -pair[0])] for group in groups.values()]
