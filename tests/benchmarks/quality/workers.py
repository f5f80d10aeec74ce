"""Training and merging in one process for each core: most of a merge cannot use more than one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from decoder import Decoder
from encoder import Encoder
from merging import Arm, Family, Laboratory
from scored import Scorer
from tokens import Draws

SEEDS = (0, 1, 2)

_own: dict[str, Laboratory] = {}  # of this worker, by family
_scorers: dict[tuple[str, int], Scorer] = {}  # of this worker, by family and seed


def laboratories(folder: Path, quick: bool, *, run: bool) -> dict[str, Laboratory]:
    """By family."""
    steps = {"base_steps": 60, "steps": 30} if quick else {"base_steps": 320, "steps": 60}
    families: list[Family] = [
        Decoder(folder / "decoder", **steps),
        Encoder(folder / "encoder", epochs=1 if quick else 2),
    ]
    variants: list[Family] = [
        Decoder(folder / "decoder-untied", **steps, tied=False),
        Decoder(folder / "decoder-32k", **steps, vocabulary=32768),
    ]
    found = [(family, SEEDS[:1] if quick else SEEDS) for family in families] + [(family, SEEDS[:1]) for family in variants]
    return {family.name: Laboratory(family, folder, seeds, run=run) for family, seeds in found}


@contextmanager
def workers(folder: Path, quick: bool) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes can be given the functions below, as many as torch would have used threads."""
    count = torch.get_num_threads()
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start, initargs=(folder, quick))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start(folder: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # what a block warns of is what is measured here
    _own.update(laboratories(folder, quick, run=True))


def prepare(family: str) -> None:
    _own[family].family.prepare()


def fine_tune(family: str, seed: int, task: str) -> None:
    _own[family].family.fine_tune(seed, task)


def unmerged(family: str) -> None:
    """Judge the base model and the fine-tunes."""
    _own[family].base()
    _own[family].tuned()


def judge(family: str, arm: Arm) -> None:
    _own[family].outcome(arm)


def score(family: str, seed: int, arm: Arm | None) -> None:
    """Score a merge, or the base model."""
    if (family, seed) not in _scorers:
        _scorers.clear()  # what the experts give is in there
        _scorers[family, seed] = Scorer(_own[family], seed)
    _scorers[family, seed].measure(arm)


def draw(family: str, arm: Arm) -> None:
    """Judge what becomes of an arm with two draws of tokens, and compare them."""
    draws = Draws(_own[family])
    for seed in draws.seeds:
        draws.scores(arm, seed)
        if arm.pave is not None:
            draws.apart(arm, seed)


def time_scoring(family: str, arm: Arm) -> None:
    """How long it takes to score a merge."""
    Scorer(_own[family], _own[family].seeds[0]).seconds(arm)
