"""Tiny models and data sets under the names that a config has for real ones, in the current directory.

mergekit, transformers and datasets all take a path that is there for what it names, so a config runs as it is written.
"""

import functools
import json
import re
import string
from pathlib import Path

import peft
import transformers
from models import make_model, make_rows, make_tokenizer, perturbed, save, write_rows
from PIL import Image

_TEXTS = "sum add count equal number seven nine twelve apple coin price cost half double total share each week hour more"
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
_DECODER = {"num_key_value_heads": 2, "max_position_embeddings": 64}
_OF_IMAGES = {"image_size": 16, "patch_size": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
# By what is in a model's name: the class that it really has, what a tiny one needs, and which tokenizer. They are as wide as
# it takes to lose a component: Llama-2's example keeps 0.99829 of them.
KINDS = [
    ("clip-vit", "CLIPVisionModel", _OF_IMAGES, None),
    ("JeremiahZ/roberta", "RobertaForSequenceClassification", {"max_position_embeddings": 66}, "bert"),
    ("roberta", "RobertaForMaskedLM", {"max_position_embeddings": 66}, "bert"),
    ("OLMoE", "OlmoeForCausalLM", _DECODER | _MOE, "llama"),
    ("Qwen2", "Qwen2ForCausalLM", _DECODER | {"tie_word_embeddings": True}, "padded"),
    ("istral|zephyr", "MistralForCausalLM", _DECODER, "llama"),
    ("WizardMath", "LlamaForCausalLM", _DECODER | {"hidden_size": 320}, "one more"),
    ("", "LlamaForCausalLM", _DECODER | {"hidden_size": 320}, "llama"),
]


def make_standins(config: dict) -> None:
    """Everything that a mergekit config names, but for what is there already and for what it makes itself."""
    names = [config.get("base_model"), *(entry["model"] for entry in config.get("models", ()))]
    for name in dict.fromkeys(filter(None, names)):
        base, _, adapter = name.partition("+")
        make_standin(base)
        if adapter:
            _make_adapter(base, adapter)
    for entry in config.get("pave", {}).get("models", ()):
        given = entry.get("data", [])
        for data in given if isinstance(given, list) else [given]:
            make_data(data)


def make_standin(name: str) -> None:
    """A model whose weights depend on its name alone."""
    if Path(name).exists() or "/" not in name:
        return
    cls, settings, tokenizer = next(kind[1:] for kind in KINDS if re.search(kind[0], name))
    seed = sum(map(ord, name))
    save(perturbed(_base(cls, json.dumps(settings), tokenizer), seed), _processor(tokenizer), Path(name))


@functools.cache
def _base(cls: str, settings: str, tokenizer: str | None) -> transformers.PreTrainedModel:
    sizes = _SIZES | json.loads(settings)
    if tokenizer:
        sizes |= {"vocab_size": len(_processor(tokenizer)), "bos_token_id": 1, "eos_token_id": 2}
    return make_model(cls, getattr(transformers, cls).config_class(**sizes))


@functools.cache
def _processor(tokenizer: str | None):
    if tokenizer is None:
        return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    made = make_tokenizer("bert" if tokenizer == "bert" else "llama")
    if tokenizer == "padded":
        made.pad_token = made.eos_token
    if tokenizer == "one more":
        made.add_special_tokens({"pad_token": "[PAD]"})
    return made


def _make_adapter(base: str, name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(name)


def make_data(entry: dict) -> None:
    """A data set with the columns that are asked for: a file, or a folder with the configuration and the split."""
    path = Path(entry["path"])
    file = path if path.suffix else path / entry.get("name", "default") / f"{entry.get('split', 'train')}.jsonl"
    if "image" in entry:
        _write_images(file.with_suffix(""))
    elif not file.exists():
        write_rows(file, [_row(entry, row) for row in make_rows(_TEXTS, 12, seed=len(str(file)))])
    if not path.suffix:
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        configs = [{"config_name": folder.name, "data_files": _splits(folder)} for folder in folders]
        (path / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")


def _splits(folder: Path) -> list[dict]:
    files = sorted(folder.iterdir())
    return [{"split": f.stem, "path": f"{folder.name}/{f.name}" + ("/*" if f.is_dir() else "")} for f in files]


def _row(entry: dict, row: dict) -> dict:
    """A row with the columns that the entry names, or `text` where it names none."""
    if "messages" in entry:
        return {entry["messages"]: row["conversation"]}
    texts = [entry[key] for key in ("text", "text_pair", "target") if key in entry] or ["text"]
    columns = [field for text in texts for _, field, _, _ in string.Formatter().parse(text) if field]
    columns += [text for text in texts if "{" not in text]
    return {column: row["text"] for column in columns}


def _write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(6):
        picture = Image.linear_gradient("L").rotate(60 * i).resize((24, 20))
        picture.convert("RGB").save(folder / f"{i}.png")
