"""Which arms are run, and which table they stand in.

Every arm of a method has the same settings to choose from, five of them (Model Stock has but two), and all comparisons
are between arms of the same method and of as many models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from merging import Arm

RATIOS = (0.75, 0.875, 0.9375, 0.97, 0.984, 0.998)
MAIN_RATIO = 0.984
CONTROL_RATIO = 0.9375  # enough is removed for a control to show
SAMPLES = (8, 32, 128, 512)
TARGETS = ("weights", "task_vector")


@dataclass(frozen=True)
class Row:
    """A line of a table: an arm, and the one that it is compared with.

    Attributes:
        ratio: rank_ratio, where the row is part of the sweep that is plotted.
    """

    section: str
    label: str
    arm: Arm
    reference: Arm | None
    ratio: float | None = None


def scaled(*values: float, **parameters: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"lambda": value, **parameters} for value in values)


def dense(value: float) -> list[dict[str, Any]]:
    """A density for all but the encoder's embeddings: they are frozen, so thinning them out would only take time."""
    return [{"filter": "word_embeddings", "value": 1.0}, {"value": value}]


# Around the range of lambda in which each method's best value lies, with and without purification.
METHODS = {
    "task_arithmetic": Arm("task_arithmetic", scaled(0.15, 0.25, 0.35, 0.5, 0.7, weight=1.0)),
    "ties": Arm("ties", scaled(0.6, 1.0, 1.4, 1.9, 2.5, weight=1.0, density=dense(0.3))),
    "dare_ties": Arm("dare_ties", scaled(0.6, 1.0, 1.4, 1.9, 2.5, weight=1.0, density=dense(0.5))),
    "dare_linear": Arm("dare_linear", scaled(0.15, 0.25, 0.35, 0.5, 0.7, weight=1.0, density=dense(0.5))),
    "della": Arm("della", scaled(0.6, 1.0, 1.4, 1.9, 2.5, weight=1.0, density=dense(0.5))),
    "model_stock": Arm("model_stock", ({"filter_wise": False}, {"filter_wise": True})),
}


def rows(models: int, counts: tuple[int, ...], quick: bool) -> list[Row]:
    """Every row, the most important ones first.

    Args:
        models: how many fine-tunes there are.
        counts: numbers of models to merge at once besides.
    """
    methods = {name: replace(arm, models=models) for name, arm in METHODS.items()}
    swept = ["task_arithmetic", "ties"]
    ratios = (CONTROL_RATIO, MAIN_RATIO) if quick else RATIOS
    found = []

    def add(section: str, label: str, arm: Arm, reference: Arm | None, ratio: float | None = None) -> None:
        found.append(Row(section, label, arm, reference, ratio))

    for name, arm in methods.items():
        if not quick or name in swept:
            against = None if name == swept[0] else methods[swept[0]]
            add(f"Methods, against {swept[0]}", name, arm, against)
    for name in swept if quick else methods:
        for target in TARGETS:
            label = f"{name}, `target: {target}`"
            add(
                f"Purified, rank_ratio {MAIN_RATIO}, against plain",
                label,
                purified(methods[name], MAIN_RATIO, target),
                methods[name],
            )

    for name in swept:
        plain = methods[name]
        for target in TARGETS:
            for ratio in ratios:
                label = f"{name}, `target: {target}`, rank_ratio {ratio}"
                add("Rank ratio, against plain", label, purified(plain, ratio, target), plain, ratio)

    plain = methods[swept[0]]
    for target in TARGETS:
        own = purified(plain, CONTROL_RATIO, target)
        varied = {
            "as above": own,
            "C = I": replace(own, pave=own.pave | {"regularization": 1e9}),
            "random directions": replace(own, data="rotated"),
            "another task's data": replace(own, data="other"),
            "uniform allocation": replace(own, pave=own.pave | {"allocation": "uniform"}),
            "regularization 0.1, absolute": replace(own, pave=own.pave | {"regularization": 0.1}),
            "regularization 0.1, relative": replace(own, pave=own.pave | {"regularization": {"relative": 0.1}}),
        } | {f"{count} samples": replace(own, samples=count) for count in SAMPLES}
        for label, arm in varied.items():
            add(
                f"Controls and settings, {swept[0]}, rank_ratio {CONTROL_RATIO}, against plain",
                f"`target: {target}`, {label}",
                arm,
                plain,
            )

    for count in counts:
        for name in swept:
            plain = replace(methods[name], models=count)
            add("Fewer models at once, against plain", f"{count} models, {name}", plain, None)
            for target in TARGETS:
                label = f"{count} models, {name}, `target: {target}`"
                add("Fewer models at once, against plain", label, purified(plain, MAIN_RATIO, target), plain)
    return found


def purified(plain: Arm, ratio: float, target: str) -> Arm:
    return replace(plain, pave={"rank_ratio": ratio, "target": target})
