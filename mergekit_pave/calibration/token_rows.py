"""Which weights of a model have a row for each token: token embeddings, and the heads of language models."""

from __future__ import annotations

from torch import nn

from mergekit_pave.calibration.models import backbone

SIDES = ("input_ids", "decoder_input_ids")
PREDICTED = "predicted"


def find_token_rows(model: nn.Module, has_decoder: bool) -> dict[str, tuple[str, ...]]:
    """By the name of a weight, the tokens that use its rows: those of the model's inputs, or those that are to be predicted.

    A head that is tied with an embedding counts as that embedding. A tied weight has several names.

    Args:
        has_decoder: it is an encoder-decoder model, whose decoder reads ids of its own.
    """
    parts = {"input_ids": model}
    if has_decoder:
        base = backbone(model)
        parts = dict(zip(SIDES, (base.get_encoder(), base.get_decoder())))
    uses: dict[int, tuple[str, ...]] = {}
    for side, part in parts.items():
        embedding = _embedding_of(part)
        if isinstance(embedding, nn.Embedding):  # an image model may embed patches by a convolution
            uses[id(embedding.weight)] = (*uses.get(id(embedding.weight), ()), side)
    head = model.get_output_embeddings()
    # A model that cannot generate text predicts something else than the next token, such as a masked one.
    if uses and isinstance(head, nn.Linear) and model.can_generate():
        uses.setdefault(id(head.weight), (PREDICTED,))
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: uses[id(parameter)] for name, parameter in parameters if id(parameter) in uses}


def _embedding_of(part: nn.Module) -> nn.Module | None:
    try:
        return part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
