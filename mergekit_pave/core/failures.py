"""What fails in the middle of a computation, told to people: memory that runs out, and a factorisation without a result."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

import numpy as np
import torch

from mergekit_pave.errors import PaveError, in_a_line

# What allocators and libraries of linear algebra say that have no exception of their own for it.
_SAID = re.compile(r"out of memory|not enough memory|allocate memory|memory allocation failed|_ALLOC_FAILED", re.IGNORECASE)

# torch's is a RuntimeError, that of numpy and scipy a ValueError.
NOT_CONVERGED = (torch.linalg.LinAlgError, np.linalg.LinAlgError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, that of an accelerator or that of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


@contextlib.contextmanager
def advising(work: str, device: torch.device | str, remedy: str | None = None) -> Iterator[None]:
    """Failures of a piece of work on tensors, as errors that say what to do.

    Args:
        work: what is done to which tensor of which model, as a noun.
        remedy: what to do where memory runs out, if there is more to say than of the device.

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
    """What to tell people where a piece of work has run out of memory; see `advising`."""
    if remedy is None and torch.device(device).type == "cpu":
        remedy = "Free memory, or use a machine that has more"
    if remedy is None:
        remedy = (
            "Free memory there, or use another device; in a merge, --low-cpu-memory and --read-to-gpu keep more tensors on it"
        )
    return PaveError(f"{work} ran out of memory on {device}. {remedy}")
