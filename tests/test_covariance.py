"""Second moments: both forms, the crossover between them, and what is stored."""

import pytest
import torch

from mergekit_pave.core.covariance import Covariance, SecondMoment
from mergekit_pave.core.gram import mirror_upper, upper_gram
from mergekit_pave.core.purification import purify


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().mT @ rows.double() / len(rows)


def accumulated(batches) -> Covariance:
    second = SecondMoment(batches[0].shape[1])
    for batch in batches:
        second.add(batch)
    return second.result()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Entry by entry, relative to the lengths of the two columns."""
    scale = expected.diagonal().sqrt()
    assert ((actual - expected).abs() <= tolerance * scale[:, None] * scale).all()


# Rows are the smaller form here even in float64.
FORMS = {"rows": 5, "gram": 500}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_mean_of_outer_products(form, dtype):
    rows = draw(FORMS[form], 24, dtype=dtype)
    covariance = Covariance.from_rows(rows)
    assert (covariance.rows is None) == (form == "gram")
    assert (covariance.gram is None) == (form == "rows")
    assert (covariance.tokens, covariance.dim) == (FORMS[form], 24)
    expected = moment(rows)
    assert_close(covariance.matrix(), expected)
    assert covariance.matrix().dtype == torch.float64
    assert torch.equal(covariance.matrix(), covariance.matrix().mT)
    assert covariance.mean_diagonal() == pytest.approx(float(expected.diagonal().mean()), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_multiply_is_the_product_with_the_shifted_matrix(form):
    covariance = Covariance.from_rows(draw(FORMS[form], 24))
    weight = draw(7, 24, seed=1, dtype=torch.float64)
    before = weight.clone()
    expected = weight @ (covariance.matrix() + 0.3 * torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(covariance.multiply(weight, 0.3), expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 24, 40, 90])
@pytest.mark.parametrize("d_out", [1, 6, 24, 100])
def test_multiply_with_rows_in_whichever_order_is_cheaper(d_out, tokens):
    covariance = Covariance(tokens, rows=draw(tokens, 24))
    weight = draw(d_out, 24, seed=1, dtype=torch.float64)
    expected = weight @ (moment(covariance.rows) + 0.3 * torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(covariance.multiply(weight, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_upper_gram():
    x = draw(30, 1100, dtype=torch.float64)
    gram = upper_gram(x)
    torch.testing.assert_close(gram.triu(), (x.mT @ x).triu(), rtol=0, atol=1e-12)
    assert mirror_upper(gram) is gram
    torch.testing.assert_close(gram, x.mT @ x, rtol=0, atol=1e-12)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[::2, 3:], lambda x: x.mT, lambda x: x[:0]])
def test_upper_gram_of_views(view, dtype):
    x = view(draw(40, 30, dtype=dtype))
    found = upper_gram(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.triu(), (x.mT @ x).triu(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-1)


def test_rows_are_kept_as_they_came():
    batches = [draw(3, 24, seed=i, dtype=torch.bfloat16) for i in range(3)]
    covariance = accumulated(batches)
    assert torch.equal(covariance.rows, torch.cat(batches))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [0, 1])
def test_the_smaller_form_is_kept(dtype, extra):
    # A float64 triangle of 24 has 300 numbers, i.e. 2400 bytes.
    crossover = 2400 // (24 * dtype.itemsize)
    covariance = Covariance.from_rows(draw(crossover + extra, 24, dtype=dtype))
    assert (covariance.rows is None) == bool(extra)
    stored = sum(tensor.nbytes for tensor in covariance.to_tensors().values())
    assert stored == (2400 if extra else crossover * 24 * dtype.itemsize)


@pytest.mark.parametrize("sizes", [[500], [1] * 500, [499, 1], [7, 200, 293], [20, 480]])
def test_how_rows_are_batched_hardly_matters(sizes):
    rows = draw(500, 24)
    covariance = accumulated(list(rows.split(sizes)))
    assert covariance.tokens == 500
    assert_close(covariance.matrix(), moment(rows))


def test_many_rows_are_multiplied_in_float32():
    """But for the first two thousand; the error is far below that of a float32 number for each of them."""
    rows = draw(20000, 24)
    rows[:, 0] *= 50
    exact, many = moment(rows), accumulated(list(rows.split(700))).matrix()
    assert_close(many, exact, 1e-7)
    assert not torch.equal(many, exact)
    few = rows[:2000]
    assert_close(accumulated(list(few.split(700))).matrix(), moment(few))


def test_the_order_of_batches_hardly_matters():
    batches = list(draw(2000, 24).split(250))
    forward, backward = accumulated(batches), accumulated(batches[::-1])
    assert_close(forward.matrix(), backward.matrix())


def test_sums_keep_the_small_directions():
    """What PAVE removes moves far less by the rounding of the sums than it would if they were float32."""
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** torch.linspace(0, -3, 192)  # of C: over six decades, and a few channels 50 times larger
    rows = draw(16000, 192) * scales @ torch.linalg.qr(torch.randn(192, 192, generator=generator)).Q
    rows[:, :3] *= 50
    batches = rows.split(100)
    weight = draw(192, 192, seed=1, dtype=torch.float64)

    def removed(gram: torch.Tensor) -> torch.Tensor:
        covariance = Covariance(len(rows), gram=gram.double())
        return weight - purify(weight, covariance, 184, shift=0.001 * covariance.mean_diagonal())

    exact = removed(rows.double().mT @ rows.double())
    error = (removed(accumulated(batches).gram) - exact).norm() / exact.norm()
    in_float32 = (removed(sum(batch.mT @ batch for batch in batches)) - exact).norm() / exact.norm()
    assert error < 1e-5
    assert error < in_float32 / 4


def test_wide_inputs_are_multiplied_in_strips():
    rows = draw(1300, 1100)
    covariance = Covariance.from_rows(rows)
    assert covariance.gram is not None
    assert_close(covariance.matrix(), moment(rows))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_comes_back(form):
    covariance = Covariance.from_rows(draw(FORMS[form], 24))
    back = Covariance.from_tensors(covariance.to_tensors(), covariance.tokens, 24)
    assert (back.tokens, back.dim) == (covariance.tokens, 24)
    if form == "rows":
        assert torch.equal(back.rows, covariance.rows)
        return
    assert torch.equal(back.gram, covariance.gram)
    assert back.gram.dtype == torch.float64


def test_the_packed_triangle_goes_row_by_row():
    gram = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]], dtype=torch.float64)
    assert Covariance(9, gram=gram).to_tensors()["triangle"].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("width", [1, 63, 64, 65, 150])
def test_a_large_triangle_goes_in_strips_of_64_rows(width):
    gram = draw(width, width, dtype=torch.float64)
    gram = gram + gram.mT
    tensors = Covariance(9, gram=gram).to_tensors()
    assert tensors["triangle"].shape == (width * (width + 1) // 2,)
    expected = []
    for start in range(0, width, 64):
        block = range(start, min(start + 64, width))
        expected += [gram[i, j] for i in block for j in block if j >= i]
        expected += [gram[i, j] for i in block for j in range(start + 64, width)]
    assert torch.equal(tensors["triangle"], torch.stack(expected))
    assert torch.equal(Covariance.from_tensors(tensors, 9, width).gram, gram)


@pytest.mark.parametrize("tokens", [5, 500])
def test_the_inverse_is_that_of_the_shifted_matrix(tokens):
    covariance = Covariance.from_rows(draw(tokens, 24))
    for shift in (0.3, 0.01):
        expected = torch.linalg.inv(covariance.matrix() + shift * torch.eye(24, dtype=torch.float64)) * shift
        torch.testing.assert_close(covariance.inverse(shift).double(), expected, rtol=1e-5, atol=1e-6)
        assert covariance.inverse(shift) is covariance.inverse(shift)  # layers that share an input share it, too


def test_a_matrix_that_rounding_makes_indefinite_has_no_inverse():
    covariance = Covariance.from_rows(1e12 * draw(3, 1).repeat(1, 24))
    assert covariance.inverse(1e-9) is None


def test_one_row():
    row = draw(1, 24)
    covariance = Covariance.from_rows(row)
    torch.testing.assert_close(covariance.matrix(), row.double().mT @ row.double())


def test_zero_rows_of_input_count_as_tokens():
    assert Covariance.from_rows(torch.zeros(4, 24)).mean_diagonal() == 0
    half = torch.cat([draw(10, 24), torch.zeros(10, 24)])
    assert_close(Covariance.from_rows(half).matrix(), moment(draw(10, 24)) / 2)
