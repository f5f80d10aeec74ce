"""The end of what an earlier merge has left, when new weights take the place of its own.

mergekit writes into a folder that is there already and leaves what else it finds. So a report and pictures of an earlier
merge would pass for those of the new one, whether that has a `pave:` block or not. They go when the new weights are complete,
since until then the old ones are there: a merge that fails destroys nothing.

Like `field`, this is there for everybody who uses mergekit, so it needs nothing but Python, and may break nothing.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

from mergekit_pave.report.outputs import REPORT_NAME, remove

LOG = logging.getLogger(__name__)


def add() -> None:
    """Let mergekit's writer of weights remove what does not belong to them. Idempotent."""
    writer = getattr(sys.modules.get("mergekit.io.tensor_writer"), "TensorWriter", None)
    finalize = getattr(writer, "finalize", None)
    if finalize is None or hasattr(finalize, "removes_evidence"):
        return

    @functools.wraps(finalize)
    def wrapper(self, *args, **kwargs):
        done = finalize(self, *args, **kwargs)
        try:
            if not self.override_basename:  # such as an adapter's, which leaves the model beside it as it was
                remove(Path(self.out_path))
        except Exception as error:
            LOG.warning("%s: what tells of an earlier merge could not be removed (%s)", REPORT_NAME, error)
        return done

    wrapper.removes_evidence = True
    writer.finalize = wrapper
