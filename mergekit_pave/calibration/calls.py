"""How often a model calls its layers, found without any weight."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import torch

from mergekit_pave.calibration.batches import make_batches
from mergekit_pave.calibration.forward import runner
from mergekit_pave.calibration.job import Job
from mergekit_pave.calibration.models import empty_model


def called_again(job: Job, layers: Collection[str]) -> str | None:
    """One of these layers that the model calls more than once for a sample; None also where that depends on values."""
    model = empty_model(job.architecture.cls, job.config).eval().to("meta")
    calls: Counter[str] = Counter()
    for path in layers:
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: calls.update([path]))
    run = runner(model, unpadded=True)
    batch = make_batches(job.run[:1], 1)[0].to("meta")
    unmasked = replace(batch, inputs={name: values for name, values in batch.inputs.items() if "mask" not in name})
    for one in (batch, unmasked):  # some models look into a mask, and others cannot do without
        calls.clear()
        with contextlib.suppress(Exception), torch.no_grad():
            run(one)
        if calls and max(calls.values()) > 1:
            return max(calls, key=calls.get)
    return None
