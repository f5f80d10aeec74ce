"""How near a merge is to each expert on held-out rows, row by row, written down without the product: the reference for it.

Everything is in float32. A row's numbers go by their names:

    kl          KL(expert || merged) in nats, added up over the row's tokens; on the encoder of the classes of the row, with the
                expert's head on the mean of the last hidden states: what that classifier predicts
    kl@k        of the decoder: the same, where all tokens but the expert's k likeliest are one
    cosine      of the encoder: 1 - cosine of the means of the last hidden states, less their mean over the rows
    right       of the encoder: 1 where the class is right, else 0
    bits        of the decoder: of the row's tokens after the first
    bytes       of the decoder: of the same tokens
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from decoder import Decoder
from encoder import Encoder
from merging import Family
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM

BATCH = 16
TOP = (16, 64, 256, 1024)

Rows = dict[str, dict[str, list[float]]]  # by task and name


def held_out(family: Family, seed: int, task: str, drawn: int, rows: int) -> list[int]:
    """Numbers of calibration rows: those that follow the ones that are drawn for C, in the same shuffle."""
    count = sum(1 for _ in family.calibration(task).open())
    return np.random.default_rng(seed).permutation(count)[drawn : drawn + rows].tolist()


def texts_of(family: Family, task: str, numbers: list[int]) -> list[str]:
    lines = family.calibration(task).read_text().splitlines()
    return [json.loads(lines[number])["text"] for number in numbers]


class _Rows:
    """Texts of one task as tokens, in batches of texts that are about as long."""

    def __init__(self, family: Family, seed: int, task: str, drawn: int, rows: int):
        self.numbers = held_out(family, seed, task, drawn, rows)
        tokenizer = AutoTokenizer.from_pretrained(family.base)
        texts = texts_of(family, task, self.numbers)
        self.ids = tokenizer(texts, truncation=True, max_length=family.max_length)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Rows, their tokens and what is no padding, both (rows, tokens)."""
        order = sorted(range(len(self)), key=lambda i: len(self.ids[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            ids = [torch.tensor(self.ids[i]) for i in chosen]
            mask = [torch.ones_like(row) for row in ids]
            pad = torch.nn.utils.rnn.pad_sequence
            yield chosen, pad(ids, batch_first=True), pad(mask, batch_first=True)


def divergence(expert: Tensor, merged: Tensor) -> Tensor:
    """KL of log-probabilities, (..., tokens) to (...)."""
    return (expert.exp() * (expert - merged)).sum(-1)


def coarse(logs: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities of some tokens, (..., k) indices, and of all others together, (..., k + 1)."""
    kept = logs.gather(-1, top)
    rest = (1 - kept.exp().sum(-1, keepdim=True, dtype=torch.float64)).clamp(min=1e-12).log()
    return torch.cat([kept.double(), rest], dim=-1)


class DecoderLikeness:
    """Distances to the fine-tunes of one seed."""

    def __init__(self, family: Decoder, seed: int, drawn: int, rows: int):
        self.rows = {task: _Rows(family, seed, task, drawn, rows) for task in family.tasks}
        tokenizer = AutoTokenizer.from_pretrained(family.base)
        # In a byte-level vocabulary a token's name has a character for each byte.
        self._size = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(family.vocabulary))])
        self._experts = {}  # the last hidden states of each batch, and the head
        for task, rows_of in self.rows.items():
            expert = LlamaForCausalLM.from_pretrained(family.tuned(seed, task), dtype=torch.float32).eval()
            with torch.inference_mode():
                states = [expert.model(input_ids=ids).last_hidden_state for _, ids, _ in rows_of.batches()]
            self._experts[task] = states, expert.lm_head.weight

    @torch.inference_mode()
    def measure(self, model: Path) -> Rows:
        loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        found = {}
        for task, rows in self.rows.items():
            of_task = defaultdict(lambda rows=rows: [0.0] * len(rows))
            states, head = self._experts[task]
            for (chosen, ids, mask), state in zip(rows.batches(), states):
                merged = loaded(input_ids=ids).logits.log_softmax(-1)
                expert = linear(state, head).log_softmax(-1)
                for i, values in zip(chosen, self._of_rows(expert, merged, ids, mask)):
                    for name, value in values.items():
                        of_task[name][i] = value
            found[task] = dict(of_task)
        return found

    def _of_rows(self, expert: Tensor, merged: Tensor, ids: Tensor, mask: Tensor) -> Iterator[dict[str, float]]:
        order = expert.topk(min(max(TOP), expert.shape[-1]), dim=-1).indices
        for i, real in enumerate(mask.bool()):
            p, q, following = expert[i, real], merged[i, real], ids[i, real][1:]
            values = {"kl": divergence(p, q).sum().item()}
            for k in TOP:
                top = order[i, real][:, :k]
                values[f"kl@{k}"] = divergence(coarse(p, top), coarse(q, top)).sum().item()
            values["bits"] = -q[:-1].gather(-1, following[:, None]).sum().item() / math.log(2)
            values["bytes"] = float(self._size[following].sum())
            yield values


class EncoderLikeness:
    """Distances to the fine-tunes of one seed."""

    def __init__(self, family: Encoder, seed: int, drawn: int, rows: int):
        self.rows = {task: _Rows(family, seed, task, drawn, rows) for task in family.tasks}
        self._classes, self._heads, self._experts = {}, {}, {}
        for task, rows_of in self.rows.items():
            labels = [number for _, number in family.tasks[task].parts["calibration"]]
            self._classes[task] = torch.tensor([labels[number] for number in rows_of.numbers])
            self._heads[task] = torch.load(family.tuned(seed, task) / "head.pt")
            self._experts[task] = self._states(self._load(family.tuned(seed, task)), rows_of)

    def _load(self, model: Path) -> BertModel:
        return BertModel.from_pretrained(model, dtype=torch.float32, add_pooling_layer=False).eval()

    @torch.inference_mode()
    def _states(self, body: BertModel, rows: _Rows) -> list[Tensor]:
        """The last hidden states of each row, (tokens, hidden)."""
        found = {}
        for chosen, ids, mask in rows.batches():
            states = body(input_ids=ids, attention_mask=mask).last_hidden_state
            found |= {i: state[real.bool()] for i, state, real in zip(chosen, states, mask)}
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def measure(self, model: Path) -> Rows:
        body = self._load(model)
        return {task: self._of_task(task, self._states(body, rows)) for task, rows in self.rows.items()}

    def _of_task(self, task: str, merged: list[Tensor]) -> dict[str, list[float]]:
        expert, head = self._experts[task], self._heads[task]

        def predicted(states: Tensor) -> Tensor:
            return linear(states, head["weight"], head["bias"]).log_softmax(-1)

        pooled, pooled_expert = (torch.stack([states.mean(0) for states in of]) for of in (merged, expert))
        centred, centred_expert = (features - features.mean(0) for features in (pooled, pooled_expert))
        logs = predicted(pooled)
        return {
            "kl": divergence(predicted(pooled_expert), logs).tolist(),
            "cosine": (1 - cosine_similarity(centred_expert, centred)).tolist(),
            "right": (logs.argmax(1) == self._classes[task]).float().tolist(),
        }
