"""Every place where we touch mergekit's inside, for mergekit >=0.1.5,<0.2; the field itself is added in `_field`.

- `MergePlanner.plan_tensor` notes where in its slice a tensor lies (gradients need it, and the plan forgets it).
- `MergePlanner._plan` swaps the gather tasks of purified tensors.
- `MergePlanner.plan_to_disk` adds the task that writes the report, and sees to it that `generate_card`, which
  `mergekit.merge` will call when the merge is done, appends to the card.

Without a `pave:` block each of these hands on to mergekit's own code and does nothing else.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys

from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_pave import _field
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.run import Runtime
from mergekit_pave.card import with_section
from mergekit_pave.errors import PaveError
from mergekit_pave.planning import Environment, Plan, PlannedTensor, make_plan
from mergekit_pave.report import read_report
from mergekit_pave.tasks import WriteReport


def register() -> None:
    """Teach mergekit about the `pave:` block. Idempotent; validating a config with a block calls it."""
    _field.add()
    if not hasattr(MergePlanner._plan, "__wrapped__"):
        MergePlanner.plan_tensor = _noting_position(MergePlanner.plan_tensor)
        MergePlanner._plan = _with_purification(MergePlanner._plan)
        MergePlanner.plan_to_disk = _with_report(MergePlanner.plan_to_disk)
        log = logging.getLogger("mergekit_pave")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)  # the line that says what was purified shows at default verbosity


def _noting_position(plan_tensor):
    @functools.wraps(plan_tensor)
    def wrapper(self, *args, **kwargs):
        plan_tensor(self, *args, **kwargs)
        if self.config.pave is None:
            return
        reader = inspect.signature(plan_tensor).bind(self, *args, **kwargs).arguments["cfg_reader"]
        positions = self.__dict__.setdefault("_pave_positions", [])
        positions += [reader.t] * (len(self._tensors) - len(positions))

    return wrapper


def _with_purification(plan):
    @functools.wraps(plan)
    def wrapper(self):
        plan(self)
        if self.config.pave is None:
            return
        tensors = [
            PlannedTensor(
                name=weight.name,
                # Tensors with a vocabulary axis may be gathered by a task that also permutes or truncates them.
                gather=task.gather_tensors if type(task.gather_tensors) is GatherTensors else None,
                models=task.model_order,
                base=task.base_model,
                t=t,
            )
            for (weight, task), t in zip(self._tensors, self._pave_positions, strict=True)
        ]
        self._pave_plan = make_plan(self.config.pave, tensors, _environment(self.options))
        for place, gather in self._pave_plan.gathers.items():
            weight, task = self._tensors[place]
            self._tensors[place] = weight, task.model_copy(update={"gather_tensors": gather})

    return wrapper


def _with_report(plan_to_disk):
    @functools.wraps(plan_to_disk)
    def wrapper(self, out_path):
        tasks = plan_to_disk(self, out_path)
        if self.config.pave is not None:
            plan = self._pave_plan
            tasks.append(WriteReport(out_path=out_path, header=json.dumps(plan.header), stats=tuple(plan.stats)))
            self.config.pave._out_path = out_path
            merge = sys.modules.get("mergekit.merge")
            if merge is not None and not hasattr(merge.generate_card, "__wrapped__"):
                merge.generate_card = _with_card(merge.generate_card)
        return tasks

    return wrapper


def _with_card(generate_card):
    @functools.wraps(generate_card)
    def wrapper(config, *args, **kwargs):
        card = generate_card(config, *args, **kwargs)
        return card if config.pave is None else with_section(card, read_report(config.pave._out_path))

    return wrapper


def _environment(options: MergeOptions) -> Environment:
    return Environment(
        runtime=Runtime(options.device, options.trust_remote_code, options.quiet),
        transformers_cache=options.transformers_cache,
        checkpoint=_checkpoint,
    )


def _checkpoint(model: ModelReference) -> tuple[str, list[str]]:
    """The folder of a model's checkpoint, LoRA merged, and the names of its files."""
    index = LoaderCache().get(model).index
    return index.base_path, list(index.tensor_paths.values())


def plan_merge(config: MergeConfiguration, options: MergeOptions) -> Plan:
    """What purification would add to a merge, without merging.

    Raises:
        PaveError: the config has no `pave:` block, or the block does not fit.
    """
    if config.pave is None:
        raise PaveError("the config has no `pave:` block")
    LoaderCache().setup(options=options)
    base = config.base_model or config.referenced_models()[0]
    planner = MergePlanner(
        config,
        get_architecture_info(config, options),
        options=options,
        out_model_config=base.config(trust_remote_code=options.trust_remote_code),
    )
    planner._plan()
    return planner._pave_plan


def fill_caches(config: MergeConfiguration, options: MergeOptions) -> Plan:
    """Calibrate and decompose whatever the caches lack for a merge, in as many processes as were started."""
    distributed.start()
    options = options.model_copy(update={"device": distributed.local_device(options.device)})
    plan = plan_merge(config, options)
    # In one order everywhere, which an executor does not promise: processes wait for each other in every block.
    for calibration in plan.calibrations:
        calibration.execute()
    share = plan.decompositions[distributed.rank() :: distributed.world_size()]
    distributed.stop()
    storage = options.device if options.low_cpu_memory else "cpu"
    executor = Executor(share, math_device=options.device, storage_device=storage)
    for _ in executor.run(quiet=options.quiet, desc="Decomposing"):
        pass
    return plan
