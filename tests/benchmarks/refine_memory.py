"""Whether the peak memory of a refined merge grows with the number of layers: real `mergekit-yaml` commands.

    python tests/benchmarks/refine_memory.py    # 8 and 16 layers of 2048: models of 0.6 and 1.1 GB, 6 GB of disk
    python tests/benchmarks/refine_memory.py --layers 2 8 --hidden 512 --feed-forward 512    # half a minute

The models are random Llamas in 16 bit: a base and two perturbations of it, run on 16 samples of 128 tokens. mergekit keeps its
output until a shard is full, so shards are small here. The vocabulary is left to the merge method; its fit does not know layers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import yaml
from warm_merge import WORDS, command, make_models, write_configs

TEXTS, TOKENS = 16, 128


def refined(place: Path) -> Path:
    """The config of a refined merge of the models under a folder."""
    rows = [{"text": " ".join(random.Random(i).choices(WORDS, k=TOKENS))} for i in range(TEXTS)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, path = write_configs(place, 2, "task_arithmetic")
    config = yaml.safe_load(path.read_text())
    config["pave"] |= {"purify": False, "refine": True, "vocabulary": "method"}
    path.write_text(yaml.safe_dump(config))
    return path


def measure(layers: int, hidden: int, feed_forward: int, folder: str | None) -> tuple[float, float, float]:
    """GB of one model, seconds, and peak resident GB."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        size = make_models(Path(place), 2, hidden, feed_forward, layers)
        merge = [str(Path(sys.executable).parent / "mergekit-yaml"), str(refined(Path(place))), "--out-shard-size", "100M"]
        return size, *command(merge, Path(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=4096)
    parser.add_argument("--place", help="where the checkpoints go; default: the system's temporary folder")
    options = parser.parse_args()
    peaks = []
    print(f"{'layers':>6}{'GB a model':>12}{'seconds':>9}{'peak GB':>9}")
    for layers in options.layers:
        size, seconds, peak = measure(layers, options.hidden, options.feed_forward, options.place)
        peaks.append(peak)
        print(f"{layers:6}{size:12.2f}{seconds:9.0f}{peak:9.2f}", flush=True)
    print(f"peak at most by peak at least layers: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
