"""Calibration over several processes: each runs a share of the batches, and then their sums are added up.

Second moments are sums, so the result is that of one process, up to the order of addition. `accelerate launch` or `torchrun`
starts the processes, and numbers them in environment variables.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from mergekit_pave.calibration.batches import Batch, Encoded, make_batches
from mergekit_pave.core.covariance import Covariance, Measurement, SecondMoment
from mergekit_pave.errors import PaveError

T = TypeVar("T")


def start() -> None:
    """Join the other processes, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Sums travel through main memory, as they are written to the disk next.
        # The timeout is long because the others wait while one process merges adapters or downloads models.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))


def stop() -> None:
    """Wait for the other processes and leave them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process. Process 0 writes the cache."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str) -> str:
    """The device of this process. Of several processes on one machine, each takes an accelerator of its own, of any type."""
    kind = torch.device(device)
    if world_size() == 1 or kind.type == "cpu" or kind.index is not None:
        return device
    count = torch.get_device_module(kind).device_count()
    return f"{kind.type}:{int(os.environ.get('LOCAL_RANK', '0')) % max(1, count)}"


def agree(value: bool) -> bool:
    """Process 0's value, in every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def first_alone(work: Callable[[], T]) -> T:
    """Do a piece of work in process 0, and then in the others, which find its results on the disk.

    If it fails in process 0, that process reports why, and the others just end.
    """
    result, done = None, False
    if rank() == 0:
        try:
            result = work()
            done = True
        finally:
            agree(done)
    elif not agree(done):
        raise SystemExit(1)
    return together(lambda: result if rank() == 0 else work())


def together(work: Callable[[], T]) -> T:
    """Do a piece of work in every process. If it fails in one, it fails in all, so that no process waits for a dead one."""
    if world_size() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    failures: list[Exception | None] = [None] * world_size()
    dist.all_gather_object(failures, failure)
    for failed in failures:
        if failed is not None:
            raise failed
    return result


def lowest(value: int) -> int:
    """The lowest of all processes' values."""
    if world_size() == 1:
        return value
    values = [0] * world_size()
    dist.all_gather_object(values, value)
    return min(values)


def share(encoded: list[Encoded], batch_size: int) -> list[Batch]:
    """The batches of this process. Long and short ones are spread evenly over the processes.

    Raises:
        PaveError: there are more processes than samples.
    """
    if len(encoded) < world_size():
        raise PaveError(f"{world_size()} processes cannot share {len(encoded)} calibration samples; start fewer")
    batches = make_batches(encoded, min(batch_size, len(encoded) // world_size()))
    return batches[rank() :: world_size()]


def total(sums: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in process 0."""
    if world_size() > 1:
        dist.reduce(sums, dst=0)
    return sums


def add_up(measurements: list[Measurement]) -> list[Measurement]:
    """The covariances of the rows of all processes, in process 0. The result in the other processes is of no use.

    Args:
        measurements: those of this process. Another process may have seen other layers, such as an expert that no token of
            this one was routed to.
    """
    if world_size() == 1:
        return measurements
    covariances = {tuple(layers): covariance for layers, covariance in measurements}
    # For each process, by layers: the width, and whether the rows are summed.
    forms: list[dict[tuple[str, ...], tuple[int, bool]]] = [{} for _ in range(world_size())]
    dist.all_gather_object(forms, {layers: (c.dim, c.gram is not None) for layers, c in covariances.items()})
    dims = {layers: dim for of_process in forms for layers, (dim, _) in of_process.items()}
    result = []
    for layers, dim in dims.items():
        part = covariances.get(layers, Covariance(0, rows=torch.zeros(0, dim))).to(torch.device("cpu"))
        if any(of_process.get(layers, (dim, False))[1] for of_process in forms):
            # If one process has summed its rows, those of the others are summed, too.
            gram = part.unscaled()
            tokens = torch.tensor(part.tokens)
            dist.reduce(gram, dst=0)
            dist.reduce(tokens, dst=0)
            result.append(Measurement(list(layers), Covariance(int(tokens), gram=gram)))
            continue
        parts = [part] * world_size()
        dist.gather_object(part, parts if rank() == 0 else None, dst=0)
        total = SecondMoment(dim)
        for other in parts:
            total.add(other.rows)
        result.append(Measurement(list(layers), total.result()))
    return result
