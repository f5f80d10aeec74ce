"""What a `pave:` block adds to a merge whose caches are filled: wall time and peak memory of real `mergekit-yaml` commands.

    python tests/benchmarks/warm_merge.py            # two models of 2.2 GB and their base: 10 GB of disk, about 15 minutes
    python tests/benchmarks/warm_merge.py --quick    # 0.2 GB each
    python tests/benchmarks/warm_merge.py --cpu-time # seconds of one thread's CPU time: good on a machine that does other things

The caches are filled by a run in which random orthonormal directions stand in for the decomposition: as a warm merge only
reads and applies them, their values do not matter, and an honest decomposition would take most of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
import yaml
from calibration import write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def fill(config: str, out: str) -> None:
    """Run the merge with a stand-in for the decomposition."""
    from mergekit.scripts import run_yaml

    import mergekit_pave.core.purification
    from mergekit_pave.core.subspace import Tail

    def stand_in(weight, covariance, shift, count):
        values = torch.linspace(0.1, 1, count, dtype=torch.float64)
        return Tail(torch.linalg.qr(torch.randn(weight.shape[0], count)).Q, values, 10.0, 1e4)

    mergekit_pave.core.purification.tail_components = stand_in
    run_yaml.main([config, out], standalone_mode=False)


def make_models(
    place: Path, count: int, hidden: int, feed_forward: int, layers: int, dtype: torch.dtype = torch.bfloat16
) -> float:
    """A base and `count` fine-tunes under a folder, each with tokenizer and data. Returns the GB of one."""
    size = 0.0
    for name in ["base", *(f"tuned{i}" for i in range(count))]:
        folder = place / name
        folder.mkdir()
        size = write_checkpoint(folder, hidden, feed_forward, layers, dtype) / 1e9
        for shard in folder.glob("*.safetensors") if name != "base" else ():
            tensors = {
                key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in safetensors.torch.load_file(shard).items()
            }
            safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (place / "data.jsonl").write_text("".join(json.dumps({"text": " ".join(WORDS[i:] * 3)}) + "\n" for i in range(4)))
    return size


def write_configs(place: Path, count: int, method: str) -> tuple[Path, Path]:
    tuned = [str(place / f"tuned{i}") for i in range(count)]
    parameters = {"weight": 1 / count} | ({"density": 0.9} if method == "ties" else {})
    config = {
        "merge_method": method,
        "base_model": str(place / "base"),
        "models": [{"model": model, "parameters": parameters} for model in tuned],
        "dtype": "bfloat16",
    }
    data = {"path": str(place / "data.jsonl")}
    pave = {"cache_dir": str(place / "cache"), "models": [{"model": model, "data": data} for model in tuned]}
    paths = place / f"{method}-plain.yml", place / f"{method}-pave.yml"
    for path, content in zip(paths, (config, config | {"pave": pave})):
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    return paths


def command(arguments: list[str], place: Path) -> tuple[float, float]:
    """Seconds, of CPU time where there is one thread, and peak resident GB of a command."""
    shutil.rmtree(place / "out", ignore_errors=True)
    with (place / "log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen([*arguments, str(place / "out")], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        sys.exit((place / "log").read_text())
    if os.environ.get("OMP_NUM_THREADS") == "1":
        seconds = usage.ru_utime + usage.ru_stime
    return seconds, usage.ru_maxrss * 1024 / 1e9


def compare(place: Path, count: int, method: str, repeats: int, label: str) -> None:
    plain, pave = write_configs(place, count, method)
    command([sys.executable, __file__, "--fill", str(pave)], place)
    yaml_command = str(Path(sys.executable).parent / "mergekit-yaml")
    runs: dict[Path, list[tuple[float, float]]] = {plain: [], pave: []}
    for _ in range(repeats):  # in turns, so that a busy machine meets both
        for config, measured in runs.items():
            measured.append(command([yaml_command, str(config)], place))
    (t0, m0), (t1, m1) = (tuple(map(statistics.median, zip(*measured))) for measured in runs.values())
    spread = " ".join(f"{seconds:.1f}" for measured in runs.values() for seconds, _ in measured)
    print(f"{label:34}|{t0:7.1f}{t1:7.1f}{t1 / t0:7.2f} |{m0:7.2f}{m1:7.2f}{m1 / m0:7.2f} | {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--place", help="where the checkpoints go; default: the system's temporary folder")
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    parser.add_argument("out", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        fill(options.fill, options.out)
        return

    if options.cpu_time:
        os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'':34}|{'seconds':^22}|{'peak GB':^22}|")
    print(f"{'merge':34}|{'plain':>7}{'pave':>7}{'ratio':>7} |{'plain':>7}{'pave':>7}{'ratio':>7} | each run")
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        shape = (1024, 2816, 8) if options.quick else (2048, 8192, 16)
        size = make_models(Path(place), 2, *shape)
        for method in options.methods:
            compare(Path(place), 2, method, options.repeats, f"{method}, 2 x {size:.1f} GB")


if __name__ == "__main__":
    main()
