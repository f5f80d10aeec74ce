"""Arithmetic as exact as our mathematics takes it to be, whatever a process has set for its models and a device can do."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.core.failures import is_out_of_memory

LOG = logging.getLogger(__name__)

# Workers share the process's setting: the first of them to come changes it, the last to go puts it back.
_lock = threading.Lock()
_inside = 0
_before = contextlib.ExitStack()


@contextlib.contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Products of float32 tensors on a device are those of IEEE float32.

    A process may have asked for faster ones, of fewer bits: by `torch.autocast` (bfloat16 or float16) or by
    `torch.set_float32_matmul_precision` and the like (TF32 on GPUs, bfloat16 on CPUs). float64 is exempt from both. What was
    set holds again afterwards; meanwhile other threads compute in IEEE float32, too.
    """
    global _inside
    with contextlib.ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        with _lock:
            if not _inside:
                _use_ieee(_before)
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if not _inside:
                    _before.close()


def _use_ieee(stack: contextlib.ExitStack) -> None:
    """Leaves in the stack what puts everything back."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9 there is one setting
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        return
    backends = torch.backends
    # A setting that is not made follows the one above it, which comes first here, and is not made afterwards either.
    settings: list[Any] = [backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul]
    for setting in settings:
        if setting.fp32_precision not in ("none", "ieee"):
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"


@functools.cache
def float64_device(device: torch.device) -> torch.device:
    """Where float64 work on a device's tensors is done: there, or on the CPU where the device has no float64 (Apple's, say)."""
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        (one @ one).item()  # some take the tensor and refuse to compute
    except (TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        LOG.info("%s has no float64: sums and decompositions are done on the CPU", device)
        return torch.device("cpu")
    return device


def in_float64(x: Tensor) -> Tensor:
    """A tensor in float64, on its device where that has it, else on the CPU."""
    return x.to(float64_device(x.device)).to(torch.float64)  # moved first: where it came from, the type may not exist
