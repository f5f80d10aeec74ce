"""Settings that mergekit looks at only when it merges: each is tried out before any work."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo

from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.planning.names import all_names
from mergekit_pave.plugin.checkpoints import checkpoint_of
from mergekit_pave.plugin.planner import is_emr, is_regmean

_SIDE = 128  # of a matrix: small, but large enough that a low density does not drop all of it


def try_out(planner: MergePlanner) -> None:
    """Try each setting of a merge that mergekit has planned.

    Where a `tokenizer` section turns out to change nothing, vocabularies are gathered as other tensors are.

    Raises:
        PaveError: mergekit would fail with one of them.
    """
    config = planner.config
    _try_dtypes({"dtype": config.dtype, "out_dtype": config.out_dtype})
    if config.chat_template not in (None, "auto"):
        _try_chat_template(config)
    if planner._tokenizer_task:
        gathers = (task.gather_tensors for _, task in planner._tensors)
        vocabularies = [task for task in gathers if isinstance(task, PermutedVocabulary)]
        built = _try_tokenizer(planner._tokenizer_task, vocabularies)
        if all(_is_unchanged(vocabulary, built) for vocabulary in vocabularies):
            _gather_plainly(planner)
    if not is_regmean(planner) and not is_emr(planner):  # their parameters, if any, are checked elsewhere
        _try_method(task for _, task in planner._tensors)


def _try_dtypes(dtypes: dict[str, str | None]) -> None:
    """Refuse a precision that mergekit does not know.

    Args:
        dtypes: by key of the config.
    """
    for key, name in dtypes.items():
        try:
            dtype = dtype_from_name(name)
        except RuntimeError:
            dtype = torch.bool
        if dtype is not None and not dtype.is_floating_point:
            raise PaveError(f"{key}: {name!r} is not a precision to merge in; use bfloat16, float16, float32 or float64")


def _try_chat_template(config: MergeConfiguration) -> None:
    """Refuse a chat template that is neither a template nor the name of one."""
    from mergekit.merge import _set_chat_template  # which is not imported before a merge

    try:
        _set_chat_template(SimpleNamespace(chat_template=None), config)
    except RuntimeError as error:
        raise PaveError(
            f"chat_template: {config.chat_template!r} is neither a Jinja template nor the name of one that mergekit has, such as "
            "chatml or llama3"
        ) from error


def _is_unchanged(vocabulary: PermutedVocabulary, built: TokenizerInfo) -> bool:
    """Whether all models' tensors have just the rows that the output will have, in the same order."""
    if vocabulary.tokens or vocabulary.pad_to_multiple_of:
        return False
    size, rows = len(built.tokenizer.get_vocab()), _rows(vocabulary)
    same = [built.permutations[model] == dict(zip(range(size), range(size))) for model in vocabulary.gather_tensors.weight_info]
    return all(same) and list(rows.values()) == [size] * len(same)


def _gather_plainly(planner: MergePlanner) -> None:
    for number, (weight, task) in enumerate(planner._tensors):
        if isinstance(task.gather_tensors, PermutedVocabulary):
            plain = task.gather_tensors.gather_tensors
            planner._tensors[number] = weight, task.model_copy(update={"gather_tensors": plain})


def _try_tokenizer(task: BuildTokenizer, vocabularies: list[PermutedVocabulary]) -> TokenizerInfo:
    """Build the output's tokenizer, and bring vocabularies in line with it: once those that many tensors have."""
    tried = set()
    with _silent_logs(), contextlib.redirect_stderr(io.StringIO()):  # the merge will log it all again, and draw its bar
        try:
            built = task.execute()
            for vocabulary in vocabularies:
                rows = _rows(vocabulary)
                settings = repr((rows, vocabulary.vocabulary_axis, vocabulary.base_model))
                if settings in tried or len(rows) < len(vocabulary.gather_tensors.weight_info):
                    continue
                tried.add(settings)
                shapes = {model: [1, 1] for model in rows}
                for model, shape in shapes.items():
                    shape[vocabulary.vocabulary_axis] = rows[model]
                tensors = {model: torch.zeros(shape) for model, shape in shapes.items()}
                vocabulary.execute(tokenizer_info=built, tensors=tensors)
            return built
        except PaveError:
            raise
        except Exception as error:  # transformers, the Hub and mergekit raise a dozen kinds
            reason = in_a_line(error)
            raise PaveError(f"tokenizer: mergekit cannot make the output's tokenizer as configured: {reason}") from error


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """mergekit logs a part of this by the root logger, where nothing but a switch for all loggers reaches it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _rows(vocabulary: PermutedVocabulary) -> dict[ModelReference, int]:
    """How many tokens each model's tensor is for. Of models whose headers do not say it there is no entry."""
    rows = {}
    for model, info in vocabulary.gather_tensors.weight_info.items():
        if stored := checkpoint_of(model).first_stored(all_names(info)):
            rows[model] = stored.shape[vocabulary.vocabulary_axis]
    return rows


def _try_method(tasks: Iterable[ExecuteMergeMethodTask]) -> None:
    """Merge random matrices with the parameters of each tensor: once with those that many tensors have.

    The process's random numbers are restored afterwards, so that a merge with a seed gives what it gave.
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
            attempt = f"{task.method_name}: mergekit cannot merge {task.output_weight.name} with the parameters of the config"
            try:
                merged = task.execute(tensors)
            except PaveError:
                raise
            except Exception as error:
                raise PaveError(f"{attempt} ({in_a_line(error)})") from error
            if merged is not None and not merged.isfinite().all():
                raise PaveError(f"{attempt}: the result is not finite. Look for NaN or infinity among them")
