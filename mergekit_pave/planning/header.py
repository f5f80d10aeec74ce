"""The report without its rows: what is known before the merge."""

from __future__ import annotations

import json
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave import versions
from mergekit_pave.config import PaveConfig, PaveModel
from mergekit_pave.planning.merge import PlannedTensor
from mergekit_pave.planning.source import Source
from mergekit_pave.report.stored import FORMAT


def header_of(
    config: PaveConfig,
    tensors: list[PlannedTensor],
    sources: dict[ModelReference, Source],
    reasons: dict[ModelReference, dict[str, str]],
) -> dict[str, Any]:
    block = json.loads(config.model_dump_json(exclude={"models", "cache_dir", "calibration"}))
    return {
        "format": FORMAT,
        "versions": versions.installed(),
        "settings": block,
        "models": {
            str(model): {
                "data": source.data,
                "covariance": source.entry.covariance,
                "settings": _resolved(source.entry, block),
                "calibration": config.calibration_of(model).model_dump() if source.entry.data else None,
                "dtype": source.dtype,
                "samples": source.samples,
                "tokens": source.tokens,
                "left_as_they_are": reasons[model],
            }
            for model, source in sources.items()
        },
        "not_purified": [str(entry.model) for entry in config.models if not entry.purify],
        "tensors": len(tensors),
    }


def _resolved(entry: PaveModel, block: dict[str, Any]) -> dict[str, Any]:
    """The settings that hold for one model: its own where it has one."""
    own = json.loads(entry.model_dump_json())
    return {key: value if own.get(key) is None else own[key] for key, value in block.items()}
