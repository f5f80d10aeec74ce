"""The experts of a mixture: one 3-D parameter holds a matrix for each, and each sees only the tokens that are routed to it.

transformers marks every such module with its decorator `use_experts_implementation`. All implementations that this decorator
chooses from have to compute what `run_experts` computes. The marks give the layout of the weights, so nothing here depends on
the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold experts, by their paths."""
    marks = ("has_gate", "has_bias", "is_transposed")
    return {path: module for path, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)}


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of the parameters that multiply each token, in this order; each (E, d_out, d_in), or (E, d_in, d_out)."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def run_experts(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    counted: Tensor | None,
    see: Callable[[str, int, Tensor], None],
) -> Tensor:
    """The output of a module of experts, computed one expert at a time.

    Which tokens each expert gets is looked up once for all of them: an accelerator has to be waited for at every look.

    Args:
        hidden: (tokens, width).
        top_k_index: (tokens, k), the experts that each token is routed to.
        top_k_weights: (tokens, k).
        counted: which tokens count, bool (tokens,); None if all do.
        see: is called with a projection's name, the expert, and those of its input rows (n, d_in) that count. It may keep them.
            Experts that get no token are left out.
    """
    first, last = projections(experts)
    result = torch.zeros_like(hidden)
    for expert, tokens, choices, counting in _routed(top_k_index, getattr(experts, first).shape[0], counted):
        rows = hidden[tokens]
        see(first, expert, rows if counting is None else rows[counting])
        rows = _project(experts, first, expert, rows)
        rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
        see(last, expert, rows if counting is None else rows[counting])
        rows = _project(experts, last, expert, rows)
        if getattr(experts, "has_post_expert_norm", False):
            rows = experts.post_expert_norm(rows)
        rows = rows * top_k_weights[tokens, choices, None]
        result.index_add_(0, tokens, rows.to(result.dtype))
    return result


def _routed(top_k_index: Tensor, count: int, counted: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Each expert that gets a token; the numbers of its tokens, ascending; which of a token's k choices it is; and which of these
    tokens count, None if all do.
    """
    numbers, order = top_k_index.flatten().sort(stable=True)
    tokens, choices = order // top_k_index.shape[1], order % top_k_index.shape[1]
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted[tokens]
    counted_before = nn.functional.pad(counted.cumsum(0), (1, 0))
    counted_first = (~counted).to(torch.uint8).argsort(stable=True)
    starts = torch.searchsorted(numbers, torch.arange(count + 1, dtype=numbers.dtype, device=numbers.device))
    starts, counted_starts = torch.stack((starts, counted_before[starts])).tolist()
    for expert, ((start, stop), (first, last)) in enumerate(zip(pairwise(starts), pairwise(counted_starts))):
        if start < stop:
            rows = None if last - first == stop - start else counted_first[first:last] - start
            yield expert, tokens[start:stop], choices[start:stop], rows


def _project(experts: nn.Module, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(rows, weight.mT if experts.is_transposed else weight, bias)


def find_routers(model: nn.Module, experts: dict[str, nn.Module]) -> set[str]:
    """The names of the weights that choose among experts.

    Such a weight is the only matrix of a module beside the experts, and has one row for each. A shared expert may have as many
    rows, but it has several matrices.
    """
    routers = set()
    for path, module in experts.items():
        count = getattr(module, projections(module)[0]).shape[0]
        parent = path.rpartition(".")[0]
        for name, sibling in model.get_submodule(parent).named_children():
            matrices = {leaf: value for leaf, value in sibling.named_parameters() if value.dim() == 2}
            if len(matrices) == 1 and next(iter(matrices.values())).shape[0] == count:
                routers.add(".".join(filter(None, (parent, name, next(iter(matrices))))))
    return routers


@dataclass(frozen=True)
class Part:
    """Where transformers puts a tensor of one expert in its parameter of all experts.

    Attributes:
        parameter: the name of the parameter.
        expert: the number of the expert.
        parts: how many such tensors make up the expert's matrix, joined along `dim` of the parameter.
    """

    parameter: str
    expert: int
    parts: int
    dim: int


def part_of_experts(conversions: list[WeightTransform], name: str) -> Part | None:
    """The place of a tensor of this name, if transformers stacks such tensors and does nothing else to them."""
    renamings = [transform for transform in conversions if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in conversions if isinstance(transform, WeightConverter)]
    renamed = apply_renamings(name, renamings)
    parameter, pattern = apply_converters(renamed, converters)
    if pattern is None:
        return None
    converter = next(converter for converter in converters if pattern in converter.source_patterns)
    stack, *join = converter.operations
    number = re.search(pattern.replace("*.", r"(\d+)\."), renamed)
    stacked = isinstance(stack, MergeModulelist) and stack.dim == 0
    joined = len(join) == 1 and isinstance(join[0], Concatenate)
    if not stacked or not (joined or not join) or not number or not number.groups():
        return None
    return Part(parameter, int(number.group(1)), len(converter.source_patterns), join[0].dim if join else 1)
