"""The whole way on a laptop: train a small model, fine-tune it three ways, merge with and without `pave:`.

Everything is made here: the texts come from Python and the installed packages, the models from the texts. The merges
are what a user would run, such as `mergekit-yaml plain.yml ./plain` and `mergekit-yaml refined.yml ./refined`: task
arithmetic, the same with purification, `regmean`, and the same refined. What each keeps of its models is told by
`mergekit-pave score`, and their scores on held-out text are printed, good or bad. Run it with `make demo`, which takes five
to ten minutes; the configs, texts, models and caches stay in `demo-out/`,
where you can run them again.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import json
import math
import os
import pydoc_data.topics
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Nothing is downloaded, and `mergekit-yaml` is the one installed beside this interpreter.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import scipy
import torch
import torchgen
import transformers
import yaml
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "demo-out"
SEED = 0
VOCABULARY = 2048
LENGTH = 128  # tokens in a window, in training and when scoring
BATCH = 8  # windows in a training step
DOMAIN_BYTES = 1_200_000  # text taken per domain at most
CALIBRATION_ROWS = 256 + 64  # as many as `pave.calibration.samples` takes by default, and some to score with
SCORED_WINDOWS = 96  # per domain
BASE_STEPS, BASE_RATE = 320, 3e-3
TUNE_STEPS, TUNE_RATE = 60, 1e-3
MERGES = ["plain", "purified", "regmean", "refined"]
WEIGHT = 0.4  # of each task vector; best for the plain merge on the calibration texts, of 0.3 to 1.0


# --- The texts -------------------------------------------------------------------------------------------------------


@dataclass
class Domain:
    """One kind of text, cut into parts that share no document."""

    name: str
    train: str
    calibration: str
    held_out: str


def read_files(paths: Iterable[Path]) -> Iterator[str]:
    for path in sorted(paths):
        with contextlib.suppress(UnicodeDecodeError):  # some of Python's own files are in old encodings
            yield path.read_text(encoding="utf-8")


def python_source() -> Iterator[str]:
    """Modules of the standard library, without tables (`encodings`), tests and what is installed beside them."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    paths = [*library.glob("*.py"), *library.glob("*/*.py")]
    return read_files(path for path in paths if path.parent.name not in skipped)


def cpp_headers() -> Iterator[str]:
    """PyTorch's C++ headers that were written by hand; those under ATen/ops are generated and much alike."""
    include = Path(torch.__file__).parent / "include"
    return read_files(
        path for part in ("c10", "ATen/native", "ATen/core", "torch/csrc") for path in (include / part).rglob("*.h")
    )


def english_prose() -> Iterator[str]:
    """The Python reference and SciPy's docstrings, only paragraphs of full sentences, each once."""
    seen = set()
    modules = read_files(path for path in Path(scipy.__file__).parent.rglob("*.py") if "tests" not in path.parts)
    for document in [*pydoc_data.topics.topics.values(), *map(docstrings, modules)]:
        paragraphs = [part.strip() for part in document.split("\n\n")]
        sentences = [p for p in paragraphs if len(p) > 80 and p[0].isupper() and p.endswith(".") and ">>>" not in p]
        fresh = [p for p in dict.fromkeys(sentences) if p not in seen]
        seen.update(fresh)
        yield "\n\n".join(fresh)


def docstrings(source: str) -> str:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))]
    return "\n\n".join(inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node, clean=False)))


def yaml_declarations() -> Iterator[str]:
    """PyTorch's declarations of its operators and their derivatives: two long files, in pieces of 200 lines."""
    for text in read_files((Path(torchgen.__file__).parent / "packaged").rglob("*s.yaml")):
        lines = text.splitlines()
        for start in range(0, len(lines), 200):
            yield "\n".join(lines[start : start + 200])


def split(name: str, documents: Iterable[str]) -> Domain:
    """Deal the documents out: the first to be held out and to calibrate with, the rest to train on."""
    shuffled = [text for text in dict.fromkeys(documents) if text]
    random.Random(SEED).shuffle(shuffled)
    total = min(DOMAIN_BYTES, sum(map(len, shuffled)))
    parts: list[list[str]] = [[], [], []]
    taken = 0
    for document in shuffled:
        if taken < total:
            parts[0 if taken < 0.15 * total else 1 if taken < 0.35 * total else 2].append(document)
            taken += len(document)
    held_out, calibration, train = ("\n\n".join(part) for part in parts)
    return Domain(name, train, calibration, held_out)


# --- The models ------------------------------------------------------------------------------------------------------


def make_tokenizer(domains: list[Domain]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text is representable, and the length of a token's name is its number of bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((domain.train for domain in domains), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=LENGTH)


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made nearly orthogonal, in float32.

    `torch.optim.Muon` does the same in bfloat16, which many CPUs can only imitate: there it takes 30 times as long.
    """

    def __init__(self, weights: list[torch.nn.Parameter], lr: float):
        super().__init__(weights, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                direction = orthogonal(weight.grad.lerp(average, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-0.2 * group["lr"] * max(weight.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps, which bring all singular values near 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrix else x.T


def train(model: LlamaForCausalLM, streams: list[torch.Tensor], steps: int, rate: float) -> None:
    """Next-token training on random windows, each drawn from one of the streams in turn."""
    generator = torch.Generator().manual_seed(SEED)
    # With Muon for the hidden matrices, two minutes of CPU time are enough; AdamW alone needs far longer.
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(hidden, lr=rate),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    warmup = steps // 10

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    for step in range(steps):
        sources = [streams[(step * BATCH + i) % len(streams)] for i in range(BATCH)]
        starts = [int(torch.randint(len(source) - LENGTH, (1,), generator=generator)) for source in sources]
        windows = torch.stack([source[start : start + LENGTH] for source, start in zip(sources, starts)])
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if (step + 1) % (steps // 5) == 0:
            print(f"  step {step + 1:4d} of {steps}: loss {loss.item():.3f}", flush=True)


# --- The scores ------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One model on one domain. Windows stay apart, so that two models can be compared window by window."""

    bits: torch.Tensor
    correct: torch.Tensor
    bytes: torch.Tensor

    @property
    def bits_per_byte(self) -> float:
        return (self.bits.sum() / self.bytes.sum()).item()

    @property
    def accuracy(self) -> float:
        return 100 * self.correct.sum().item() / (len(self.correct) * (LENGTH - 1))


def scored_windows(tokens: torch.Tensor) -> torch.Tensor:
    """Windows spread evenly over the held-out text."""
    starts = torch.linspace(0, len(tokens) - LENGTH, SCORED_WINDOWS).long()
    windows = tokens.unfold(0, LENGTH, 1)[starts]
    assert starts.diff().min() >= LENGTH, "held-out windows overlap"
    return windows


@torch.inference_mode()
def score(folder: Path, windows: torch.Tensor, token_bytes: torch.Tensor) -> Score:
    """Score a model that was saved."""
    model = load(folder)
    bits, correct = [], []
    for batch in windows.split(32):
        logits = model(input_ids=batch).logits[:, :-1]
        targets = batch[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        bits.append(losses.double().sum(1) / math.log(2))
        correct.append((logits.argmax(-1) == targets).sum(1))
    return Score(torch.cat(bits), torch.cat(correct), token_bytes[windows[:, 1:]].sum(1).double())


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gain(scores: list[Score], reference: list[Score]) -> tuple[float, float]:
    """By how many bits per byte a model beats another, mean over the domains, and the standard error over the windows."""
    means, variances = [], []
    for a, b in zip(scores, reference):
        per_window = (b.bits - a.bits) / a.bytes.mean()
        means.append(per_window.mean())
        variances.append(per_window.var() / len(per_window))
    return torch.stack(means).mean().item(), torch.stack(variances).sum().sqrt().item() / len(means)


def signed(measured: tuple[float, float]) -> str:
    return "{:+.5f} ± {:.5f}".format(*measured)


def print_table(title: str, tuned: list[str], other: str, rows: dict[str, list[float]]) -> None:
    """A row of scores for each model, with the mean over the kinds of text that have a fine-tune."""
    print(f"\n{title}")
    print(" " * 26 + "".join(f"{name:>9}" for name in [*tuned, "mean", f"({other})"]))
    for label, (*values, last) in rows.items():
        print(f"{label:26}" + "".join(f"{value:9.3f}" for value in [*values, sum(values) / len(values), last]))


# --- The merges ------------------------------------------------------------------------------------------------------


def write_calibration(domain: Domain) -> None:
    """The calibration text in rows of equal length: one JSON object a line, with the `text` column that is looked for."""
    size = len(domain.calibration) // CALIBRATION_ROWS
    rows = [domain.calibration[i * size : (i + 1) * size] for i in range(CALIBRATION_ROWS)]
    lines = (json.dumps({"text": row}) + "\n" for row in rows)
    (OUT / "calibration" / f"{domain.name}.jsonl").write_text("".join(lines))


def write_configs(domains: list[Domain]) -> None:
    """The YAML of each merge. Paths are relative to `demo-out/`, where the merges run."""
    names = [domain.name for domain in domains]
    plain = {
        "merge_method": "task_arithmetic",
        "base_model": "./base",
        "models": [{"model": f"./{name}", "parameters": {"weight": WEIGHT}} for name in names],
        "dtype": "float32",
    }
    # Nothing is set but which data belongs to which model. By default 0.984 of the components are kept, so 4 of the
    # 256 in each matrix go: few, as they would be in a large model.
    data = [{"model": f"./{name}", "data": {"path": f"./calibration/{name}.jsonl"}} for name in names]
    block = {"cache_dir": "./pave-cache", "models": data}
    regmean = plain | {"merge_method": "regmean", "models": [{"model": f"./{name}"} for name in names]}
    write_config("plain", plain)
    write_config("purified", plain | {"pave": block})
    write_config("regmean", regmean | {"pave": {"purify": False} | block})
    write_config("refined", regmean | {"pave": {"purify": False, "refine": True} | block})


def write_config(name: str, config: dict) -> None:
    (OUT / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))


def merge(name: str) -> None:
    print("".join(f"    {line}" for line in (OUT / f"{name}.yml").read_text().splitlines(keepends=True)))
    run("mergekit-yaml", f"{name}.yml", f"./{name}")


def run(*command: str) -> None:
    print(f"  demo-out$ {' '.join(command)}", flush=True)
    subprocess.run(command, cwd=OUT, check=True)


def show_work(name: str) -> None:
    """What a merge with a block says about itself. Without the plugin, mergekit silently ignores `pave:`."""
    card, report = OUT / name / "README.md", OUT / name / "pave_report.json"
    content = json.loads(report.read_text()) if report.exists() else {}
    closed, refined = content.get("regmean", {}).get("closed_form", []), content.get("refined", {}).get("layers", [])
    done = {"purified": content.get("purified", []), "merged in closed form": closed, "refined": refined}
    print(
        f"\ndemo-out/{name}/pave_report.json: {', '.join(f'{len(rows)} weights {what}' for what, rows in done.items() if rows)}"
    )
    section = card.read_text().partition("### PAVE")
    if not section[1] or not any(done.values()):
        sys.exit(f"the block of {name} did nothing; ask `mergekit-pave doctor` why")
    table = section[2].partition("#### What it did")[2].partition("####")[0]
    print("\n".join(f"    {line}" for line in table.strip().splitlines()))


# --- The whole --------------------------------------------------------------------------------------------------------


def report(tuned: list[str], other: str, scores: dict[str, list[Score]]) -> None:
    """The tables, then what follows from them.

    Args:
        tuned: the kinds of text that have a fine-tune. Only these are compared.
        other: the kind that the base knows best, to show what the fine-tunes forget of it.
        scores: by model, on each of `tuned` and then on `other`.
    """
    labels = {"base": "base"} | {name: f"fine-tune on {name}" for name in tuned} | {name: f"merge: {name}" for name in MERGES}
    bits = {label: [s.bits_per_byte for s in scores[name]] for name, label in labels.items()}
    hits = {label: [s.accuracy for s in scores[name]] for name, label in labels.items()}
    print_table("Held-out bits per byte (lower is better)", tuned, other, bits)
    print_table("Held-out next-token accuracy, % (higher is better)", tuned, other, hits)

    for name in MERGES[1:]:
        show_work(name)

    print("\nGain over the base in bits per byte, ± standard error over the held-out windows:")
    compared = {name: row[: len(tuned)] for name, row in scores.items()}
    base = compared["base"]
    own = [scores[name][i] for i, name in enumerate(tuned)]
    for name, after, before in zip(tuned, own, base):
        print(f"  fine-tune on {name}, on {name}: {signed(gain([after], [before]))}")
    whole = gain(own, base)[0]
    print(f"  mean over the {len(tuned)} kinds of text, each fine-tune on its own kind: {signed(gain(own, base))}")
    for name in MERGES:
        measured = gain(compared[name], base)
        print(f"  mean over the {len(tuned)} kinds of text, merge {name}: {signed(measured)} ({measured[0] / whole:.1%} of that)")

    print("\nGain over the plain merge in bits per byte:")
    for name in MERGES[1:]:
        mean, error = gain(compared[name], compared["plain"])
        verdict = "not distinguishable from zero" if abs(mean) < 2 * error else "better" if mean > 0 else "worse"
        print(f"  {name}: {verdict}, {signed((mean, error))} ({mean / whole:+.2%} of the gain of fine-tuning)")
    print("This is one small model, one seed and one setting; another may come out differently.")
    if weak := [name for name, after, before in zip(tuned, own, base) if gain([after], [before])[0] <= 0]:
        sys.exit(f"Fine-tuning did not help on {', '.join(weak)}, so the comparison above means nothing.")


def draw(tuned: list[str], scores: dict[str, list[Score]], path: Path) -> None:
    """A bar for each merge: its gain over the base as a share of the fine-tunes', on all kinds of text and on each."""
    base = [scores["base"][i].bits_per_byte for i in range(len(tuned))]
    own = [scores[name][i].bits_per_byte for i, name in enumerate(tuned)]
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(reversed(MERGES)):
        gains = [before - scores[name][i].bits_per_byte for i, before in enumerate(base)]
        share = 100 * sum(gains) / sum(before - after for before, after in zip(base, own))
        axes.barh(row, share, height=0.6, color="#9aa2ad" if name in ("plain", "purified") else "#2563eb")
        axes.text(share + 1, row, f"{share:.0f} %", va="center")
    labels = {"plain": "task_arithmetic", "purified": "the same, purified", "refined": "regmean, refined"}
    axes.set_yticks(range(len(MERGES)), [labels.get(name, name) for name in reversed(MERGES)])
    axes.set_xlim(min(0, axes.get_xlim()[0]), 108)
    axes.set_xlabel("gain over the base model on held-out text, as a share of the fine-tunes' own gain (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    model.save_pretrained(OUT / name)
    tokenizer.save_pretrained(OUT / name)


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    start = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "calibration").mkdir(parents=True)

    with stage("Texts and tokenizer"):
        domains = [
            split("python", python_source()),
            split("cpp", cpp_headers()),
            split("prose", english_prose()),
            split("yaml", yaml_declarations()),
        ]
        tokenizer = make_tokenizer(domains)
        streams = [encode(tokenizer, domain.train) for domain in domains]
        windows = [scored_windows(encode(tokenizer, domain.held_out)) for domain in domains]
        token_bytes = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
        for domain, stream in zip(domains, streams):
            write_calibration(domain)
            parts = (domain.train, domain.calibration, domain.held_out)
            sizes = "train {:,}, calibration {:,}, held out {:,} characters".format(*map(len, parts))
            print(f"  {domain.name:7} {sizes}; {len(stream):,} tokens to train on")

    # The base has seen some of everything, but mostly Python, so the fine-tunes have something left to learn.
    mixture = [streams[0]] * 5 + streams[1:]
    tuned = domains[1:]
    with stage("Base model, pre-trained on a mixture that is mostly Python"):
        base = make_base()
        print(f"  {base.num_parameters() / 1e6:.1f} million parameters")
        train(base, mixture, BASE_STEPS, BASE_RATE)
        save(base, tokenizer, "base")

    for domain, stream in zip(tuned, streams[1:]):
        with stage(f"Fine-tune on {domain.name}"):
            model = copy.deepcopy(base)
            train(model, [stream], TUNE_STEPS, TUNE_RATE)
            save(model, tokenizer, domain.name)

    write_configs(tuned)
    for name in MERGES:
        with stage(f"Merge: {name}"):
            merge(name)

    with stage("What each merge keeps of its models, as `mergekit-pave score` tells without labels"):
        run("mergekit-pave", "score", "refined.yml", *(f"./{name}" for name in MERGES), "--quiet")

    with stage(f"Scoring on {SCORED_WINDOWS * LENGTH:,} held-out tokens of each kind"):
        folders = ["base", *(domain.name for domain in tuned), *MERGES]
        scores = {name: [score(OUT / name, w, token_bytes) for w in windows[1:] + windows[:1]] for name in folders}

    report([domain.name for domain in tuned], domains[0].name, scores)
    draw([domain.name for domain in tuned], scores, OUT / "gains.svg")
    print("\ndemo-out/gains.svg shows it; demo-out/refined/README.md is a model card, with what was done")
    print("\nTo look for a better setting: cd demo-out; ../.venv/bin/mergekit-pave tune purified.yml -o best.yml")
    print(f"\nTotal time: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
