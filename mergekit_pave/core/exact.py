"""Arithmetic that is as exact as our mathematics assumes, whatever a process has set and whatever a device can do."""

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

# All threads share the process's setting: the first thread to enter changes it, the last to leave restores it.
_lock = threading.Lock()
_inside = 0
_restore = contextlib.ExitStack()


@contextlib.contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Within this context, products of float32 tensors on a device are those of IEEE float32.

    A process may have asked for faster products of fewer bits: with `torch.autocast` (bfloat16 or float16), or with settings
    such as `torch.set_float32_matmul_precision` (TF32 on GPUs, bfloat16 on CPUs). Neither affects float64. The settings are
    restored afterwards. Until then other threads compute in IEEE float32, too.
    """
    global _inside
    with contextlib.ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        with _lock:
            if not _inside:
                _use_ieee(_restore)
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if not _inside:
                    _restore.close()


def _use_ieee(stack: contextlib.ExitStack) -> None:
    """Set IEEE float32. Closing the stack restores what was set before."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9 there was one setting
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        return
    backends = torch.backends
    # A setting of "none" follows the more general one, which comes first in this list. So it needs no change.
    settings: list[Any] = [backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul]
    for setting in settings:
        if setting.fp32_precision not in ("none", "ieee"):
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"


@functools.cache
def float64_device(device: torch.device) -> torch.device:
    """Where float64 work on a device's tensors is done: there, or on the CPU if the device has no float64, as Apple's."""
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        (one @ one).item()  # some devices accept the tensor, but refuse to compute
    except (TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        LOG.info("%s has no float64: sums and decompositions are done on the CPU", device)
        return torch.device("cpu")
    return device


def in_float64(x: Tensor) -> Tensor:
    """A tensor in float64, on its device, or on the CPU if the device has no float64."""
    return x.to(float64_device(x.device)).to(torch.float64)  # first moved, then cast: its device may not have the type
