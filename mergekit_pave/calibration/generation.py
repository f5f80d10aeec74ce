"""Samples that a causal language model writes itself, as draws from what it has learned.

A model without a chat template writes texts. One with a chat template writes what a user says and then its reply, as in Magpie
(arXiv 2406.08464). If its tokenizer has no token to begin with, each text begins with a random one, as in LLM-QAT (arXiv
2305.17888). Every token is drawn from the model's own probabilities, at temperature 1.

Texts are written in batches, each of which is kept in the cache as soon as it is complete. So a run that was stopped goes on
where it was, and more texts add to those that are there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig

from mergekit_pave import cache, versions
from mergekit_pave.calibration.data import Sample
from mergekit_pave.calibration.job import Runtime
from mergekit_pave.calibration.models import inference_dtype, load_model
from mergekit_pave.calibration.starts import Start
from mergekit_pave.core.failures import is_out_of_memory, ran_out
from mergekit_pave.errors import PaveError
from mergekit_pave.progress import bar

LOG = logging.getLogger(__name__)

_FILE = "tokens.safetensors"


@dataclass(frozen=True)
class Generation:
    """The texts of one model, numbered from 0 on.

    Attributes:
        name: the model's name, for messages.
        folder: of its checkpoint.
        cls, config: transformers'.
        start: what a text begins with.
        longest: the most tokens of a text.
        batch_size: how many texts are written at a time.
        entry: the folder in the cache. Its name is the key of everything that determines the texts.
        seed: differs between models, so that two that are almost the same do not write the same.
        num_weights: of the whole model, with a head even if that is tied.
        kept: numbers that attention keeps of each token.
    """

    name: str
    folder: str
    cls: Any
    config: transformers.PretrainedConfig
    start: Start
    longest: int
    batch_size: int
    entry: Path
    seed: str
    num_weights: int
    kept: int
    runtime: Runtime

    def missing(self, first: int, count: int) -> list[int]:
        """The batches of these texts that the cache lacks, or that are damaged there."""
        return [number for number in self._batches(first, count) if not self._has(number)]

    @property
    def memory(self) -> int:
        """Bytes that writing takes."""
        kept = self.batch_size * self.longest * self.kept
        return (self.num_weights + kept) * inference_dtype(self.config, self.runtime.device).itemsize

    def samples(self, first: int, count: int) -> list[Sample]:
        """These texts. What the cache lacks is written now.

        Raises:
            PaveError: the model cannot be run, or memory runs out.
        """
        if missing := self.missing(first, count):
            self._write(missing)
        batches = self._batches(first, count)
        texts = [text for number in batches for text in self._read(number)]
        skipped = first - batches.start * self.batch_size
        return [self._sample(number, text) for number, text in enumerate(texts[skipped : skipped + count], first)]

    def _sample(self, number: int, tokens: list[int]) -> Sample:
        origin = f"text {number} of {self.name}"
        if len(tokens) <= max(1, len(self.start.tokens)):
            return Sample(origin, problem="empty", blank=True)
        return Sample(origin, tokens=tokens)

    def _batches(self, first: int, count: int) -> range:
        return range(first // self.batch_size, -(-(first + count) // self.batch_size))

    def _artefact(self, number: int) -> cache.Artefact:
        return cache.Artefact(self.entry / f"{number:05}")

    def _has(self, number: int) -> bool:
        try:
            self._read(number)  # they are few, and are read anyway
        except cache.DamagedError:
            return False
        return True

    def _read(self, number: int) -> list[list[int]]:
        tensors = self._artefact(number).read(_FILE)
        return [part.tolist() for part in tensors["tokens"].split(tensors["lengths"].tolist())]

    def _write(self, missing: list[int]) -> None:
        LOG.info(
            "%s: writes %d texts of its own of at most %d tokens",
            self.name,
            len(missing) * self.batch_size,
            self.longest,
        )
        try:
            model = load_model(self.cls, self.config, self.folder, self.runtime.device, with_head=True)
            self._check_runs(model)
            with bar(len(missing), f"Generating text of {self.name}", "batches", hidden=self.runtime.quiet) as progress:
                for number in missing:
                    artefact = self._artefact(number)
                    with artefact.lock():
                        if not self._has(number):  # another process may have made it meanwhile
                            with artefact.discarded_on_error():
                                self._store(artefact, self._texts(model, number))
                    progress.update()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            halved = max(1, self.batch_size // 2)
            remedy = (
                f"The whole model has to fit, and what attention keeps of {self.batch_size} texts of {self.longest} tokens. Set "
                f"pave.calibration.batch_size: {halved}, use another device, or name a data set: then a model runs layer by layer"
            )
            raise ran_out(f"{self.name}: writing its own text", self.runtime.device, remedy) from error

    def _store(self, artefact: cache.Artefact, texts: list[list[int]]) -> None:
        lengths = torch.tensor([len(text) for text in texts])
        tokens = torch.tensor([token for text in texts for token in text])
        artefact.complete(
            {
                "files": {_FILE: artefact.write(_FILE, {"tokens": tokens, "lengths": lengths})},
                "model": self.name,
                "generated": self.start.kind,
                "rows": len(texts),
                "tokens": len(tokens),
                "dtype": str(inference_dtype(self.config, self.runtime.device)).removeprefix("torch."),
                "versions": versions.installed(),
            }
        )

    @torch.inference_mode()
    def _check_runs(self, model: nn.Module) -> None:
        ids = torch.tensor([self.start.tokens or self.start.drawn[:1]], device=self.runtime.device)
        if not model(input_ids=ids).logits.isfinite().all():
            raise PaveError(
                f"{self.name}: its predictions are not finite (NaN or infinity), so it cannot write its own text. Check whether "
                "the model works at all; if it overflows in its precision, run it in float32, as on a CPU (without --cuda)"
            )

    def _texts(self, model: nn.Module, number: int) -> list[list[int]]:
        """The texts of one batch."""
        start, seed = self.start, int(cache.digest(self.seed, number)[:15], 16)
        beginnings = [list(start.tokens)] * self.batch_size
        if start.drawn:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randint(len(start.drawn), (self.batch_size,), generator=generator).tolist()
            beginnings = [[start.drawn[i]] for i in chosen]
        with _seeded(seed, self.runtime.device):
            texts = self._continued(model, beginnings)
            replied = [  # those whose user has said something, and has come to an end
                i
                for i, text in enumerate(texts)
                if start.reply and len(start.tokens) < len(text) < self.longest - len(start.reply)
            ]
            if replied:
                replies = self._continued(model, [[*texts[i], *start.reply] for i in replied])
                for i, text in zip(replied, replies):
                    texts[i] = text
        return texts

    @torch.inference_mode()
    def _continued(self, model: nn.Module, beginnings: list[list[int]]) -> list[list[int]]:
        """The same texts, with what the model writes up to a token that ends a text, which is left out."""
        width = max(map(len, beginnings))
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            max_new_tokens=self.longest - min(map(len, beginnings)),
            eos_token_id=list(self.start.stops) or None,
            pad_token_id=self.start.stops[0] if self.start.stops else 0,
            suppress_tokens=list(self.start.unknown) or None,
        )
        model.generation_config = GenerationConfig()  # or that of the checkpoint would fill what is not set here
        ids = torch.tensor([[0] * (width - len(text)) + text for text in beginnings])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in beginnings])
        device = self.runtime.device
        written = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        texts = []
        for beginning, row in zip(beginnings, written[:, width:].tolist()):
            end = next((i for i, token in enumerate(row) if token in self.start.stops), len(row))
            texts.append([*beginning, *row[:end]][: self.longest])
        return texts


@contextlib.contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Random numbers from a seed, without a trace in those that come afterwards: some merge methods draw some, too."""
    devices = range(torch.cuda.device_count()) if torch.device(device).type == "cuda" else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
