"""What of mergekit is wrapped, for mergekit >=0.1.5,<0.2.

- `ModelReference.serialize` gets another body, see `references`.
- `get_architecture_info`, with which a merge begins, first checks that the device and the models are there, and
  that mergekit will be able to write its model card.
- `MergePlanner.plan_tensor` notes the position of a tensor in its slice, which gradients need and the plan forgets. It also
  plans every optional tensor that all of its inputs have.
- `MergePlanner._plan` gets an architecture whose tensors have the names that the checkpoints use (see `stored_names`). Then it
  swaps the gather tasks of purified tensors, all merge tasks of `regmean`, and those of the vocabulary by token counts.
- `Executor._run` adds advice to an error where memory runs out.
- `MergePlanner.plan_to_disk` fills the caches with what the merge will read (see `phases`). What fails there leaves nothing
  behind, as mergekit has not opened its output. Each phase has a progress bar of its own, because mergekit's bar counts tasks
  and would count a calibration as one of hundreds. Last it adds the task that writes the report.
- `generate_card`, which `mergekit.merge` calls when the merge is done, appends a section to the model card.

The field `pave` itself is added in `hook.field`.

Without a `pave:` block each of these calls mergekit's own code and does nothing else, unless the method is `regmean`
(of `tsv` only the names of parameters are checked).
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
import time
import traceback
from pathlib import Path

from mergekit.architecture import get_architecture_info
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.plan import MergePlanner

from mergekit_pave.cache import require_space
from mergekit_pave.core.failures import is_out_of_memory, ran_out
from mergekit_pave.methods.regmean import check_baseless, check_weights
from mergekit_pave.planning.checks import check_present
from mergekit_pave.planning.closed_form import plan_without_data
from mergekit_pave.planning.make import make_plan
from mergekit_pave.planning.names import all_names, own_names
from mergekit_pave.planning.plan import announce_refinement
from mergekit_pave.plugin.checkpoints import has, missing_from, without_aliases
from mergekit_pave.plugin.dry_run import try_out
from mergekit_pave.plugin.emr import architecture_for, by_emr, check_emr, restrict
from mergekit_pave.plugin.following import following
from mergekit_pave.plugin.inputs import check_card, check_inputs, check_layers, planning_errors
from mergekit_pave.plugin.parameters import check_parameters
from mergekit_pave.plugin.phases import calibrate_all, decompose_all
from mergekit_pave.plugin.planner import data_share_of, inputs_of, is_emr, is_ours, is_regmean, merge_of
from mergekit_pave.plugin.references import make_writable
from mergekit_pave.plugin.stored_names import with_stored_names
from mergekit_pave.progress import no_bars_of_others
from mergekit_pave.report.card import with_section
from mergekit_pave.report.licence import common_licence
from mergekit_pave.report.page.picture import draw_ranks
from mergekit_pave.report.stored import read_report
from mergekit_pave.tasks.emr import WriteTasks
from mergekit_pave.tasks.refine import refine_merge
from mergekit_pave.tasks.regmean import ClosedForm, MergeByRegMean
from mergekit_pave.tasks.report import WriteReport
from mergekit_pave.tasks.store import ReadTensor, TensorStore
from mergekit_pave.tasks.vocabulary import MergeHeads, MergeRows

LOG = logging.getLogger(__name__)


def wrap() -> None:
    """Wrap mergekit. Idempotent. `host.register` calls it, after it has checked that mergekit has all that is needed."""
    make_writable()
    if not hasattr(MergePlanner._plan, "__wrapped__"):
        MergePlanner.plan_tensor = _noting_position(MergePlanner.plan_tensor)
        MergePlanner._plan = _with_purification(MergePlanner._plan)
        MergePlanner.plan_to_disk = _with_phases(MergePlanner.plan_to_disk)
        # `mergekit.merge` imports it from the first, and may have done so already.
        for module in filter(None, map(sys.modules.get, ("mergekit.architecture", "mergekit.merge"))):
            module.get_architecture_info = _with_checks(get_architecture_info)
        Executor._run = _with_advice(Executor._run)
        MultiGPUExecutor._device_worker = _until_taken(MultiGPUExecutor._device_worker)
        log = logging.getLogger("mergekit_pave")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)  # the block that says what was done shows at default verbosity


def _with_advice(run):
    """Memory may also run out in a task of mergekit's, or while mergekit moves tensors for one of ours."""

    @functools.wraps(run)
    def wrapper(self, *args, **kwargs):
        running = run(self, *args, **kwargs)
        ours = any(_is_of_ours(handle.task()) for handle in self.schedule.tasks)
        return advised(running, self.math_device) if ours else running

    def advised(running, device):
        try:
            yield from running
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is run.__code__)
            task = next((frame.f_locals.get("task") for frame in frames), None)
            tensor = getattr(task, "tensor", None) or getattr(getattr(task, "output_weight", None), "name", "a tensor")
            model = f"{task.model}: " if hasattr(task, "model") else ""
            raise ran_out(f"{model}working on {tensor}", device) from error

    return wrapper


def _until_taken(worker):
    """A worker of --multi-gpu waits until its last results are taken.

    mergekit stops taking them once all workers are done. It would run a task whose result was lost once more, without the values
    that the task needs.
    """

    @functools.wraps(worker)
    def wrapper(self, *args, **kwargs):
        worker(self, *args, **kwargs)
        ours = any(_is_of_ours(handle.task()) for handle in self.serial_schedule.tasks)
        while ours and not self.task_completion_queue.empty() and not self.done_event.is_set():
            time.sleep(0.001)

    return wrapper


def _is_of_ours(task: Task) -> bool:
    return type(task).__module__.startswith("mergekit_pave.")


def _with_checks(get_architecture_info):
    @functools.wraps(get_architecture_info)
    def wrapper(config, options):
        if getattr(config, "pave", None) is None:
            return get_architecture_info(config, options)
        check_inputs(config, options)
        check_card(config, options)
        with planning_errors(Exception):
            return architecture_for(config, options, get_architecture_info)

    return wrapper


def _noting_position(plan_tensor):
    signature = inspect.signature(plan_tensor)

    @functools.wraps(plan_tensor)
    def wrapper(self, *args, **kwargs):
        if not is_ours(self):
            return plan_tensor(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        reader = bound["cfg_reader"]
        bound["weights_in"] = [without_aliases(weight) for weight in bound["weights_in"]]
        if is_emr(self) and not restrict(self, bound):
            return
        models, weights = bound["models"], bound["weights_in"]
        if bound["weight"].optional and all(map(functools.partial(has, self), models, weights)):
            # mergekit looks for it by fewer names than it reads it by, and would leave it out.
            required = {"optional": False}
            bound["weight"] = bound["weight"].model_copy(update=required)
            bound["weights_in"] = [weight.model_copy(update=required) for weight in weights]
        plan_tensor(**bound)
        positions = self.__dict__.setdefault("_pave_positions", [])
        positions += [reader.t] * (len(self._tensors) - len(positions))

    return wrapper


def _with_purification(plan):
    @functools.wraps(plan)
    def wrapper(self):
        check_parameters(self)
        if not is_ours(self):
            return plan(self)
        if is_emr(self):
            check_emr(self)
        self.arch_info = with_stored_names(self)
        check_layers(self)
        plan(self)
        if self.config.pave is None:
            closed_forms = plan_without_data(merge_of(self))
        else:
            check_present(inputs_of(self), functools.partial(missing_from, self))
            with no_bars_of_others(self.options.quiet):
                try_out(self)
                self._pave_plan = make_plan(self.config.pave, merge_of(self))
            for number, gather in self._pave_plan.gathers.items():
                weight, task = self._tensors[number]
                self._tensors[number] = weight, task.model_copy(update={"gather_tensors": gather})
            closed_forms = self._pave_plan.closed_forms
        if is_regmean(self):
            for number, (weight, task) in enumerate(self._tensors):
                self._tensors[number] = weight, _by_regmean(task, closed_forms.get(number))
        if is_emr(self):
            self._pave_masks = by_emr(self)
        if self.config.pave is None:
            return
        for number, rows in self._pave_plan.rows.items():
            weight, task = self._tensors[number]
            self._tensors[number] = weight, MergeRows(merged=task, rows=rows)
        for number, heads in self._pave_plan.heads.items():
            weight, task = self._tensors[number]
            self._tensors[number] = weight, MergeHeads(name=weight.name, gather=task.gather_tensors, heads=heads)
        if self._pave_plan.refinement:
            _read_refined(self)

    return wrapper


def _read_refined(planner: MergePlanner) -> None:
    """Have the output tensors that are refined, and those that the refined model is run with, read from a store."""
    store, tasks, names = TensorStore(planner._pave_plan.refinement.folder), {}, {}
    for number in planner._pave_plan.refinement.numbers:
        weight, tasks[number] = planner._tensors[number]
        names.update(dict.fromkeys(own_names(weight), number))
        planner._tensors[number] = weight, ReadTensor(store=store, number=number)
    for number in tasks:  # a tensor stands in for those that are tied with it only where they are not stored
        for name in all_names(planner._tensors[number][0]):
            names.setdefault(name, number)
    planner._pave_merged = tasks, names, store


def _by_regmean(task: ExecuteMergeMethodTask, form: ClosedForm | None) -> MergeByRegMean:
    """The task that merges in closed form, or as task_arithmetic does."""
    has_base = task.base_model is not None
    check_baseless(data_share_of(task) if form else 1.0, task.parameters["lambda"], has_base)
    weights = [task.input_parameters[model]["weight"] for model in task.model_order if model != task.base_model]
    check_weights([1.0 if weight is None else weight for weight in weights], has_base, task.output_weight.name)
    return MergeByRegMean(**{name: getattr(task, name) for name in type(task).model_fields}, form=form)


def _with_phases(plan_to_disk):
    @functools.wraps(plan_to_disk)
    def wrapper(self, out_path):
        tasks = plan_to_disk(self, out_path)
        if self.config.pave is not None:
            plan = self._pave_plan
            announce_refinement(plan)
            calibrate_all(plan, self.options)
            decompose_all(plan.decompositions, self.options)
            merges = [task for _, task in self._tensors]
            if plan.refinement:
                of_merged, names, store = self._pave_merged
                storage = self.options.device if self.options.low_cpu_memory else "cpu"
                with no_bars_of_others(self.options.quiet):
                    refined = refine_merge(plan.refinement, of_merged, names, store, storage)
                plan.header["refined"] |= {"layers": refined.rows, "left": plan.header["refined"]["left"] | refined.left}
                merges += of_merged.values()
            closed = tuple(task for task in merges if isinstance(task, MergeByRegMean) and task.form)
            header = json.dumps(plan.header)
            finalize = next(task for task in tasks if isinstance(task, FinalizeModel))
            written = {"out_path": out_path, "finalize": finalize}
            if plan.emr:
                self._pave_masks.open(Path(out_path))
                keeps = {"masks": self._pave_masks, "files": plan.emr.files, "base_only": plan.emr.base_only}
                written["emr"] = WriteTasks(**written, **keeps, dtype=self.config.out_dtype or self.config.dtype)
                require_space(Path(out_path), 2 * plan.emr.size)  # masks are stored twice while their files are written
            written["following"] = following(self.config, out_path, self.options)
            tasks.append(WriteReport(**written, header=header, stats=tuple(plan.stats), closed_forms=closed))
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
        if config.pave is None:
            return card
        try:
            report = read_report(config.pave._out_path)
            licence = common_licence(config.referenced_models(), LoaderCache().hf_cache_dir)
            return with_section(card, report, licence=licence, picture=draw_ranks(report, config.pave._out_path))
        except Exception as error:  # mergekit has yet to write the tokenizer, so a card may not stop it
            LOG.warning("the model card gets no PAVE section, because it could not be written (%s)", error)
            return card

    return wrapper
