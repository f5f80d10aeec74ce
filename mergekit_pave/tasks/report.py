"""The report beside the merged weights."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import tqdm
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel
from mergekit.io.tensor_writer import TensorWriter

from mergekit_pave.files import replacing
from mergekit_pave.report.outputs import REPORT_NAME
from mergekit_pave.report.stored import written_weights
from mergekit_pave.report.summary import (
    complete,
    left_experts,
    left_weights,
    refined_summary,
    regmean_summary,
    regmean_warnings,
    summary,
    vocabulary_lines,
    warnings,
)
from mergekit_pave.tasks.purify import PurificationStats
from mergekit_pave.tasks.regmean import MergeByRegMean

LOG = logging.getLogger(__name__)


class WriteReport(Task[None]):
    """Writes pave_report.json beside the merged model, and logs in one line what was purified.

    It runs once the weights are complete: the report has their fingerprints, and that of an earlier merge is removed only then.
    """

    out_path: str
    finalize: FinalizeModel
    header: str
    stats: tuple[PurificationStats, ...]
    closed_forms: tuple[MergeByRegMean, ...]

    def __hash__(self) -> int:
        return hash((WriteReport, self.out_path))

    def arguments(self) -> dict[str, Task]:
        stats: dict[str, Task] = {str(i): task for i, task in enumerate(self.stats)}
        return stats | {"finalized": self.finalize, "writer": self.finalize.writer_task}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, finalized: None, writer: TensorWriter, **stats: dict[str, Any]) -> None:
        done = ((str(task.model), stats[str(i)]) for i, task in enumerate(self.stats))
        report = complete(json.loads(self.header), done)
        if "regmean" in report:
            report["regmean"]["closed_form"] = []
            for merge in self.closed_forms:
                row, reasons = merge.report()
                report["regmean"]["closed_form"] += [row] if row else []
                report["regmean"]["as_task_arithmetic"] |= reasons
            report["warnings"] += regmean_warnings(report["regmean"])
        folder = Path(self.out_path)
        content = report | {"weights": written_weights(folder, _files_of(writer))}
        with replacing(folder / REPORT_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        with tqdm.tqdm.external_write_mode(sys.stderr):  # mergekit's bar is on that line
            if report["purified"]:
                LOG.info(summary(report))
            if "regmean" in report:
                LOG.info(regmean_summary(report["regmean"]))
            for line in vocabulary_lines(report["vocabulary"]) if "vocabulary" in report else ():
                LOG.info(line)
            if "refined" in report:
                LOG.info(refined_summary(report["refined"]))
            for line in left_experts(report) + left_weights(report):
                LOG.info(line)
            for warning in warnings(report) + (regmean_warnings(report["regmean"]) if "regmean" in report else []):
                LOG.warning(warning)


def _files_of(writer: TensorWriter) -> set[str]:
    """The files that a writer has written."""
    files = set(writer.weight_map.values())
    # mergekit renames a single file after it has noted its name.
    return {file.replace("-1.", ".") for file in files} if writer.shards_written == 1 else files
