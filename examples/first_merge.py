# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first merge
#
# Merge two fine-tunes of one model, see what the merge keeps of each, and look for a better setting, with
# [mergekit](https://github.com/arcee-ai/mergekit) and its plugin `mergekit-pave`.
#
# As it stands, this notebook makes two tiny models itself, downloads none, and takes a minute or two on any machine.
# Run it so once. Then put the names of your own models into `merge.yml` below and run it again: the commands stay the same.

# %% [markdown]
# ## Install

# %%
# %pip install --quiet "mergekit-pave[report]"

# %% [markdown]
# The commands lie beside the Python of this notebook. This makes sure that the shell finds them there.

# %%
import html
import json
import os
import random
import shutil
import sysconfig
from pathlib import Path

os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

import torch
from IPython.display import HTML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

for command in ("mergekit-yaml", "mergekit-pave"):
    print(shutil.which(command) or f"{command} is missing: restart the kernel and run the cell above again")

# %% [markdown]
# ## The models
#
# **Skip this section if you have models of your own.** It writes a base model, one fine-tuned on recipes, one fine-tuned on
# forecasts, and for each fine-tune a file of texts of its kind. They know a few dozen words and are trained in seconds, so
# their scores say nothing about real models.

# %%
RECIPES = (
    "mix fry boil bake|the some|eggs flour butter rice|with|salt sugar milk pepper|for|two five ten twenty|minutes",
    "serve keep eat taste|the some|soup cake bread rice|with|salt butter milk honey|after|one two three|hours",
)
FORECASTS = (
    "today tomorrow monday sunday|it will be|cold warm dry wet|with|rain snow sun fog|for|two five ten|hours",
    "some more the|rain snow sun fog|in the|north south east west|after|one two three|cold warm dry wet|days",
)


def write(patterns: tuple[str, ...]) -> str:
    """A text of four sentences. Each takes one word of every group, or the whole group if it is a fixed phrase."""
    fixed = {"it will be", "in the"}
    sentences = []
    for pattern in random.choices(patterns, k=4):
        sentences.append(" ".join(group if group in fixed else random.choice(group.split()) for group in pattern.split("|")))
    return " . ".join(sentences)


def train(model: LlamaForCausalLM, texts: list[str], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = tokenizer(random.sample(texts, 16), padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # padding does not count
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(model: LlamaForCausalLM, name: str) -> None:
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)


disable_progress_bar()
random.seed(0)
torch.manual_seed(0)
texts = {"recipes": [write(RECIPES) for _ in range(300)], "forecasts": [write(FORECASTS) for _ in range(300)]}
words = sorted({word for kind in texts.values() for text in kind for word in text.split()})
words = {word: number for number, word in enumerate(["<unk>", "<pad>", *words])}
splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, unk_token="<unk>", pad_token="<pad>")
config = LlamaConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)

base = LlamaForCausalLM(config)
train(base, texts["recipes"] + texts["forecasts"], steps=30)
save(base, "base")
for kind in texts:
    model = LlamaForCausalLM.from_pretrained("base")
    train(model, texts[kind], steps=60)
    save(model, kind)
    Path(f"{kind}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[kind]))

# %% [markdown]
# ## Merge
#
# **Put your own models here**: names on the Hub, or folders that begin with `./`. Each needs a few hundred samples of its own
# task, without labels: a data set on the Hub or a file. Name the column that has the text (`text: "{question}\n{answer}"` joins
# two), or write `messages: conversation` for a column of chats. Use `dtype: bfloat16` for large models.

# %%
CONFIG = """\
merge_method: regmean
base_model: ./base
models:
  - model: ./recipes
  - model: ./forecasts
dtype: float32

pave:
  purify: false               # measure the models, but merge them as they are
  refine: {lambda: 1.2}       # then fit the merge to its models, block by block
  calibration: {samples: 128}
  models:
    - model: ./recipes
      data: {path: ./recipes.jsonl, text: text}
    - model: ./forecasts
      data: {path: ./forecasts.jsonl, text: text}
"""
_ = Path("merge.yml").write_text(CONFIG)

# %% [markdown]
# `regmean` merges each layer in closed form, from what the layer sees in the samples. `refine` then fits the merged model to its
# models. With a GPU add `--cuda` to the commands.
# `!mergekit-pave plan merge.yml` tells beforehand what a merge will need.

# %%
# !mergekit-yaml merge.yml ./merged --quiet

# %% [markdown]
# ## What does it keep?
#
# 0 % is the base model, 100 % the fine-tune itself, on samples that the merge has not seen.

# %%
# !mergekit-pave score merge.yml ./merged --quiet

# %% [markdown]
# The same as a page, with what was done to each layer. It lies in `merged/pave_report`.

# %%
# !mergekit-pave report ./merged


# %%
def show(page: str) -> HTML:
    """A page of its own inside the notebook, so that neither disturbs the other's style."""
    source = html.escape(Path(page).read_text())
    return HTML(f'<div><iframe srcdoc="{source}" width="100%" height="700" style="border: 0"></iframe></div>')


show("merged/pave_report/index.html")

# %% [markdown]
# ## Which setting keeps more?
#
# Each setting is merged, scored and removed again: here refining that goes less or more far than above. Without `--set` a list
# of usual settings is tried. `best.yml` is your config with the best of them.

# %%
# !mergekit-pave tune merge.yml --set pave.refine.lambda=1,1.4 -o best.yml --report tuned --quiet

# %%
show("tuned/index.html")

# %% [markdown]
# ## Next
#
# - `!mergekit-yaml best.yml ./best` merges the best setting. `!mergekit-pave score best.yml ./best --card` adds its scores to the
#   model card.
# - `!hf upload yourname/best ./best` publishes it. Its card says which models and data it was made from.
# - Test it on your own task as well. The scores tell how close it is to its models, not how good these are.
