"""The whole way on a laptop: train a small model, fine-tune it three ways, merge with and without `pave:`.

Everything is made here: the texts come from Python and the installed packages, the models from the texts. The merges
are what a user would run, such as `mergekit-yaml plain.yml ./plain`: task arithmetic, the same with purification, `regmean`,
and the same refined. Their scores on held-out text are printed, good or bad. Run it with `make demo`, which takes about
four minutes; the configs, texts, models and caches stay in `demo-out/`, where you can run them again.
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

# For this process and the commands that it runs: nothing is downloaded, transformers says only what went wrong, and
# `mergekit-yaml` is the one installed beside this interpreter.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import scipy
import torch
import torchgen
import transformers
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "demo-out"
LOG = OUT / "log.txt"  # what the commands say
WIDTH = 100  # of the terminal
SEED = 0
VOCABULARY = 2048
LENGTH = 128  # tokens in a window, in training and when scoring
BATCH = 8  # windows in a training step
DOMAIN_BYTES = 1_200_000  # text taken per domain at most
CALIBRATION_ROWS = 256 + 64  # as many as `pave.calibration.samples` takes by default, and some to score with
SCORED_WINDOWS = 64  # per domain
BASE_STEPS, BASE_RATE = 200, 6e-3
TUNE_STEPS, TUNE_RATE = 60, 1e-3
WEIGHT = 0.4  # of each task vector; best for the plain merge on the calibration texts, of 0.2 to 0.8
MERGES = {
    "plain": "task_arithmetic",
    "purified": "the same, purified as published",
    "regmean": "regmean: layers by what they see",
    "refined": "the same, fitted to its models",
}


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
    """Three Newton-Schulz steps, which bring the singular values nearer to 1. With five, training takes a quarter longer."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrix else x.T


def pretrain(model: LlamaForCausalLM, streams: list[torch.Tensor]) -> None:
    """With Muon for the hidden matrices, 100 seconds of CPU time are enough; AdamW alone needs longer."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    train(model, streams, BASE_STEPS, [Muon(hidden, lr=BASE_RATE), adamw(others, 2 * BASE_RATE)])


def finetune(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    train(model, [stream], TUNE_STEPS, [adamw(model.parameters(), TUNE_RATE)])


def adamw(weights: Iterable[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)


def train(model: LlamaForCausalLM, streams: list[torch.Tensor], steps: int, optimizers: list[torch.optim.Optimizer]) -> None:
    """Next-token training on random windows, each drawn from one of the streams in turn."""
    generator = torch.Generator().manual_seed(SEED)
    warmup = steps // 10

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    for step in range(steps):
        sources = [streams[(step * BATCH + i) % len(streams)] for i in range(BATCH)]
        starts = [int(torch.randint(len(source) - LENGTH, (1,), generator=generator)) for source in sources]
        windows = torch.stack([source[start : start + LENGTH] for source, start in zip(sources, starts)])
        model(input_ids=windows, labels=windows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    model.save_pretrained(OUT / name)
    tokenizer.save_pretrained(OUT / name)


# --- The merges ------------------------------------------------------------------------------------------------------


def write_calibration(domain: Domain) -> None:
    """The calibration text in rows of equal length: one JSON object a line, with the `text` column that is looked for."""
    size = len(domain.calibration) // CALIBRATION_ROWS
    rows = [domain.calibration[i * size : (i + 1) * size] for i in range(CALIBRATION_ROWS)]
    lines = (json.dumps({"text": row}) + "\n" for row in rows)
    (OUT / "calibration" / f"{domain.name}.jsonl").write_text("".join(lines))


def write_configs(names: list[str]) -> None:
    """The YAML of each merge. Paths are relative to `demo-out/`, where the merges run."""
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
    configs = {
        "plain": plain,
        "purified": plain | {"pave": block},
        "regmean": regmean | {"pave": {"purify": False} | block},
        "refined": regmean | {"pave": {"purify": False, "refine": True} | block},
    }
    for name, config in configs.items():
        (OUT / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))


def run(command: str, remark: str = "") -> None:
    """Run a command in `demo-out/`, as one would type it there. What it says goes to the log, and is shown if it fails."""
    with step(f"  $ {command:48}{remark}"), LOG.open("a") as log:
        print(f"$ {command}", file=log, flush=True)
        code = subprocess.run(command.split(), cwd=OUT, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            end = "\n".join(LOG.read_text().splitlines()[-20:])
            sys.exit(f"`{command}` failed with exit code {code}. The end of {LOG}:\n{end}")


def check_work(name: str) -> None:
    """Without the plugin, mergekit silently ignores `pave:`."""
    report = OUT / name / "pave_report.json"
    content = json.loads(report.read_text()) if report.exists() else {}
    if not (content.get("purified") or content.get("regmean", {}).get("closed_form")):
        sys.exit(f"The block of {name}.yml did nothing; ask `mergekit-pave doctor` why.")


# --- The scores ------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One model on one domain. Windows stay apart, so that two models can be compared window by window."""

    bits: torch.Tensor
    bytes: torch.Tensor

    @property
    def bits_per_byte(self) -> float:
        return (self.bits.sum() / self.bytes.sum()).item()


def scored_windows(tokens: torch.Tensor) -> torch.Tensor:
    """Windows spread evenly over the held-out text."""
    starts = torch.linspace(0, len(tokens) - LENGTH, SCORED_WINDOWS).long()
    windows = tokens.unfold(0, LENGTH, 1)[starts]
    assert starts.diff().min() >= LENGTH, "held-out windows overlap"
    return windows


@torch.inference_mode()
def score(folder: Path, domains: list[torch.Tensor], token_bytes: torch.Tensor) -> list[Score]:
    """Score a model that was saved, on the windows of each domain."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for windows in domains:
        targets = windows[:, 1:]
        logits = model(input_ids=windows).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        bits = losses.view(targets.shape).double().sum(1) / math.log(2)
        scores.append(Score(bits, token_bytes[targets].sum(1).double()))
    return scores


def gain(scores: list[Score], reference: list[Score]) -> tuple[float, float]:
    """By how many bits per byte a model beats another, mean over the domains, and the standard error over the windows."""
    means, variances = [], []
    for a, b in zip(scores, reference):
        per_window = (b.bits - a.bits) / a.bytes.mean()
        means.append(per_window.mean())
        variances.append(per_window.var() / len(per_window))
    return torch.stack(means).mean().item(), torch.stack(variances).sum().sqrt().item() / len(means)


# --- What they say ---------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """
    Attributes:
        tuned: the kinds of text that have a fine-tune. Only these are compared.
        other: the kind that the base knows best, to show what is forgotten of it.
        scores: by model, on each of `tuned` and then on `other`.
    """

    tuned: list[str]
    other: str
    scores: dict[str, list[Score]]

    def __post_init__(self) -> None:
        self.base = self.scores["base"][:-1]
        self.own = [self.scores[name][i] for i, name in enumerate(self.tuned)]  # each fine-tune on its own kind

    def shares(self, name: str) -> list[float]:
        """The gain over the base as a share of the fine-tunes' own, in %: on each kind of text, and in the mean."""
        pairs = [([a], [b], [c]) for a, b, c in zip(self.scores[name], self.base, self.own)]
        pairs.append((self.scores[name][:-1], self.base, self.own))
        return [100 * gain(a, b)[0] / gain(c, b)[0] for a, b, c in pairs]

    def bits(self, name: str) -> list[float]:
        """Bits per byte on each kind of text, in the mean of those that have a fine-tune, and on the other."""
        *values, other = [score.bits_per_byte for score in self.scores[name]]
        return [*values, sum(values) / len(values), other]


def print_table(results: Results) -> None:
    kinds = "".join(f"{name:>7}" for name in [*results.tuned, "mean"])
    print("\n" + " " * 19 + "share of the fine-tunes' gain, %" + " " * 12 + "held-out bits per byte")
    print(f"{'':17}{kinds}{'`score` says':>14}{kinds}{results.other:>9}")
    labels = {"base": "base"} | {name: f"fine-tune {name}" for name in results.tuned} | {name: name for name in MERGES}
    for name, label in labels.items():
        told = ""
        if name in MERGES:
            mean = json.loads((OUT / name / "pave_scores.json").read_text())["mean"]
            told = f"{100 * mean['kept']:.1f} ± {100 * mean['error']:.1f}"
        shares = "".join(f"{share:7.1f}" for share in results.shares(name))
        *bits, other = results.bits(name)
        print(f"{label:17}{shares}{told:>14}{''.join(f'{value:7.3f}' for value in bits)}{other:9.3f}")
    print("\n100 % is each fine-tune on its own kind of text. `score` needs no labels; it reads other rows.")
    print(f"The last column shows what is forgotten: no fine-tune was trained further on {results.other}.")


def print_verdicts(results: Results) -> None:
    whole = gain(results.own, results.base)[0]
    plain = results.scores["plain"][:-1]
    print("\nAgainst the plain merge, in points of the mean share, ± one standard error of the difference:")
    for name in list(MERGES)[1:]:
        mean, error = gain(results.scores[name][:-1], plain)
        verdict = "not distinguishable" if abs(mean) < 2 * error else "better" if mean > 0 else "worse"
        print(f"  {name:10}{100 * mean / whole:+7.2f} ± {100 * error / whole:.2f}  {verdict}")
    print("This is one small model, one seed and one setting; another may come out differently.")
    if weak := [name for name, a, b in zip(results.tuned, results.own, results.base) if gain([a], [b])[0] <= 0]:
        sys.exit(f"Fine-tuning did not help on {', '.join(weak)}, so the comparison above means nothing.")


def draw(results: Results, path: Path) -> None:
    """A bar for each merge: its gain over the base as a share of the fine-tunes', in the mean over the kinds of text."""
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(reversed(MERGES)):
        share = results.shares(name)[-1]
        axes.barh(row, share, height=0.6, color="#9aa2ad" if name in ("plain", "purified") else "#2563eb")
        axes.text(share + 1, row, f"{share:.0f} %", va="center")
    labels = {"plain": "task_arithmetic", "purified": "the same, purified", "refined": "regmean, refined"}
    axes.set_yticks(range(len(MERGES)), [labels.get(name, name) for name in reversed(MERGES)])
    axes.set_xlim(min(0, axes.get_xlim()[0]), 108)
    axes.set_xlabel("gain over the base model on held-out text, as a share of the fine-tunes' own gain (%)")
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": path.stem}):  # the same picture has the same bytes
        figure.savefig(path, metadata={"Date": None})


# --- The whole -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """A line that says what is done, and when it is finished, how long it took."""
    print(f"{text:{WIDTH - 6}}", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print()
        raise
    print(f"{time.perf_counter() - start:4.0f} s", flush=True)


def print_next() -> None:
    activate = Path(sys.executable).with_name("activate")
    print(f"""Look at    demo-out/refined/pave_report/index.html      what the refined merge keeps, and how
           demo-out/gains.svg                           the shares as a picture
Go on      cd demo-out{f"; source {os.path.relpath(activate, OUT)}" if activate.exists() else ""}
           mergekit-pave tune purified.yml -o best.yml  tries settings, and writes the best
Your own   copy refined.yml to yours.yml, change its models and data, and type
           mergekit-pave plan yours.yml                 what will be done, and what it costs
           mergekit-yaml yours.yml ./merged             as always""")


def main() -> None:
    start = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "calibration").mkdir(parents=True)
    print("A small model is trained and fine-tuned on three kinds of text, the fine-tunes are merged in four")
    print("ways and scored: about four minutes on two idle cores. Everything stays in demo-out/.\n")

    with step("Gather texts from this Python and its packages: Python, C++, prose and YAML"):
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
        for domain in domains:
            write_calibration(domain)

    # The base has seen some of everything, but mostly Python, so the fine-tunes have something left to learn.
    mixture = [streams[0]] * 5 + streams[1:]
    other, *tuned = [domain.name for domain in domains]
    base = make_base()
    with step(f"Train the base, {base.num_parameters() / 1e6:.1f} million parameters, mostly on {other}"):
        pretrain(base, mixture)
        save(base, tokenizer, "base")
    for name, stream in zip(tuned, streams[1:]):
        with step(f"Fine-tune it on {name}"):
            model = copy.deepcopy(base)
            finetune(model, stream)
            save(model, tokenizer, name)

    print("\nMerge the fine-tunes, in demo-out/:")
    write_configs(tuned)
    for name, method in MERGES.items():
        run(f"mergekit-yaml {name}.yml ./{name} --quiet", method)
        if name != "plain":
            check_work(name)

    print("\nSee what the merges keep:")
    run(f"mergekit-pave score refined.yml {' '.join(f'./{name}' for name in MERGES)} --quiet")
    run("mergekit-pave report ./refined --quiet", "a page with plots")
    with step(f"  all models on held-out text, {SCORED_WINDOWS * LENGTH:,} tokens of each kind"):
        ordered = windows[1:] + windows[:1]
        results = Results(tuned, other, {name: score(OUT / name, ordered, token_bytes) for name in ["base", *tuned, *MERGES]})
        draw(results, OUT / "gains.svg")

    print_table(results)
    print_verdicts(results)
    print(f"\nAll of it took {time.perf_counter() - start:.0f} s.\n")
    print_next()


if __name__ == "__main__":
    main()
