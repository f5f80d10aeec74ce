"""All batches through a model block by block, so that each block's weights are in memory once and briefly.

Every batch runs the model's ordinary `forward` in a greenlet of its own. A hook on each block (the children of the
model's outermost `ModuleList`s) hands control back before the block runs. When every batch waits before a
block, the block is loaded, each batch runs through it, and the block is let go. Nothing needs to be known about the
architecture, and what a batch computes is what it would compute alone.

Memory: one block's weights and covariances, and the hidden states of all samples, whatever the depth. Attention masks, which the
suspended passes keep as well, are packed.
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

Waiting = list[tuple[greenlet, Batch, nn.Module]]  # each batch, and the block that it waits before


def run_in_lockstep(
    streamed: StreamedModel, batches: list[Batch], run: Callable[[Batch], None], begin: Callable[[Batch], None]
) -> Iterator[str | None]:
    """Run all batches, and yield each block's path when the last of them has left it; None before the first block.

    Args:
        streamed: the model, nothing of it loaded.
        batches: at least one.
        run: runs the model on a batch.
        begin: is told of a batch whenever it starts or goes on.

    Raises:
        UnknownWeightError: the model needs a weight that cannot be found, or where we do not see it.
    """
    scheduler = getcurrent()

    blocks = find_blocks(streamed.model)
    order = {block: i for i, block in enumerate(blocks)}

    def pause(module: nn.Module, _) -> None:
        if getcurrent() is not scheduler:
            scheduler.switch(module)

    # Outside the blocks weights come one module at a time: embeddings before the first block, norms after the last.
    within = {module for block in blocks for module in block.modules()}
    outside = [module for module in streamed.model.modules() if module._parameters and module not in within]
    handles = [block.register_forward_pre_hook(pause, prepend=True) for block in blocks]
    handles += [block.register_forward_hook(lambda m, args, output: pack(output)) for block in blocks]
    for module in outside:
        handles.append(module.register_forward_pre_hook(lambda m, _: streamed.load(m, recurse=False), prepend=True))

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
        later = []
        if any(block is current for _, _, block in waiting):
            streamed.load(current)
        for runner, batch, block in waiting:
            if block is current:
                begin(batch)
                block = runner.switch()
            if block is not None:
                later.append((runner, batch, block))
        streamed.release()
        return later

    masks = contextlib.ExitStack()
    masks.enter_context(packed_masks())
    try:
        waiting = distributed.together(start)
        yield None
        # Where batches differ in the blocks that they call (not each has an image), those that lag behind come first, and
        # where processes differ they still go through all blocks side by side.
        while (place := distributed.lowest(min((order[block] for _, _, block in waiting), default=len(order)))) < len(order):
            current = list(blocks)[place]
            waiting = distributed.together(lambda: through(current, waiting))  # noqa: B023
            yield blocks[current]
    finally:
        masks.close()
        for handle in handles:
            handle.remove()
