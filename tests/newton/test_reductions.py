import pytest
import torch

from lightning_sfn.newton.reductions import (
    _chunk_sums,
    combine,
    dot,
    norm,
    plain_norm,
    project,
    project_rows,
    subtract,
    subtract_rows,
)

SIZES = [1, 100, 4096, 4097, 100_003]


def test_norm_of_twenty_million_float32_numbers() -> None:
    x = torch.randn(20_000_000)
    expected = float(torch.linalg.vector_norm(x.double()))
    assert abs(float(norm(x)) - expected) <= 1e-6 * expected


def test_dot_of_many_float32_numbers_of_one_sign() -> None:
    x, y = torch.rand(5_000_000), torch.rand(5_000_000)
    expected = float(x.double() @ y.double())
    assert abs(float(dot(x, y)) - expected) <= 1e-6 * expected


@pytest.mark.parametrize("size", SIZES)
def test_dot_and_norm_are_right_around_chunk_boundaries(size: int) -> None:
    x, y = torch.randn(size), torch.randn(size)
    x[-1] = y[-1] = 100.0  # a lost tail would show
    exact = float(x.double() @ y.double())
    bound = 1e-6 * float(torch.linalg.vector_norm(x.double()) * torch.linalg.vector_norm(y.double()))
    assert abs(float(dot(x, y)) - exact) <= bound
    assert float(norm(x)) == pytest.approx(float(torch.linalg.vector_norm(x.double())), rel=1e-6)


@pytest.mark.parametrize("size", [*SIZES, 5_000_000])
def test_chunks_as_they_are_added_up_on_a_device_lose_nothing(size: int) -> None:
    values = torch.rand(size)
    values[-1] = 100.0
    assert float(_chunk_sums(values)) == pytest.approx(float(values.double().sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, 16_384, 16_385, 200_001])
def test_project_equals_the_float64_product(size: int, dtype: torch.dtype) -> None:
    basis, vector = torch.rand(3, size, dtype=dtype), torch.rand(size, dtype=dtype)
    expected = basis.double() @ vector.double()
    result = project(basis, vector)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


def test_project_of_many_float32_numbers_of_one_sign() -> None:
    """One float32 product of this length is off by 4e-5."""
    basis, vector = torch.rand(2, 8_000_000), torch.rand(8_000_000)
    expected = torch.stack([row.double() @ vector.double() for row in basis])
    torch.testing.assert_close(project(basis, vector), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1e30, 1e-30, 1e20, 1e-25])
@pytest.mark.parametrize("size", [10, 4096, 10_000])
def test_norm_neither_overflows_nor_underflows_in_float32(value: float, size: int) -> None:
    x = torch.full((size,), value)
    expected = float(torch.linalg.vector_norm(x.double()))
    assert abs(float(norm(x)) - expected) <= 1e-6 * expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norm_shows_entries_that_are_not_finite(value: float) -> None:
    x = torch.ones(5000)
    x[17] = value
    assert not torch.isfinite(norm(x))


def test_norm_of_nothing_and_of_zeros_is_zero() -> None:
    assert float(norm(torch.zeros(0))) == 0.0
    assert float(norm(torch.zeros(5000))) == 0.0


def test_combine_gives_linear_combinations_in_the_dtype_of_the_basis() -> None:
    basis = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]])
    assert combine(torch.tensor([2.0, -1.0], dtype=torch.float64), basis).tolist() == [2, -1, 1]
    rows = combine(torch.eye(2, dtype=torch.float64), basis)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, 16_384, 16_385, 200_001])
def test_rows_together_are_rows_one_by_one_in_float64(size: int, dtype: torch.dtype) -> None:
    basis, vectors = torch.rand(3, size, dtype=dtype), torch.rand(2, size, dtype=dtype)
    found = project_rows(basis, vectors)
    assert found.dtype == torch.float64
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, vectors.double() @ basis.double().T, rtol=bound, atol=0)
    coefficients = torch.randn(2, 3, dtype=torch.float64)
    expected = vectors.double() - coefficients @ basis.double()
    single = vectors[0].clone()
    subtract(single, coefficients[0], basis)
    subtract_rows(vectors, coefficients, basis)
    torch.testing.assert_close(vectors.double(), expected, rtol=0, atol=10 * bound)
    torch.testing.assert_close(single.double(), expected[0], rtol=0, atol=10 * bound)


def test_the_plain_norm_is_the_norm_where_squares_stay_in_range() -> None:
    x = torch.randn(100_003)
    assert float(plain_norm(x)) == pytest.approx(float(torch.linalg.vector_norm(x.double())), rel=1e-6)
