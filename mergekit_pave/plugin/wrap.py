"""Every place where we touch mergekit's inside, for mergekit >=0.1.5,<0.2; the field itself is added in `_field`, and
`_conversion` asks what it can convert.

- `ModelReference.serialize` gets another body, see `_references`.
- `get_architecture_info`, which a merge begins with, first looks whether the device and the models are there.
- `MergePlanner.plan_tensor` notes where in its slice a tensor lies (gradients need it, and the plan forgets it), and
  plans every tensor that all of its inputs have.
- `MergePlanner._plan` gets an architecture whose tensors go by the names that the checkpoints have for them, and swaps the
  gather tasks of purified tensors, and all merge tasks of `regmean`.
- `Executor._run` says what to do where memory runs out.
- `MergePlanner.plan_to_disk` fills the caches with what the merge will read. What fails there leaves nothing behind, as
  mergekit has not opened its output; and each phase has a bar of its own, where mergekit's, which counts tasks, would take
  a calibration for one of hundreds. It also adds the task that writes the report, and sees to it that `generate_card`, which
  `mergekit.merge` will call when the merge is done, appends to the card.

Without a `pave:` block each of these hands on to mergekit's own code and does nothing else, unless the method is `regmean`
(of `tsv` only the names of parameters are checked).
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
import traceback

from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.graph import Executor
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner
from mergekit.tokenizer import PermutedVocabulary

from mergekit_pave.calibration.job import Runtime
from mergekit_pave.core.failures import is_out_of_memory, ran_out
from mergekit_pave.methods import registry
from mergekit_pave.methods.regmean import check_baseless, check_names, check_weights, data_share
from mergekit_pave.planning.checks import check_present, names_of
from mergekit_pave.planning.closed_form import plan_without_data
from mergekit_pave.planning.make import make_plan
from mergekit_pave.planning.merge import Environment, PlannedTensor
from mergekit_pave.plugin.checkpoints import checkpoint_of, has, reads
from mergekit_pave.plugin.checks import check_layers, inputs_of, missing_from, parameters_of
from mergekit_pave.plugin.dry_run import try_chat_template, try_dtypes, try_method, try_tokenizer
from mergekit_pave.plugin.inputs import check_inputs, told_in_a_line
from mergekit_pave.plugin.phases import calibrate_all, decompose_all
from mergekit_pave.plugin.planner import is_ours, is_regmean
from mergekit_pave.plugin.references import make_writable
from mergekit_pave.plugin.stored_names import with_stored_names
from mergekit_pave.progress import no_bars_of_others
from mergekit_pave.report.card import with_section
from mergekit_pave.report.licence import common_licence
from mergekit_pave.report.page.picture import draw_ranks
from mergekit_pave.report.stored import read_report
from mergekit_pave.tasks.regmean import ClosedForm, MergeByRegMean
from mergekit_pave.tasks.report import WriteReport

LOG = logging.getLogger(__name__)


def wrap() -> None:
    """Wrap mergekit's planner; see `host.register`, which has looked whether that can be done. Idempotent."""
    make_writable()
    if not hasattr(MergePlanner._plan, "__wrapped__"):
        MergePlanner.plan_tensor = _noting_position(MergePlanner.plan_tensor)
        MergePlanner._plan = _with_purification(MergePlanner._plan)
        MergePlanner.plan_to_disk = _with_phases(MergePlanner.plan_to_disk)
        # Where `mergekit.merge` has it from, or has it already.
        for module in filter(None, map(sys.modules.get, ("mergekit.architecture", "mergekit.merge"))):
            module.get_architecture_info = _with_checks(get_architecture_info)
        Executor._run = _with_advice(Executor._run)
        log = logging.getLogger("mergekit_pave")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)  # the line that says what was purified shows at default verbosity


def _with_advice(run):
    """Where memory runs out in a task of mergekit's, or while it moves tensors for one of ours, there is advice as well."""

    @functools.wraps(run)
    def wrapper(self, *args, **kwargs):
        running = run(self, *args, **kwargs)
        ours = any(type(handle.task()).__module__.startswith("mergekit_pave.") for handle in self.schedule.tasks)
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


def _with_checks(get_architecture_info):
    @functools.wraps(get_architecture_info)
    def wrapper(config, options):
        if getattr(config, "pave", None) is None:
            return get_architecture_info(config, options)
        check_inputs(config, options)
        with told_in_a_line():
            return get_architecture_info(config, options)

    return wrapper


def _noting_position(plan_tensor):
    signature = inspect.signature(plan_tensor)

    @functools.wraps(plan_tensor)
    def wrapper(self, *args, **kwargs):
        if not is_ours(self):
            return plan_tensor(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        models, reader = bound["models"], bound["cfg_reader"]
        bound["weights_in"] = weights = [_without_aliases(weight) for weight in bound["weights_in"]]
        if bound["weight"].optional and all(map(functools.partial(has, self), models, weights)):
            # mergekit asks for it by fewer names than it reads it by, and would leave it out.
            required = {"optional": False}
            bound["weight"] = bound["weight"].model_copy(update=required)
            bound["weights_in"] = [weight.model_copy(update=required) for weight in weights]
        plan_tensor(**bound)
        positions = self.__dict__.setdefault("_pave_positions", [])
        positions += [reader.t] * (len(self._tensors) - len(positions))

    return wrapper


def _without_aliases(weight: WeightInfo) -> WeightInfo:
    """The aliases of an optional weight, which mergekit trips over, among the other names that it is read by."""
    if not weight.optional or not weight.aliases:
        return weight
    return weight.model_copy(update={"aliases": None, "tied_names": (*weight.aliases, *(weight.tied_names or ()))})


def _with_purification(plan):
    @functools.wraps(plan)
    def wrapper(self):
        if registry.is_ours(self._method.spec.name):
            check_names(self._method.spec, parameters_of(self.config))
        if not is_ours(self):
            return plan(self)
        self.arch_info = with_stored_names(self)
        check_layers(self)
        plan(self)
        tensors = [
            PlannedTensor(
                name=weight.name,
                # Tensors with a vocabulary axis may be gathered by a task that also permutes or truncates them.
                gather=task.gather_tensors if type(task.gather_tensors) is GatherTensors else None,
                models=task.model_order,
                base=task.base_model,
                t=t,
                data_share=_data_share(task) if is_regmean(self) else None,
            )
            for (weight, task), t in zip(self._tensors, self._pave_positions, strict=True)
        ]
        if self.config.pave is None:
            closed_forms = plan_without_data(tensors, _environment(self))
        else:
            check_present(inputs_of(self), functools.partial(missing_from, self))
            with no_bars_of_others(self.options.quiet):
                _try_out(self)
                self._pave_plan = make_plan(self.config.pave, tensors, _environment(self))
            for place, gather in self._pave_plan.gathers.items():
                weight, task = self._tensors[place]
                self._tensors[place] = weight, task.model_copy(update={"gather_tensors": gather})
            closed_forms = self._pave_plan.closed_forms
        if is_regmean(self):
            for place, (weight, task) in enumerate(self._tensors):
                self._tensors[place] = weight, _by_regmean(task, closed_forms.get(place))

    return wrapper


def _try_out(planner: MergePlanner) -> None:
    """Try what mergekit looks at only when it merges."""
    config = planner.config
    try_dtypes({"dtype": config.dtype, "out_dtype": config.out_dtype})
    if config.chat_template not in (None, "auto"):
        try_chat_template(config)
    if planner._tokenizer_task:
        gathers = (task.gather_tensors for _, task in planner._tensors)
        vocabularies = [gather for gather in gathers if isinstance(gather, PermutedVocabulary)]
        known = [(vocabulary, _rows(vocabulary)) for vocabulary in vocabularies]
        known = [(one, rows) for one, rows in known if len(rows) == len(one.gather_tensors.weight_info)]
        try_tokenizer(planner._tokenizer_task, known)
    if not is_regmean(planner):  # its parameters are checked where its tasks are made
        try_method(task for _, task in planner._tensors)


def _rows(vocabulary: PermutedVocabulary) -> dict[ModelReference, int]:
    """How many tokens each model's tensor is for, as far as headers say."""
    rows = {}
    for model, info in vocabulary.gather_tensors.weight_info.items():
        stored = checkpoint_of(model).stored
        if name := next((name for name in names_of(info) if name in stored), None):
            rows[model] = stored[name].shape[vocabulary.vocabulary_axis]
    return rows


def _data_share(task: ExecuteMergeMethodTask) -> float:
    return data_share(task.parameters["covariance"], task.base_model is not None)


def _by_regmean(task: ExecuteMergeMethodTask, form: ClosedForm | None) -> MergeByRegMean:
    """The task that merges in closed form, or as task_arithmetic does."""
    has_base = task.base_model is not None
    check_baseless(_data_share(task) if form else 1.0, task.parameters["lambda"], has_base)
    weights = [task.input_parameters[model]["weight"] for model in task.model_order if model != task.base_model]
    check_weights([1.0 if weight is None else weight for weight in weights], has_base, task.output_weight.name)
    return MergeByRegMean(**{name: getattr(task, name) for name in type(task).model_fields}, form=form)


def _with_phases(plan_to_disk):
    @functools.wraps(plan_to_disk)
    def wrapper(self, out_path):
        tasks = plan_to_disk(self, out_path)
        if self.config.pave is not None:
            plan = self._pave_plan
            calibrate_all(plan, self.options)
            decompose_all(plan.decompositions, self.options)
            closed = tuple(task for _, task in self._tensors if isinstance(task, MergeByRegMean) and task.form)
            header = json.dumps(plan.header)
            finalize = next(task for task in tasks if isinstance(task, FinalizeModel))
            written = {"out_path": out_path, "finalize": finalize}
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
        except Exception as error:  # mergekit has yet to write the tokenizer, which a card must not cost
            LOG.warning("the model card gets no PAVE section, because it could not be written (%s)", error)
            return card

    return wrapper


def _environment(planner: MergePlanner) -> Environment:
    options = planner.options
    return Environment(
        runtime=Runtime(options.device, options.trust_remote_code, options.quiet),
        transformers_cache=options.transformers_cache,
        checkpoint=checkpoint_of,
        reads=functools.partial(reads, planner),
        compares=planner.__dict__.get("_pave_compares", True),
        merge_method=planner.config.merge_method,
    )
