"""Which arms are run, and which table they stand in.

Every arm has four settings of its method to choose from (Model Stock has but two, and a quick run tries two).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from merging import Arm

RATIOS = (0.75, 0.875, 0.9375, 0.97, 0.984, 0.998)
QUICK_RATIOS = (0.75, 0.9375, 0.984, 0.998)
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


# Around what validation chose when other ranges were tried.
METHODS = {
    "task_arithmetic": Arm("task_arithmetic", scaled(0.15, 0.3, 0.45, 0.65, weight=1.0)),
    "ties": Arm("ties", scaled(0.15, 0.35, 0.7, 1.1, weight=1.0, density=dense(0.3))),
    "dare_ties": Arm("dare_ties", scaled(0.15, 0.35, 0.7, 1.1, weight=1.0, density=dense(0.5))),
    "dare_linear": Arm("dare_linear", scaled(0.15, 0.3, 0.45, 0.65, weight=1.0, density=dense(0.5))),
    "della": Arm("della", scaled(0.15, 0.35, 0.7, 1.1, weight=1.0, density=dense(0.5))),
    "model_stock": Arm("model_stock", ({"filter_wise": False}, {"filter_wise": True})),
    "tsv": Arm("tsv", scaled(0.5, 0.8, 1.2, 1.8)),
    "regmean, covariance 0": Arm("regmean", scaled(0.6, 0.8, 1.0, 1.25, covariance=0.0)),
    "regmean, covariance 0.5": Arm("regmean", scaled(0.6, 0.8, 1.0, 1.25, covariance=0.5), pave={}, purify=False),
    "regmean, covariance 1": Arm("regmean", scaled(0.6, 0.8, 1.0, 1.25, covariance=1.0), pave={}, purify=False),
}
# The fewer models are merged, the further they may go; `regmean` does not depend on how many there are.
FEW_MODELS = {
    "task_arithmetic": scaled(0.45, 0.65, 0.85, 1.1, weight=1.0),
    "ties": scaled(0.7, 1.1, 1.6, 2.2, weight=1.0, density=dense(0.3)),
    "tsv": scaled(0.8, 1.2, 1.8, 2.5),
}
FIRST, CLOSED = "task_arithmetic", "regmean, covariance 0.5"
BEST_KNOWN = (FIRST, "ties", "tsv", CLOSED)
METHODS_SECTION = f"Methods, against {FIRST}"
PURIFIED_SECTION = f"Purified, rank_ratio {MAIN_RATIO}, against the same method without"
UNPURIFIED = ("tsv", "regmean, covariance 0", "regmean, covariance 1")  # slow, or too much like the one between them


def rows(models: int, counts: tuple[int, ...] = (), *, details: bool, quick: bool) -> list[Row]:
    """Every row, the most important ones first.

    Args:
        models: how many fine-tunes there are.
        counts: numbers of models to merge at once besides.
        details: whether all settings are varied, or only the most important ones.
    """
    chosen = BEST_KNOWN if quick else tuple(METHODS)
    methods = {name: replace(METHODS[name], models=models) for name in chosen}
    if quick:
        methods = {name: replace(arm, settings=arm.settings[::2]) for name, arm in methods.items()}
    found = []

    def add(section: str, label: str, arm: Arm, reference: Arm | None, ratio: float | None = None) -> None:
        found.append(Row(section, label, arm, reference, ratio))

    for name, arm in methods.items():
        add(METHODS_SECTION, name, arm, None if name == FIRST else methods[FIRST])

    for name in methods:
        if name not in (FIRST, CLOSED):
            add(f"{CLOSED}, against each other method", f"against {name}", methods[CLOSED], methods[name])

    for name in chosen:
        for target in TARGETS if name not in UNPURIFIED else ():
            add(PURIFIED_SECTION, f"{name}, `target: {target}`", purified(methods[name], MAIN_RATIO, target), methods[name])

    section = f"Rank ratio, {FIRST}, against no purification"
    plain = methods[FIRST]
    for target in TARGETS:
        for ratio in QUICK_RATIOS if quick else RATIOS:
            add(section, f"`target: {target}`, rank_ratio {ratio}", purified(plain, ratio, target), plain, ratio)

    # With the target `weights`, as the other one shows nothing that a control could take away.
    section = f"Controls and settings, {FIRST}, rank_ratio {CONTROL_RATIO}, against no purification"
    own = purified(plain, CONTROL_RATIO, "weights")
    varied = {
        "as above": own,
        "C = I": replace(own, pave=own.pave | {"regularization": 1e9}),
        "C with random eigenvectors": replace(own, data="rotated"),
        "another task's data": replace(own, data="other"),
    }
    if details:
        varied["uniform allocation"] = replace(own, pave=own.pave | {"allocation": "uniform"})
        varied["regularization 0.1, absolute"] = replace(own, pave=own.pave | {"regularization": 0.1})
        varied["regularization 0.1, relative"] = replace(own, pave=own.pave | {"regularization": {"relative": 0.1}})
        varied |= {f"{count} samples": replace(own, samples=count) for count in SAMPLES}
    for label, arm in varied.items():
        add(section, label, arm, plain)

    if not details:
        return found
    section = f"What {CLOSED}, is given, against {FIRST}"
    closed = methods[CLOSED]
    varied = {"another task's data": replace(closed, data="other")}
    varied |= {f"{count} samples": replace(closed, samples=count) for count in SAMPLES}
    for label, arm in varied.items():
        add(section, label, arm, plain)

    for count in counts:
        section = f"{count} models at once, against {FIRST}"
        fewer = {
            name: replace(methods[name], models=count, settings=FEW_MODELS.get(name, methods[name].settings))
            for name in BEST_KNOWN
        }
        for name, arm in fewer.items():
            add(section, name, arm, None if name == FIRST else fewer[FIRST])
        section = f"{count} models at once, rank_ratio {MAIN_RATIO}, against the same method without"
        for target in TARGETS:
            add(section, f"{FIRST}, `target: {target}`", purified(fewer[FIRST], MAIN_RATIO, target), fewer[FIRST])
    return found


def purified(plain: Arm, ratio: float, target: str) -> Arm:
    return replace(plain, pave={"rank_ratio": ratio, "target": target}, purify=True)


REFINED = (1.0, 1.2, 1.4, 1.7)  # lambdas of refining
METHOD = {"vocabulary": "method"}


def refined_rows(models: int, counts: tuple[int, ...] = (), *, has_vocabulary: bool, details: bool = True) -> list[Row]:
    """What fitting to the experts does: the vocabulary, and refining, each on what is there without.

    Args:
        models, counts: see `rows`.
        has_vocabulary: the fine-tunes have changed it.
        details: whether merges are refined from every method, or only from the first.
    """
    found = []
    for count in (models, *counts):
        all_at_once = f"{count} models at once"
        arms = {name: replace(METHODS[name], models=count) for name in (FIRST, "ties")}
        if count < models:
            arms = {name: replace(arm, settings=FEW_MODELS[name]) for name, arm in arms.items()}
        plain, ties = arms[FIRST], purified(arms["ties"], MAIN_RATIO, "weights")
        layers = replace(METHODS[CLOSED], models=count, settings=scaled(0.8, 1.0, 1.25, 1.5, covariance=0.5), pave=METHOD)
        best = replace(layers, pave={}) if has_vocabulary else layers
        found.append(Row(f"{all_at_once}, against {FIRST}", FIRST, plain, None))
        found.append(Row(f"{all_at_once}, against {FIRST}", CLOSED, layers, plain))
        if has_vocabulary:
            section = f"{all_at_once}: `vocabulary`, against the same method without"
            for name, arm in ((FIRST, plain), (CLOSED, layers)):
                found.append(Row(section, f"{name}, `counts`", replace(arm, pave={"vocabulary": "counts"}, purify=False), arm))
            found.append(Row(section, f"{FIRST}, `fit`", replace(plain, pave={"vocabulary": "fit"}, purify=False), plain))
            found.append(Row(section, f"{CLOSED}, `fit`", best, layers))

        section = f"{all_at_once}: refined, against {CLOSED}"
        refined = refining(replace(plain, pave={}, purify=False), plain.settings[1])
        found.append(Row(section, f"{FIRST}, refined", refined, best))
        if not details:
            continue
        found.append(Row(section, f"{CLOSED}, refined", refining(best, best.settings[1]), best))
        if count == models:
            of_ties = refining(ties, ties.settings[2])
            ties = replace(ties, pave=ties.pave | METHOD)
            found.append(Row(section, "ties, purified, refined", of_ties, best))
            found.append(Row(f"{all_at_once}: ties, purified", "ties, purified", ties, plain))
            found.append(Row(f"{all_at_once}: ties, purified", "refined, against it", of_ties, ties))
        if has_vocabulary and count == models:
            without = replace(refined, pave=METHOD)
            found.append(Row(section, f"{FIRST}, refined, `vocabulary: method`", without, best))
            found.append(Row(f"{all_at_once}: the vocabulary's part in refining", "with it", refined, without))
    return found


EMR_RATIOS = (0.984, 0.9375, 0.875)


def emr_rows(models: int) -> list[Row]:
    """EMR-Merging, where each task is judged with its own restored model, plain and purified, beside merges of one model.

    Args:
        models: see `rows`.
    """
    plain, closed = (replace(METHODS[name], models=models) for name in (FIRST, CLOSED))
    emr = Arm("emr", ({},), models=models)
    refined = refining(replace(plain, pave={}, purify=False), plain.settings[1])
    section = f"EMR-Merging beside merges of one model, against {FIRST}"
    found = [Row(section, FIRST, plain, None), Row(section, CLOSED, closed, plain)]
    found += [Row(section, f"{FIRST}, refined", refined, plain), Row(section, "emr", emr, plain)]
    section = "EMR-Merging, purified, against the same without"
    for ratio in EMR_RATIOS:
        for target in TARGETS:
            found.append(Row(section, f"`target: {target}`, rank_ratio {ratio}", purified(emr, ratio, target), emr))
    papers = purified(emr, EMR_RATIOS[-1], "weights")
    papers = replace(papers, pave=papers.pave | {"regularization": 0.1})
    found.append(Row(section, f"`target: weights`, rank_ratio {EMR_RATIOS[-1]}, regularization 0.1", papers, emr))
    return found


DATA = {
    "own": "samples of each model's own task",
    "generated": "what each model writes itself",
    "other": "samples of another model's task",
    "general": "one set of other text for all models",
}


def given_rows(models: int) -> list[Row]:
    """What the data of a block are worth: those of each model's task, what it writes itself, and others."""
    plain = replace(METHODS[FIRST], models=models)
    arms = {
        f"{FIRST}, purified at {MAIN_RATIO}": purified(plain, MAIN_RATIO, "weights"),
        CLOSED: replace(METHODS[CLOSED], models=models),
        f"{FIRST}, refined": refining(replace(plain, pave={}, purify=False), plain.settings[1]),
    }
    found = [Row(f"What models are given, against {FIRST}", FIRST, plain, None)]
    for name, arm in arms.items():
        section = f"What models are given, against {FIRST}: {name}"
        found += [Row(section, label, replace(arm, data=data), plain) for data, label in DATA.items()]
    return found


def refining(arm: Arm, start: dict[str, Any]) -> Arm:
    """The arm refined, with each lambda of refining, from one setting of its method."""
    return replace(arm, settings=tuple(start | {"refine": value} for value in REFINED))


def some(arm: Arm, *numbers: int) -> Arm:
    """The arm with some of its settings."""
    return replace(arm, settings=tuple(arm.settings[number] for number in numbers))


def scored_rows(models: int, *, has_vocabulary: bool) -> list[Row]:
    """Merges to choose from, all models at once: each row is an arm with one setting, and its section is the method.

    Args:
        models: how many fine-tunes there are.
        has_vocabulary: they have changed it.
    """
    plain = {name: replace(arm, models=models) for name, arm in METHODS.items()}
    layers = replace(plain[CLOSED], settings=scaled(0.8, 1.0, 1.25, 1.5, covariance=0.5), pave=METHOD)
    purify = {"rank_ratio": MAIN_RATIO, "target": "weights"} | METHOD
    refined = refining(replace(plain[FIRST], pave={}, purify=False), plain[FIRST].settings[1])
    own = {
        FIRST: plain[FIRST],
        "ties": some(plain["ties"], 1, 2, 3),
        "dare_ties": some(plain["dare_ties"], 2),
        "dare_linear": some(plain["dare_linear"], 2),
        "della": some(plain["della"], 2),
        "model_stock": some(plain["model_stock"], 0),
        "tsv": plain["tsv"],
        "regmean, covariance 0": some(plain["regmean, covariance 0"], 0, 2),
        CLOSED: layers,
        "regmean, covariance 1": replace(some(plain["regmean, covariance 1"], 1, 3), pave=METHOD),
        f"{FIRST}, purified": replace(some(plain[FIRST], 1, 2), pave=purify),
        "ties, purified": replace(some(plain["ties"], 2), pave=purify),
        f"{FIRST}, refined": some(refined, 0, 2, 3),
    }
    if has_vocabulary:
        fitted = {"vocabulary": "fit"}
        own[f"{FIRST}, fit"] = replace(some(plain[FIRST], 1, 2), pave=fitted, purify=False)
        own[f"{CLOSED}, fit"] = replace(layers, pave=fitted)
    named = ("lambda", "filter_wise", "refine")
    return [
        Row(name, f"{name}, {', '.join(f'{key} {setting[key]}' for key in named if key in setting)}", arm, None)
        for name, several in own.items()
        for setting in several.settings
        for arm in [replace(several, settings=(setting,))]
    ]
