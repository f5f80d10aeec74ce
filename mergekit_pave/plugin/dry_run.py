"""What mergekit would trip over once it merges: each setting that it looks at late is tried out before any work."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary

from mergekit_pave.errors import PaveError, in_a_line

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


def try_chat_template(config: MergeConfiguration) -> None:
    """Refuse a chat template that is neither a template nor the name of one."""
    from mergekit.merge import _set_chat_template  # which is not loaded before somebody merges

    try:
        _set_chat_template(SimpleNamespace(chat_template=None), config)
    except RuntimeError as error:
        raise PaveError(
            f"chat_template: {config.chat_template!r} is neither a Jinja template nor the name of one that mergekit has, such as "
            "chatml or llama3"
        ) from error


def try_tokenizer(task: BuildTokenizer, vocabularies: Iterable[tuple[PermutedVocabulary, dict[ModelReference, int]]]) -> None:
    """Build the output's tokenizer, and bring vocabularies in line with it.

    Args:
        vocabularies: the tasks that do so, with the number of rows that each model's tensor has.
    """
    log = logging.getLogger("mergekit.tokenizer")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the merge will say it all again
    try:
        built = task.execute()
        for vocabulary, rows in vocabularies:
            shapes = {model: [1, 1] for model in rows}
            for model, shape in shapes.items():
                shape[vocabulary.vocabulary_axis] = rows[model]
            vocabulary.execute(tokenizer_info=built, tensors={model: torch.zeros(shape) for model, shape in shapes.items()})
    except Exception as error:  # transformers, the Hub and mergekit raise a dozen kinds
        raise PaveError(f"tokenizer: mergekit cannot make the output's tokenizer as configured: {in_a_line(error)}") from error
    finally:
        log.setLevel(level)


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
            what = f"{task.method_name}: mergekit cannot merge {task.output_weight.name} with the parameters of the config"
            try:
                merged = task.execute(tensors)
            except PaveError:
                raise
            except Exception as error:
                raise PaveError(f"{what} ({in_a_line(error)})") from error
            if merged is not None and not merged.isfinite().all():
                raise PaveError(f"{what}: the result is not finite. Look for NaN or infinity among them")
