"""The mathematics of EMR-Merging against its formulas (arXiv 2405.17461, section 3), in float64 and entry by entry."""

import math
import random

import numpy as np
import pytest
import torch

from mergekit_pave.core import emr

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (16, 24), (2, 3, 11)]
LARGE = (emr._IN_CACHE + 13, 3)  # in several parts, the last of which does not fill a byte


def random_models(shape, dtype, count=3, seed=0, scale=0.1):
    """A base and models. A third of all entries are left as they are, and some changes cancel each other exactly."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    models = []
    for _ in range(count):
        change = scale * torch.randn(shape, generator=generator)
        change[torch.rand(shape, generator=generator) < 0.3] = 0
        models.append((base + change).to(dtype))
    return base, models


def elected(changes: list[float]) -> tuple[int, float]:
    """The paper's unified sign and magnitude of one entry."""
    total = math.fsum(changes)
    sign = (total > 0) - (total < 0)
    return sign, max((abs(change) for change in changes if change * sign > 0), default=0.0)


def by_definition(base, models, dtype, originals=None):
    """W, masks, and all sums, one entry at a time, in Python's floats."""
    starts = base.double().flatten().tolist()
    columns = list(zip(*(model.double().flatten().tolist() for model in models)))
    before = list(zip(*(model.double().flatten().tolist() for model in originals or models)))
    merged, masks = [], [[] for _ in models]
    for start, entries in zip(starts, columns):
        sign, size = elected([entry - start for entry in entries])
        merged.append(start + sign * size)
        for mask, entry in zip(masks, entries):
            mask.append((entry - start) * sign > 0)
    merged = torch.tensor(merged, dtype=torch.float64).to(dtype)
    stored = (merged.double() - base.flatten().to(dtype).double()).tolist()
    sums = []
    for i, mask in enumerate(masks):
        changes = [of[i] - start for of, start in zip(columns, starts)]
        own = [of[i] - start for of, start in zip(before, starts)]
        kept = [change * agreed for change, agreed in zip(stored, mask)]
        sums.append(
            {
                "size": math.fsum(map(abs, changes)),
                "kept": math.fsum(map(abs, kept)),
                "change": math.fsum(a * a for a in own),
                "product": math.fsum(a * b for a, b in zip(own, kept)),
                "square": math.fsum(a * a for a in kept),
                "agreed": sum(mask),
                "entries": len(mask),
            }
        )
    return merged.view(base.shape), masks, sums


def assert_as_defined(base, models, dtype, originals=None):
    merged, masks, sums = emr.unify(base, models, dtype, originals)
    wanted, agreed, numbers = by_definition(base, models, dtype, originals)
    assert merged.dtype == dtype and merged.shape == base.shape and torch.equal(merged, wanted)
    for mask, bits, found, number in zip(masks, agreed, sums, numbers):
        packed = np.packbits(np.array(bits, dtype=bool), bitorder="little")
        assert mask.dtype == torch.uint8 and mask.tolist() == packed.tolist()
        for name, value in number.items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=1e-15), name
        assert isinstance(found.agreed, float) and isinstance(found.entries, int)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_models_are_unified_as_defined(shape, dtype):
    base, models = random_models(shape, dtype)
    assert_as_defined(base, models, dtype)
    assert_as_defined(base, models[:1], dtype)
    assert_as_defined(base, models, dtype, originals=[model + 0.01 for model in models])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_in_another_precision(dtype):
    for stored in DTYPES:
        base, models = random_models((5, 9), stored)
        assert_as_defined(base, models, dtype)


def test_many_entries_are_unified_in_parts():
    base, models = random_models(LARGE, torch.float32)
    merged, masks, sums = emr.unify(base, models, torch.float32)
    changes = torch.stack([model.double() - base.double() for model in models])
    sign = changes.sum(0).sign()
    tau = sign * (changes * sign).clamp(min=0).amax(0)
    assert torch.equal(merged, (base.double() + tau).float())
    for change, mask, found in zip(changes, masks, sums):
        agreed = change * sign > 0
        assert mask.tolist() == np.packbits(agreed.numpy(), bitorder="little").tolist()
        stored = (merged.double() - base.double()) * agreed
        assert found.size == pytest.approx(change.abs().sum().item(), rel=1e-12)
        assert found.kept == pytest.approx(stored.abs().sum().item(), rel=1e-12)
        assert found.entries == base.numel() and found.agreed == agreed.sum()


def test_ties_and_models_that_equal_the_base():
    base = torch.zeros(6)
    models = [
        torch.tensor([1.0, 2, 0, -3, 0.5, 1]),
        torch.tensor([-1.0, -1, 0, -4, 0.25, 1]),
        torch.tensor([0.0, 0, 0, 6, 0.25, 1]),
    ]
    merged, masks, _ = emr.unify(base, models, torch.float32)
    # The first: changes cancel, so no sign is elected. The fourth: the largest change loses against two others.
    assert merged.tolist() == [0, 2, 0, -4, 0.5, 1]
    bits = [emr.unpack(mask, 6).int().tolist() for mask in masks]
    assert bits == [[0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    same = emr.unify(base, [base, base.clone()], torch.float32)
    assert torch.equal(same[0], base) and not any(mask.any() for mask in same[1])
    assert all(sums.scale == 1 and sums.distance is None for sums in same[2])


def test_a_model_keeps_its_own_sum_of_changes():
    """λ brings the restored change to the model's own size, over all tensors together, as the paper's rescaler does."""
    parts = [random_models(shape, torch.float64, seed=seed) for seed, shape in enumerate(((4, 6), (13,), (2, 3, 5)))]
    unified = [emr.unify(base, models, torch.float64) for base, models in parts]
    for i in range(3):
        total = sum((sums[i] for *_, sums in unified), emr.Sums())
        restored = [emr.restore(base, merged, masks[i], total.scale) for (base, _), (merged, masks, _) in zip(parts, unified)]
        moved = sum((new - base).abs().sum().item() for new, (base, _) in zip(restored, parts))
        own = sum((models[i] - base).abs().sum().item() for base, models in parts)
        assert moved == pytest.approx(own, rel=1e-12)
        squares = sum((new - models[i]).square().sum().item() for new, (_, models) in zip(restored, parts))
        changes = sum((models[i] - base).square().sum().item() for base, models in parts)
        assert total.distance == pytest.approx(math.sqrt(squares / changes), rel=1e-9)


def test_the_distance_is_to_the_model_before_it_was_purified():
    base, models = random_models((6, 7), torch.float64)
    originals = [model + 0.05 * torch.randn_like(model) for model in models]
    merged, masks, sums = emr.unify(base, models, torch.float64, originals)
    for original, mask, found in zip(originals, masks, sums):
        restored = emr.restore(base, merged, mask, found.scale)
        assert found.distance == pytest.approx(((restored - original).norm() / (original - base).norm()).item(), rel=1e-9)


def restored_by_numpy(base, merged, mask, scale):
    """Each operation rounded by itself, in float32, or in float64 where the merge is."""
    exact = np.float64 if merged.dtype == torch.float64 else np.float32
    start = base.to(merged.dtype).double().numpy().astype(exact)
    end = merged.double().numpy().astype(exact)
    bits = np.unpackbits(mask.numpy(), count=merged.numel(), bitorder="little").reshape(merged.shape).astype(exact)
    return torch.from_numpy(np.asarray(start + (end - start) * bits * exact(scale))).to(merged.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_models_are_restored_bit_for_bit(shape, dtype):
    for stored in (dtype, torch.float32):
        base, models = random_models(shape, stored)
        merged, masks, _ = emr.unify(base, models, dtype)
        for mask, scale in zip(masks, (1.0, 0.7310585786300049, 3.3)):
            wanted = restored_by_numpy(base, merged, mask, scale)
            found = emr.restore(base, merged, mask, scale)
            assert found.dtype == dtype and found.shape == merged.shape and torch.equal(found, wanted)
            out = torch.full_like(merged, 7)
            assert emr.restore(base, merged, mask, scale, out) is out and torch.equal(out, wanted)


def test_restoring_changes_no_input_and_reads_tensors_that_are_not_contiguous():
    base, models = random_models((6, 10), torch.float32)
    merged, masks, _ = emr.unify(base, models, torch.float32)
    copies = base.clone(), merged.clone(), masks[0].clone()
    found = emr.restore(base.T.contiguous().T, merged, masks[0], 1.5)
    assert torch.equal(found, restored_by_numpy(base, merged, masks[0], 1.5))
    assert all(torch.equal(a, b) for a, b in zip((base, merged, masks[0]), copies))


def test_a_single_model_is_restored_exactly():
    base, (model, *_) = random_models((40, 5), torch.float64)
    merged, (mask,), (sums,) = emr.unify(base, [model], torch.float64)
    assert sums.scale == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(emr.restore(base, merged, mask, sums.scale), model, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 64, 1001])
def test_masks_are_packed_as_numpy_does(size):
    rng = random.Random(size)
    bits = torch.tensor([rng.random() < 0.5 for _ in range(size)], dtype=torch.bool)
    packed = emr.pack(bits)
    assert packed.dtype == torch.uint8 and packed.tolist() == np.packbits(bits.numpy(), bitorder="little").tolist()
    assert torch.equal(emr.unpack(packed, size), bits) and emr.unpack(packed, size).dtype == torch.bool


def test_every_byte_is_packed_and_unpacked():
    every = torch.arange(256, dtype=torch.uint8)
    bits = torch.from_numpy(np.unpackbits(every.numpy(), bitorder="little").astype(bool))
    assert torch.equal(emr.unpack(every, 2048), bits) and torch.equal(emr.pack(bits), every)
