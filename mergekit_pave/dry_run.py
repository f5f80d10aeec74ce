"""What mergekit would trip over once it merges: each setting that it looks at late is tried out before any work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_pave.errors import PaveError

_SIDE = 128  # of a matrix: small, but large enough that a low density leaves something of it


def try_dtypes(dtypes: dict[str, str | None]) -> None:
    """Refuse a precision that mergekit does not know.

    Args:
        dtypes: by key of the config.
    """
    for key, name in dtypes.items():
        try:
            known = dtype_from_name(name)
        except RuntimeError:
            known = torch.bool
        if known is not None and not known.is_floating_point:
            raise PaveError(f"{key}: {name!r} is no precision to merge in; use bfloat16, float16, float32 or float64")


def try_tokenizers(models: Iterable[ModelReference], trust_remote_code: bool) -> None:
    """Refuse models that the output's tokenizer is made of, but that have none."""
    for model in models:
        try:
            transformers.AutoTokenizer.from_pretrained(
                model.model.path, revision=model.model.revision, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers and the Hub raise a dozen kinds
            reason = " ".join(str(error).split())
            raise PaveError(f"tokenizer: the tokenizer of {model} cannot be loaded, and the merge needs it: {reason}") from error


def try_method(tasks: Iterable[ExecuteMergeMethodTask]) -> None:
    """Merge random matrices with the parameters of each tensor: once with those that many tensors have.

    The process's random numbers are as they were afterwards, so that a merge with a seed is what it was.
    """
    tried = set()
    values = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        for task in tasks:
            of_models = [(model, *sorted(task.input_parameters[model].items())) for model in task.input_parameters]
            parameters = repr((task.model_order, task.base_model, sorted(task.parameters.items()), of_models))
            if parameters in tried:
                continue
            tried.add(parameters)
            tensors = {model: torch.randn(_SIDE, _SIDE, generator=values) for model in task.model_order}
            try:
                task.execute(tensors)
            except PaveError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise PaveError(
                    f"{task.method_name}: mergekit cannot merge {task.output_weight.name} with the parameters that the config "
                    f"gives it ({reason})"
                ) from error
