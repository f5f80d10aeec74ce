"""The report without its rows: what is known before the merge."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from mergekit.common import ModelReference

from mergekit_pave import versions
from mergekit_pave.config import PaveConfig, PaveModel
from mergekit_pave.planning.calibration import PlannedCalibration
from mergekit_pave.planning.merge import Merge
from mergekit_pave.planning.plan import Reasons
from mergekit_pave.report.stored import FORMAT

_NOT_OF_ALL = {"models", "data", "cache_dir", "keep_covariances", "calibration", "vocabulary", "purify", "refine"}
_NOT_CALIBRATED = {"data": [], "covariance": None, "calibration": None, "samples": 0, "tokens": 0}


def header_of(
    config: PaveConfig,
    merge: Merge,
    calibrations: dict[ModelReference, PlannedCalibration],
    used: Collection[ModelReference],
    reasons: Reasons,
) -> dict[str, Any]:
    """
    Args:
        used: the models whose calibration plays a part. The others have nothing to purify, so they are not calibrated.
    """
    block = json.loads(config.model_dump_json(exclude=_NOT_OF_ALL))
    return {
        "format": FORMAT,
        "versions": versions.installed(),
        "settings": block,
        "models": {
            str(model): {
                "data": calibration.data,
                "covariance": calibration.source.entry.covariance,
                "settings": _settings_of(calibration.source.entry, block),
                "calibration": calibration.settings.model_dump() if calibration.settings else None,
                "dtype": calibration.dtype,
                "samples": calibration.samples,
                "tokens": calibration.tokens,
                "left_as_they_are": reasons.get(model, {}),
            }
            | ({} if model in used else _NOT_CALIBRATED)
            for model, calibration in calibrations.items()
        },
        "not_purified": [str(entry.model) for entry in config.models if not config.entry(entry.model)],
        "tensors": len(merge.tensors),
    }


def _settings_of(entry: PaveModel, block: dict[str, Any]) -> dict[str, Any]:
    """The settings that hold for one model: those of its entry, and for the rest those of the block."""
    of_entry = json.loads(entry.model_dump_json())
    return {key: value if of_entry.get(key) is None else of_entry[key] for key, value in block.items()}
