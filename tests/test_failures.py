"""Memory that runs out, and factorisations that do not converge: what is told, and what is left as it was."""

import errno
import itertools

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from merging import config_for, invoke
from test_covariance import draw
from test_in_memory import assert_same, batches_of, load, state

import mergekit_pave.in_memory
from mergekit_pave import Covariance, PaveError, purify_model
from mergekit_pave.core import eigenpairs, projection, purification, subspace
from mergekit_pave.core.failures import advising, is_out_of_memory
from mergekit_pave.core.subspace import tail_components
from mergekit_pave.tasks import purify

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cusolver": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd`"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)."),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "windows": RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    "python": MemoryError(),
    "numpy": np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(float)),
    "mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_it_is_recognised_whoever_says_it(error):
    told = r"^m: decomposing w ran out of memory on cuda:1\. Free memory there, or use another device"
    with pytest.raises(PaveError, match=told), advising("m: decomposing w", "cuda:1"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError(errno.ENOENT, "no")]
)
def test_other_errors_are_none(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, advising("m: decomposing w", "cpu"):
        raise error
    assert caught.value is error


def failing(real, at, error):
    """A function that fails when it is called for the time `at`."""
    count = itertools.count(1)

    def wrapper(*args, **kwargs):
        if next(count) == at:
            raise error
        return real(*args, **kwargs)

    return wrapper


def test_a_decomposition_that_runs_out_of_memory(llama, tmp_path, cache, monkeypatch):
    """The weight is named; those before it stay in the cache, and the next run goes on from there."""
    config, error = config_for(llama, {}), OUT_OF_MEMORY["cusolver"]
    monkeypatch.setattr(purification, "tail_components", failing(subspace.tail_components, 5, error))
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 1
    assert "model.layers." in result.output
    assert "decomposing" in result.output
    assert "ran out of memory on cpu. Free memory, or use a machine that has more" in " ".join(result.output.split())
    assert len(list(cache.glob("subspace/*/*/prepared.json"))) == 4
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(cache))
    assert invoke(config, tmp_path / "out").exit_code == 0


def test_a_merge_that_runs_out_of_memory(llama, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(purify, "purify_weight", failing(purify.purify_weight, 3, OUT_OF_MEMORY["cuda"]))
    result = invoke(config_for(llama, {}), tmp_path / "out")
    assert isinstance(result.exception, PaveError | SystemExit)
    assert "purifying model.layers." in str(result.exception) + result.output


@pytest.mark.parametrize("method", ["regmean", "tsv"])
@pytest.mark.parametrize("error", [OUT_OF_MEMORY["cublas"], torch.linalg.LinAlgError("linalg.eigh: failed to converge")])
def test_merge_methods_name_the_tensor(monkeypatch, method, error):
    import mergekit_pave.methods.regmean
    import mergekit_pave.methods.tsv

    monkeypatch.setattr(getattr(mergekit_pave.methods, method), "merge_changes", failing(None, 1, error))
    states = {name: {"a.weight": draw(8, 8, seed=i)} for i, name in enumerate(("base", "one", "two"))}
    parameters = {"covariance": 0.0} if method == "regmean" else {}
    with pytest.raises(PaveError, match=rf"^{method}: merging a\.weight (ran out of memory on cpu|did not converge)"):
        merge_state_dicts(states, method, base="base", parameters=parameters)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY["cuda"], KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("at", [1, 2, 14, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_memory_is_left_as_it_was(llama, monkeypatch, at, dtype, error):
    model = load("llama", llama.tuned[0]).to(dtype)
    before = state(model)
    monkeypatch.setattr(mergekit_pave.in_memory, "purify_weight", failing(mergekit_pave.in_memory.purify_weight, at, error))
    batch = next(batches_of(llama.tuned[0], llama.data[0]))
    with pytest.raises(BaseException) as caught:
        purify_model(model, batch, rank_ratio=0.875, quiet=True)
    if isinstance(error, KeyboardInterrupt):
        assert caught.value is error
    else:
        assert "purifying model.layers." in str(caught.value)
    assert_same(state(model), before)


def test_a_model_in_memory_whose_calibration_runs_out_of_memory(llama, monkeypatch):
    model = load("llama", llama.tuned[0])
    monkeypatch.setattr(model.model, "forward", failing(model.model.forward, 1, OUT_OF_MEMORY["cuda"]))
    with pytest.raises(PaveError, match=r"calibrating ran out of memory on cpu\. Give smaller batches"):
        purify_model(model, next(batches_of(llama.tuned[0], llama.data[0])), quiet=True)


# A factorisation that does not converge leaves the decomposition to another one.

FACTORISATIONS = {
    "scipy's eigh": (eigenpairs.scipy.linalg, "eigh", np.linalg.LinAlgError("eigh did not converge")),
    "torch's eigh": (torch.linalg, "eigh", torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")),
    "qr": (torch.linalg, "qr", torch.linalg.LinAlgError("linalg.qr: failed")),
}


@pytest.mark.parametrize("count", [8, 120])
@pytest.mark.parametrize(("module", "name", "error"), FACTORISATIONS.values(), ids=FACTORISATIONS)
def test_the_svd_takes_over(monkeypatch, module, name, error, count):
    weight, covariance = draw(300, 320, seed=1).double(), Covariance.from_rows(draw(2000, 320))
    expected = tail_components(weight, covariance, 0.1, count)
    called = []

    def fails(*args, **kwargs):
        called.append(name)
        raise error

    monkeypatch.setattr(module, name, fails)
    found = tail_components(weight, covariance, 0.1, count)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=0)
    assert found.largest == pytest.approx(expected.largest, rel=1e-4)
    overlap = torch.linalg.svdvals(found.directions.mT @ expected.directions)
    torch.testing.assert_close(overlap, torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-6)


def test_where_lapack_finds_too_few_the_svd_takes_over(monkeypatch):
    weight, covariance = draw(60, 64, seed=1).double(), Covariance.from_rows(draw(2000, 64))
    expected = tail_components(weight, covariance, 0.1, 8)
    real = eigenpairs.scipy.linalg.eigh

    def too_few(*args, **kwargs):
        values, vectors = real(*args, **kwargs)
        return values[1:], vectors[:, 1:]

    monkeypatch.setattr(eigenpairs.scipy.linalg, "eigh", too_few)
    torch.testing.assert_close(tail_components(weight, covariance, 0.1, 8).values, expected.values, rtol=1e-6, atol=0)


def test_where_not_even_the_svd_converges_the_weight_is_named(llama, monkeypatch):
    def svd(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", svd)
    model = load("llama", llama.tuned[0])
    before = state(model)
    with pytest.raises(PaveError, match=r"decomposing model\.layers\.0\.self_attn\.q_proj\.weight did not converge \(lin"):
        purify_model(model, next(batches_of(llama.tuned[0], llama.data[0])), quiet=True)
    assert_same(state(model), before)


def test_blocks_are_no_larger_than_the_weight(monkeypatch):
    monkeypatch.setattr(projection, "_CPU_BLOCK", 1 << 24)  # as on an accelerator
    (block,) = projection._blocks(torch.empty(48, 48))
    assert block == slice(0, 48)
    assert [block.stop - block.start for block in projection._blocks(torch.empty(3, 1 << 24))] == [1, 1, 1]
