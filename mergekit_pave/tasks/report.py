"""The report beside the merged weights."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, Optional

import tqdm
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel
from mergekit.io.tensor_writer import TensorWriter

from mergekit_pave.cache.checkpoint import stored_in
from mergekit_pave.files import replacing
from mergekit_pave.report.account import account
from mergekit_pave.report.closed_form import count_weights
from mergekit_pave.report.emr import emr_warnings
from mergekit_pave.report.outputs import REPORT_NAME
from mergekit_pave.report.stored import written_weights
from mergekit_pave.report.summary import complete, regmean_warnings
from mergekit_pave.tasks.base import files_of
from mergekit_pave.tasks.emr import WriteTasks
from mergekit_pave.tasks.purify import PurificationStats
from mergekit_pave.tasks.regmean import MergeByRegMean

LOG = logging.getLogger(__name__)

_WARNINGS = 4  # lines of them; every model may have one


class WriteReport(Task[None]):
    """Writes pave_report.json beside the merged model, and logs a block of a few lines that tells what was done.

    It runs once the weights are complete: the report has their fingerprints, and that of an earlier merge is removed only then.

    Attributes:
        following: the command to type next.
    """

    out_path: str
    finalize: FinalizeModel
    header: str
    stats: tuple[PurificationStats, ...]
    closed_forms: tuple[MergeByRegMean, ...]
    following: str
    emr: Optional[WriteTasks] = None

    def __hash__(self) -> int:
        return hash((WriteReport, self.out_path))

    def arguments(self) -> dict[str, Task]:
        stats: dict[str, Task] = {str(i): task for i, task in enumerate(self.stats)}
        return stats | {"finalized": self.finalize, "writer": self.finalize.writer_task} | ({"emr": self.emr} if self.emr else {})

    def main_thread_only(self) -> bool:
        return True

    def execute(
        self, finalized: None, writer: TensorWriter, emr: Optional[dict[str, Any]] = None, **stats: dict[str, Any]
    ) -> None:
        done = ((str(task.model), stats[str(i)]) for i, task in enumerate(self.stats))
        header = json.loads(self.header)
        report = complete(header, done)
        folder, files = Path(self.out_path), files_of(writer)
        if "regmean" in report:
            self._complete_regmean(report, folder, files)
        if emr:
            report["emr"] = emr
            report["warnings"] += emr_warnings(report)
        content = report | {"weights": written_weights(folder, files)}
        with replacing(folder / REPORT_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        found = report["warnings"][len(header["warnings"]) :]  # the others were shown before the merge
        with tqdm.tqdm.external_write_mode(sys.stderr):  # mergekit's bar is on that line
            shown = found if len(found) <= _WARNINGS else found[: _WARNINGS - 1]
            for warning in shown:
                LOG.warning(warning)
            if len(found) > len(shown):
                LOG.warning("and %d warnings of the same kind; %s has all of them", len(found) - len(shown), REPORT_NAME)
            LOG.info(account(report, self.out_path, self.following))

    def _complete_regmean(self, report: dict[str, Any], folder: Path, files: set[str]) -> None:
        """Add what only the finished merge knows."""
        regmean, matrices, reasons = report["regmean"] | {"closed_form": []}, [], {}
        for merge in self.closed_forms:
            row, others, of_merge = merge.report()
            regmean["closed_form"] += [row] if row else []
            reasons |= others
            matrices += of_merge
        if all(file.endswith(".safetensors") for file in files):
            sizes = {name: math.prod(tensor.shape) for file in files for name, tensor in stored_in(folder / file).items()}
            regmean["weights"] = count_weights(report, matrices, sizes)
        regmean["as_task_arithmetic"] |= reasons
        report["regmean"] = regmean
        report["warnings"] += regmean_warnings(regmean)
