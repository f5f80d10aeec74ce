"""Some tools of mergekit read a YAML of their own, and would ignore a `pave:` block in it. Here they are made to refuse it.

Like `field`, this is there for everybody who uses mergekit: without a block these tools do what they always did.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from mergekit_pave.errors import PaveError


class Tool(NamedTuple):
    """A tool that does not honour the block.

    Attributes:
        key: one that its config has and that of mergekit-yaml does not have.
        advice: what to do instead.
    """

    command: str
    key: str | None
    advice: str


_MOE = Tool(
    "mergekit-moe",
    "experts",
    "purify each expert beforehand, by a config of mergekit-yaml with this model alone, and name its output as source_model",
)
_PYTORCH = Tool(
    "mergekit-pytorch",
    None,
    "merge the folders of these models (weights, config.json and tokenizer) with mergekit-yaml",
)
_BAKLLAMA = Tool("bakllama", "layer_slices", "write its slices as a passthrough merge for mergekit-yaml")
_EVOLVE = Tool("mergekit-evolve", "genome", "evolve without the block, and put it into the config that is found")

# By module of mergekit: the class of the config in it, and the tool that reads the config.
_CONFIGS = {
    "mergekit.moe.config": ("MoEMergeConfig", _MOE),
    "mergekit.scripts.merge_raw_pytorch": ("RawPyTorchMergeConfig", _PYTORCH),
    "mergekit.scripts.bakllama": ("BakllamaConfig", _BAKLLAMA),
    "mergekit.evo.genome": ("ModelGenomeDefinition", _EVOLVE),
    "mergekit.evo.config": ("EvolMergeConfiguration", _EVOLVE),
}
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def add(module: ModuleType) -> None:
    """Let the config in one of these modules refuse the block. Idempotent."""
    name, tool = _CONFIGS[module.__name__]
    config = getattr(module, name)
    if "pave" not in config.__pydantic_fields__:
        annotation = Annotated[Any, BeforeValidator(_refusal(tool)), Field(exclude=True, repr=False)]
        config.__pydantic_fields__["pave"] = FieldInfo.from_annotated_attribute(annotation, None)
        config.model_rebuild(force=True)


def unguarded() -> list[str]:
    """The tools that a later mergekit has changed so that they would ignore a block; for `doctor`."""
    commands = []
    for module, (name, tool) in _CONFIGS.items():
        try:
            config = getattr(importlib.import_module(module), name, None)
        except Exception:  # a tool that cannot be imported cannot be used, either
            continue
        if "pave" not in getattr(config, "model_fields", {}):
            commands.append(tool.command)
    return list(dict.fromkeys(commands))


def _refusal(tool: Tool):
    def refuse(value: Any) -> None:
        if value is not None:
            raise PaveError(
                f"{tool.command} does not honour a `pave:` block, only mergekit-yaml, mergekit-multi and run_merge do. "
                f"Remove it here; to purify, {tool.advice}"
            )

    return refuse


def tool_of(config: dict[str, Any]) -> Tool | None:
    """The other tool of mergekit that a config is meant for, or None."""
    for _, tool in _CONFIGS.values():
        if tool.key in config and "merge_method" not in config:
            return tool
    models = config.get("models")
    names = [entry.get("model") for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    return _PYTORCH if any(isinstance(name, str) and _is_file(name) for name in names) else None


def _is_file(name: str) -> bool:
    """Whether a model's name is that of a file of weights."""
    return Path(name).is_file() or (name.endswith(_FILES) and not Path(name).is_dir())
