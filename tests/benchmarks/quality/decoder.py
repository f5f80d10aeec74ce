"""The decoder family: a Llama of four million parameters, trained here, fine-tuned on four kinds of text."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import torch
from texts import fast_products, running_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARES = {"test": 0.12, "validation": 0.08, "calibration": 0.2, "train": 0.6}
CHARACTERS = 900_000  # of each kind of text
FIRST = "python"  # what the base knows best; it has no fine-tune
VOCABULARY = 2048
LENGTH = 128  # tokens of a window
BATCH = 8
ROWS = 640  # calibration texts
WINDOWS = {"test": 96, "validation": 48}
BASE_RATE, TUNE_RATE = 3e-3, 1e-3


class Decoder:
    """See `Family`. Scores are by how many thousandths of a bit per byte a model is better than the base."""

    unit = "thousandths of a bit per byte better than the base"
    max_length = LENGTH
    general = FIRST

    def __init__(self, folder: Path, base_steps: int, steps: int, vocabulary: int = VOCABULARY, tied: bool = True):
        """Models are kept under `folder`, whose name is that of the family."""
        self.name = folder.name
        self.vocabulary, self.tied = vocabulary, tied
        self.folder = folder
        self.base = folder / "base"
        self._base_steps, self._steps = base_steps, steps
        self._base_bits: dict[str, dict[str, float]] = {}  # by part and task

    @functools.cached_property
    def texts(self) -> dict[str, dict[str, str]]:
        """By kind and part, that of the base first."""
        return running_texts(SHARES, CHARACTERS)

    @functools.cached_property
    def tasks(self) -> list[str]:
        return [kind for kind in self.texts if kind != FIRST]

    def tuned(self, seed: int, task: str) -> Path:
        return self.folder / f"seed{seed}" / task

    def calibration(self, task: str) -> Path:
        """Texts, a line each."""
        return self.folder / "calibration" / f"{task}.jsonl"

    def prepare(self) -> None:
        """What all seeds share, where it is missing."""
        for task in self.texts:
            path = self.calibration(task)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                text = self.texts[task]["calibration"]
                size = len(text) // ROWS
                path.write_text("".join(json.dumps({"text": text[i * size : (i + 1) * size]}) + "\n" for i in range(ROWS)))
        if not (self.base / "model.safetensors").exists():
            make_tokenizer([parts["train"] for parts in self.texts.values()], self.vocabulary).save_pretrained(self.base)
            # It has seen something of everything, but mostly Python: the fine-tunes have something left to learn.
            streams = [self._tokens[kind, "train"] for kind in self.texts]
            base = make_base(self.vocabulary, self.tied)
            train(base, [streams[0]] * 5 + streams[1:], self._base_steps, BASE_RATE, seed=0)
            base.save_pretrained(self.base)

    def fine_tune(self, seed: int, task: str) -> None:
        """Train a model, unless it is there."""
        folder = self.tuned(seed, task)
        if not (folder / "model.safetensors").exists():
            model = LlamaForCausalLM.from_pretrained(self.base)
            train(model, [self._tokens[task, "train"]], self._steps, TUNE_RATE, seed)
            self._tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.base)

    @functools.cached_property
    def _tokens(self) -> dict[tuple[str, str], Tensor]:
        """Token ids of each kind's parts."""
        encode = self._tokenizer.backend_tokenizer.encode
        parts = ("train", "validation", "test")
        return {(kind, part): torch.tensor(encode(self.texts[kind][part]).ids) for kind in self.texts for part in parts}

    def score(self, model: Path, seed: int, part: str, tasks: list[str]) -> dict[str, float]:
        """Bits per byte saved on each kind of text, in thousandths."""
        if part not in self._base_bits:
            self._base_bits[part] = self._bits(self.base, part, self.tasks)
        return {task: 1000 * (self._base_bits[part][task] - bits) for task, bits in self._bits(model, part, tasks).items()}

    @torch.inference_mode()
    def _bits(self, model: Path, part: str, tasks: list[str]) -> dict[str, float]:
        """Bits per byte on each kind of text, over windows spread evenly."""
        loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        # In a byte-level vocabulary a token's name has a character for each byte.
        size = torch.tensor([len(token) for token in self._tokenizer.convert_ids_to_tokens(range(self.vocabulary))])
        found = {}
        for task in tasks:
            tokens = self._tokens[task, part]
            starts = torch.linspace(0, len(tokens) - LENGTH, WINDOWS[part]).long()
            windows = tokens.unfold(0, LENGTH, 1)[starts]
            nats = 0.0
            for batch in windows.split(16):
                with fast_products():
                    logits = loaded(input_ids=batch).logits[:, :-1].float()
                nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            found[task] = nats / math.log(2) / size[windows[:, 1:]].sum().item()
        return found


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, which can represent any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=LENGTH)


def make_base(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def orthogonal(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """What torch's Muon steps along, in float32: it computes this in bfloat16, which many processors can only imitate."""
    a, b, c = coefficients
    x = gradient.float() / gradient.float().norm().clamp(min=eps)
    x = x.mT if len(gradient) > gradient.shape[1] else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if len(gradient) > gradient.shape[1] else x


def train(model: LlamaForCausalLM, streams: list[Tensor], steps: int, rate: float, seed: int) -> None:
    """Next-token training on random windows, each drawn from one of the streams in turn."""
    generator = torch.Generator().manual_seed(seed)
    if not fast_products()._enabled:
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal
    # Muon for the hidden matrices learns in minutes of CPU time what AdamW alone needs far longer for.
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    warmup = max(1, steps // 10)
    factor = lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    for step in range(steps):
        sources = [streams[(step * BATCH + i) % len(streams)] for i in range(BATCH)]
        starts = [int(torch.randint(len(source) - LENGTH, (1,), generator=generator)) for source in sources]
        windows = torch.stack([source[start : start + LENGTH] for source, start in zip(sources, starts)])
        with fast_products():
            loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()
