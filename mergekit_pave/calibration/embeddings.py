"""Which weights of a model are those of token embeddings."""

from __future__ import annotations

from torch import nn

from mergekit_pave.calibration.models import backbone

SIDES = ("input_ids", "decoder_input_ids")


def find_embeddings(model: nn.Module, has_decoder: bool) -> dict[str, tuple[str, ...]]:
    """By the name of a token embedding's weight, the inputs whose ids look it up. A tied weight has several names.

    Args:
        has_decoder: it is an encoder-decoder model, whose decoder reads ids of its own.
    """
    parts = {"input_ids": model}
    if has_decoder:
        base = backbone(model)
        parts = dict(zip(SIDES, (base.get_encoder(), base.get_decoder())))
    sides: dict[int, tuple[str, ...]] = {}
    for side, part in parts.items():
        embedding = _embedding_of(part)
        if isinstance(embedding, nn.Embedding):  # an image model may embed patches by a convolution
            sides[id(embedding.weight)] = (*sides.get(id(embedding.weight), ()), side)
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: sides[id(parameter)] for name, parameter in parameters if id(parameter) in sides}


def _embedding_of(part: nn.Module) -> nn.Module | None:
    try:
        return part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
