from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import (
    DiagonalPreconditioner,
    HessianOperator,
    IdentityPreconditioner,
    Objective,
    Preconditioner,
)
from lightning_sfn.newton.basis import BasisStore

from .cases import quadratic, symmetric
from .ranks import Reversing


def operator_of(matrix: Tensor) -> HessianOperator:
    x = torch.zeros(len(matrix), dtype=matrix.dtype, requires_grad=True)
    return HessianOperator(Objective([quadratic(matrix)(x)]), [x])


def refreshed(matrix: Tensor, times: int, **options: float) -> DiagonalPreconditioner:
    preconditioner, operator = DiagonalPreconditioner(**options), operator_of(matrix)
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        preconditioner.refresh(operator, generator)
    return preconditioner


@pytest.fixture
def matrix() -> Tensor:
    """Rows of very different norms; the diagonal of the first one is zero."""
    scale = torch.tensor([10.0, 1.0, 0.1, 3.0], dtype=torch.float64)
    matrix = scale[:, None] * symmetric(4) * scale
    matrix[0, 0] = 0.0
    return matrix


def test_the_estimate_converges_to_the_row_norms(matrix: Tensor) -> None:
    floor = 1e-6
    preconditioner = refreshed(matrix, 3000, decay=0.999, floor=floor)
    rows = matrix.norm(dim=1)
    diagonal = preconditioner.scale(torch.ones(4, dtype=torch.float64))
    estimate = diagonal**-2 - floor * rows.max()
    assert float((estimate / rows - 1).abs().max()) <= 0.1  # the standard deviation is two per cent


def test_the_first_estimate_is_not_biased_towards_zero(matrix: Tensor) -> None:
    preconditioner = refreshed(matrix, 1, decay=0.9, floor=1e-9)
    probe = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (matrix @ probe).abs().rsqrt()
    torch.testing.assert_close(preconditioner.scale(torch.ones(4, dtype=torch.float64)), expected, rtol=1e-6, atol=0)


def test_the_floor_bounds_the_diagonal() -> None:
    preconditioner = refreshed(torch.diag(torch.tensor([4.0, 0.0])).double(), 5, floor=0.25)
    diagonal = preconditioner.scale(torch.ones(2, dtype=torch.float64))
    assert float(diagonal[1] / diagonal[0]) == pytest.approx(5**0.5)  # (e + e/4) / (0 + e/4)


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_scale_and_unscale_are_inverse(matrix: Tensor, shape: tuple[int, ...]) -> None:
    preconditioner = refreshed(matrix, 3)
    vectors = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(preconditioner.unscale(preconditioner.scale(vectors)), vectors)
    assert not torch.allclose(preconditioner.scale(vectors), vectors)


def test_it_is_the_identity_before_anything_is_known_and_without_curvature() -> None:
    vector = torch.randn(3, dtype=torch.float64)
    for preconditioner in (DiagonalPreconditioner(), refreshed(torch.zeros(3, 3).double(), 2)):
        assert torch.equal(preconditioner.scale(vector), vector)
        assert torch.equal(preconditioner.unscale(vector), vector)


def test_a_product_that_is_not_finite_is_left_out(matrix: Tensor) -> None:
    preconditioner = refreshed(matrix, 3)
    before = preconditioner.scale(torch.ones(4, dtype=torch.float64))
    preconditioner.refresh(operator_of(matrix * float("nan")), torch.Generator())
    assert torch.equal(preconditioner.scale(torch.ones(4, dtype=torch.float64)), before)


def test_one_product_is_spent_on_a_refresh(matrix: Tensor) -> None:
    operator = operator_of(matrix)
    DiagonalPreconditioner().refresh(operator, torch.Generator())
    assert operator.products == 1


def test_state_round_trip(matrix: Tensor) -> None:
    first, second = refreshed(matrix, 3), DiagonalPreconditioner()
    second.load_state_dict(first.state_dict())
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    ones = torch.ones(4, dtype=torch.float64)
    assert torch.equal(first.scale(ones), second.scale(ones))
    for preconditioner, generator in zip((first, second), generators, strict=True):
        preconditioner.refresh(operator_of(matrix), generator)
    assert torch.equal(first.scale(ones), second.scale(ones))


def test_a_state_is_not_changed_by_later_refreshes(matrix: Tensor) -> None:
    preconditioner = refreshed(matrix, 1)
    state = preconditioner.state_dict()
    mean = state["mean"].clone()
    preconditioner.refresh(operator_of(matrix), torch.Generator())
    assert torch.equal(state["mean"], mean)
    other = DiagonalPreconditioner()
    other.load_state_dict(state)
    other.refresh(operator_of(matrix), torch.Generator())
    assert torch.equal(state["mean"], mean)


def test_an_empty_state_forgets(matrix: Tensor) -> None:
    preconditioner = refreshed(matrix, 1)
    preconditioner.load_state_dict(DiagonalPreconditioner().state_dict())
    assert torch.equal(preconditioner.scale(torch.ones(4).double()), torch.ones(4).double())


def test_another_number_of_parameters_starts_anew(matrix: Tensor) -> None:
    preconditioner = refreshed(matrix, 3, floor=1e-9)
    preconditioner.refresh(operator_of(torch.eye(2, dtype=torch.float64)), torch.Generator().manual_seed(4))
    probe = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(preconditioner.scale(torch.ones(2).double()), probe.abs().rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"floor": 0.0}, {"floor": -1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value}, but a .* is expected\.$"):
        DiagonalPreconditioner(**options)


class Doubling(Preconditioner):
    """Knows the map and its inverse, which is all that a preconditioner has to know."""

    def scale(self, vectors: Tensor) -> Tensor:
        return 2 * vectors

    def unscale(self, vectors: Tensor) -> Tensor:
        return vectors / 2


def test_a_preconditioner_needs_to_know_a_map_and_its_inverse_alone() -> None:
    doubling, vectors = Doubling(), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert torch.equal(doubling.precondition(vectors), 4 * vectors)
    assert [doubling.default_krylov_dim(bent) for bent in (True, False)] == [16, 16]
    shares = doubling.shares(vectors)
    assert (shares.tolist(), shares.dtype) == ([[1], [1], [1]], vectors.dtype)


class OneByOne(Reversing):
    """Puts single vectors together only."""

    @property
    def is_shared_out(self) -> bool:
        return True

    def whole(self, parts: Tensor, size: int) -> Tensor:
        assert parts.dim() == 1
        return super().whole(parts, size)


def test_whole_vectors_are_put_together_one_at_a_time() -> None:
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(Doubling().on_parts(OneByOne(), 2).scale(vectors), 2 * vectors)


class Counting(Doubling):
    """Counts how often it is applied."""

    calls = 0

    def scale(self, vectors: Tensor) -> Tensor:
        self.calls += 1
        return 2 * vectors


def test_vectors_that_each_process_keeps_whole_are_mapped_together() -> None:
    vectors, counting = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Counting()
    assert torch.equal(counting.on_parts(BasisStore(), 2).scale(vectors), 2 * vectors)
    assert counting.calls == 1


def test_the_identity_keeps_nothing() -> None:
    identity, vector = IdentityPreconditioner(), torch.randn(3)
    assert torch.equal(identity.scale(vector), vector)
    assert torch.equal(identity.unscale(vector), vector)
    assert identity.state_dict() == {}


# ------------------------------------------------------------------------------------------------ vectors kept in parts


class SecondHalf(BasisStore):
    """Keeps the last two of four entries, and one of padding."""

    def local(self, vector: Tensor) -> Tensor:
        return torch.nn.functional.pad(vector[2:], (0, 1))


class Dense(Preconditioner):
    """A map that needs whole vectors."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def scale(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix.T

    def unscale(self, vectors: Tensor) -> Tensor:
        return vectors @ torch.linalg.inv(self.matrix).T


def test_a_map_of_whole_vectors_acts_on_parts() -> None:
    whole = Dense(symmetric(4))
    parts = whole.on_parts(Reversing(), 4)
    for v in (torch.randn(4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)):
        torch.testing.assert_close(parts.scale(v.flip(-1)), whole.scale(v).flip(-1))
        torch.testing.assert_close(parts.unscale(v.flip(-1)), whole.unscale(v).flip(-1))


def test_a_diagonal_acts_on_its_part_and_leaves_padding_alone(matrix: Tensor) -> None:
    whole = refreshed(matrix, 3)
    v = torch.tensor([0.0, 0.0, 5.0, -7.0], dtype=torch.float64)
    parts, part = whole.on_parts(SecondHalf(), 4), torch.tensor([5.0, -7.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(parts.scale(part), torch.cat([whole.scale(v)[2:], part[2:]]))
    torch.testing.assert_close(parts.unscale(part), torch.cat([whole.unscale(v)[2:], part[2:]]))


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_a_part_of_a_diagonal_is_exact_whatever_its_size(matrix: Tensor, size: float) -> None:
    whole = refreshed(size * matrix, 3)
    part = whole.on_parts(Reversing(), len(matrix))
    vector = torch.ones(len(matrix), dtype=torch.float64)
    assert torch.equal(part.scale(vector), whole.scale(vector).flip(-1))


def test_parts_of_an_unknown_diagonal_and_of_the_identity_stay_as_they_are() -> None:
    part = torch.tensor([5.0, -7.0, 2.0], dtype=torch.float64)
    for unknown in (DiagonalPreconditioner(), IdentityPreconditioner()):
        parts = unknown.on_parts(SecondHalf(), 4)
        assert torch.equal(parts.scale(part), part)
        assert torch.equal(parts.unscale(part), part)


def test_a_diagonal_that_is_reset_begins_anew(matrix: Tensor) -> None:
    again, operator = refreshed(matrix, 3), operator_of(matrix)
    again.reset()
    v = torch.ones(4, dtype=torch.float64)
    assert torch.equal(again.scale(v), v)
    again.refresh(operator, torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.scale(v), refreshed(matrix, 1).scale(v))


def test_without_decay_the_last_estimate_counts_alone(matrix: Tensor) -> None:
    operator, generator = operator_of(matrix), torch.Generator().manual_seed(1)
    last = DiagonalPreconditioner(decay=0.0)
    last.refresh(operator, generator)
    later = DiagonalPreconditioner()
    probe = generator.get_state()
    last.refresh(operator, generator)
    generator.set_state(probe)
    later.refresh(operator, generator)
    v = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(last.scale(v), later.scale(v))


def test_the_default_floor_is_a_hundredth_of_the_largest_row() -> None:
    matrix = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    diagonal = refreshed(matrix, 1).scale(torch.ones(2, dtype=torch.float64))
    assert float((diagonal[1] / diagonal[0]) ** 2) == pytest.approx(101.0)
