"""The decomposition against a float64 SVD with the inverse written out, over every shape and every kind of hard input."""

import math
from dataclasses import dataclass

import pytest
import torch

from mergekit_pave.core.covariance import Covariance
from mergekit_pave.core.projection import coefficients
from mergekit_pave.core.projection import drop_components as drop_components_into
from mergekit_pave.core.purification import purify
from mergekit_pave.core.subspace import tail_components

SHAPES = {"wide": (96, 240), "square": (160, 160), "tall": (240, 96), "one-row": (1, 64), "one-column": (64, 1), "thin": (3, 200)}
TOKENS = {"few": 40, "many": 1000}


def drop_components(weight: torch.Tensor, directions: torch.Tensor, base=None, target="weights", dtype=None) -> tuple:
    """(W', what was removed, what was changed), W' in the precision in which it is computed unless told otherwise."""
    out = torch.empty_like(weight, dtype=dtype or torch.promote_types(weight.dtype, torch.float32))
    removed = coefficients(weight, directions, base if target == "task_vector" else None)
    return out, *drop_components_into(weight, directions, removed, base, out=out)


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Layer inputs (N, d) whose second moment has a power-law spectrum over six decades and a few channels 50 times larger."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    eigenvalues = 10 ** torch.linspace(0, -6, width, dtype=torch.float64)
    rows = draw(tokens, width) * eigenvalues.sqrt() @ torch.linalg.qr(draw(width, width)).Q
    rows[:, torch.randperm(width, generator=generator)[:3]] *= 50
    return rows.float()


def covariance_of(rows: torch.Tensor) -> Covariance:
    """In the form in which it would be stored, without the rounding of `SecondMoment`'s float32 products."""
    tokens, width = rows.shape
    if tokens * rows.element_size() <= 2 * (width + 1):
        return Covariance(tokens, rows=rows)
    return Covariance(tokens, gram=rows.double().mT @ rows.double())


def weights(d_out: int, d_in: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)) / math.sqrt(d_in)


@dataclass
class Reference:
    """PAVE as defined: W C_s = U S V^T in float64, the top components kept, and C_s inverted by an explicit solve."""

    weight: torch.Tensor
    shifted: torch.Tensor

    def __init__(self, weight: torch.Tensor, rows: torch.Tensor, shift: float):
        rows = rows.double()
        self.weight = weight.double()
        self.shifted = rows.mT @ rows / len(rows) + shift * torch.eye(rows.shape[1], dtype=torch.float64)
        self.left, self.values, self.right = torch.linalg.svd(self.weight @ self.shifted, full_matrices=False)

    def purified(self, rank: int) -> torch.Tensor:
        kept = self.left[:, :rank] * self.values[:rank] @ self.right[:rank]
        return torch.linalg.solve(self.shifted, kept, left=False)


def assert_exact(weight: torch.Tensor, rows: torch.Tensor, shift: float, rank: int) -> None:
    """W' within 1e-4 of ||W' - W||, and the parts of the tail that a report or an allocation looks at."""
    components = min(weight.shape)
    reference = Reference(weight, rows, shift)
    expected = reference.purified(rank)
    tail = tail_components(weight, covariance_of(rows), shift, components - rank)
    purified, removed, _ = drop_components(weight.double(), tail.directions)
    assert removed == pytest.approx(
        float((purified - weight.double()).norm()), rel=1e-6, abs=1e-12 * float(weight.double().norm())
    )

    # Where only null directions of W are dropped, W' is W, and what the reference removes is its own rounding error.
    floor = 1e-9 * reference.weight.norm()
    assert (purified - expected).norm() <= 1e-4 * (expected - reference.weight).norm() + floor

    count = components - rank
    identity = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(tail.directions.mT @ tail.directions, identity, rtol=0, atol=1e-9)
    assert tail.directions.shape == (weight.shape[0], count)
    noise = 1e-11 * float(reference.values[0])
    torch.testing.assert_close(tail.values, reference.values[rank:].flip(0), rtol=1e-4, atol=noise)
    assert (tail.values.diff() >= 0).all()
    assert tail.largest == pytest.approx(float(reference.values[0]), rel=1e-5)
    assert tail.energy == pytest.approx(float(reference.values.square().sum()), rel=1e-5)


@pytest.mark.parametrize("shift", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition_at_every_cut(shape, tokens, shift):
    d_out, d_in = SHAPES[shape]
    weight, rows = weights(d_out, d_in), inputs(TOKENS[tokens], d_in)
    components = min(d_out, d_in)
    for ratio in (0.5, 0.875, 0.96875, 0.984375, 0.999):
        rank = max(1, min(components - 1, round(components * ratio)))
        if rank < components:
            assert_exact(weight, rows, shift, rank)


@pytest.mark.parametrize("tokens", [8, 200, 2000])
@pytest.mark.parametrize("shape", [(512, 512), (320, 512), (512, 320)])
def test_matches_the_definition_where_the_tail_is_a_small_share(shape, tokens):
    weight, rows = weights(*shape), inputs(tokens, shape[1])
    for ratio in (0.9, 0.984, 0.998):
        assert_exact(weight, rows, 1e-3, round(min(shape) * ratio))


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1e-3, 1.0])
@pytest.mark.parametrize("tokens", [256, 8192])
@pytest.mark.parametrize("shape", [(1536, 1536), (1024, 2816), (2816, 1024)])
def test_matches_the_definition_at_the_size_of_a_small_model(shape, tokens, shift):
    weight, rows = weights(*shape), inputs(tokens, shape[1])
    for ratio in (0.5, 0.984, 0.999):
        assert_exact(weight, rows, shift, round(min(shape) * ratio))


def rank_deficient(weight):
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    values[-len(values) // 10 :] = 0
    return left * values @ right


def graded(weight):
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left * 10 ** torch.linspace(0, -5, len(values)) @ right


def with_zero_rows(weight):
    weight[::9] = 0
    return weight


def with_zero_columns(weight):
    weight[:, ::9] = 0
    return weight


def with_duplicated_rows(weight):
    weight[1::9] = weight[::9][: len(weight[1::9])]
    return weight


def constant(weight):
    return torch.full_like(weight, 0.25)


def all_zero(weight):
    return torch.zeros_like(weight)


def single_entry(weight):
    weight[:] = 0
    weight[2, 3] = -1.5
    return weight


HARD = [rank_deficient, graded, with_zero_rows, with_zero_columns, with_duplicated_rows, constant, single_entry]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
@pytest.mark.parametrize("spoil", HARD, ids=lambda spoil: spoil.__name__)
def test_hard_weights(spoil, shape, tokens):
    d_out, d_in = SHAPES[shape]
    weight, rows = spoil(weights(d_out, d_in)), inputs(TOKENS[tokens], d_in)
    components = min(d_out, d_in)
    # W C_s has as many components as W has. A rank above that drops null directions alone; below it, real ones too.
    # Exactly there, or anywhere within null directions, the cut is not unique but W' is W all the same.
    for ratio in (0.5, 0.8, 0.95, 0.99):
        assert_exact(weight, rows, 0.01, round(components * ratio))


@pytest.mark.parametrize("tokens", [40, 2000])
@pytest.mark.parametrize("shape", [(320, 512), (512, 320)])
@pytest.mark.parametrize("spoil", HARD, ids=lambda spoil: spoil.__name__)
def test_hard_weights_of_which_a_small_share_is_dropped(spoil, shape, tokens):
    weight, rows = spoil(weights(*shape)), inputs(tokens, shape[1])
    for ratio in (0.97, 0.99):
        assert_exact(weight, rows, 0.01, round(min(shape) * ratio))


@pytest.mark.parametrize("shape", [(320, 512), (512, 320)])
def test_a_weight_that_ignores_the_largest_inputs(shape):
    """Of the product of W and C then nearly everything cancels."""
    rows = inputs(2000, shape[1])
    top = torch.linalg.eigh(rows.double().mT @ rows.double()).eigenvectors[:, -20:]
    weight = weights(*shape).double()
    assert_exact(weight - weight @ top @ top.mT, rows, 1e-3, round(min(shape) * 0.984))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(320, 512), (512, 320)])
def test_the_range_of_float32_is_no_limit(shape, scale):
    weight, rows = weights(*shape).double(), inputs(2000, shape[1]).double()
    covariance = Covariance(2000, gram=rows.mT @ rows)
    expected, found = (
        tail_components(w, c, shift, 5)
        for w, c, shift in (
            (weight, covariance, 1e-3),
            (weight * scale, Covariance(2000, gram=covariance.gram * scale), 1e-3 * scale),
        )
    )
    torch.testing.assert_close(found.values / scale**2, expected.values, rtol=1e-6, atol=0)
    assert found.energy / scale**4 == pytest.approx(expected.energy, rel=1e-6)
    overlap = torch.linalg.svdvals(found.directions.mT @ expected.directions)
    torch.testing.assert_close(overlap, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(320, 512), (512, 320)])
def test_one_covariance_serves_several_weights(shape):
    covariance = covariance_of(inputs(200, shape[1]))
    for seed, shift in ((1, 1e-3), (2, 1e-3), (3, 0.1)):
        weight = weights(*shape, seed=seed)
        shared, alone = (tail_components(weight, c, shift, 5) for c in (covariance, covariance_of(inputs(200, shape[1]))))
        torch.testing.assert_close(shared.values, alone.values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
def test_a_zero_weight_stays_zero(shape):
    d_out, d_in = SHAPES[shape]
    tail = tail_components(torch.zeros(d_out, d_in), covariance_of(inputs(40, d_in)), 0.1, 5)
    torch.testing.assert_close(tail.directions.mT @ tail.directions, torch.eye(5, dtype=torch.float64))
    assert tail.values.tolist() == [0.0] * 5
    assert (tail.largest, tail.energy) == (0.0, 0.0)
    assert not purify(torch.zeros(d_out, d_in), covariance_of(inputs(40, d_in)), 8, shift=0.1).any()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_the_scale_of_a_weight_does_not_matter(scale, tokens):
    weight, rows = weights(96, 96) * scale, inputs(TOKENS[tokens], 96)
    assert_exact(weight, rows, 0.01, 80)


@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
def test_inputs_that_are_all_zero_leave_a_plain_svd(shape):
    d_out, d_in = SHAPES[shape]
    assert_exact(weights(d_out, d_in), torch.zeros(16, d_in), 0.1, round(min(d_out, d_in) * 0.9))


@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
def test_one_token(shape):
    d_out, d_in = SHAPES[shape]
    assert_exact(weights(d_out, d_in), inputs(1, d_in), 0.1, round(min(d_out, d_in) * 0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_half_precision_inputs_are_taken_at_their_exact_value(dtype, tokens):
    weight, rows = weights(96, 240).to(dtype), inputs(TOKENS[tokens], 240).to(dtype)
    assert_exact(weight, rows, 0.01, 90)
    purified = purify(weight, covariance_of(rows), 90, shift=0.01)
    assert purified.dtype == dtype
    # Rounded once, at the end.
    exact = Reference(weight, rows, 0.01).purified(90)
    assert (purified.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
def test_purify_is_the_definition(shape):
    d_out, d_in = SHAPES[shape]
    weight, rows = weights(d_out, d_in).double(), inputs(40, d_in)
    before = weight.clone()
    expected = Reference(weight, rows, 0.1).purified(80)
    purified = purify(weight, covariance_of(rows), 80, shift=0.1)
    assert purified.dtype == torch.float64
    assert (purified - expected).norm() <= 1e-4 * (expected - weight).norm()
    assert torch.equal(weight, before)


def test_purify_with_every_component_is_a_copy():
    weight = weights(32, 48)
    purified = purify(weight, covariance_of(inputs(8, 48)), 32, shift=0.1)
    assert torch.equal(purified, weight)
    assert purified.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_purify_refuses_a_rank_that_does_not_exist(rank):
    with pytest.raises(ValueError, match=r"between 1 and 32 .*\(32, 48\)"):
        purify(weights(32, 48), covariance_of(inputs(8, 48)), rank, shift=0.1)


def test_purifying_twice_changes_nothing_more():
    weight, covariance = weights(96, 96).double(), covariance_of(inputs(1000, 96))
    once = purify(weight, covariance, 80, shift=0.01)
    twice = purify(once, covariance, 80, shift=0.01)
    assert (twice - once).norm() <= 1e-6 * (once - weight).norm()


def test_a_longer_tail_begins_with_the_shorter_one():
    """A cached tail serves every smaller cut."""
    weight, covariance = weights(160, 160), covariance_of(inputs(1000, 160))
    short, long = (tail_components(weight, covariance, 0.01, count) for count in (7, 40))
    torch.testing.assert_close(long.values[:7], short.values, rtol=1e-6, atol=0)
    overlap = torch.linalg.svdvals(long.directions[:, :7].mT @ short.directions)
    torch.testing.assert_close(overlap, torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-8)


def spectrum_weight(values: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A float64 weight and rows for which W C_s has exactly these singular values; also its left singular vectors."""
    d_out, d_in = shape
    generator = torch.Generator().manual_seed(5)
    left = torch.linalg.qr(torch.randn(d_out, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(d_in, len(values), generator=generator, dtype=torch.float64)).Q
    return left * values @ right.mT, left, torch.zeros(4, d_in)


@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
def test_of_two_equal_values_at_the_cut_one_is_dropped(shape):
    d_out, d_in = SHAPES[shape]
    values = torch.linspace(1, 2, min(d_out, d_in), dtype=torch.float64)
    values[4] = values[5]
    weight, left, rows = spectrum_weight(values, (d_out, d_in))
    tail = tail_components(weight, covariance_of(rows), 1.0, 5)
    torch.testing.assert_close(tail.values, values[:5], rtol=1e-10, atol=0)
    torch.testing.assert_close(tail.directions.mT @ tail.directions, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)
    # The four below the cut are dropped; the fifth is any unit vector of the plane that the pair spans.
    kept = tail.directions - left[:, :6] @ (left[:, :6].mT @ tail.directions)
    assert kept.norm() <= 1e-7
    assert torch.linalg.svdvals(left[:, :4].mT @ tail.directions).min() >= 1 - 1e-9


@pytest.mark.parametrize("shape", ["wide", "square", "tall"])
def test_where_all_values_are_equal_any_choice_is_optimal(shape):
    d_out, d_in = SHAPES[shape]
    weight, _, rows = spectrum_weight(torch.full((min(d_out, d_in),), 3.0, dtype=torch.float64), (d_out, d_in))
    tail = tail_components(weight, covariance_of(rows), 0.5, 10)
    torch.testing.assert_close(tail.values, torch.full((10,), 1.5, dtype=torch.float64))
    assert drop_components(weight, tail.directions)[1] == pytest.approx(3 * math.sqrt(10))


def test_the_same_input_gives_the_same_bits():
    weight, covariance = weights(160, 160), covariance_of(inputs(1000, 160))
    first, second = (tail_components(weight, covariance, 0.01, 20) for _ in range(2))
    assert torch.equal(first.directions, second.directions)
    assert torch.equal(first.values, second.values)
    assert first.largest == second.largest


def test_no_global_random_state_is_touched():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tail_components(weights(64, 64), covariance_of(inputs(40, 64)), 0.1, 8)
    assert torch.equal(torch.rand(4), expected)


def test_inputs_are_borrowed():
    weight, rows = weights(64, 96), inputs(1000, 96)
    covariance = covariance_of(rows)
    before = weight.clone(), covariance.gram.clone()
    tail_components(weight, covariance, 0.1, 8)
    tail_components(weight.double(), covariance, 0.1, 8)
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance.gram, before[1])


def test_a_strided_weight_is_read_as_what_it_is():
    """Conv1D weights arrive transposed."""
    weight, covariance = weights(96, 64), covariance_of(inputs(40, 96))
    strided, packed = (tail_components(view, covariance, 0.1, 8) for view in (weight.mT, weight.mT.contiguous()))
    torch.testing.assert_close(strided.directions @ strided.directions.mT, packed.directions @ packed.directions.mT)


def test_another_default_device_changes_nothing():
    """mergekit's workers make their GPU the default."""
    weight, covariance = weights(96, 64), covariance_of(inputs(1000, 64))
    here = tail_components(weight, covariance, 0.1, 8)
    with torch.device("meta"):
        there = tail_components(weight, covariance, 0.1, 8)
        again = Covariance.from_tensors(covariance.to_tensors(), covariance.tokens, covariance.dim)
    assert torch.equal(here.directions, there.directions)
    assert torch.equal(again.gram, covariance.gram)


def test_the_task_vector_alone_is_projected():
    weight, base = weights(48, 64, seed=1).double(), weights(48, 64, seed=2).double()
    directions = torch.linalg.qr(torch.randn(48, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))).Q
    purified, removed, change = drop_components(weight, directions, base, target="task_vector")
    expected = directions @ directions.mT @ (weight - base)
    torch.testing.assert_close(purified, weight - expected)
    assert removed == pytest.approx(float(expected.norm()))
    assert change == pytest.approx(float((weight - base).norm()))
    # What is left of the change has no part in the dropped directions, and the base keeps all of its own.
    torch.testing.assert_close(directions.mT @ (purified - base), torch.zeros(6, 64, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(drop_components(base, directions, base, target="task_vector")[0], base)


@pytest.mark.parametrize("target", ["weights", "task_vector"])
@pytest.mark.parametrize("shape", [(48, 64), (600, 4000)])  # the latter in several blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_removing_in_float32_is_exact_enough(dtype, shape, target):
    weight, base = weights(*shape, seed=1).to(dtype), weights(*shape, seed=2).to(dtype)
    directions = torch.linalg.qr(torch.randn(shape[0], 6, generator=torch.Generator().manual_seed(7))).Q
    exact = directions.double() @ (directions.double().mT @ (weight.double() - (0 if target == "weights" else base.double())))
    purified, removed, change = drop_components(weight, directions, base, target=target)
    assert purified.dtype == torch.float32
    assert (purified - (weight.double() - exact)).norm() <= 1e-7 * weight.double().norm()
    assert removed == pytest.approx(exact.norm().item(), rel=1e-5)
    assert change == pytest.approx((weight.double() - base.double()).norm().item(), rel=1e-5)
    assert drop_components(weight, directions, base, target=target, dtype=dtype)[0].equal(purified.to(dtype))


def test_nothing_dropped_removes_nothing():
    purified, removed, _ = drop_components(weights(48, 64), torch.empty(48, 0))
    assert torch.equal(purified, weights(48, 64))
    assert removed == 0
