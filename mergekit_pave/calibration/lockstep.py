"""All batches through a model block by block, so that each block's weights are in memory once and briefly.

1. Every batch runs the model's ordinary `forward` in a greenlet of its own, and stops before its first block. Blocks are the
   children of the model's outermost `ModuleList`s. A hook before each block switches back to the scheduler.
2. When all batches have stopped, the first block that one of them waits for is loaded. Each of these batches runs through it and
   stops before its next block.
3. The block is released, and the caller takes its covariances. Steps 2 and 3 repeat until no batch waits.

Nothing here depends on the architecture, and a batch computes what it would compute alone. In memory are one block's weights and
covariances, and the hidden states of all samples, whatever the depth. The suspended passes keep attention masks, too, in packed
form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from greenlet import getcurrent, greenlet
from torch import nn

from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.batches import Batch
from mergekit_pave.calibration.masks import pack, packed_masks
from mergekit_pave.calibration.models import find_blocks
from mergekit_pave.calibration.weights import StreamedModel

Waiting = list[tuple[greenlet, Batch, nn.Module]]  # each batch, and the block that it waits for


def run_in_lockstep(
    streamed: StreamedModel, batches: list[Batch], run: Callable[[Batch], None], begin: Callable[[Batch], None]
) -> Iterator[str | None]:
    """Run all batches, and yield each block's path when all batches have left it; None before the first block.

    Args:
        streamed: the model, with no weight loaded.
        batches: at least one.
        run: runs the model on a batch.
        begin: is called with a batch whenever it starts or continues.

    Raises:
        UnknownWeightError: the model needs a weight that cannot be found, or uses one that is not loaded.
    """
    scheduler = getcurrent()

    blocks = find_blocks(streamed.model)
    order = {block: i for i, block in enumerate(blocks)}

    def pause(module: nn.Module, _) -> None:
        if getcurrent() is not scheduler:
            scheduler.switch(module)

    # Modules outside the blocks load their weights when they run: embeddings before the first block, norms after the last.
    in_blocks = {module for block in blocks for module in block.modules()}
    outside = [module for module in streamed.model.modules() if module._parameters and module not in in_blocks]

    def start() -> Waiting:
        waiting = []
        for batch in batches:
            begin(batch)
            runner = greenlet(run)
            if (block := runner.switch(batch)) is not None:
                waiting.append((runner, batch, block))
        streamed.release()
        return waiting

    def through(current: nn.Module, waiting: Waiting) -> Waiting:
        still_waiting = []
        if any(block is current for _, _, block in waiting):
            streamed.load(current)
        for runner, batch, block in waiting:
            if block is current:
                begin(batch)
                block = runner.switch()
            if block is not None:
                still_waiting.append((runner, batch, block))
        streamed.release()
        return still_waiting

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(pause, prepend=True))
            hooks.enter_context(block.register_forward_hook(lambda module, args, output: pack(output)))
        for module in outside:
            hooks.enter_context(module.register_forward_pre_hook(lambda m, _: streamed.load(m, recurse=False), prepend=True))
        hooks.enter_context(packed_masks())
        waiting = distributed.together(start)
        yield None
        # Batches may call different blocks, as not each has an image: those that are furthest behind come first. Processes may
        # differ in the same way, but all of them go through all blocks side by side.
        while (number := distributed.lowest(min((order[block] for _, _, block in waiting), default=len(order)))) < len(order):
            current = list(blocks)[number]
            waiting = distributed.together(lambda: through(current, waiting))  # noqa: B023
            yield blocks[current]
