"""What tasks have in common."""

from __future__ import annotations

from typing import Any, Optional

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tensor_writer import TensorWriter


class TensorTask(Task[Any]):
    """A task on one tensor of one model. mergekit schedules it beside its own tasks on that tensor."""

    model: ModelReference
    tensor: str

    # Tasks nest, and mergekit hashes them often: hashing a task with all tasks below it would take longer than the merge.
    def __hash__(self) -> int:
        return hash((type(self), self.model, self.tensor))

    def group_label(self) -> Optional[str]:
        return self.tensor

    def uses_accelerator(self) -> bool:
        return True


def files_of(writer: TensorWriter) -> set[str]:
    """The files that a writer has written."""
    files = set(writer.weight_map.values())
    # mergekit renames a single file after it has noted its name.
    return {file.replace("-1.", ".") for file in files} if writer.shards_written == 1 else files
