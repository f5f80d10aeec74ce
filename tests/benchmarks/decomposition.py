"""What purifying one weight costs: the paper's pipeline, as published, against ours, side by side.

    python tests/benchmarks/decomposition.py            # all shapes; half an hour and more on two cores
    python tests/benchmarks/decomposition.py --quick    # 1024-wide, under a minute

The paper's pipeline, in float32: activations are collected for the rank search (`svdvals` of W C_s) and again for the task
vector (full SVD of W C_s); C_s is inverted explicitly, and its shift doubled until the inverse looks accurate.
Ours: second moments once, the tail in float64, ranks, and the tail's part taken from W.

`collect` is the time for X^T X (both collections of the paper), without the model's forward passes, which the paper also does
twice; beyond 8192 tokens the same ones come again. `decompose` is everything after that:
decomposition, allocation, purification. `error` is the distance to float64's answer as a share of ||W' - W||.
"""

from __future__ import annotations

import argparse
import math
import os
import time

import torch

from mergekit_pave.core.allocation import allocate_ranks, fair_share, most_dropped
from mergekit_pave.core.covariance import SecondMoment
from mergekit_pave.core.projection import coefficients, drop_components
from mergekit_pave.core.subspace import tail_components

SHAPES = ["2048x2048", "8192x2048", "2048x8192", "4096x4096"]
DIFFERENT_TOKENS = 8192


def weights(d_out: int, d_in: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(d_out, d_in, generator=generator) / math.sqrt(d_in)).bfloat16().to(device)


def inputs(tokens: int, width: int, device: torch.device) -> torch.Tensor:
    """Layer inputs: a power-law spectrum over six decades, and a few channels 50 times larger."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(tokens, width, generator=generator) * 10 ** torch.linspace(0, -3, width)
    # A few reflections mix the channels as well as any rotation does, and cost less to make.
    for _ in range(8):
        axis = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        rows -= 2 * torch.outer(rows @ axis, axis)
    rows[:, torch.randperm(width, generator=generator)[:4]] *= 50
    return rows.bfloat16().to(device)


class Clock:
    """Wall time and CPU time of a block. CPU time is what to compare on a machine that is shared."""

    def __init__(self, device: torch.device):
        self.device, self.wall, self.cpu = device, 0.0, 0.0

    def __enter__(self):
        self._sync()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self._sync()
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]

    def _sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def published_covariance(batches: list[torch.Tensor]) -> torch.Tensor:
    width = batches[0].shape[1]
    total = torch.zeros(width, width, device=batches[0].device)
    for batch in batches:
        batch = batch.float()
        total += batch.mT @ batch
    return total / sum(map(len, batches))


def published_shift(covariance: torch.Tensor, relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """C_s and its inverse, with the shift doubled until their product is near the identity."""
    identity = torch.eye(len(covariance), device=covariance.device)
    while True:
        shifted = covariance + relative * covariance.diagonal().mean() * identity
        inverse = torch.linalg.inv(shifted)
        if torch.dist(shifted @ inverse, identity) < 0.05:
            return shifted, inverse
        relative *= 2


def published(weight: torch.Tensor, batches: list[torch.Tensor], ratio: float, collect: Clock, decompose: Clock) -> torch.Tensor:
    components = min(weight.shape)
    with collect:
        covariance = published_covariance(batches)
    with decompose:
        shifted, _ = published_shift(covariance, 0.01)
        values = torch.linalg.svdvals(weight.float() @ shifted).flip(0)
        share = fair_share(components, ratio)
        (dropped,) = allocate_ranks([(values / values[-1]).tolist()], [share], [share])
    with collect:
        covariance = published_covariance(batches)
    with decompose:
        shifted, inverse = published_shift(covariance, 0.01)
        left, values, right = torch.linalg.svd(weight.float() @ shifted, full_matrices=False)
        rank = components - dropped
        purified = (left[:, :rank] * values[:rank]) @ (right[:rank] @ inverse)
    return purified


def ours(weight: torch.Tensor, batches: list[torch.Tensor], ratio: float, collect: Clock, decompose: Clock) -> torch.Tensor:
    with collect:
        moment = SecondMoment(weight.shape[1])
        for batch in batches:
            moment.add(batch)
        covariance = moment.result()
    with decompose:
        shift = 0.01 * covariance.mean_diagonal()
        share = fair_share(min(weight.shape), ratio)
        # As many components as spectral allocation may ask for.
        tail = tail_components(weight, covariance, shift, most_dropped(min(weight.shape), share))
        (dropped,) = allocate_ranks([(tail.values / tail.largest).tolist()], [share], [share])
        purified = torch.empty_like(weight, dtype=torch.float32)
        directions = tail.directions[:, :dropped]
        drop_components(weight, directions, coefficients(weight, directions), out=purified)
    return purified


def reference(weight: torch.Tensor, rows: torch.Tensor, ratio: float) -> torch.Tensor:
    rows, weight = rows.double(), weight.double()
    covariance = rows.mT @ rows / len(rows)
    shifted = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=rows.dtype, device=rows.device)
    left = torch.linalg.svd(weight @ shifted, full_matrices=False).U
    tail = left[:, min(weight.shape) - fair_share(min(weight.shape), ratio) :]
    return weight - tail @ (tail.mT @ weight)


Seconds = dict[str, tuple[float, float]]  # of "paper" and "ours": (collect, decompose)


def measure(shape: tuple[int, int], tokens: int, options: argparse.Namespace) -> Seconds:
    device = torch.device(options.device)
    weight, rows = weights(*shape, device), inputs(min(tokens, DIFFERENT_TOKENS), shape[1], device)
    batches = list(rows.split(2048)) * (tokens // len(rows))
    seconds: Seconds = {}
    results = {}
    for name, run in (("ours", ours), ("paper", published)):
        collect, decompose = Clock(device), Clock(device)
        results[name] = run(weight, batches, options.ratio, collect, decompose)
        seconds[name] = [(collect.wall, decompose.wall), (collect.cpu, decompose.cpu)][options.cpu_time]
    errors = ["-", "-"]
    if options.errors:
        exact = reference(weight, rows, options.ratio)
        size = (exact - weight.double()).norm()
        errors = [f"{((results[name].double() - exact).norm() / size).item():.0e}" for name in ("paper", "ours")]
    show("x".join(map(str, shape)), tokens, seconds, errors)
    return seconds


def show(label: str, tokens: int, seconds: Seconds, errors: list[str]) -> None:
    (pc, pd), (oc, od) = seconds["paper"], seconds["ours"]
    print(
        f"{label:>11} {tokens:6d} |{pc:9.2f}{pd:9.2f} |{oc:9.2f}{od:9.2f} |"
        f"{pd / od:8.1f}{(pc + pd) / (oc + od):8.1f} |{errors[0]:>7}{errors[1]:>7}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small layer")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN", help="11008x4096 4096x11008 for a 7B model")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096, 65536])
    parser.add_argument("--ratio", type=float, default=0.984, help="share of components kept")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="1 with --cpu-time gives fair figures on a busy machine"
    )
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU instead of wall time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--errors", action="store_true", help="compare with a float64 SVD, which takes longer than all the rest")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.tokens, options.errors = ["1024x1024"], [512, 4096], True
    torch.set_num_threads(options.threads)
    kind = "CPU" if options.cpu_time else "wall"
    print(f"{options.device}, {options.threads} threads, {kind} seconds, rank_ratio {options.ratio}")
    print(f"{'':18} |{'paper':^18} |{'ours':^18} |{'ratio':^16} |{'error':^14}")
    print(f"{'shape':>11} {'tokens':>6} |{'collect':>9}{'decomp.':>9} |{'collect':>9}{'decomp.':>9} |", end="")
    print(f"{'decomp.':>8}{'total':>8} |{'paper':>7}{'ours':>7}")
    for tokens in options.tokens:
        measured = [measure(tuple(map(int, shape.split("x"))), tokens, options) for shape in options.shapes]
        total = {name: tuple(map(sum, zip(*(seconds[name] for seconds in measured)))) for name in ("paper", "ours")}
        show("together", tokens, total, ["", ""])


if __name__ == "__main__":
    main()
