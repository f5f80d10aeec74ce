"""What a first merge costs, nothing cached: whole programs, timed side by side.

    python tests/benchmarks/first_merge.py                              # two models of 1 GB: half an hour, 5 GB of disk
    python tests/benchmarks/first_merge.py --against ../other           # another checkout of this repository, at its own defaults
    python tests/benchmarks/first_merge.py --layers 6 --words 1700 --paper  # also the paper's pipeline on the same tokens
    python tests/benchmarks/first_merge.py --cpu-time                   # seconds of one thread's CPU time

Every program starts with an empty cache and ends with the merged model on the disk. `forward` is the time that transformers takes
for the forward passes alone, over the tokens that the program runs its models on. `cache` is what it leaves there, in bytes of
one model's checkpoint.

The paper's pipeline is what its research code does for task arithmetic, in float32: two passes that collect X^T X of each layer,
one for the ranks (`svdvals` of W C_s), one for the task vector (a full SVD); C_s is inverted, and its shift doubled until the
inverse looks accurate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from calibration import clock
from decomposition import published_shift
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import LlamaForCausalLM
from warm_merge import WORDS, command, make_models, write_configs

from mergekit_pave.plugin.phases import plan_merge

HERE = Path(__file__).resolve().parents[2]


def token_ids(place: Path) -> tuple[torch.Tensor, ...]:
    """The tokens that a merge runs a model on, as the checkout that is imported plans it."""
    config = yaml.safe_load((place / "task_arithmetic-pave.yml").read_text())
    job = plan_merge(MergeConfiguration.model_validate(config), MergeOptions(), compares=False).calibrations[0].job
    samples = getattr(job, "run", job.encoded)  # before there was a choice, all were run
    return torch.tensor([sample.inputs["input_ids"] for sample in samples]).split(job.batch_size)


def write_data(place: Path, words: int | None) -> None:
    """Rows that are longer than any sample; or with `words` few enough that there are so many tokens altogether."""
    generator = torch.Generator().manual_seed(3)
    count, length = (512, 600) if words is None else (words // 100, 100)
    with (place / "data.jsonl").open("w") as file:
        for _ in range(count):
            numbers = torch.randint(len(WORDS), (length,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(WORDS[i] for i in numbers)}) + "\n")


def stage_forward(place: Path, out: Path) -> None:
    """The forward passes alone. Writes their seconds."""
    seconds = 0.0
    for name in ("tuned0", "tuned1"):
        model = LlamaForCausalLM.from_pretrained(place / name, dtype=torch.float32).eval()
        with torch.no_grad():
            start = clock()
            for batch in token_ids(place):
                model.model(batch, use_cache=False)
            seconds += clock() - start
    out.write_text(json.dumps(seconds))


def stage_paper(place: Path, out: Path, ratio: float = 0.984) -> None:
    """The paper's pipeline for task arithmetic."""
    base = LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    changes: dict[str, torch.Tensor] = {}
    for name in ("tuned0", "tuned1"):
        model = LlamaForCausalLM.from_pretrained(place / name, dtype=torch.float32).eval()
        layers = {path: one for path, one in model.model.named_modules() if isinstance(one, torch.nn.Linear)}
        batches = token_ids(place)
        for path, covariance in _published_covariances(model, layers, batches).items():
            shifted, _ = published_shift(covariance, 0.01)
            torch.linalg.svdvals(layers[path].weight.detach() @ shifted)  # what the ranks are found with
        for path, covariance in _published_covariances(model, layers, batches).items():
            shifted, inverse = published_shift(covariance, 0.01)
            left, values, right = torch.linalg.svd(layers[path].weight.detach() @ shifted, full_matrices=False)
            rank = round(ratio * len(values))
            layers[path].weight.data = (left[:, :rank] * values[:rank]) @ (right[:rank] @ inverse)
        of_base = base.state_dict()
        for key, tensor in model.state_dict().items():
            change = (tensor - of_base[key]) / 2
            changes[key] = changes[key] + change if key in changes else change
    for key, tensor in base.state_dict().items():
        tensor += changes[key]
    base.save_pretrained(out)


def _published_covariances(model, layers, batches) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    rows = sum(batch.numel() for batch in batches)
    hooks = []
    for path, layer in layers.items():

        def see(_, args, path=path):
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            sums[path] = sums[path] + x.mT @ x if path in sums else x.mT @ x

        hooks.append(layer.register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in batches:
            model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: total / rows for path, total in sums.items()}


def in_checkout(checkout: Path, arguments: list[str], place: Path) -> tuple[float, float]:
    """Run a command with the package of a checkout. See `command`."""
    os.environ["PYTHONPATH"] = str(checkout)
    try:
        return command(arguments, place)
    finally:
        del os.environ["PYTHONPATH"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="of models 1024 wide; 22 make 1 GB")
    parser.add_argument("--words", type=int, help="tokens of each model; default: what the defaults take")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--place", help="where the checkpoints go; default: the system's temporary folder")
    parser.add_argument("--stage", choices=["forward", "paper"], help=argparse.SUPPRESS)
    parser.add_argument("out", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        {"forward": stage_forward, "paper": stage_paper}[options.stage](*options.out)
        return
    if options.cpu_time:
        os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        place = Path(folder)
        size = make_models(place, 2, 1024, 2816, options.layers, torch.float32)
        write_data(place, options.words)
        _, config = write_configs(place, 2, "task_arithmetic")
        content = yaml.safe_load(config.read_text()) | {"dtype": "float32"}
        config.write_text(yaml.safe_dump(content, sort_keys=False))
        print(
            f"two models of {size:.2f} GB\n{'':12}{'seconds':>9}{'forward':>9}{'others':>9}{'cache':>8}{'peak GB':>9}", flush=True
        )
        this = [sys.executable, __file__]
        for name, checkout in {"here": HERE, "against": options.against}.items():
            if checkout is None:
                continue
            yaml_command = str(Path(sys.executable).parent / "mergekit-yaml")
            seconds, peak = in_checkout(checkout, [yaml_command, str(config)], place)
            cache = place / "cache"
            kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 2e9 / size
            cache.rename(place / f"cache-of-{name}")
            subprocess.run(
                [*this, "--stage", "forward", str(place), str(place / "forward")],
                check=True,
                env=os.environ | {"PYTHONPATH": str(checkout)},
                stderr=subprocess.DEVNULL,
            )
            forward = json.loads((place / "forward").read_text())
            print(f"{name:12}{seconds:9.1f}{forward:9.1f}{seconds - forward:9.1f}{kept:8.2f}{peak:9.2f}", flush=True)
        if options.paper:
            seconds, peak = command([*this, "--stage", "paper", str(place)], place)
            print(f"{'paper':12}{seconds:9.1f}{'':26}{peak:9.2f}", flush=True)


if __name__ == "__main__":
    main()
