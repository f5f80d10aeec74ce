"""What happens to a merge when something goes wrong: every fault injected for real, how often, and how it ended.

    python tests/benchmarks/faults.py    # about 20 minutes on 2 cores

Each trial disturbs `mergekit-yaml` on tiny Llamas, runs it once more, undisturbed and on the same cache, and compares what that
writes with the result on a fresh cache, bit for bit. A trial fails, and so does the command, when these differ, when a
disturbed run ends without a word of explanation, or when it leaves temporary files or half a merge behind.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
# Read once, by the Hugging Face libraries and by torch, here and in the commands that are started.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import merging
import torch
from models import make_family, read_rows, write_rows
from reference import weights

RNG = random.Random(0)


class Bench:
    """Two models and enough data that a run takes seconds, its cache, and the result of an undisturbed run."""

    def __init__(self, place: Path):
        self.cache, self.out = place / "cache", place / "out"
        family = make_family("llama", place / "models")
        data = write_rows(place / "many.jsonl", [row for path in family.data for row in read_rows(path)] * 20)
        pave = {
            "models": [{"model": str(model), "data": {"path": str(data)}} for model in family.tuned[:2]],
            "calibration": {"samples": 1000, "batch_size": 1},
            "cache_dir": str(self.cache),
        }
        self.config = merging.write_config(merging.config_for(family, pave), place / "config.yml")
        start = time.monotonic()
        self.start().communicate()
        self.duration = time.monotonic() - start
        self.expected = weights(self.out)
        self.filled = place / "filled"
        shutil.copytree(self.cache, self.filled)

    def start(self, out: Path | None = None, **options) -> subprocess.Popen:
        command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(self.config), str(out or self.out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)

    def reset(self, filled: bool = False) -> None:
        for folder in (self.cache, self.out):
            shutil.rmtree(folder, ignore_errors=True)
        if filled:
            shutil.copytree(self.filled, self.cache)

    def recovers(self) -> bool:
        """Whether an undisturbed run on what is there now gives the undisturbed result."""
        process = self.start()
        process.communicate()
        return process.returncode == 0 and self.is_expected(self.out)

    def is_expected(self, out: Path) -> bool:
        found = weights(out)
        return found.keys() == self.expected.keys() and all(torch.equal(found[k], v) for k, v in self.expected.items())

    def rubbish(self) -> bool:
        temporary = [path for path in self.cache.rglob(".*") if path.suffix != ".lock"]
        return bool(temporary) or any(self.out.glob("*.safetensors"))


def killed(bench: Bench) -> str:
    """SIGKILL at a random moment"""
    process = bench.start()
    time.sleep(RNG.uniform(0.3, 1) * bench.duration)
    process.kill()
    process.communicate()
    return "continued"


def interrupted(bench: Bench) -> str:
    """Ctrl-C at a random moment"""
    # In a background job the signal is ignored, and children inherit that.
    process = bench.start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    time.sleep(RNG.uniform(0.5, 0.9) * bench.duration)
    process.send_signal(signal.SIGINT)
    process.communicate()
    if process.returncode == 0:
        return "ended before"
    return "FAILED: rubbish" if bench.rubbish() else "clean stop, continued"


def disk_full(bench: Bench) -> str:
    """a write fails (a random limit on file size)"""
    limit = RNG.randint(2000, 20000)
    process = bench.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    told, _ = process.communicate()
    if process.returncode == 0 or "cannot be written" not in told or "Traceback" in told:
        return "FAILED: not told"
    return "FAILED: rubbish" if bench.rubbish() else "refused with a message, continued"


def two_at_once(bench: Bench) -> str:
    """two processes on one cache"""
    other = bench.out.with_name("other")
    processes = [bench.start(), bench.start(other)]
    for process in processes:
        process.communicate()
    good = all(process.returncode == 0 for process in processes) and bench.is_expected(other)
    shutil.rmtree(other, ignore_errors=True)
    return "both as undisturbed" if good else "FAILED: differ"


def flipped(bench: Bench) -> str:
    """one bit flipped in a random cache file"""
    path = some_file(bench)
    content = bytearray(path.read_bytes())
    content[RNG.randrange(len(content))] ^= 1 << RNG.randrange(8)
    path.write_bytes(content)
    process = bench.start()
    told, _ = process.communicate()
    if process.returncode == 0:  # it was in a manifest, which is read before anything is planned
        return "noticed, made anew" if bench.is_expected(bench.out) else "FAILED: another result"
    if "is damaged" not in told or "run again" not in told or "Traceback" in told or path.parent.exists():
        return "FAILED: not told"
    return "FAILED: rubbish" if bench.rubbish() else "told, made anew by the next run"


def cut_short(bench: Bench) -> str:
    """a random cache file cut short"""
    path = some_file(bench)
    path.write_bytes(path.read_bytes()[: RNG.randrange(path.stat().st_size)])
    return "noticed, made anew"


def gone(bench: Bench) -> str:
    """a random cache file removed"""
    some_file(bench).unlink()
    return "noticed, made anew"


def some_file(bench: Bench) -> Path:
    """A file that the next run reads: covariances are read only where tails are missing."""
    if RNG.random() < 0.5:
        shutil.rmtree(bench.cache / "subspace")
    kind = "subspace" if (bench.cache / "subspace").exists() else "covariance"
    return RNG.choice(sorted(path for path in (bench.cache / kind).rglob("*") if path.is_file() and path.suffix != ".lock"))


FAULTS: list[tuple[Callable[[Bench], str], int, bool]] = [
    (killed, 20, False),
    (interrupted, 10, False),
    (disk_full, 10, False),
    (two_at_once, 5, False),
    (flipped, 20, True),
    (cut_short, 10, True),
    (gone, 5, True),
]


def main() -> None:
    failed = False
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_HOME"] = str(Path(place, "hf"))
        bench = Bench(Path(place))
        print(f"An undisturbed run takes {bench.duration:.1f} s\n\n| fault | trials | outcome |\n|---|---|---|", flush=True)
        for fault, count, filled in FAULTS:
            outcomes: Counter[str] = Counter()
            for _ in range(count):
                bench.reset(filled)
                outcome = fault(bench)
                outcomes[outcome if bench.recovers() else "FAILED: another result"] += 1
            failed |= any(outcome.startswith("FAILED") for outcome in outcomes)
            told = ", ".join(f"{number} x {outcome}" for outcome, number in outcomes.items())
            print(f"| {fault.__doc__} | {count} | {told} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
