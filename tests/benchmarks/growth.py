"""How the cost of a first merge, nothing cached, grows with the number of layers and of models: real `mergekit-yaml` commands.

    python tests/benchmarks/growth.py                      # about 5 minutes on 2 cores, 3 GB of disk
    python tests/benchmarks/growth.py --plot growth.svg    # also a log-log plot; needs matplotlib

Each run calibrates, decomposes and merges Llamas that are 512 wide. What any command takes before it has read a model (Python and
its libraries) is measured by a merge of one layer, and taken off the time for one weight. The memory of any merge grows, as the
pages of checkpoints that are mapped into it count, and mergekit keeps its output until a shard is full: so it stands beside that
of the merge without a block.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from warm_merge import command, make_models, write_configs

LAYERS = [(4, 2), (8, 2), (16, 2), (32, 2)]
MODELS = [(4, 2), (4, 8), (4, 30)]
WEIGHTS = 7  # linear weights of a Llama's layer


def measure(layers: int, models: int) -> tuple[float, float, float]:
    """Seconds and peak GB of a first merge, and peak GB of the same merge without a block."""
    with tempfile.TemporaryDirectory() as place:
        make_models(Path(place), models, 512, 1408, layers)
        plain, config = write_configs(Path(place), models, "task_arithmetic")
        shutil.rmtree(Path(place, "cache"), ignore_errors=True)
        yaml_command = str(Path(sys.executable).parent / "mergekit-yaml")
        seconds, peak = command([yaml_command, str(config)], Path(place))
        return seconds, peak, command([yaml_command, str(plain)], Path(place))[1]


def plot(results: dict[tuple[int, int], tuple[float, float, float]], start: float, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for label, grid in (("layers grow, 2 models", LAYERS), ("models grow, 4 layers", MODELS)):
        counts = [layers * models * WEIGHTS for layers, models in grid]
        axis.loglog(counts, [results[point][0] - start for point in grid], "o-", label=f"seconds: {label}")
        axis.loglog(counts, [results[point][1] for point in grid], "s--", label=f"peak GB: {label}")
        axis.loglog(counts, [results[point][2] for point in grid], "x:", label=f"peak GB without a block: {label}")
    axis.set_xlabel("weights purified")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    plt.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of one thread's CPU time")
    options = parser.parse_args()
    if options.cpu_time:
        os.environ["OMP_NUM_THREADS"] = "1"
    start, *_ = measure(1, 2)
    print(f"a merge of one layer: {start:.1f} s\n")
    print("| layers | models | weights | seconds | s a weight | peak memory | without a block |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results = {}
    for layers, models in dict.fromkeys([*LAYERS, *MODELS]):
        seconds, peak, plain = results[layers, models] = measure(layers, models)
        count = layers * models * WEIGHTS
        each = (seconds - start) / (count - 2 * WEIGHTS)
        print(f"| {layers} | {models} | {count} | {seconds:.1f} | {each:.3f} | {peak:.2f} GB | {plain:.2f} GB |", flush=True)
    if options.plot:
        plot(results, start, options.plot)


if __name__ == "__main__":
    main()
