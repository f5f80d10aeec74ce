"""The `pave:` block of a mergekit YAML: its keys, their ranges, and the errors for what does not fit.

Everything that can be judged from the YAML alone is judged here, when mergekit parses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, ParameterSetting
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)

from mergekit_pave.errors import PaveError
from mergekit_pave.settings import (
    DEFAULT_CALIBRATION,
    GENERATED,
    AnyData,
    Block,
    Calibration,
    Data,
    OptionalRefine,
    Refine,
    Regularization,
    RelativeRegularization,
    reject_string,
    wrong_keys,
)


def _reject_unknown_filter_keys(setting: Any) -> Any:
    for condition in setting if isinstance(setting, list) else [setting]:
        if isinstance(condition, dict) and (others := condition.keys() - {"filter", "value"}):
            raise ValueError(f"unknown key {sorted(others)[0]!r} (known keys: filter, value)")
    return setting


def _check_rank_ratio(setting: ParameterSetting) -> ParameterSetting:
    conditions = setting if isinstance(setting, list) else [setting]
    if not conditions:
        raise ValueError("an empty list sets nothing; give a number, a gradient, or a list of {filter, value}")
    for i, condition in enumerate(conditions):
        if isinstance(condition, ConditionalParameter) and condition.filter in (None, "*") and i + 1 < len(conditions):
            raise ValueError(f"{_shown(conditions[i + 1])} never holds, because the value before it has no filter; put that last")
        value = condition.value if isinstance(condition, ConditionalParameter) else condition
        for number in value if isinstance(value, list) else [value]:
            try:
                valid = not isinstance(number, bool) and 0 < float(number) <= 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"must be a share of components, 0 < x <= 1, not {number!r}")
    return setting


def _shown(condition: ConditionalParameter) -> str:
    return "the value" if condition.filter is None else f"the filter {condition.filter!r}"


RankRatio = Annotated[ParameterSetting, BeforeValidator(_reject_unknown_filter_keys), AfterValidator(_check_rank_ratio)]
Patterns = Annotated[list[str], reject_string("a list: [{}]")]


class PaveModel(Block):
    """One model of the merge: its data, and settings that differ from those of the whole block."""

    _elsewhere: ClassVar[dict[str, str]] = {
        "allocation": "is between models, so it holds for all of them: put it directly under `pave`",
        "cache_dir": "holds for all models: put it directly under `pave`",
        "vocabulary": "holds for all models: put it directly under `pave`",
        "refine": "is about the merged model: put it directly under `pave`",
        "keep_covariances": "holds for all models: put it directly under `pave`",
    }

    model: ModelReference
    data: AnyData = None
    covariance: str | None = Field(default=None, min_length=1)
    purify: bool = True
    rank_ratio: RankRatio | None = None
    regularization: Regularization | None = None
    target: Literal["weights", "task_vector"] | None = None
    exclude: Patterns | None = None
    include: Patterns | None = None
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _data_if_purified(self) -> PaveModel:
        if self.data and self.covariance:
            raise ValueError("give either data or the covariance that was made from it, not both")
        if self.purify and not self.data and not self.covariance:
            raise ValueError(f"{self.model} has no data: give `data`, or `purify: false` to merge it as it is")
        return self

    @property
    def is_generated(self) -> bool:
        """Whether the model writes its own samples."""
        return self.data == GENERATED

    @property
    def sources(self) -> list[Data]:
        """The data sets, one or several; none if the model writes its own samples."""
        if self.is_generated:
            return []
        return self.data if isinstance(self.data, list) else [self.data]


class _Shielded:
    """A config that a dump passes on as it is."""

    def __init__(self, config: PaveConfig):
        self._config = config

    def with_models(self, models: list[Any]) -> PaveConfig:
        """The config, with what the models are called now."""
        entries = [
            entry.model_copy(update={"model": ModelReference.model_validate(model)})
            for entry, model in zip(self._config.models, models)
        ]
        return self._config.model_copy(update={"models": entries})


class PaveConfig(Block):
    """The whole `pave:` block."""

    _out_path: str = PrivateAttr("")  # where the merge is written, for the model card

    data: AnyData = None
    rank_ratio: RankRatio = 0.984
    allocation: Literal["spectral", "uniform"] = "spectral"
    regularization: Regularization = RelativeRegularization(relative=0.01)
    target: Literal["weights", "task_vector"] = "weights"
    exclude: Patterns = Field(default=[])
    include: Patterns = Field(default=[])
    vocabulary: Literal["fit", "counts", "method"] | None = None
    purify: bool = True
    refine: OptionalRefine = False
    cache_dir: str | None = None
    keep_covariances: Literal["auto", True, False] = "auto"
    calibration: Calibration = Calibration()
    models: list[PaveModel] = Field(default=[])

    # mergekit-multi dumps a config, and replaces every string that equals the name of a merge step by a reference to the output
    # of that step. It means models; a data set or a filter of the same name must not be replaced.
    @model_serializer(mode="wrap")
    def _shield(self, handler, info):
        if info.mode != "python":
            return handler(self)
        return {"block": _Shielded(self), "models": [entry.model for entry in self.models]}

    @model_validator(mode="before")
    @classmethod
    def _hold_for_each_model(cls, value: Any) -> Any:
        """What the block says holds for each model that does not say otherwise."""
        if isinstance(value, dict) and isinstance(value.get("models"), list):
            entries = [_completed(entry, value) if isinstance(entry, dict) else entry for entry in value["models"]]
            return value | {"models": entries}
        return value

    @model_validator(mode="after")
    def _each_model_once(self) -> PaveConfig:
        if not self.models and not self.data:
            raise ValueError("give `data` for all models, or list each one under `models` with its own")
        seen = set()
        for entry in self.models:
            if entry.model in seen:
                raise ValueError(f"{entry.model} is listed twice under models")
            seen.add(entry.model)
        return self

    @property
    def refinement(self) -> Refine | None:
        """How the merge is to be refined; None where it is not."""
        return (Refine() if self.refine is True else self.refine) or None

    def with_merged(self, merge: dict[str, Any]) -> PaveConfig:
        """The block with an entry for each model that is merged, if it has data for all of them.

        Args:
            merge: see `check_models`.
        """
        if not self.data:
            return self
        merged = dict.fromkeys(merged_models(merge, merge.get("base_model")))
        added = [PaveModel(model=model, data=self.data, purify=self.purify) for model in merged if not self.listed(model)]
        return self.model_copy(update={"models": [*self.models, *added]})

    def data_key(self, model: ModelReference) -> str:
        """Where the `data` of a model stands, for messages."""
        is_of_all = self.data and self.listed(model).data == self.data
        return f"{model}: pave.data" if is_of_all else f"pave.models[{model}].data"

    def listed(self, model: ModelReference) -> PaveModel | None:
        """The model's entry, or None."""
        return next((entry for entry in self.models if entry.model == model), None)

    def entry(self, model: ModelReference) -> PaveModel | None:
        """The model's entry, or None when it is not to be purified, as with a rank ratio of 1, which takes nothing away."""
        listed = self.listed(model)
        return listed if listed and listed.purify and self.setting(model, "rank_ratio") != 1 else None

    def setting(self, model: ModelReference, key: str) -> Any:
        """A setting of one model: that of its entry if there is one, else that of the block."""
        of_entry = getattr(self.listed(model), key)
        return getattr(self, key) if of_entry is None else of_entry

    def merges_vocabulary(self, data_share: float | None) -> Literal["fit", "counts", "method"]:
        """How the vocabulary is merged. By default it is fitted where `regmean` uses data, or where a merge is refined.

        Args:
            data_share: how much of regmean's metric is to be C; None with any other merge method.
        """
        return self.vocabulary or ("fit" if data_share or self.refine else "method")

    def least_tokens(self, model: ModelReference, experts: tuple[int, ...]) -> int:
        """How many tokens each matrix of a layer must have seen: `min_tokens` for experts, 0 for an ordinary layer."""
        return self.calibration_of(model).min_tokens if experts else 0

    def calibration_of(self, model: ModelReference) -> Calibration:
        """The calibration settings of one model, every one of them set but for `max_tokens`, which may depend on the model."""
        scopes = (DEFAULT_CALIBRATION, self.calibration, self.listed(model).calibration)
        return Calibration(**{k: v for scope in scopes for k, v in scope.model_dump(exclude_none=True).items()})


def read_block(value: Any) -> PaveConfig:
    """The block, whatever the merge around it is.

    Raises:
        PaveError: a line for each key that is wrong.
    """
    if isinstance(value, dict) and isinstance(value.get("block"), _Shielded):
        value = value["block"].with_models(value["models"])
    try:
        return PaveConfig.model_validate(value)
    except ValidationError as error:
        raise PaveError("\n".join(wrong_keys(value, error))) from None


def check_models(config: PaveConfig, merge: dict[str, Any]) -> None:
    """Refuse a block whose models are not those of the merge.

    Args:
        merge: the other fields of mergekit's configuration.

    Raises:
        PaveError: naming the model.
    """
    base = merge.get("base_model")
    merged = set(merged_models(merge, base))
    if not merged:
        raise PaveError("models: the config merges no models; list them under `models`, as in `- model: ./model`")
    for entry in config.models:
        if entry.model == base and entry.purify and base not in merged:
            raise PaveError(f"pave.models: {entry.model} is the base model, which is never purified; remove its entry")
        if entry.model not in merged and entry.model != base:
            models = ", ".join(sorted(map(str, merged)))
            same = [str(model) for model in (*merged, base) if model and _location(model) == _location(entry.model)]
            hint = f"; it is called {same[0]} there, so call it the same here" if same else ""
            raise PaveError(f"pave.models: {entry.model} is not part of this merge (its models: {models}){hint}")
        if config.refine and entry.model != base and not entry.data:
            raise PaveError(f"pave.models: refine needs data for each model, and {entry.model} has none: give it `data`")
    listed = {entry.model for entry in config.models}
    for model in sorted(merged - listed, key=str):
        otherwise = "" if config.refine else ", or `purify: false` to merge it as it is"
        raise PaveError(
            f"pave.models: {model} is merged but has no entry; give it `data` to calibrate with{otherwise}. "
            "`data` directly under `pave` holds for all models"
        )


def _completed(entry: dict[Any, Any], block: dict[Any, Any]) -> dict[Any, Any]:
    """A model's entry, with what the block says for all models."""
    more = {"purify": block["purify"]} if "purify" in block else {}
    if block.get("data") and not entry.get("data") and not entry.get("covariance"):
        more["data"], entry = block["data"], {key: value for key, value in entry.items() if key != "data"}
    return more | entry


def _location(model: ModelReference) -> list[tuple[str, str | None]]:
    """What a reference refers to, however its paths are written."""
    return [(os.path.realpath(part.path), part.revision) for part in (model.model, model.lora) if part]


def merged_models(scope: dict[str, Any], base: ModelReference | None) -> Iterator[ModelReference]:
    """Every model that is merged somewhere without being the base there."""
    for module in (scope.get("modules") or {}).values():
        yield from merged_models({"models": module.models, "slices": module.slices}, base)
    for source in scope.get("models") or ():
        if source.model != base:
            yield source.model
    for output in scope.get("slices") or ():
        yield from (source.model for source in output.sources if source.model != (output.base_model or base))
