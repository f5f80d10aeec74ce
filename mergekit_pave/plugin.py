"""Every place where we touch mergekit's inside, for mergekit >=0.1.5,<0.2.

- `MergeConfiguration` gets a field `pave`, so that the block is validated with the YAML and survives `to_yaml`.
- `MergePlanner.plan_tensor` notes where in its slice a tensor lies (gradients need it, and the plan forgets it).
- `MergePlanner._plan` swaps the gather tasks of purified tensors.
- `MergePlanner.plan_to_disk` adds the task that writes the report.
- `run_merge` appends to the model card.

Without a `pave:` block each of these hands on to mergekit's own code and does nothing else.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from importlib.metadata import version
from typing import Annotated, Optional

from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from packaging.specifiers import SpecifierSet
from pydantic import WrapValidator
from pydantic.fields import FieldInfo

from mergekit_pave import config as pave_config
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.run import Runtime
from mergekit_pave.card import append_to_card
from mergekit_pave.errors import PaveError
from mergekit_pave.planning import Environment, Plan, PlannedTensor, make_plan
from mergekit_pave.tasks import WriteReport

SUPPORTED = SpecifierSet(">=0.1.5,<0.2")


def register() -> None:
    """Teach the loaded mergekit about the `pave:` block. Idempotent.

    Raises:
        PaveError: this mergekit is not one we know.
    """
    installed = version("mergekit")
    if installed not in SUPPORTED:
        raise PaveError(
            f"mergekit-pave {version('mergekit-pave')} works with mergekit {SUPPORTED}, but {installed} is installed. "
            f"Install a version that fits (pip install 'mergekit{SUPPORTED}'), or remove mergekit-pave"
        )
    if "pave" not in MergeConfiguration.model_fields:
        _add_field()
        MergePlanner.plan_tensor = _noting_position(MergePlanner.plan_tensor)
        MergePlanner._plan = _with_purification(MergePlanner._plan)
        MergePlanner.plan_to_disk = _with_report(MergePlanner.plan_to_disk)
        log = logging.getLogger("mergekit_pave")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)  # the line that says what was purified shows at default verbosity


def register_run_merge() -> None:
    """The part of `register` that needs `mergekit.merge`, which is loaded after the planner. Idempotent."""
    module = sys.modules["mergekit.merge"]
    if not hasattr(module.run_merge, "__wrapped__"):
        module.run_merge = _with_card(module.run_merge)


def _add_field() -> None:
    annotation = Annotated[Optional[pave_config.PaveConfig], WrapValidator(pave_config.parse)]
    MergeConfiguration.__pydantic_fields__["pave"] = FieldInfo.from_annotated_attribute(annotation, None)
    MergeConfiguration.model_rebuild(force=True)
    ConfigReader.model_rebuild(force=True)  # it embeds the schema of the other


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
        return tasks

    return wrapper


def _with_card(run_merge):
    @functools.wraps(run_merge)
    def wrapper(*args, **kwargs):
        run_merge(*args, **kwargs)
        given = inspect.signature(run_merge).bind(*args, **kwargs).arguments
        if given["merge_config"].pave is not None and given["options"].write_model_card:
            append_to_card(given["out_path"])

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


register()
if hasattr(sys.modules.get("mergekit.merge"), "run_merge"):
    register_run_merge()
