"""How many tokens a covariance takes: what is run for `--tokens`.

Every arm is merged twice, from tokens of either half of the calibration rows. Both merges are judged on the test parts, with the
setting that is best on the validation parts for the first half and the first seed; and they are compared with each other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import statistics
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from arms import CLOSED, CONTROL_RATIO, FIRST, MAIN_RATIO, METHOD, METHODS, Row, purified, scaled
from decoder import Decoder
from encoder import Encoder
from merging import HALVES, Arm, Laboratory, Scores
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_pave.settings import DEFAULT_CALIBRATION

SEEDS = 2  # of the fine-tunes, at most
LENGTHS = {"decoder": Decoder.max_length, "encoder": Encoder.max_length}
WIDTHS = {"decoder": 256, "encoder": 384}  # of the hidden states; the widest inputs are 688 and 1536 wide
ROWS = 320  # in half of the calibration rows
SHARES = (1 / 8, 2, 1 / 32, 8, 1 / 2, 1 / 4, 1, 1 / 16, 4, 16)  # tokens for each of the width, the most telling ones first
SHAPED = {"decoder": (1024, 2048), "encoder": (768, 1536)}  # tokens, with which samples of other lengths are tried
FILLED = {"decoder": 0.98, "encoder": 0.7}  # how long samples are, of the length they may have
WEIGHTS = "model.safetensors"
SMALLEST = {"min_tokens": 1}
FITTED = f"{CLOSED}, with the vocabulary"


def token_rows(family: str, models: int) -> list[Row]:
    """The sweep over numbers of tokens, and at some of them what they are made of.

    Args:
        models: how many fine-tunes there are.
    """
    width, longest = WIDTHS[family], LENGTHS[family]
    plain = replace(METHODS[FIRST], models=models, settings=scaled(1.0, weight=1.0))
    closed = replace(METHODS[CLOSED], models=models, settings=scaled(1.0, covariance=0.5))
    methods = {CLOSED: replace(closed, pave=METHOD)}
    if family == "decoder":
        methods[FITTED] = replace(closed, pave={"vocabulary": "fit"})
    methods |= {f"purified, rank_ratio {ratio}": purified(plain, ratio, "weights") for ratio in (CONTROL_RATIO, MAIN_RATIO)}
    found = [Row("", FIRST, plain, None)]

    def add(method: str, label: str, share: float | None, **calibration: int) -> None:
        arm = methods[method]
        arm = replace(arm, data=HALVES[0], pave=arm.pave | {"calibration": calibration | SMALLEST})
        found.append(Row(method, label, arm, plain, share))

    for share in SHARES:
        for method in methods:
            tokens = round(share * width)
            add(method, "some tokens of each sample", share, samples=min(ROWS, tokens), max_tokens=tokens)
    for method in methods:
        add(method, "defaults", None, samples=DEFAULT_CALIBRATION.samples)
        add(method, "all tokens", None, samples=DEFAULT_CALIBRATION.samples, max_tokens=65536)
    for tokens in SHAPED[family]:
        for name, length in (("all of whole samples", longest), ("all of short samples", longest // 4)):
            for method in methods:
                # A few more than needed if all were as long as they may be.
                samples = math.ceil(tokens / (FILLED[family] * length))
                add(method, name, tokens / width, samples=samples, max_length=length, max_tokens=tokens)
    return found


class Draws:
    """Merges from two draws of tokens.

    All that these methods change of the base model is a multiple of lambda. So one merge, with a lambda of 1, stands for all.
    """

    def __init__(self, laboratory: Laboratory):
        self._laboratory, self._family = laboratory, laboratory.family
        self._tasks = list(self._family.tasks)
        self.seeds = laboratory.seeds[:SEEDS]
        self._changes = functools.cache(self._read_changes)
        self._kept = self._family.base.parent / "kept"

    def best(self, arm: Arm) -> float:
        """The lambda that is best on the validation parts, for the first seed and the first draw."""
        return self._first(arm)["lambda"]

    def scores(self, arm: Arm, seed: int) -> list[Scores]:
        """On the test parts, of the merges from both draws, or of the one that has no data."""
        first = seed == self._laboratory.seeds[0]
        factor = self.best(arm)
        halves = HALVES if arm.data in HALVES else (arm.data,)
        return [
            self._first(arm)["test"] if first and half == arm.data else self._other(replace(arm, data=half), seed, factor)["test"]
            for half in halves
        ]

    def apart(self, arm: Arm, seed: int) -> dict[str, dict[str, float]]:
        """By input width, squares over the linear layers: of the difference between both merges, of a merge's change, and
        where it is purified, of what is removed."""
        return self._other(replace(arm, data=HALVES[1]), seed, self.best(arm))["apart"]

    def _first(self, arm: Arm) -> dict[str, Any]:
        seed = self._laboratory.seeds[0]

        def judge(merged: Path) -> dict[str, Any]:
            found = {}
            for factor in lambdas(arm):
                scores = self._family.score(self._scaled(merged, factor), seed, "validation", self._tasks)
                found[factor] = statistics.mean(scores.values())
            best = max(found, key=found.get)
            test = self._family.score(self._scaled(merged, best), seed, "test", self._tasks)
            return {"validation": found, "lambda": best, "test": test}

        inspect = {"judged": judge}
        if arm.data in HALVES:
            inspect["kept"] = lambda merged: self._keep(arm, seed, merged)
        return self._laboratory.inspected(arm, seed, inspect)["judged"]

    def _other(self, arm: Arm, seed: int, factor: float) -> dict[str, Any]:
        def test(merged: Path) -> Scores:
            return self._family.score(self._scaled(merged, factor), seed, "test", self._tasks)

        inspect = {f"test at {factor}": test}
        if arm.data == HALVES[0]:
            inspect["kept"] = lambda merged: self._keep(arm, seed, merged)
        elif arm.data == HALVES[1]:
            inspect["apart"] = lambda merged: self._apart(arm, seed, merged)
        found = self._laboratory.inspected(arm, seed, inspect)
        return found | {"test": found[f"test at {factor}"]}

    def _scaled(self, merged: Path, factor: float) -> Path:
        """The merge with another lambda, beside it."""
        scaled = merged.parent / f"{merged.name}-scaled"
        shutil.copytree(merged, scaled, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        base, tensors = load_file(self._family.base / WEIGHTS), load_file(merged / WEIGHTS)
        save_file({name: base[name].lerp(tensor, factor) for name, tensor in tensors.items()}, scaled / WEIGHTS, {"format": "pt"})
        return scaled

    def _keep(self, arm: Arm, seed: int, merged: Path) -> dict[str, str]:
        self._kept.mkdir(exist_ok=True)
        save_file(linear_weights(merged), path := self._kept / _name(arm, seed))
        return {"file": path.name}

    def _apart(self, arm: Arm, seed: int, merged: Path) -> dict[str, dict[str, float]]:
        other = load_file(self._kept / _name(replace(arm, data=HALVES[0]), seed))
        base, total = self._changes(seed)
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, weight in linear_weights(merged).items():
            squares = found[str(weight.shape[1])]
            squares["apart"] += _square(weight - other[name])
            squares["change"] += (_square(weight - base[name]) + _square(other[name] - base[name])) / 2
            if arm.purify:
                whole = base[name] + total[name]
                squares["removed"] += (_square(whole - weight) + _square(whole - other[name])) / 2
        return {width: dict(squares) for width, squares in found.items()}

    def _read_changes(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of the base model, and the sum of what fine-tuning has changed of them."""
        base = linear_weights(self._family.base)
        total = {name: -len(self._tasks) * weight for name, weight in base.items()}
        for task in self._tasks:
            for name, weight in linear_weights(self._family.tuned(seed, task)).items():
                total[name] += weight
        return base, total


def lambdas(arm: Arm) -> tuple[float, ...]:
    """From which the best is chosen: around what was best when others were tried."""
    if arm.method != "regmean":
        return 0.2, 0.3, 0.45
    return (0.8, 1.0, 1.25) if arm.pave["vocabulary"] == "method" else (1.0, 1.25, 1.5)


def _name(arm: Arm, seed: int) -> str:
    return hashlib.sha256(json.dumps([asdict(arm), seed], sort_keys=True).encode()).hexdigest()[:16] + ".safetensors"


def linear_weights(folder: Path) -> dict[str, Tensor]:
    """Those of the layers that see hidden states."""
    tensors = load_file(folder / WEIGHTS)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "classifier"))
    }


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()
