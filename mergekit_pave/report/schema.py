"""What `pave_report.json` and `pave_scores.json` have to hold, and their checks, so that card and page can rely on them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, Field, ValidationError

Count = Annotated[int, Field(ge=0, lt=2**63)]
PositiveCount = Annotated[int, Field(gt=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Norm = Annotated[float, Field(ge=0, lt=1e150)]  # its square is finite
Share = Annotated[float, Field(gt=-1e100, lt=1e100)]
Cosine = Annotated[float, Field(ge=-1.001, le=1.001)]  # with what rounding adds
Paths = str | list[str]


class _Strict(BaseModel, strict=True):
    """No value is converted: a text is no number. Keys that are not listed may hold anything."""


class _Row(_Strict):
    """What was done to one matrix of one model."""

    tensor: str
    output: str
    model: str
    expert: Optional[Count] = None
    components: PositiveCount
    kept: Count
    energy_dropped: Norm
    removed_norm: Norm
    change_norm: Optional[Norm]
    tokens: Count


class _Data(_Strict):
    path: str
    name: Optional[str] = None
    split: Optional[str] = None
    data_files: Paths | dict[str, Paths] | None = None


class _Written(_Strict):
    generated: Literal["chat", "bos", "eos", "random"]


class _ModelSettings(_Strict):
    target: Literal["weights", "task_vector"]


class _Settings(_ModelSettings):
    allocation: Literal["spectral", "uniform"]


class _Model(_Strict):
    data: list[_Data | _Written]
    covariance: Optional[str]
    settings: _ModelSettings
    calibration: Optional[dict[str, Any]]
    samples: Count
    tokens: Count
    left_as_they_are: dict[str, str]


class _ClosedForm(_Strict):
    tensor: str
    covariance: Number
    lambda_: Number = Field(alias="lambda")
    reduce_off_diagonal: Number
    alignment: dict[str, Optional[Cosine]] = {}  # older reports have none


class _RegMean(_Strict):
    closed_form: list[_ClosedForm]
    as_task_arithmetic: dict[str, str]
    weights: dict[str, PositiveCount] = {}  # likewise


class _Rows(_Strict):
    tensor: str
    rows: PositiveCount
    shown: Count
    tokens: dict[str, Count]
    lambda_: Number = Field(alias="lambda")
    by: Literal["counts", "predictions"]


class _Vocabulary(_Strict):
    merged: list[_Rows]
    left: dict[str, str]


class _RefinementSettings(_Strict):
    covariance: Number
    lambda_: Number = Field(alias="lambda")


class _RefinedLayer(_Strict):
    tensor: str
    tokens: Count
    error_before: Optional[Norm]
    error_after: Optional[Norm]


class _Refined(_Strict):
    settings: _RefinementSettings
    layers: list[_RefinedLayer]
    left: dict[str, str]


class _Restored(_Strict):
    file: Annotated[str, Field(pattern=r"^emr/[A-Za-z0-9._-]+\.safetensors$")]
    bytes: Count
    scale: Norm
    distance: Optional[Norm]
    agreed: Annotated[float, Field(ge=0, le=1)]
    own: list[str]


class _Emr(_Strict):
    tensors: Count
    base_only: dict[str, str]
    models: Annotated[dict[str, _Restored], Field(min_length=1)]


class _Versions(_Strict, extra="allow"):
    __pydantic_extra__: dict[str, str]

    ours: str = Field(alias="mergekit-pave")


class _Report(_Strict):
    versions: _Versions
    settings: _Settings
    models: dict[str, _Model]
    not_purified: list[str]
    warnings: list[str]
    tensors: Count
    purified: list[_Row]
    regmean: _RegMean = None  # not there without regmean, but never null
    vocabulary: _Vocabulary = None  # likewise
    refined: _Refined = None
    emr: _Emr = None
    weights: Optional[dict[str, Optional[str]]] = None


class _BitsPerByte(_Strict):
    merged: Norm
    expert: Norm
    base: Norm


class _ByRow(_Strict):
    merged: list[Number]
    base: list[Number]


class _Kept(_Strict):
    kept: Share
    error: Optional[Norm]


class _Worst(_Kept):
    model: str


class _ScoredModel(_Kept):
    rows: PositiveCount
    place: Literal["token", "row", "label"]
    places: PositiveCount
    measure: Literal["kl", "cosine"]
    kept: Optional[Share]
    agreement: Optional[Annotated[float, Field(ge=0, le=1)]]
    bits_per_byte: Optional[_BitsPerByte]
    drift: Optional[Number]
    by_row: _ByRow


class _Scores(_Strict):
    versions: _Versions
    base: str
    models: Annotated[dict[str, _ScoredModel], Field(min_length=1)]
    mean: Optional[_Kept]
    worst: Optional[_Worst]
    restored: bool = False  # the models are compared with what they are restored to
    weights: dict[str, Optional[str]]


def validate(report: Any) -> None:
    """Check the content of a report, whatever it is.

    Raises:
        ValueError: it is damaged, or no report; the message names the first place where something is wrong.
    """
    _validate(_Report, report)
    for i, row in enumerate(report["purified"]):
        if row["model"] not in report["models"]:
            raise ValueError(f"purified.{i}.model: {row['model']} is not among the models")


def validate_scores(scores: Any) -> None:
    """Check the content of the scores of a merge, whatever it is.

    Raises:
        ValueError: they are damaged, or no scores; the message names the first place where something is wrong.
    """
    _validate(_Scores, scores)
    if scores["worst"] and scores["worst"]["model"] not in scores["models"]:
        raise ValueError(f"worst.model: {scores['worst']['model']} is not among the models")


def _validate(model: type[_Strict], content: Any) -> None:
    try:
        model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
