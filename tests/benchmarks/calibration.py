"""What calibration costs, beside a bare forward pass and PEFT's covariance pass, and how its memory grows.

    python tests/benchmarks/calibration.py            # about 40 minutes on 2 cores, 25 GB of disk
    python tests/benchmarks/calibration.py --quick    # about 8 minutes, 4 GB of disk
    python tests/benchmarks/calibration.py --cpu-time # seconds of one thread's CPU time: good on a machine that does other things

Every measurement runs in a process of its own, so that peak memory is its own. PEFT's pass needs the package attrs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 8192


def write_checkpoint(folder: Path, hidden: int, feed_forward: int, layers: int, dtype: torch.dtype) -> int:
    """A sharded Llama of random weights and a small vocabulary, written without ever holding it whole. Returns its bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map, shard, size, total, number = {}, {}, 0, 0, 0
    for i, (name, shape) in enumerate(shapes.items()):
        scale = shape[-1] ** -0.5
        value = torch.randn(shape, generator=generator) * scale if len(shape) > 1 else torch.ones(shape)
        shard[name] = value.to(dtype)
        size += shard[name].nbytes
        if size > 1e9 or i == len(shapes) - 1:
            file = f"model-{number:05}.safetensors"
            safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            total += size
            shard, size, number = {}, 0, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def encoded_samples(samples: int, length: int, max_tokens: int):
    """Random token ids in place of tokenised text: the cost is the same. At most `max_tokens` of them count."""
    from mergekit_pave.calibration.batches import Encoded
    from mergekit_pave.calibration.drawing import draw_positions

    ids = torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1)).tolist()
    counted = draw_positions([length] * samples, max_tokens, seed=42)
    return [Encoded(str(i), {"input_ids": row}, places) for i, (row, places) in enumerate(zip(ids, counted))]


def stage_forward(folder: str, samples: int, length: int, counted: int) -> None:
    """The model's own forward pass over the same tokens, and nothing else."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([sample.inputs["input_ids"] for sample in encoded_samples(samples, length, counted)])
    with torch.no_grad():
        start = clock()
        for batch in ids.split(8):
            model.model(batch, use_cache=False)
    report(clock() - start)


def stage_pave(folder: str, samples: int, length: int, counted: int) -> None:
    """Our pass at the default settings, loading weights and writing covariances included."""
    from mergekit_pave.cache import Artefact
    from mergekit_pave.calibration.architecture import describe
    from mergekit_pave.calibration.job import Job, Runtime
    from mergekit_pave.calibration.run import calibrate

    config = AutoConfig.from_pretrained(folder)
    about = {"model": "model", "tokens": samples * counted}
    job = Job("model", folder, config, describe(config, folder, False), encoded_samples(samples, length, counted), 8, about)
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as cache:
        start = clock()
        calibrate(job, Artefact(Path(cache, "covariance")), Runtime("cpu", False, True))
        report(clock() - start)


def stage_peft(folder: str, samples: int, length: int, counted: int) -> None:
    """The covariance part of PEFT's `preprocess_corda`, without the decomposition that follows it there."""
    from peft import LoraConfig
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([sample.inputs["input_ids"] for sample in encoded_samples(samples, length, counted)])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(init_lora_weights="corda", target_modules=targets, corda_config=CordaConfig(corda_method="kpm"))

    def run_model() -> None:
        for row in ids:  # its hooks take one sample at a time
            model.model(row[None], use_cache=False)

    with torch.no_grad():
        start = clock()
        corda.calib_cov_distribution(model, config, run_model, None, None)
    report(clock() - start)


def clock() -> float:
    """Seconds: of this process on a CPU where it may use one thread, else on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def report(seconds: float) -> None:
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure(stage: str, folder: Path, samples: int, length: int, counted: int) -> dict[str, float]:
    """Run one of the stages above. The environment has the number of threads."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    command += ["--samples", str(samples), "--length", str(length), "--counted", str(counted)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--stage", choices=["forward", "pave", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--counted", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        globals()[f"stage_{options.stage}"](options.folder, options.samples, options.length, options.counted)
        return

    quick = options.quick
    if options.cpu_time:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    # At the default settings, 256 samples of 512 tokens of which half count; the quick form has a quarter of each.
    samples, counted = (64, 16384) if quick else (256, 65536)
    with tempfile.TemporaryDirectory() as place:
        print(f"{samples} samples of 512 tokens, {counted} counted, float32 on {torch.get_num_threads()} threads\n")
        print("| model | pass | seconds | x forward | peak memory |\n|---|---|---|---|---|", flush=True)
        shapes = {"SmolLM2-135M": (576, 1536, 30), "TinyLlama-1.1B, 2 of its 22 layers": (2048, 5632, 2)}
        for name, shape in shapes.items():
            folder = Path(place, "speed", name)
            folder.mkdir(parents=True)
            write_checkpoint(folder, *shape, torch.float32)
            for stage in ("forward", "pave", "peft"):
                result = measure(stage, folder, samples, 512, counted)
                if stage == "forward":
                    forward = result["seconds"]
                ratio = result["seconds"] / forward
                print(f"| {name} | {stage} | {result['seconds']:.0f} | {ratio:.2f} | {result['peak'] / 1e9:.2f} GB |", flush=True)

        shape = (1024, 2816) if quick else (2048, 5632)
        print("\n| layers | checkpoint | peak memory of calibration | share |\n|---|---|---|---|", flush=True)
        for layers in (20, 40) if quick else (44, 88):
            folder = Path(place, f"memory-{layers}")
            folder.mkdir()
            size = write_checkpoint(folder, *shape, layers, torch.bfloat16)
            peak = measure("pave", folder, 16, 256, 65536)["peak"]
            print(f"| {layers} | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {peak / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
