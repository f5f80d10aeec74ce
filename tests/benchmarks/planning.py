"""What planning takes and says at the sizes of real models, from configurations and the headers of shards alone.

    python tests/benchmarks/planning.py                      # all models, a few minutes on one core, 100 MB of disk
    python tests/benchmarks/planning.py --method regmean     # which keeps covariances
    python tests/benchmarks/planning.py --model qwen3 --show # what `plan` prints, too

A base and two fine-tunes of each: the tensors of the published checkpoints, with holes of the right
size in the place of weights. Seconds are CPU time of all threads, so that a machine that does other things matters little.
The cache is what one model takes of the disk at most, also as a share of its checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
import yaml
from models import make_tokenizer, published_shapes, write_hollow
from transformers import DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

QWEN3_30B = Qwen3MoeConfig(
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    vocab_size=151936,
    max_position_embeddings=40960,
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
)
LLAMA = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}
LLAMA3_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA)
LLAMA3_70B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA)
DEEPSEEK_V3 = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])  # its defaults are the published shape
MODELS = {"llama3-8b": LLAMA3_8B, "llama3-70b": LLAMA3_70B, "qwen3": QWEN3_30B, "deepseek": DEEPSEEK_V3}


def write_models(config: transformers.PretrainedConfig, place: Path, method: str) -> Path:
    """A base, two fine-tunes and data under a folder. Returns the config of their merge."""
    tensors, tokenizer = published_shapes(config), make_tokenizer("llama")
    for name in ("base", "tuned0", "tuned1"):
        config.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        write_hollow(place / name, tensors, tensors_a_shard=max(30, len(tensors) // 60))
    entries = []
    for i in range(2):
        rows = [{"text": f"the sum of {i + 1} and {j} is {i + j + 1}; " * 40} for j in range(256)]
        (place / f"data{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"model": str(place / f"tuned{i}"), "data": {"path": str(place / f"data{i}.jsonl")}})
    merge = {
        "merge_method": method,
        "base_model": str(place / "base"),
        "models": [{"model": entry["model"], "parameters": {"weight": 0.5}} for entry in entries],
        "parameters": {"density": 0.5} if method == "ties" else {},
        "dtype": "bfloat16",
        "pave": {"cache_dir": str(place / "cache"), "purify": method != "regmean", "models": entries},
    }
    (place / "config.yml").write_text(yaml.safe_dump(merge))
    return place / "config.yml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one")
    parser.add_argument("--method", default="ties", choices=["ties", "task_arithmetic", "regmean"])
    parser.add_argument("--show", action="store_true", help="what `mergekit-pave plan` prints, too")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_pave.cli import main as command
    from mergekit_pave.plugin.phases import plan_merge

    for name in options.model or MODELS:
        with tempfile.TemporaryDirectory() as place:
            config = write_models(MODELS[name], Path(place), options.method)
            stored = len(json.loads(Path(place, "base", "model.safetensors.index.json").read_text())["weight_map"])
            size = sum(file.stat().st_size for file in Path(place, "base").glob("*.safetensors"))
            start = time.process_time()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                command(["plan", str(config)], standalone_mode=False)
            seconds = time.process_time() - start
            plan = plan_merge(
                MergeConfiguration.model_validate(yaml.safe_load(config.read_text())), MergeOptions(), compares=False
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name}: {stored} tensors a model, planned in {seconds:.1f} s of CPU time; peak of memory so far {peak:.2f} GB")
        measured = plan.to_calibrate[0].job.estimate("cuda").cache  # in the model's own precision
        tails = sum(task.cache for task in plan.decompositions) / 2
        share = (measured + tails) / size
        print(
            f"  {size / 1e9:.1f} GB; cache {measured / 1e9:.2f} GB measured, {tails / 1e9:.2f} GB decomposed: {share:.2f} of it"
        )
        if options.show:
            print(printed.getvalue())


if __name__ == "__main__":
    main()
