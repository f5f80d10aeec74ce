"""The licence of a merge, if the cards of all its inputs name the same one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import build_hf_headers, get_session
from mergekit.common import ModelPath, ModelReference

_KEYS = ("license", "license_name", "license_link")
_PATIENCE = 5  # seconds for the Hub to answer


def common_licence(models: Iterable[ModelReference], cache_dir: str | None) -> dict[str, str]:
    """The `license` metadata that all models and adapters share; empty if two differ or one is unknown.

    mergekit fetches no cards, so this asks the Hub for those that are not on this machine. If it does not answer, the licence is
    unknown.

    Args:
        cache_dir: that of the Hub's client, if it is not the default.
    """
    parts = {part for model in models for part in (model.model, model.lora) if part}
    common: dict[str, str] = {}
    for part in sorted(parts, key=lambda part: (not Path(part.path).exists(), str(part))):
        licence = _licence(part, cache_dir)
        if not licence or (common and licence != common):
            return {}  # at once, so that only one request waits for a network that is down
        common = licence
    return common


def _licence(part: ModelPath, cache_dir: str | None) -> dict[str, str]:
    try:
        data = ModelCard(_card(part, cache_dir), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card that cannot be read must not fail the merge
        return {}
    licence = {key: data[key] for key in _KEYS if isinstance(data.get(key), str)}
    if licence.get("license") == "other":
        # It needs a name, and a link to the Web: a file that it links to is not beside the merge.
        link = licence.get("license_link", "")
        return licence if licence.get("license_name") and link.startswith("https://") else {}
    return {key: value for key, value in licence.items() if key == "license"}


def _card(part: ModelPath, cache_dir: str | None) -> str:
    """The text of a model's card.

    Raises:
        Exception: there is no card, or it cannot be read.
    """
    if Path(part.path).exists():
        return Path(part.path, "README.md").read_text(encoding="utf-8")
    cached = functools.partial(huggingface_hub.try_to_load_from_cache, part.path, cache_dir=cache_dir, revision=part.revision)
    if path := cached("README.md"):
        return Path(path).read_text(encoding="utf-8")  # fails if the cache knows that there is no card
    configs = (cached(name) for name in ("config.json", "adapter_config.json"))
    commit = next((Path(config).parent.name for config in configs if isinstance(config, str)), part.revision)
    # Not by the client's own download, which retries for minutes without a network.
    url = huggingface_hub.hf_hub_url(part.path, "README.md", revision=commit)
    answer = get_session().get(url, headers=build_hf_headers(), timeout=_PATIENCE, follow_redirects=True)
    answer.raise_for_status()
    return answer.text
