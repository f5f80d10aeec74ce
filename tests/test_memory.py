"""Memory for purified weights."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from mergekit_pave.memory import empty_in_huge_pages


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (1500, 2047), (4, 700, 800)])
def test_a_tensor_like_another_holds_what_is_written_to_it(shape, dtype):
    like = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = empty_in_huge_pages(like.mT.contiguous().mT, dtype)
    assert (made.shape, made.dtype, made.device) == (like.shape, dtype, like.device)
    assert made.is_contiguous()
    made.copy_(like)
    assert made.equal(like.to(dtype))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has them")
def test_memory_goes_back_with_the_last_view_of_the_tensor():
    like = torch.empty(()).expand(64 << 20)  # takes no memory itself
    before = resident()
    made = empty_in_huge_pages(like, torch.float32).fill_(1)
    view = made[10:]
    del made
    assert resident() - before > 200 << 20
    assert view.sum() == len(view)
    del view
    assert resident() - before < 50 << 20
