"""`merge_method: emr`: EMR-Merging (see `core.emr`), as mergekit knows it.

A planned merge has tasks of ours in the place of mergekit's, because each tensor gives masks beside what is merged.
"""

from __future__ import annotations

from typing import Any

from mergekit.merge_methods.base import BasePolicy, GroupMergeMethod, InputContract, MergeMethodSpec, TensorGroup
from torch import Tensor

from mergekit_pave.errors import PaveError
from mergekit_pave.names import EMR


class Emr(GroupMergeMethod):
    """The method as mergekit knows it. It has no parameters."""

    spec = MergeMethodSpec(
        name=EMR,
        pretty_name="EMR-Merging",
        reference_url="https://arxiv.org/abs/2405.17461",
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=0),
        parameters=(),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """A tensor that no other model shares with the base is the base's.

        Raises:
            PaveError: there are other models, whose masks would be lost here.
        """
        if not group.non_base:
            return group.base.tensor
        raise PaveError(
            "emr: masks are only written by a merge to a folder (mergekit-yaml, mergekit-multi, run_merge), and without them the "
            "merged model is of no use; merge so, or use another merge_method"
        )
