"""Tiny real models, tokenizers and data sets to merge, made with transformers and saved like any checkpoint."""

import json
import math
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_TOPICS = (
    "sum add count equal number seven nine twelve apple coin price cost half double total share each week hour more",
    "def return list index loop print value string import class lambda while break tuple dict key sort append range none",
    "patient doctor fever dose blood heart pain cure nurse clinic scan acute chronic tablet cough sleep diet lung skin test",
)
# Different sizes on purpose: few tokens are stored as rows, many as a triangle.
_ROWS = (40, 3, 20)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """An architecture, as the tests know it.

    Attributes:
        model: the name of its class.
        linears: a pattern of the weights of its backbone's linear layers, told by name so that nothing here depends on the
            package's own search.
        transposed: these weights are stored as (d_in, d_out).
    """

    model: str
    linears: str
    transposed: bool = False

    def is_linear(self, tensor: str) -> bool:
        return re.search(self.linears, tensor) is not None


KINDS = {
    "llama": Kind("LlamaForCausalLM", r"(q|k|v|o|gate|up|down)_proj\.weight$"),
    "gpt2": Kind("GPT2LMHeadModel", r"(c_attn|c_proj|c_fc)\.weight$", transposed=True),
    "bert": Kind("BertForSequenceClassification", r"(query|key|value|dense)\.weight$"),
}


@dataclass(frozen=True)
class Family:
    """A base model, three fine-tunes of it, and a data set for each fine-tune."""

    kind: str
    base: Path
    tuned: tuple[Path, ...]
    data: tuple[Path, ...]

    def is_linear(self, tensor: str) -> bool:
        return KINDS[self.kind].is_linear(tensor)


def make_family(kind: str, folder: Path, **settings) -> Family:
    """Write everything under a folder. The same call always writes the same numbers."""
    tokenizer = make_tokenizer(kind)
    base = make_model(KINDS[kind].model, model_config(kind, len(tokenizer), **settings))
    return save_family(kind, base, tokenizer, write_texts(folder), folder)


def save_family(kind: str, base: transformers.PreTrainedModel, processor, data: tuple[Path, ...], folder: Path) -> Family:
    """A base model with a fine-tune for each data set, all with the same tokenizer or image processor."""
    tuned = tuple(save(perturbed(base, seed=i + 1), processor, folder / f"tuned{i}") for i in range(len(data)))
    family = Family(kind, save(base, processor, folder / "base"), tuned, data)
    age(folder)
    return family


def age(folder: Path) -> None:
    """Make files old: what has just been written may change again, so samples from it are not remembered."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**12))


def write_texts(folder: Path) -> tuple[Path, ...]:
    """A data set for each topic."""
    return tuple(write_rows(folder / f"data{i}.jsonl", make_rows(topic, _ROWS[i], seed=i)) for i, topic in enumerate(_TOPICS))


def make_rows(topic: str, count: int, seed: int) -> list[dict]:
    """Rows with every kind of column, of one to two dozen words, so that batches need padding."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(topic.split(), k=rng.randint(least, most)))

    rows = []
    for i in range(count):
        chat = [{"role": "user", "content": words(1, 6)}, {"role": "assistant", "content": words(1, 12)}]
        rows.append({"text": words(1, 24), "question": words(1, 8), "answer": words(1, 8), "number": i, "conversation": chat})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase | None, path: Path) -> Path:
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def published_shapes(config: transformers.PretrainedConfig) -> dict[str, list[int]]:
    """The tensors of a checkpoint as people publish mixtures: each expert has its own."""
    with torch.device("meta"):
        state = getattr(transformers, config.architectures[0])(config).state_dict()
    found = {}
    for name, tensor in state.items():
        stem, leaf = name.rpartition(".")[::2]
        if leaf not in ("gate_up_proj", "down_proj"):
            found[name] = list(tensor.shape)
            continue
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        experts, d_out, d_in = tensor.shape
        for expert in range(experts):
            for part in parts:
                found[f"{stem}.{expert}.{part}.weight"] = [d_out // len(parts), d_in]
    return found


def write_hollow(folder: Path, shapes: dict[str, list[int]], tensors_a_shard: int = 100) -> None:
    """A checkpoint in bfloat16 that has only headers and an index: its weights are holes in files of the right size."""
    names, weight_map = list(shapes), {}
    for start in range(0, len(names), tensors_a_shard):
        file, end, header = f"model-{start:05}.safetensors", 0, {}
        for name in names[start : start + tensors_a_shard]:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            weight_map[name] = file
            end += size
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as shard:
            shard.write(len(encoded).to_bytes(8, "little") + encoded)
            shard.truncate(8 + len(encoded) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def saved_anew(model: str, folder: Path, out: Path) -> Path:
    """A checkpoint as transformers would save a model that was never loaded, whatever names its tensors have now."""
    cls = getattr(transformers, model)
    loaded = cls.from_pretrained(folder, dtype=torch.float64)
    fresh = cls(loaded.config).double()
    fresh.load_state_dict(loaded.state_dict())
    return save(fresh, None, out)


def perturbed(base: transformers.PreTrainedModel, seed: int, scale: float = 0.02) -> transformers.PreTrainedModel:
    """A copy of a model with noise on every parameter: a fine-tune as far as merging is concerned."""
    model = type(base)(base.config)
    model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def model_config(kind: str, vocabulary: int, **more) -> transformers.PretrainedConfig:
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=more.pop("num_hidden_layers", 3),
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.15,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
            **more,
        )
    if kind == "gpt2":
        settings = {"n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.15}
        return transformers.GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **settings, **more)
    return transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        num_labels=3,
        pad_token_id=0,
        **more,
    )


def make_model(name: str, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    corpus = [row[key] for i, topic in enumerate(_TOPICS) for row in make_rows(topic, 20, i) for key in ("text", "question")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"llama": ["<unk>", "<s>", "</s>"], "gpt2": ["<|endoftext|>"], "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}[kind]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    names = {}
    if kind == "llama":
        # A beginning-of-sequence token, and no padding token: as Llama's own tokenizer has it.
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    elif kind == "gpt2":
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if kind != "bert":
        names["model_input_names"] = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
