"""The phases before a merge: it is planned, and the caches are filled."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_pave.calibration import distributed
from mergekit_pave.errors import PaveError
from mergekit_pave.methods import registry
from mergekit_pave.planning.plan import Plan, announce
from mergekit_pave.plugin.conversion import each_checkpoint_once
from mergekit_pave.plugin.emr import architecture_for
from mergekit_pave.plugin.inputs import check_inputs, check_name, planning_errors
from mergekit_pave.progress import bar, no_bars_of_others
from mergekit_pave.report.summary import kind
from mergekit_pave.tasks.decompose import DecomposeWeight
from mergekit_pave.tasks.purify import PurificationStats

LOG = logging.getLogger(__name__)


def plan_merge(config: MergeConfiguration, options: MergeOptions, *, compares: bool = True, generates: bool = True) -> Plan:
    """What purification would add to a merge, without merging.

    Args:
        compares, generates: see `Merge`.

    Raises:
        PaveError: the config has no `pave:` block, the block does not fit, or mergekit cannot plan the merge.
    """
    with planning_errors(OSError, ValueError, RuntimeError):
        return _plan_merge(config, options, compares, generates)


def _plan_merge(config: MergeConfiguration, options: MergeOptions, compares: bool, generates: bool) -> Plan:
    missing = "the config has no `pave:` block, so nothing would be purified or measured"
    if config.pave is None and not registry.is_ours(config.merge_method):
        raise PaveError(missing)
    check_inputs(config, options)
    merge_adapters(config, options)
    base = config.base_model or config.referenced_models()[0]
    with each_checkpoint_once(), planning_errors(Exception):
        architecture = architecture_for(config, options, get_architecture_info)
    planner = MergePlanner(
        config,
        architecture,
        options=options,
        out_model_config=base.config(trust_remote_code=options.trust_remote_code),
    )
    planner._pave_compares, planner._pave_generates = compares, generates
    planner._plan()
    if config.pave is None:
        raise PaveError(
            f"{missing}; {config.merge_method} alone needs no plan, calibration or report: merge it with mergekit-yaml"
        )
    return planner._pave_plan


def merge_adapters(config: MergeConfiguration, options: MergeOptions) -> None:
    """Let mergekit merge adapters into their models, as it does before it reads the first of their tensors.

    Raises:
        PaveError: no --lora-merge-cache says where to.
    """
    for model in sorted((model for model in config.referenced_models() if model.lora), key=str):
        if not options.lora_merge_cache:
            raise PaveError(f"{model}: an adapter is merged into its model first; say where to with --lora-merge-cache FOLDER")
        folder = Path(options.lora_merge_cache, f"{model.model._unique_id()}_{model.lora._unique_id()}")
        if folder.exists():
            continue
        LOG.info("%s: merging the adapter into its model, which is written to %s", model, folder)
        try:
            LoaderCache().get(model)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # or mergekit would use what is there as the merged model
            raise


def sample_removal(plan: Plan, options: MergeOptions) -> dict[str, list[dict[str, Any]]]:
    """Rows of the report, for one weight of each kind of each model.

    These weights are read and purified only so that a plan can say how large the removed part is. There are no rows of weights
    whose decompositions are not in the cache.
    """
    uncached = {weight.output for weight in plan.weights if not weight.cached}
    kinds: dict[tuple[str, str], list[PurificationStats]] = {}
    for task in plan.stats:
        if task.purify.allocation.output not in uncached:
            kinds.setdefault((str(task.model), kind(task.tensor)), []).append(task)
    chosen = [tasks[len(tasks) // 2] for tasks in kinds.values()]
    rows: dict[str, list[dict[str, Any]]] = {str(task.model): [] for task in chosen}
    for task, stats in Executor(chosen, math_device=options.device, storage_device="cpu").run(quiet=True):
        rows[str(task.model)] += stats["rows"]
    return rows


def fill_caches(config: MergeConfiguration, options: MergeOptions) -> Plan:
    """Calibrate and decompose whatever the caches lack for a merge, in as many processes as were started."""
    distributed.start()
    check_name(options.device)
    options = options.model_copy(update={"device": distributed.local_device(options.device)})
    if distributed.rank() > 0:  # of several processes only the first logs
        logging.getLogger("mergekit_pave").setLevel(logging.ERROR)
        options = options.model_copy(update={"quiet": True})
    # mergekit merges adapters without a lock; and what the first process puts into the cache the others need not find again.
    plan = distributed.first_alone(lambda: plan_merge(config, options))
    calibrate_all(plan, options)
    share = plan.decompositions[distributed.rank() :: distributed.world_size()]
    distributed.stop()
    decompose_all(share, options)
    return plan


def calibrate_all(plan: Plan, options: MergeOptions) -> None:
    announce(plan)
    for remember in plan.remember if distributed.rank() == 0 else ():
        remember()
    # Processes wait for each other in every block, so all need the same order. An executor does not promise one.
    with no_bars_of_others(options.quiet):
        for calibration in plan.calibrations:
            calibration.execute()


def decompose_all(tasks: list[DecomposeWeight], options: MergeOptions) -> None:
    """Decompose the weights that calibration has not decomposed on the way, because their covariances were there already."""
    tasks = [task for task in tasks if not task.is_done]
    if not tasks:
        return
    storage = options.device if options.low_cpu_memory else "cpu"
    if options.multi_gpu:
        executor = MultiGPUExecutor(tasks, storage_device=None if options.low_cpu_memory else "cpu")
    else:
        executor = Executor(tasks, math_device=options.device, storage_device=storage)
    # Over several GPUs the executor yields nothing before all is done, so its own bar is shown instead.
    with bar(len(tasks), "Decomposing", "weights", hidden=options.quiet or options.multi_gpu) as progress:
        for _ in executor.run(quiet=options.quiet or not options.multi_gpu):
            progress.update()
