"""What a model gives that can be compared with what another gives: scores of classes, or features."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import transformers

from mergekit_pave.calibration.architecture import Architecture


class Places(Enum):
    """Where a model gives scores."""

    TOKENS = "tokens"
    ROWS = "rows"
    NOWHERE = "features"  # it has no head whose scores are probabilities, so its features are compared


@dataclass(frozen=True)
class Form:
    """What is compared.

    Attributes:
        places: where there are scores.
        is_language_model: its scores are of tokens, and its head is merged like everything else. Of any other model each expert
            keeps its own head.
        labels: how many labels a row may have at once, each of which is a place; 1 if they exclude each other.
        head: see `Architecture`.
        is_generative: the scores at a token are those of the next.
    """

    places: Places
    is_language_model: bool = False
    labels: int = 1
    head: str | None = None
    is_generative: bool = False


def form_of(architecture: Architecture, config: transformers.PretrainedConfig) -> Form:
    """What a model gives. The name of its class says it."""
    name = architecture.cls.__name__
    if architecture.cls.can_generate():
        return Form(Places.TOKENS, is_language_model=True, head=architecture.head, is_generative=True)
    if "MaskedLM" in name:
        return Form(Places.TOKENS, is_language_model=True)
    if "Classification" not in name or config.num_labels < 2:  # a single label is a regression
        return Form(Places.NOWHERE)
    if "Token" in name:
        return Form(Places.TOKENS)
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    return Form(Places.ROWS, labels=config.num_labels if several else 1)
