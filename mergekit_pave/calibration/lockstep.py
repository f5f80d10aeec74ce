"""All batches through a model block by block, so that each block's weights are in memory once and briefly.

1. Every batch runs the model's ordinary `forward` in a greenlet of its own, and stops before its first block. Blocks are the
   children of the model's outermost `ModuleList`s. A hook before each block switches back to the scheduler.
2. When all batches have stopped, the first block that one of them waits for is loaded. Each of these batches runs through it and
   stops before its next block.
3. The block is released, and the caller takes its covariances. Steps 2 and 3 repeat until no batch waits.

A caller that changes weights on the way has the batches stop before linear layers, too: see `Stop`.

Nothing here depends on the architecture, and a batch computes what it would compute alone. In memory are one block's weights and
covariances, and the hidden states of all samples, whatever the depth; those that would fill a device wait in main memory, see
`parking`. The suspended passes keep attention masks, too: callers have them packed, see `masks.packed_masks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.masks import pack
from mergekit_pave.calibration.models import find_blocks
from mergekit_pave.calibration.parking import Parking


class Loads(Protocol):
    """A model whose weights can be loaded and released: a `StreamedModel`, or a model that has them all the time."""

    model: nn.Module

    def load(self, module: nn.Module, recurse: bool = True) -> None: ...

    def release(self) -> None: ...


class WholeModel:
    """A model that has all of its weights."""

    def __init__(self, model: nn.Module):
        self.model = model

    def load(self, module: nn.Module, recurse: bool = True) -> None:
        """There is nothing to load."""

    def release(self) -> None:
        """Nothing is released."""


class Stop(NamedTuple):
    """Where batches stand.

    Attributes:
        path: of the block that all batches have left, or of the layer that some are about to enter; None before the first block.
        inputs: of that layer, with their batches; empty when a block has been left.
    """

    path: str | None
    inputs: list[tuple[Batch, Tensor]]


class _Waiting(NamedTuple):
    """A batch, the block or layer before which it stands, and that one's input."""

    runner: greenlet
    batch: Batch
    module: nn.Module
    input: Any


def run_in_lockstep(
    streamed: Loads,
    batches: list[Batch],
    run: Callable[[Batch], None],
    begin: Callable[[Batch], None] = lambda batch: None,
    layers: Iterable[str] = (),
) -> Iterator[Stop]:
    """Run all batches. Stop when all of them have left a block, and before each call of one of the layers.

    Args:
        streamed: the model, with no weight loaded.
        batches: at least one.
        run: runs the model on a batch.
        begin: is called with a batch whenever it starts or continues.
        layers: paths of modules within blocks that take one tensor. Their weights may be replaced while batches stop there.

    Raises:
        UnknownWeightError: the model needs a weight that cannot be found, or uses one that is not loaded.
    """
    scheduler = getcurrent()

    blocks = find_blocks(streamed.model)
    order = {block: i for i, block in enumerate(blocks)}
    paths = {streamed.model.get_submodule(path): path for path in layers}
    # Who has batches stop before layers, too, looks at all of them there.
    parking = None if paths else Parking(streamed.model)
    block_of = {module: block for block in blocks for module in block.modules() if module in paths or module is block}

    def pause(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getcurrent() is not scheduler:
            x = next(iter((*args, *kwargs.values())), None)
            go_on = parking.leave(x) if parking else lambda: None
            scheduler.switch(module, x)
            go_on()

    # Modules outside the blocks load their weights when they run: embeddings before the first block, norms after the last.
    in_blocks = {module for block in blocks for module in block.modules()}
    outside = [module for module in streamed.model.modules() if module._parameters and module not in in_blocks]

    def start() -> list[_Waiting]:
        waiting = []
        for batch in batches:
            begin(batch)
            runner = greenlet(run)
            if (stop := runner.switch(batch)) is not None:
                waiting.append(_Waiting(runner, batch, *stop))
        streamed.release()
        return waiting

    def through(current: nn.Module, waiting: list[_Waiting]) -> list[_Waiting]:
        """Let the batches that stand before a block or a layer go on to their next stop."""
        still_waiting = []
        if current in order and any(one.module is current for one in waiting):
            streamed.load(current)
        for i, one in enumerate(waiting):
            if one.module is current:
                waiting[i] = None  # its input may be freed
                begin(one.batch)
                runner, batch = one.runner, one.batch
                del one
                stop = runner.switch()
                one = None if stop is None else _Waiting(runner, batch, *stop)
            if one is not None:
                still_waiting.append(one)
        return still_waiting

    with contextlib.ExitStack() as hooks:
        for module in block_of:
            hooks.enter_context(module.register_forward_pre_hook(pause, prepend=True, with_kwargs=True))
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda module, args, output: pack(output)))
        for module in outside:
            hooks.enter_context(module.register_forward_pre_hook(lambda m, _: streamed.load(m, recurse=False), prepend=True))
        waiting = distributed.together(start)
        yield Stop(None, [])
        # Batches may call different blocks, as not each has an image: those that are furthest behind come first. Processes may
        # differ in the same way, but all of them go through all blocks side by side.
        while True:
            ours = min((order[block_of[one.module]] for one in waiting), default=len(order))
            if (number := distributed.lowest(ours)) == len(order):
                return
            current = list(blocks)[number]
            waiting = distributed.together(lambda: through(current, waiting))  # noqa: B023
            while layer := next((one.module for one in waiting if one.module in paths and block_of[one.module] is current), None):
                yield Stop(paths[layer], [(one.batch, one.input) for one in waiting if one.module is layer])
                waiting = through(layer, waiting)
            streamed.release()
            yield Stop(blocks[current], [])
