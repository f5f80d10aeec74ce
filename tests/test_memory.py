"""Memory for purified weights."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from mergekit_pave.core.memory import empty_in_huge_pages
from mergekit_pave.core.purification import purify_weight


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
    assert view.min() == 1 == view.max()
    del view
    assert resident() - before < 50 << 20


@pytest.mark.parametrize(
    ("shape", "transposed"), [((1100, 1000), False), ((1000, 1100), True), ((3, 800, 700), False), ((3, 700, 800), True)]
)
def test_a_weight_of_several_megabytes_is_purified_as_a_small_one_is(shape, transposed):
    """Large enough for huge pages, and for more than one block at a time."""
    generator = torch.Generator().manual_seed(0)
    weight, base = torch.randn(2, *shape, generator=generator)
    own = weight[None] if weight.dim() == 2 else weight
    own = own.mT if transposed else own  # (matrices, d_out, d_in)
    directions = torch.linalg.qr(torch.randn(len(own), own.shape[1], 9, generator=generator)).Q
    slices = [{"expert": i if len(own) > 1 else None, "largest": 1.0, "energy": 1.0, "tokens": 100} for i in range(len(own))]
    tail = {
        "directions": directions,
        "coefficients": directions.mT @ own,
        "values": torch.ones(len(own), 9).double(),
        "slices": slices,
        "without_tail": {},
    }
    drops = [7, 0, 9][: len(own)]
    row = {"tensor": "t", "output": "t", "model": "m"}
    done = purify_weight(weight, base, tail, drops, transposed=transposed, target="weights", dtype=torch.float32, row=row)
    expected = torch.stack(
        [w.double() - u[:, :drop].double() @ (u[:, :drop].double().mT @ w.double()) for w, u, drop in zip(own, directions, drops)]
    )
    expected = expected.mT if transposed else expected
    assert (done["tensor"].double() - expected.reshape(shape)).abs().max() < 1e-4
    change = sum(row["change_norm"] ** 2 for row in done["stats"]) ** 0.5
    assert change == pytest.approx((weight.double() - base.double()).norm().item(), rel=1e-6)
