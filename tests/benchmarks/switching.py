"""What a model costs that is kept as a task's file of `merge_method: emr`: bytes, and the time to become it in memory.

    python tests/benchmarks/switching.py               # Llamas of 0.3 GB, in bfloat16 and in float32: 3 GB of disk, two minutes
    python tests/benchmarks/switching.py --cpu-time    # of one thread: good on a machine that does other things

Columns, in seconds, the median of rounds in turn:

    switch   load_task(out, task, into=model): it becomes another model of the merge
    copy     model.load_state_dict of another model in memory: the least that any switch takes
    load     from_pretrained of the restored folder, whose files are in the page cache, until every weight is in memory
    anew     load_task(out, task)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaForCausalLM
from transformers.utils import logging
from warm_merge import make_models

from mergekit_pave import load_task
from mergekit_pave.emr.restore import open_task, write

LAYERS = {"bfloat16": 14, "float32": 7}  # of 1024 to 2816: 0.3 GB each


def measure(place: Path, dtype: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    make_models(place, 2, 1024, 2816, LAYERS[dtype], getattr(torch, dtype))
    out, tasks = place / "out", ["tuned0", "tuned1"]
    config = {"merge_method": "emr", "base_model": str(place / "base"), "dtype": dtype}
    config["models"] = [{"model": str(place / task)} for task in tasks]
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    for task in tasks:
        write(open_task(out, task), place / f"{task}-again", 5 * 10**9, quiet=True)
    model = load_task(out, tasks[0])
    states = [LlamaForCausalLM.from_pretrained(place / f"{task}-again").state_dict() for task in tasks]
    states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]

    def load(task: str) -> None:
        loaded = LlamaForCausalLM.from_pretrained(place / f"{task}-again")
        for parameter in loaded.parameters():  # until then they are only mapped
            parameter.detach().clone()

    def seconds(run: Callable[[], Any]) -> float:
        start = clock()
        run()
        return clock() - start

    times: dict[str, list[float]] = {name: [] for name in ("switch", "copy", "load", "anew")}
    for i in range(rounds):
        this, other = i % 2, 1 - i % 2
        times["copy"].append(seconds(lambda this=this: model.load_state_dict(states[this])))
        times["switch"].append(seconds(lambda other=other: load_task(out, tasks[other], into=model)))
        assert all(torch.equal(tensor, states[other][name]) for name, tensor in model.state_dict().items())
        times["load"].append(seconds(lambda this=this: load(tasks[this])))
        times["anew"].append(seconds(lambda this=this: load_task(out, tasks[this])))
    size = sum(path.stat().st_size for path in (place / "tuned0-again").glob("*.safetensors"))
    in_file = (out / "emr" / "tuned0.safetensors").stat().st_size
    return {"dtype": dtype, "model": size, "file": in_file} | {name: statistics.median(of) for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--place", type=Path, help="a folder for the models; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for dtype in arguments.dtype:
        with tempfile.TemporaryDirectory(dir=arguments.place) as place:
            rows.append(measure(Path(place), dtype, arguments.rounds, clock))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("dtype     model MB  file MB  share  switch s  copy s  load s  anew s")
    for row in rows:
        share = row["file"] / row["model"]
        print(f"{row['dtype']:9} {row['model'] / 1e6:8.0f} {row['file'] / 1e6:8.1f} {share:6.1%} ", end="")
        print(f"{row['switch']:9.3f} {row['copy']:7.3f} {row['load']:7.3f} {row['anew']:7.3f}")


if __name__ == "__main__":
    main()
