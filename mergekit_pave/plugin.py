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

import contextlib
import functools
import inspect
import json
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.architecture import ModelArchitecture, WeightInfo, get_architecture_info
from mergekit.architecture.auto import RE_LAYER_INDEX
from mergekit.architecture.base import ModuleDefinition, _prefix_weight
from mergekit.architecture.json_definitions import JsonModuleArchDef, JsonModuleArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import PermutedVocabulary

from mergekit_pave import _field, _methods
from mergekit_pave._conversion import Conversions, known_once
from mergekit_pave._references import make_writable
from mergekit_pave.calibration import distributed
from mergekit_pave.calibration.layers import describe
from mergekit_pave.calibration.run import Runtime
from mergekit_pave.card import with_section
from mergekit_pave.checkpoint import Checkpoint
from mergekit_pave.checks import check_present, names_of
from mergekit_pave.dry_run import try_chat_template, try_dtypes, try_method, try_tokenizer
from mergekit_pave.errors import PaveError, in_a_line
from mergekit_pave.failures import is_out_of_memory, ran_out
from mergekit_pave.inputs import check_inputs, check_name, in_short
from mergekit_pave.licence import common_licence
from mergekit_pave.page.picture import draw_ranks
from mergekit_pave.planning import (
    ClosedForm,
    Environment,
    Plan,
    PlannedTensor,
    announce,
    make_plan,
    plan_without_data,
)
from mergekit_pave.progress import bar, no_bars_of_others
from mergekit_pave.regmean import RegMean, check_baseless, check_names, check_weights, data_share
from mergekit_pave.report import kind, read_report
from mergekit_pave.tasks import DecomposeWeight, MergeByRegMean, PurificationStats, RegMeanStats, WriteReport

LOG = logging.getLogger(__name__)


def wrap() -> None:
    """Wrap mergekit's planner; see `host.register`, which has looked whether that can be done. Idempotent."""
    _field.add()
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
        with _told_in_a_line():
            return get_architecture_info(config, options)

    return wrapper


@contextlib.contextmanager
def _told_in_a_line() -> Iterator[None]:
    """What mergekit has against a merge is for people, too."""
    try:
        yield
    except Exception as error:
        raise PaveError(f"mergekit cannot plan this merge: {in_short(error)}") from error


def _noting_position(plan_tensor):
    signature = inspect.signature(plan_tensor)

    @functools.wraps(plan_tensor)
    def wrapper(self, *args, **kwargs):
        if not _is_ours(self):
            return plan_tensor(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        models, reader = bound["models"], bound["cfg_reader"]
        bound["weights_in"] = weights = [_without_aliases(weight) for weight in bound["weights_in"]]
        if bound["weight"].optional and all(map(functools.partial(_has, self), models, weights)):
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
        if _methods.is_ours(self._method.spec.name):
            check_names(self._method.spec, _parameters(self.config))
        if not _is_ours(self):
            return plan(self)
        self.arch_info = _with_stored_names(self)
        _check_layers(self)
        plan(self)
        tensors = [
            PlannedTensor(
                name=weight.name,
                # Tensors with a vocabulary axis may be gathered by a task that also permutes or truncates them.
                gather=task.gather_tensors if type(task.gather_tensors) is GatherTensors else None,
                models=task.model_order,
                base=task.base_model,
                t=t,
                data_share=_data_share(task) if _is_regmean(self) else None,
            )
            for (weight, task), t in zip(self._tensors, self._pave_positions, strict=True)
        ]
        if self.config.pave is None:
            closed_forms = plan_without_data(tensors, _environment(self))
        else:
            check_present(_inputs(self), functools.partial(_problem, self))
            with no_bars_of_others(self.options.quiet):
                _try_out(self)
                self._pave_plan = make_plan(self.config.pave, tensors, _environment(self))
            for place, gather in self._pave_plan.gathers.items():
                weight, task = self._tensors[place]
                self._tensors[place] = weight, task.model_copy(update={"gather_tensors": gather})
            closed_forms = self._pave_plan.closed_forms
        if _is_regmean(self):
            for place, (weight, task) in enumerate(self._tensors):
                self._tensors[place] = weight, _by_regmean(task, closed_forms.get(place))

    return wrapper


def _check_layers(planner: MergePlanner) -> None:
    """Refuse slices that take no layer, or more than there are."""
    config, modules = planner.config, planner.arch_info.modules
    slices = [(next(iter(modules)), part) for part in config.slices or ()]
    slices += [(name, part) for name, module in (config.modules or {}).items() for part in module.slices or ()]
    for name, part in slices:
        for source in part.sources if name in modules else ():
            count = planner._model_arch(source.model).get_module(name).num_layers()
            start, end = source.layer_range
            if not 0 <= start < end <= count:
                raise PaveError(
                    f"slices: layer_range [{start}, {end}] of {source.model} does not fit. The model has {count} layers: a range "
                    f"starts at 0 or later, ends at {count} or earlier, and takes at least one layer"
                )


def _inputs(planner: MergePlanner) -> Iterator[tuple[ModelReference, WeightInfo]]:
    """Each model with each tensor that is read of it."""
    for _, task in planner._tensors:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        yield from gather.weight_info.items()


def _problem(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> str | None:
    """See `check_present`; what mergekit looks for, and where."""
    known, checkpoint = _known(planner, model), _checkpoint(model)
    names = names_of(info)
    if found := next((name for name in names if name in known.stored), None):
        file = checkpoint.files[found]
        if file.endswith(".safetensors") and found not in checkpoint.stored:
            return f"which its index places in {file}, where {{}} not; fetch the checkpoint again"
        return None
    if info.optional or any(map(known.conversions.can_make, (info.name, *(info.aliases or ())))):
        return None
    return (
        "but its checkpoint has none of such a name. Fetch it again if it is incomplete. If a complete "
        f"{_class_name(planner, model)} has none either, mergekit cannot merge it, with or without a `pave:` block"
    )


def _class_name(planner: MergePlanner, model: ModelReference) -> str:
    return (planner._model_arch(model).config.architectures or ["its class"])[0]


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
    if not _is_regmean(planner):  # its parameters are checked where its tasks are made
        try_method(task for _, task in planner._tensors)


def _rows(vocabulary: PermutedVocabulary) -> dict[ModelReference, int]:
    """How many tokens each model's tensor is for, as far as headers say."""
    rows = {}
    for model, info in vocabulary.gather_tensors.weight_info.items():
        stored = _checkpoint(model).stored
        if name := next((name for name in names_of(info) if name in stored), None):
            rows[model] = stored[name].shape[vocabulary.vocabulary_axis]
    return rows


def _parameters(config: MergeConfiguration) -> Iterator[str]:
    """The names of all parameters that a config sets, wherever that is."""
    for part in (config, *(config.modules or {}).values()):
        outputs = part.slices or ()
        inputs = [*(part.models or ()), *(source for output in outputs for source in output.sources)]
        for holder in (part, *outputs, *inputs):
            yield from holder.parameters or ()


def _is_ours(planner: MergePlanner) -> bool:
    return planner.config.pave is not None or _is_regmean(planner)


def _is_regmean(planner: MergePlanner) -> bool:
    return isinstance(planner._method, RegMean)


def _data_share(task: ExecuteMergeMethodTask) -> float:
    return data_share(task.parameters["covariance"], task.base_model is not None)


def _by_regmean(task: ExecuteMergeMethodTask, form: ClosedForm | None) -> MergeByRegMean:
    """The task that merges in closed form, or as task_arithmetic does."""
    has_base = task.base_model is not None
    check_baseless(_data_share(task) if form else 1.0, task.parameters["lambda"], has_base)
    weights = [task.input_parameters[model]["weight"] for model in task.model_order if model != task.base_model]
    check_weights([1.0 if weight is None else weight for weight in weights], has_base, task.output_weight.name)
    own = {"layer": form and form.layer, "measured": form.measured if form else ()}
    return MergeByRegMean(**{name: getattr(task, name) for name in type(task).model_fields}, **own)


def _with_stored_names(planner: MergePlanner) -> ModelArchitecture:
    """The planner's architecture, with tensors under the names that the checkpoints have for them.

    An architecture that mergekit has inferred has the names of transformers' modules, and what checkpoints have under others
    (modules that were renamed since, experts stored one by one) it leaves out, unless it can convert them. Some of its own
    definitions have names with the prefix of a whole model, which a checkpoint of the bare backbone lacks. transformers knows
    what becomes of each.
    """
    architecture, config = planner.arch_info, planner.config
    modules = {key: m for key, m in architecture.modules.items() if isinstance(m.architecture, JsonModuleArchitecture)}
    definitions = {key: _with_prefix(module) for key, module in modules.items()}
    infos = [info for d in definitions.values() for info in (*d.pre_weights, *d.layer_templates.weights, *d.post_weights)]
    known = {name for info in infos for name in names_of(info)}
    # Of all layers the first, as a checkpoint may have one more for predicting several tokens, which transformers leaves out.
    names = {name for model in config.referenced_models() for name in _checkpoint(model).files}
    names = sorted(names, key=lambda name: (int(_layer(name) or 0), name), reverse=True)
    stored = {name if name in known else _template(name): name for name in names}
    models = sorted(config.referenced_models(), key=str)
    one = models[0] if _is_regmean(planner) else next(filter(config.pave.entry, models), None)
    if one is None or not infos or stored.keys() <= known:
        return architecture

    trust = planner.options.trust_remote_code
    own_config = one.config(trust_remote_code=trust)
    described = describe(own_config, one.model.path, trust, one.model.revision)
    # A tensor outside of all layers may have a number in its name that is no layer's.
    numbered = {described.loaded_as(name) for name in known if RE_LAYER_INDEX.search(name)}

    def general(name: str, target: str | None) -> str:
        """A tensor's name in all layers."""
        return name if name in known or target in numbered else _template(name)

    stored = {general(name, described.loaded_as(name) if numbered else None): name for name in names}
    other: dict[str, list[str]] = {}  # names of the same tensor
    parts: dict[str, list[str]] = {}  # names of tensors that make it up
    for template in sorted(stored.keys() - known):
        name = stored[template]
        target = described.loaded_as(name)
        if target and _layer(target) == _layer(name):
            (other if described.weight_name([name]) else parts).setdefault(general(target, target), []).append(template)

    @functools.cache
    def conversions() -> Conversions:
        return Conversions(own_config.model_type, _checkpoint(one).files.keys())

    def named(info: WeightInfo) -> list[WeightInfo]:
        first_layers = info.name.replace("${layer_index}", "0")
        target = described.loaded_as(first_layers)
        names = other.get(general(target, target) if target else info.name, [])
        if info.name not in stored and not info.optional and (not names or conversions().can_make(first_layers)):
            return [info]  # mergekit converts it, and writes it under the new name
        if names:
            # It is read under each of these names, as it would be with `aliases`, which mergekit refuses for an optional tensor.
            first, *rest = [info.name, *names] if info.name in stored else names
            return [info.model_copy(update={"name": first, "tied_names": (*(info.tied_names or ()), *rest) or None})]
        if info.name in stored:
            return [info]
        return [info.model_copy(update={"name": name}) for name in parts.get(info.name, [])] or [info]

    def all_named(infos: list[WeightInfo]) -> list[WeightInfo]:
        return [renamed for info in infos for renamed in named(info)]

    changed = dict(architecture.modules)
    for key, old in definitions.items():
        renamed = modules[key].architecture.model_copy(update={"definition": _with_infos(old, all_named)})
        changed[key] = modules[key].model_copy(update={"architecture": renamed, "weight_prefix": None})
    return architecture.model_copy(update={"modules": changed})


def _with_prefix(module: ModuleDefinition) -> JsonModuleArchDef:
    """A module's definition with the names that its tensors have in the whole model."""
    return _with_infos(module.architecture.definition, lambda infos: [_prefix_weight(i, module.weight_prefix) for i in infos])


def _with_infos(definition: JsonModuleArchDef, change: Callable[[list[WeightInfo]], list[WeightInfo]]) -> JsonModuleArchDef:
    layers = definition.layer_templates.model_copy(update={"weights": change(definition.layer_templates.weights)})
    loose = {"pre_weights": change(definition.pre_weights), "post_weights": change(definition.post_weights)}
    return definition.model_copy(update={"layer_templates": layers, **loose})


def _layer(name: str) -> str | None:
    """The number of the layer that a tensor belongs to, as mergekit sees it."""
    found = RE_LAYER_INDEX.search(name)
    return found and found.group(1)


def _template(name: str) -> str:
    """mergekit's name for a tensor in all layers."""
    return RE_LAYER_INDEX.sub(".${layer_index}.", name, count=1)


def _with_phases(plan_to_disk):
    @functools.wraps(plan_to_disk)
    def wrapper(self, out_path):
        tasks = plan_to_disk(self, out_path)
        if self.config.pave is not None:
            plan = self._pave_plan
            _calibrate(plan, self.options)
            _decompose(plan.decompositions, self.options)
            merges = (task for _, task in self._tensors if isinstance(task, MergeByRegMean) and task.layer)
            closed = tuple(RegMeanStats(merge=task) for task in merges)
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
        checkpoint=_checkpoint,
        reads=functools.partial(_reads, planner),
        compares=planner.__dict__.get("_pave_compares", True),
        merge_method=planner.config.merge_method,
    )


def _reads(planner: MergePlanner, model: ModelReference) -> list[list[str]]:
    """See `Environment`."""
    infos = [info for info in _known(planner, model).infos if not info.optional or _has(planner, model, info)]
    return [list(names_of(info)) for info in infos]


def _has(planner: MergePlanner, model: ModelReference, info: WeightInfo) -> bool:
    """Whether mergekit finds a tensor in a model's checkpoint once it looks for it."""
    known = _known(planner, model)
    if info.name in known.stored:
        return True
    # The name of another tensor among the tied ones is no name of this one, which is not needed beside that.
    names = set(names_of(info)) - known.names
    return not names.isdisjoint(known.stored) or known.conversions.can_make(info.name)


@dataclass(frozen=True)
class _Known:
    """What is asked about a model for each of its tensors, and would take long to find out each time.

    Attributes:
        infos: all tensors of its architecture.
        names: their names.
        stored: the names of the tensors in its checkpoint.
    """

    infos: list[WeightInfo]
    names: frozenset[str]
    stored: frozenset[str]
    conversions: Conversions


def _known(planner: MergePlanner, model: ModelReference) -> _Known:
    known = planner.__dict__.setdefault("_pave_known", {})
    if model not in known:
        architecture, stored = planner._model_arch(model), frozenset(_checkpoint(model).files)
        infos = architecture.all_weights()
        conversions = Conversions(architecture.config.model_type, stored)
        known[model] = _Known(infos, frozenset(info.name for info in infos), stored, conversions)
    return known[model]


def _checkpoint(model: ModelReference) -> Checkpoint:
    return _checkpoint_of(LoaderCache().get(model))


@functools.lru_cache(maxsize=64)
def _checkpoint_of(loader: LazyTensorLoader) -> Checkpoint:
    return Checkpoint(loader.index.base_path, loader.index.tensor_paths)


def plan_merge(config: MergeConfiguration, options: MergeOptions, *, compares: bool = True) -> Plan:
    """What purification would add to a merge, without merging.

    Args:
        compares: see `Environment`.

    Raises:
        PaveError: the config has no `pave:` block, the block does not fit, or mergekit has something against the merge.
    """
    try:
        return _plan_merge(config, options, compares)
    except (OSError, ValueError, RuntimeError) as error:
        raise PaveError(f"mergekit cannot plan this merge: {in_a_line(error)}") from error


def _plan_merge(config: MergeConfiguration, options: MergeOptions, compares: bool) -> Plan:
    told = "the config has no `pave:` block, so nothing would be purified or measured"
    if config.pave is None and not _methods.is_ours(config.merge_method):
        raise PaveError(told)
    check_inputs(config, options)
    _merge_adapters(config, options)
    base = config.base_model or config.referenced_models()[0]
    with known_once(), _told_in_a_line():
        architecture = get_architecture_info(config, options)
    planner = MergePlanner(
        config,
        architecture,
        options=options,
        out_model_config=base.config(trust_remote_code=options.trust_remote_code),
    )
    planner._pave_compares = compares
    planner._plan()
    if config.pave is None:
        raise PaveError(f"{told}; {config.merge_method} alone needs no plan, calibration or report: merge it with mergekit-yaml")
    return planner._pave_plan


def _merge_adapters(config: MergeConfiguration, options: MergeOptions) -> None:
    """Let mergekit merge adapters into their models, as it does before it reads the first of their tensors.

    Raises:
        PaveError: it has not been told where to.
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
            shutil.rmtree(folder, ignore_errors=True)  # mergekit would take it for the merged model
            raise


def sample_removal(plan: Plan, options: MergeOptions) -> dict[str, list[dict[str, Any]]]:
    """Rows of the report, for one weight of each kind of each model.

    These weights are read, and purified for nothing: so a plan can say how large the removed part is. Where a decomposition
    that it takes is not in the cache there is no row.
    """
    missing = {weight.output for weight in plan.weights if not weight.cached}
    kinds: dict[tuple[str, str], list[PurificationStats]] = {}
    for task in plan.stats:
        if task.purify.allocation.output not in missing:
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
    if distributed.rank() > 0:  # of several processes one speaks
        logging.getLogger("mergekit_pave").setLevel(logging.ERROR)
        options = options.model_copy(update={"quiet": True})
    # mergekit merges adapters without a lock, and what one process has found out for the cache the others need not.
    plan = distributed.first_alone(lambda: plan_merge(config, options))
    _calibrate(plan, options)
    share = plan.decompositions[distributed.rank() :: distributed.world_size()]
    distributed.stop()
    _decompose(share, options)
    return plan


def _calibrate(plan: Plan, options: MergeOptions) -> None:
    announce(plan)
    # In one order everywhere, which an executor does not promise: processes wait for each other in every block.
    with no_bars_of_others(options.quiet):
        for calibration in plan.calibrations:
            calibration.execute()


def _decompose(tasks: list[DecomposeWeight], options: MergeOptions) -> None:
    if not tasks:
        return
    storage = options.device if options.low_cpu_memory else "cpu"
    if options.multi_gpu:
        executor = MultiGPUExecutor(tasks, storage_device=None if options.low_cpu_memory else "cpu")
    else:
        executor = Executor(tasks, math_device=options.device, storage_device=storage)
    # Over several GPUs the executor yields nothing before all is done, and draws a bar that knows better.
    with bar(len(tasks), "Decomposing", "weights", hidden=options.quiet or options.multi_gpu) as progress:
        for _ in executor.run(quiet=options.quiet or not options.multi_gpu):
            progress.update()
