"""Removes the report, the scores and the pictures of an earlier merge when new weights are written into its folder.

mergekit leaves everything else in an existing folder as it is, so they would be taken for those of the new merge, whether that
has a `pave:` block or not. They are removed once the new weights are complete. Until then the old weights are there, so a merge
that fails destroys nothing.

Like `field`, this is there for everybody who uses mergekit, so it imports only light modules, and may break nothing.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import ModuleType

from mergekit_pave.report.outputs import REPORT_NAME, remove

LOG = logging.getLogger(__name__)


def add(module: ModuleType) -> None:
    """Let the writer of weights in `mergekit.io.tensor_writer` remove the report of an earlier merge. Idempotent."""
    finalize = module.TensorWriter.finalize
    if hasattr(finalize, "removes_evidence"):
        return

    @functools.wraps(finalize)
    def wrapper(self, *args, **kwargs):
        done = finalize(self, *args, **kwargs)
        try:
            if not self.override_basename:  # which adapters have: they leave the model beside them as it was
                remove(Path(self.out_path))
        except Exception as error:
            LOG.warning("the %s of an earlier merge could not be removed (%s)", REPORT_NAME, error)
        return done

    wrapper.removes_evidence = True
    module.TensorWriter.finalize = wrapper
