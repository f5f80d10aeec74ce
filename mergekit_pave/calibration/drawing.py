"""Which samples a model is run on, and which of their tokens count."""

from __future__ import annotations

import torch

from mergekit_pave.calibration.architecture import Architecture
from mergekit_pave.calibration.data import share_evenly

TOKENS = 2048  # that count, unless layers are so wide, or experts so many, that they need more
ENOUGH = 8  # a layer whose inputs are 8 times as wide as there are tokens is measured well enough: see tests/benchmarks
_AN_EXPERT = 256  # tokens that an expert of a mixture is to see on average
_SPREAD = 64  # samples that a model is run on at least: tokens of one sample repeat each other
RUN = 4  # tokens that it is run on at least for each that counts
RULES = [_SPREAD, RUN]  # what is drawn depends on these, and not on settings alone


def default_tokens(architecture: Architecture) -> int:
    """How many tokens are to count. Of each side of an encoder-decoder model so many do."""
    linears = architecture.linears.values()
    widest = max((linear.shape[1] for linear in linears), default=0)
    experts = max((len(linear.experts) for linear in linears if linear.stacked), default=0)
    return max(TOKENS, widest // ENOUGH, _AN_EXPERT * experts // max(1, architecture.experts_a_token))


def to_run(lengths: list[int], budget: int, seed: int) -> list[bool]:
    """Which samples a model is run on: some at random, enough of them, with several times as many tokens as count."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    run, left = [False] * len(lengths), RUN * budget
    for number, i in enumerate(order):
        run[i] = left > 0 or number < _SPREAD
        left -= lengths[i]
    return run


def draw_positions(lengths: list[int], budget: int, seed: int) -> list[list[int]]:
    """The positions of each sample that count, at most `budget` together, drawn evenly over the samples.

    Of a sample that is shorter than an even share all positions count, and the others share the rest.
    """
    quotas = share_evenly(lengths, budget)
    generator = torch.Generator().manual_seed(seed)
    return [
        list(range(length)) if quota == length else torch.randperm(length, generator=generator)[:quota].sort().values.tolist()
        for length, quota in zip(lengths, quotas)
    ]
