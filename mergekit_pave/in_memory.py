"""PAVE on a transformers model that is in memory, for notebooks and scripts: a `pave:` block in Python."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.blame import NotFiniteError, explained
from mergekit_pave.calibration.forward import UnalignedInputError
from mergekit_pave.calibration.given import Tensors, as_batch, as_batches, one_by_one
from mergekit_pave.calibration.linears import find_linears
from mergekit_pave.calibration.observe import DivergedError
from mergekit_pave.calibration.run import measure_model
from mergekit_pave.config import PaveConfig
from mergekit_pave.core.allocation import fair_share
from mergekit_pave.core.equality import equal_matrices
from mergekit_pave.core.failures import advising
from mergekit_pave.core.linear import Linear
from mergekit_pave.core.measured import MeasuredCovariances
from mergekit_pave.core.purification import decompose_weight, leave_slices, missed_layers, purify_weight
from mergekit_pave.core.reasons import NEVER_CALLED, UNCHANGED
from mergekit_pave.report.summary import left_experts, left_weights, summary, warnings
from mergekit_pave.settings import DEFAULT_CALIBRATION, Regularization

LOG = logging.getLogger(__name__)


def purify_model(
    model: transformers.PreTrainedModel,
    batches: Tensors | Iterable[Tensors],
    *,
    rank_ratio: float = PaveConfig.model_fields["rank_ratio"].default,
    base: nn.Module | Tensors | None = None,
    target: Literal["weights", "task_vector"] = "weights",
    regularization: float | Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_tokens: int = DEFAULT_CALIBRATION.min_tokens,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Purify every linear layer of a model's backbone in place, as a `pave:` block with `allocation: uniform` would.

    Each weight drops its fair share, because spectral allocation needs several models. A weight that several layers share is
    purified once, for the inputs of all of them. A pattern applies to it if it is part of one of its names.

    The model runs over the batches as it would in your own code: in its own precision, or under `torch.autocast`, and on its own
    devices. All covariances are in memory at once, in at most 8 d² bytes for each distinct layer input of width d. So are the
    tails, in 4 (d_out + d_in) bytes for each component. Weights change only when all tails are computed. Then the covariances are
    freed, and main memory holds the originals until all weights are written. If anything fails, the model is as it was.

    Args:
        model: all of it in memory, without adapters (`merge_and_unload()` them) and not quantised.
        batches: one batch or several, as the model's tokenizer or image processor returns them with `return_tensors="pt"`. They
            need `attention_mask` if there is padding, which never counts, and `decoder_input_ids` for an encoder-decoder model.
        rank_ratio: share of singular components kept, 0 < x <= 1.
        base: the model that this one was fine-tuned from, or its state dict. It is needed for the target `task_vector` and for
            `change_norm`. With it, weights that fine-tuning has not changed are left as they are.
        target: what is purified: the weights, as published, or only what fine-tuning changed.
        regularization: λ as a number, or {"relative": share of C's mean diagonal}; by default 0.01 of it.
        include: parts of names of parameters; only these are purified.
        exclude: parts of names of parameters; these are left as they are.
        min_tokens: how many tokens an expert must have seen to be purified.
        quiet: draw no bar.

    Returns:
        Rows like those of `pave_report.json`: {tensor, expert (of a mixture), components, kept, energy_dropped, removed_norm,
        change_norm, tokens} for each matrix. A warning is logged for each linear layer that was left as it is.

    Raises:
        ValueError: an argument does not fit the model.
        PaveError: the model or its activations cannot be used, or memory runs out.
    """
    linears = _choose(model, rank_ratio, include, exclude)
    bases = _base_tensors(base, linears, model)
    if target not in ("weights", "task_vector"):
        raise ValueError(f"target must be 'weights' or 'task_vector', not {target!r}")
    if target == "task_vector" and base is None:
        raise ValueError("target='task_vector' needs base, the model that this one was fine-tuned from")
    regularizer = _regularization(regularization)
    name = model.name_or_path or type(model).__name__

    all_linears, _, _ = find_linears(model)
    layers = [linear.module for linear in all_linears.values() if not linear.experts]
    covariances = _measure(model, layers, as_batches(model, batches), name, quiet)
    num_weights = sum(linear.num_weights for linear in all_linears.values())
    equal = {tensor: equal_matrices(model.get_parameter(tensor), value) for tensor, value in bases.items()}
    left_as_they_are = {tensor: UNCHANGED for tensor, numbers in equal.items() if len(numbers) == len(linears[tensor].layers)}
    changed = tuple(linear for tensor, linear in linears.items() if tensor not in left_as_they_are)
    missed = missed_layers(name, changed, num_weights, covariances) if changed else []
    left_as_they_are |= {tensor: NEVER_CALLED for tensor, linear in linears.items() if linear in missed}
    tails: dict[str, dict[str, Any]] = {}
    for tensor, linear in linears.items():
        if tensor not in left_as_they_are:
            weight, needed = model.get_parameter(tensor).detach(), min_tokens if linear.experts else 0
            with advising(f"{name}: decomposing {tensor}", weight.device):
                count = _drop(linear, rank_ratio)
                tail = decompose_weight(weight, linear, covariances, regularizer, count, needed, (name, tensor))
            tails[tensor] = leave_slices(tail, needed, [linear.experts[i] for i in equal.get(tensor, ())])
    del covariances

    rows: list[dict[str, Any]] = []
    with _all_or_nothing() as write:
        for tensor in list(tails):
            parameter, tail = model.get_parameter(tensor), tails.pop(tensor)
            with advising(f"{name}: purifying {tensor}", parameter.device):
                purified = purify_weight(
                    parameter.detach(),
                    bases.get(tensor),
                    tail,
                    [_drop(linears[tensor], rank_ratio)] * len(tail["slices"]),
                    transposed=linears[tensor].transposed,
                    target=target,
                    dtype=parameter.dtype,
                    row={"tensor": tensor, "output": tensor, "model": name},
                )
                write(parameter, purified["tensor"])
            rows += purified["stats"]
            left_as_they_are |= purified["left_as_they_are"]
    report = {"tensors": len(model.state_dict()), "purified": rows, "models": {name: {"left_as_they_are": left_as_they_are}}}
    if rows:
        LOG.info(summary(report))
    for line in left_experts(report) + left_weights(report) + warnings(report):
        LOG.warning(line)
    return rows


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Yields a function that writes to a parameter. If the context ends in an error, all parameters get their old values back."""
    originals: list[tuple[Tensor, Tensor]] = []

    def overwrite(parameter: Tensor, values: Tensor) -> None:
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            parameter.copy_(values)

    def write(parameter: Tensor, values: Tensor) -> None:
        originals.append((parameter, parameter.detach().to("cpu", copy=True)))
        overwrite(parameter, values)

    try:
        yield write
    except BaseException:
        for parameter, values in originals:
            overwrite(parameter, values)
        raise


def _drop(linear: Linear, rank_ratio: float) -> int:
    return fair_share(min(linear.shape), rank_ratio)


def _choose(
    model: transformers.PreTrainedModel, rank_ratio: float, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Linear]:
    """The linear layers to purify, by the names of their weights."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"model must be one of transformers, not {type(model).__name__}; merge adapters into it first")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters, which would not be purified; merge them into its weights first")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None):
        raise ValueError("the model is quantised; load it in float16, bfloat16 or float32")
    if isinstance(rank_ratio, bool) or not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio must be a share of components, 0 < x <= 1, not {rank_ratio!r}")
    if isinstance(include, str) or isinstance(exclude, str):
        raise ValueError("include and exclude must be lists of parts of names, not one string")
    linears, _, _ = find_linears(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern, names in [*((p, linears) for p in include), *((p, parameters) for p in exclude)]:
        if not any(pattern in tensor for tensor in names):
            raise ValueError(f"{pattern!r} is part of no {'linear weight' if names is linears else 'parameter'}'s name")
    names: dict[int, list[str]] = {}  # all names of each parameter, which several layers may share
    for tensor, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(tensor)

    def named(tensor: str, patterns: Sequence[str]) -> bool:
        return any(pattern in name for pattern in patterns for name in names[id(parameters[tensor])])

    chosen = {
        tensor: linear
        for tensor, linear in linears.items()
        if tensor == names[id(parameters[tensor])][0]
        and (not include or named(tensor, include))
        and not named(tensor, exclude)
        and _drop(linear, rank_ratio)
    }
    if not chosen:
        raise ValueError("no weight would be purified; widen rank_ratio, include or exclude")
    for tensor in chosen:
        if parameters[tensor].is_meta:
            raise ValueError(f"{tensor} is not in memory (offloaded); load the model without offloading")
    return chosen


def _base_tensors(base: nn.Module | Tensors | None, linears: dict[str, Linear], model: nn.Module) -> Tensors:
    """The base model's weight of each layer."""
    if base is None:
        return {}
    state = base.state_dict() if isinstance(base, nn.Module) else base
    tensors = {}
    for tensor in linears:
        parameter = model.get_parameter(tensor)
        if tensor not in state or state[tensor].shape != parameter.shape:
            in_base = f"of shape {tuple(state[tensor].shape)}" if tensor in state else "missing"
            raise ValueError(f"base: {tensor} is {in_base}, where the model has one of shape {tuple(parameter.shape)}")
        if state[tensor].is_meta:
            raise ValueError(f"base: {tensor} is not in memory (offloaded); load the base without offloading")
        tensors[tensor] = state[tensor].detach()
    return tensors


def _regularization(given: float | Mapping[str, float] | None) -> Any:
    if given is None:
        return PaveConfig.model_fields["regularization"].default
    try:
        return TypeAdapter(Regularization).validate_python(dict(given) if isinstance(given, Mapping) else given)
    except ValidationError as error:
        raise ValueError(f"regularization: {error.errors()[0]['msg']} (got {given!r})") from None


def _measure(
    model: transformers.PreTrainedModel, layers: list[str], batches: list[Batch], name: str, quiet: bool
) -> MeasuredCovariances:
    apart: frozenset[str] = frozenset()
    unpadded = False
    remedy = "Give smaller batches, or fewer or shorter samples; or leave large models to a merge with a `pave:` block"
    with _inference(model), advising(f"{name}: calibrating", model.device, remedy):
        while True:
            try:
                device = str(model.device)
                measured = measure_model(model, layers, name, batches, apart, unpadded, device, quiet)
                by_layer = {layer: covariance for names, covariance in measured for layer in names}
                return MeasuredCovariances(by_layer, share=False)
            except DivergedError as error:
                apart |= {error.role}
            except NotFiniteError as error:
                raise explained(error, name, model.dtype, model.named_parameters()) from None
            except UnalignedInputError:  # padding cannot be told from tokens in one of the layers
                batches, unpadded = [as_batch(model, single) for batch in batches for single in one_by_one(batch)], True


@contextlib.contextmanager
def _inference(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Switch off dropout and the cache of keys and values; afterwards the model is as it was."""
    modes = {module: module.training for module in model.modules()}
    cached = getattr(model.config, "use_cache", None)
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if cached is not None:
            model.config.use_cache = cached
