"""The pretend device itself: it computes as a CPU does, refuses what CUDA refuses, and counts its memory."""

import pretend_device
import pytest
import torch
from pretend_device import memory
from safetensors.torch import load_file, save_file

FIRST, SECOND = "npu:0", "npu:1"


def test_it_computes_as_a_cpu_does():
    a, b = torch.randn(5, 3), torch.randn(3, 4)
    on_device = a.to(FIRST) @ b.to(FIRST) + torch.tensor(2.0)
    assert on_device.device == torch.device(FIRST)
    assert torch.equal(on_device.cpu(), a @ b + 2)
    assert torch.arange(3, device="npu").tolist() == [0, 1, 2] and torch.tensor([1.5], device=SECOND).item() == 1.5
    with torch.device(SECOND):
        assert torch.zeros(2).device == torch.device(SECOND)


def test_views_and_operations_in_place():
    a = torch.zeros(3, 4, device=FIRST)
    a[1:].mT.add_(1)
    assert a.sum() == 8
    assert a.unsqueeze_(0).shape == (1, 3, 4) and a.unbind()[0].T.shape == (4, 3)


def test_modules_and_files(tmp_path):
    layer = torch.nn.Linear(4, 2).to(SECOND)
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert layer(torch.ones(1, 4, device=SECOND)).device == layer.weight.device == torch.device(SECOND)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert torch.equal(load_file(tmp_path / "layer.safetensors", device=FIRST)["weight"].cpu(), layer.weight.detach().cpu())


def test_autocast():
    layer, x = torch.nn.Linear(4, 2).to(FIRST), torch.ones(1, 4, device=FIRST)
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert layer(x).dtype == (x @ x.mT).dtype == torch.bfloat16
        assert (x + 1).dtype == torch.float32 and (x.double() @ x.mT.double()).dtype == torch.float64
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(
    "refused",
    [
        lambda a, b: a + b.to(SECOND),
        lambda a, b: a + b,
        lambda a, b: a @ b.mT,
        lambda a, b: torch.cat([b, a]),
        lambda a, b: b.mul_(a),
        lambda a, b: b.mul_(torch.where(a > 0, 1.0, b)),
        lambda a, b: a.index_select(0, torch.tensor([0])),
        lambda a, b: b[torch.tensor([0], device=FIRST)],
        lambda a, b: a[torch.tensor([0], device=SECOND)],
        lambda a, b: torch.nn.functional.embedding(torch.tensor([0]), a),
        lambda a, b: a.normal_(generator=torch.Generator()),
        lambda a, b: torch.randn(3, device=FIRST, generator=torch.Generator()),
        lambda a, b: torch.equal(a, b),
    ],
)
def test_it_refuses_what_cuda_refuses(refused):
    with pytest.raises(RuntimeError, match=r"on the same device|device type for generator"):
        refused(torch.ones(2, 3).to(FIRST), torch.ones(2, 3))


def test_it_has_no_numpy():
    for array in (lambda x: x.numpy(), lambda x: __import__("numpy").asarray(x)):
        with pytest.raises(TypeError, match="can't convert npu:0 device type tensor to numpy"):
            array(torch.ones(2, device=FIRST))


def test_what_cuda_takes_it_takes():
    a = torch.ones(2, 3).to(FIRST)
    a.copy_(torch.full((2, 3), 2.0)).mul_(torch.tensor(2.0))
    assert a[torch.tensor([1])].device == torch.device(FIRST)
    assert torch.ones(2, 3).copy_(a).sum() == 24


def test_memory_is_counted():
    before = memory.used
    a = torch.zeros(10, 10, device=FIRST)
    view = a[2:].mT
    assert memory.used - before == 400 and memory.allocations == 1
    b = a.to(SECOND, torch.float64)
    assert memory.used - before == 1200 and memory.allocations == 2
    del a, b
    assert memory.used - before == 400, "the view is still there"
    del view
    assert memory.used == before and memory.peak - before == 1200


def test_what_is_moved_is_counted():
    a = torch.zeros(10).to(FIRST)
    torch.zeros(5).copy_((a + a.to(SECOND).to(FIRST))[:5])
    assert memory.moved == 40 + 20
    assert (a + 1).sum().item() == 10 and memory.moved == 60


@pytest.mark.parametrize(
    "waits",
    [
        lambda a: a.sum().item(),
        lambda a: bool(a.any()),
        lambda a: a.tolist(),
        lambda a: a.cpu(),
        lambda a: torch.zeros(2, 3).copy_(a),
        lambda a: a.nonzero(),
        lambda a: torch.where(a > 0),
        lambda a: a[a > 0],
        lambda a: a.masked_select(a > 0),
        lambda a: torch.equal(a, a),
        lambda a: a.unique(),
    ],
)
def test_waiting_is_counted(waits):
    a, before = torch.ones(2, 3).to(FIRST), memory.waits
    waits(a)
    assert memory.waits == before + 1


def test_what_needs_no_waiting():
    a, before = torch.ones(2, 3).to(FIRST), memory.waits
    at = torch.tensor([1]).to(FIRST)
    (a[at] @ a.mT).add_(1).sort(stable=True)
    torch.where(a > 0, a, 0.0).index_add_(0, at, a[at])
    assert memory.waits == before


def test_memory_runs_out():
    memory.limit = memory.used + 1000
    a = torch.zeros(100, device=FIRST)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(200, device=FIRST)
    memory.failing = range(memory.allocations + 1, memory.allocations + 2)
    a + 1  # the first of these
    with pytest.raises(torch.OutOfMemoryError):
        a + 1
    assert (a + 1).sum() == 100


def test_it_can_be_without_float64():
    memory.has_float64 = False
    for wrong in (lambda: torch.ones(2, device=FIRST).double(), lambda: torch.ones(2, dtype=torch.float64).to(FIRST)):
        with pytest.raises(TypeError, match="float64"):
            wrong()


def test_what_is_left_is_found():
    kept = []
    with pytest.raises(AssertionError, match="40 bytes are left"), pretend_device.all_freed():
        kept.append(torch.zeros(10, device=FIRST))
