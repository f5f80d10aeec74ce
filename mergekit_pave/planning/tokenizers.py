"""What makes model inputs of samples, and whether the token ids that it makes are those that the models know."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from mergekit.common import ModelReference

from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.data import Sample
from mergekit_pave.calibration.token_rows import SIDES
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.planning.merge import Merge, Reading
from mergekit_pave.planning.source import Source


def load_processor(source: Source, samples: list[Sample], reading: Reading) -> Any:
    """A tokenizer, an image processor, or one for both.

    Raises:
        PaveError: the model has none that can be loaded.
    """
    kind, loader = "tokenizer", transformers.AutoTokenizer
    if any(sample.image is not None for sample in samples):
        has_texts = any(sample.text is not None for sample in samples)
        kind = "processor" if has_texts else "image processor"
        loader = transformers.AutoProcessor if has_texts else transformers.AutoImageProcessor
    return _load(kind, loader, source.model, reading)


def load_tokenizer(model: ModelReference, reading: Reading, purpose: str) -> Any:
    """
    Args:
        purpose: what for, for the message.

    Raises:
        PaveError: the model has none that can be loaded.
    """
    return _load("tokenizer", transformers.AutoTokenizer, model, reading, purpose)


def _load(kind: str, loader: Any, model: ModelReference, reading: Reading, purpose: str = "calibration needs it") -> Any:
    # An adapter may bring a tokenizer of its own.
    for path in filter(None, (model.lora, model.model)):
        try:
            return loader.from_pretrained(
                path.path,
                revision=path.revision,
                cache_dir=reading.transformers_cache,
                trust_remote_code=reading.runtime.trust_remote_code,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            failure = error
    reason = in_a_line(failure)
    raise PaveError(f"{model}: its {kind} cannot be loaded, and {purpose}: {reason}") from failure


def check_token_ids(source: Source, encoded: list[Encoded]) -> None:
    """
    Raises:
        PaveError: the model does not know one of the ids.
    """
    largest = max(token_ids(encoded), default=0)
    vocabulary = source.architecture.vocabulary
    if vocabulary and largest >= vocabulary:
        raise PaveError(
            f"{source.model}: its tokenizer gives the token id {largest}, but the model knows only {vocabulary}; the tokenizer "
            "beside it belongs to another model"
        )


def check_meanings(source: Source, processor: Any, encoded: list[Encoded], merge: Merge) -> None:
    """Refuse token ids that stand for other tokens in the merged model, which refining shows the same ids.

    Raises:
        PaveError: naming the first such id, or saying that nobody can know.
    """
    if not (ids := token_ids(encoded)):
        return
    advice = f"set `tokenizer: {{source: {source.model}}}`, or leave `refine` out"
    if merge.tokenizer is None:
        raise PaveError(
            f"pave.refine: the merged model gets a new tokenizer, in which the token ids of {source.model} may be other tokens; "
            f"{advice}"
        )
    if merge.tokenizer == source.model:
        return
    purpose = f"refining compares it with that of {source.model}"
    theirs = load_tokenizer(merge.tokenizer, merge, purpose)
    if conflict := find_conflict(ids, getattr(processor, "tokenizer", processor), theirs):
        raise PaveError(
            f"pave.refine: the token id {conflict.token} is {conflict.ours!r} in the samples of {source.model}, but "
            f"{conflict.theirs!r} for the merged model, which has the tokenizer of {merge.tokenizer}; {advice}"
        )


def token_ids(encoded: list[Encoded]) -> set[int]:
    """All token ids in samples."""
    return {token for sample in encoded for side in SIDES for token in sample.inputs.get(side, ())}


class Conflict(NamedTuple):
    """A token id that is one token to one tokenizer, and another or none to the other."""

    token: int
    ours: str | None
    theirs: str | None


def find_conflict(ids: set[int], ours: Any, theirs: Any) -> Conflict | None:
    """The first of these ids that the two tokenizers read otherwise."""
    for token in sorted(ids):
        meanings = [_meaning(token, tokenizer) for tokenizer in (ours, theirs)]
        if meanings[0] != meanings[1]:
            return Conflict(token, *meanings)
    return None


def _meaning(token: int, tokenizer: Any) -> str | None:
    try:
        return tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError):  # some tokenizers have None for an id that they do not know
        return None
