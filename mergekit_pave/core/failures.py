"""Failures in the middle of a computation, as errors for people: memory runs out, or a factorisation does not converge."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

import numpy as np
import torch

from mergekit_pave.errors import PaveError, in_a_line

# The messages of allocators and of libraries of linear algebra that have no exception of their own for it.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|allocate memory|memory allocation failed|_ALLOC_FAILED", re.IGNORECASE
)

# The error of torch is a RuntimeError, that of numpy and scipy a ValueError.
NOT_CONVERGED = (torch.linalg.LinAlgError, np.linalg.LinAlgError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on an accelerator or on the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def advising(work: str, device: torch.device | str, remedy: str | None = None) -> Iterator[None]:
    """Turns failures of a piece of work on tensors into errors that say what to do.

    Args:
        work: what is done to which tensor of which model, as a noun.
        remedy: what to do when memory runs out, unless that depends on the device alone.

    Raises:
        PaveError: memory runs out, or a factorisation does not converge.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise ran_out(work, device, remedy) from error
        if isinstance(error, NOT_CONVERGED):
            reason = in_a_line(error)
            raise PaveError(f"{work} did not converge ({reason}). Exclude the tensor, or merge with another method") from error
        raise


def ran_out(work: str, device: torch.device | str, remedy: str | None = None) -> PaveError:
    """The error for a piece of work that has run out of memory; see `advising`."""
    if remedy is None and torch.device(device).type == "cpu":
        remedy = "Free memory, or use a machine that has more"
    if remedy is None:
        remedy = (
            "Free memory there, or use another device; in a merge, --low-cpu-memory and --read-to-gpu keep more tensors on it"
        )
    return PaveError(f"{work} ran out of memory on {device}. {remedy}")
