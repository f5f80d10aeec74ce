"""The licence of a merge, where the cards of all its inputs name the same one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard
from mergekit.common import ModelPath, ModelReference

_KEYS = ("license", "license_name", "license_link")


def common_licence(models: Iterable[ModelReference], cache_dir: str | None) -> dict[str, str]:
    """The `license` metadata that all models agree on, adapters included; empty where they differ or one is not known.

    Only cards that are on this machine are read, so it needs no network.

    Args:
        cache_dir: of the Hub's client, if it is not the default.
    """
    parts = {part for model in models for part in (model.model, model.lora) if part}
    found = [_licence(part, cache_dir) for part in parts]
    if not found or not found[0] or any(licence != found[0] for licence in found):
        return {}
    return found[0]


def _licence(part: ModelPath, cache_dir: str | None) -> dict[str, str]:
    card = Path(part.path, "README.md")
    if not Path(part.path).exists():
        cached = huggingface_hub.try_to_load_from_cache(part.path, "README.md", cache_dir=cache_dir, revision=part.revision)
        card = Path(cached) if isinstance(cached, str) else card
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever somebody has written there, the merge does without it
        return {}
    licence = {key: data[key] for key in _KEYS if isinstance(data.get(key), str)}
    if licence.get("license") == "other":
        # It says nothing without a name, and a link to a file is one to a file that is not beside the merge.
        link = licence.get("license_link", "")
        return licence if licence.get("license_name") and link.startswith("https://") else {}
    return {key: value for key, value in licence.items() if key == "license"}
