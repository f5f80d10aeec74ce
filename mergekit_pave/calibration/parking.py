"""Hidden states of batches that wait for their next block: on the device, or in main memory if they would fill it.

A suspended forward pass refers to tensors, and has to find them as it left them. So tensors stay what they are, and their values
move: meanwhile a tensor is empty.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

_SHARE = 4  # waiting hidden states may take this part of a device's free memory: weights, covariances and work need the rest


def room_on(device: torch.device | str) -> float:
    """Bytes of hidden states that may wait on a device. There is no limit if it is main memory, or does not tell what is free."""
    device = torch.device(device)
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if not hasattr(module, "mem_get_info") or not module.is_available():
        return math.inf
    free = module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device)
    return free / _SHARE


class Parking:
    """The hidden states of batches that run in greenlets.

    Args:
        model: what the batches run through.
    """

    def __init__(self, model: nn.Module):
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._room: dict[torch.device, float] = {}
        self._there: Counter[torch.device] = Counter()  # bytes that wait there
        self._inputs: weakref.WeakKeyDictionary[greenlet, list[weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()

    def leave(self, x: Any) -> Callable[[], None]:
        """Called by a batch before it waits, with the input of its next block. It has to call what it gets when it goes on.

        The inputs of earlier blocks that are still in use, as embeddings are, wait with it.
        """
        known = [x, *(ref() for ref in self._inputs.get(getcurrent(), ()))]
        states = {id(state): state for state in known if isinstance(state, Tensor)}
        self._inputs[getcurrent()] = [weakref.ref(state) for state in states.values()]
        stay: Counter[torch.device] = Counter()
        parked: list[tuple[Tensor, Tensor]] = []
        for state in states.values():
            device = state.device
            if device not in self._room:
                self._room[device] = room_on(device)
            if self._there[device] + state.nbytes <= self._room[device] or not self._may_move(state):
                stay[device] += state.nbytes
                self._there[device] += state.nbytes
            else:
                parked.append((state, state.data.to("cpu")))
                state.data = state.new_empty(0)

        def go_on() -> None:
            self._there.subtract(stay)
            while parked:
                state, values = parked.pop()
                state.data = values.to(state.device)

        return go_on

    def _may_move(self, state: Tensor) -> bool:
        """Whether a tensor is a batch's own, and its memory is its own."""
        is_own = not isinstance(state, nn.Parameter) and id(state) not in self._buffers
        is_own &= state.layout == torch.strided and state._base is None
        return is_own and state.untyped_storage().nbytes() == state.nbytes
