"""The data types of a `pave:` block that need nothing of mergekit, and what is said about keys that do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from mergekit_pave.errors import unknown


class Block(BaseModel, frozen=True):
    _elsewhere: ClassVar[dict[str, str]] = {}  # keys that belong to another block, and what to say when they are used here

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in value:
                if key in cls._elsewhere:
                    raise ValueError(f"{key} {cls._elsewhere[key]}")
                if key not in known:
                    raise ValueError(unknown("key", key, known))
        return value


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def reject_string(example: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"must be {example.format(value)}, not {value!r} alone")
        return value

    return BeforeValidator(check)


Positive = Annotated[float, BeforeValidator(_reject_bool), Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]


class RelativeRegularization(Block):
    """λ as a share of the mean diagonal of C."""

    relative: Positive


# With the tags pydantic reports only errors about the form that was meant.
Regularization = Annotated[
    Annotated[Positive, Tag("absolute")] | Annotated[RelativeRegularization, Tag("relative")],
    Discriminator(lambda value: "relative" if isinstance(value, (dict, RelativeRegularization)) else "absolute"),
]


class Refine(Block):
    """How a merge is refined.

    Attributes:
        covariance: how much of the metric is to come from the inputs, the rest being free of data. As in `regmean`.
        lambda_: what the fitted change is multiplied by.
    """

    covariance: Annotated[float, BeforeValidator(_reject_bool), Field(ge=0, le=1)] = 0.5
    lambda_: Positive = Field(default=1.2, alias="lambda")


OptionalRefine = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[Refine, Tag("settings")],
    Discriminator(lambda value: "settings" if isinstance(value, (dict, Refine)) else "switch"),
]


class Calibration(Block):
    """How calibration samples are read. Settings that are missing here come from the next wider scope."""

    samples: Count | None = None
    max_length: Count | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    batch_size: Count | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] | None = None


# How many tokens count depends on the model: see `calibration.drawing`.
DEFAULT_CALIBRATION = Calibration(samples=256, max_length=512, min_tokens=64, batch_size=8, seed=42)


class Data(Block):
    """The samples: arguments of `datasets.load_dataset`, and the columns that make up a sample."""

    path: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    streaming: bool = False
    text: str | None = Field(default=None, min_length=1)
    text_pair: str | None = Field(default=None, min_length=1)
    target: str | None = Field(default=None, min_length=1)
    messages: str | None = Field(default=None, min_length=1)
    image: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_kind_of_sample(self) -> Data:
        given = [kind for kind in ("text", "messages", "image") if getattr(self, kind) is not None]
        if len(given) > 1 and given != ["text", "image"]:
            raise ValueError(f"give only one of {', '.join(given)}")
        if self.text_pair is not None and self.image is not None:
            raise ValueError("text_pair does not go with image")
        if self.text_pair is not None and self.text is None:
            raise ValueError("text_pair needs text, the first of the pair")
        if self.target is not None and self.image is not None:
            raise ValueError("target, the answer of an encoder-decoder model, goes with text or messages, not with image")
        return self


GENERATED = "generated"  # in the place of a data set: the model writes its own text


def _reject_other_strings(value: Any) -> Any:
    if isinstance(value, str) and value != GENERATED:
        raise ValueError(f"must be a mapping, such as {{path: {value}}}, or {GENERATED!r}, not {value!r} alone")
    return value


def _form_of_data(value: Any) -> str:
    return "several" if isinstance(value, list) else "none" if value is None else "word" if isinstance(value, str) else "one"


AnyData = Annotated[
    Annotated[Data, Tag("one")]
    | Annotated[list[Data], Tag("several")]
    | Annotated[Literal["generated"], Tag("word")]
    | Annotated[None, Tag("none")],
    Discriminator(_form_of_data),
    BeforeValidator(_reject_other_strings),
]


class Written(Block):
    """Text that a model has written itself, as reports and manifests name it.

    Attributes:
        generated: what it went on from.
    """

    generated: Literal["chat", "bos", "eos", "random"]


_EXAMPLES = {  # by the class of a mapping
    "PaveConfig": "data: {path: rows.jsonl}",
    "PaveModel": "- model: ./model",
    "InputModelDefinition": "- model: ./model",
    "Data": "{path: rows.jsonl}",
    "Calibration": "{samples: 256}",
    "TokenizerConfig": "{source: base}",
}
_WORDS = {  # by the type of a problem, as pydantic has it
    "list_type": "must be a list, with a dash before each entry",
    "dict_type": "must be a mapping, such as {{key: value}}",
    "missing": "is missing",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than_equal": "must be {le:g} or less",
}


def wrong_keys(value: Any, error: ValidationError, root: str = "pave") -> Iterator[str]:
    """One line for each wrong key, with its path in the YAML. Of a union's alternatives only the first is described.

    Args:
        root: the key of the value.
    """
    described = set()
    for problem in error.errors():
        if root == "pave" and _is_of_block(problem["loc"], value):
            continue
        path, node = root, value
        for part in problem["loc"]:
            if isinstance(node, dict) and part in node:
                path, node = f"{path}.{part}", node[part]
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
                is_model = isinstance(node, dict) and isinstance(node.get("model"), str)
                path += f"[{node['model']}]" if is_model else f"[{part}]"
            elif problem["type"] == "missing" and part == problem["loc"][-1]:
                path = f"{path}.{part}"
        if path in described:
            continue
        described.add(path)
        yield f"{path.removeprefix('.') or 'it'}: {wrong_value(problem)}"


def wrong_value(problem: Any) -> str:
    """What is wrong with a value, in our words.

    Args:
        problem: one of the errors that pydantic lists.
    """
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if kind == "missing":
        close = difflib.get_close_matches(str(problem["loc"][-1]), map(str, given), n=1) if isinstance(given, dict) else []
        return _WORDS[kind] + (f"; is {close[0]!r} meant to be it?" if close else "")
    if kind == "model_type":
        name = context["class_name"]
        example = f", such as `{_EXAMPLES[name]}`" if name in _EXAMPLES else ""
        wanted = "must be the name of a model" if name == "ModelReference" else f"must be a mapping{example}"
    elif kind in _WORDS:
        wanted = _WORDS[kind].format(**context).replace("True", "true").replace("False", "false")
    else:
        wanted = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    shown = {True: "true", False: "false", None: "nothing"}.get(given) if isinstance(given, bool | None) else repr(given)
    return f"{wanted}, not {shown if len(shown) <= 60 else shown[:56] + ' ...'}"


def _is_of_block(loc: tuple[Any, ...], value: dict[str, Any]) -> bool:
    """Whether what is wrong in a model's entry stands directly in the block, and is described there."""
    if len(loc) < 3 or loc[0] != "models" or loc[2] not in ("data", "purify"):
        return False
    entry = value["models"][loc[1]]
    return not entry.get("data") if loc[2] == "data" else "purify" not in entry
