"""Restarted Lanczos against known spectra, and against ARPACK in the number of products."""

import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from lightning_sfn.newton import KrylovSubspace, lanczos, thick_restart
from lightning_sfn.newton.thick_restart import Ends, RitzValues, extreme_ritz_values

from .cases import DTYPES

SIZE = 600


def _dominated() -> Tensor:
    values = torch.linspace(-0.3, 1.0, SIZE)
    values[17] = 1000.0
    return values


def _clustered() -> Tensor:
    values = torch.linspace(-1.0, 1.0, SIZE)
    values[:6] = torch.tensor([3.0, 3.001, 3.002, 3.003, -2.0, -2.001])
    return values


def _rank_deficient() -> Tensor:
    return torch.cat([torch.tensor([5.0, 4.0, 3.0, 1.0, -0.3, -0.5]), torch.zeros(SIZE - 6)])


def _negative_end() -> Tensor:
    """What trained networks have: a bulk at zero, a few large eigenvalues, a small negative end."""
    bulk = 1e-3 * torch.linspace(-1.0, 1.0, SIZE - 12) ** 3
    return torch.cat([bulk, torch.linspace(1.0, 10.0, 10), torch.tensor([-0.03, -0.05])])


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "dominated": _dominated,
    "clustered": _clustered,
    "rank deficient": _rank_deficient,
    "negative end": _negative_end,
    "even": lambda: torch.linspace(-1.0, 1.0, SIZE),
    "saddle": lambda: torch.tensor([-2.0, 1.0]),
    "zero": lambda: torch.zeros(SIZE),
}


def start_of(values: Tensor) -> Tensor:
    return torch.randn(len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(values)


def run(
    values: Tensor,
    krylov_dim: int,
    ends: Ends,
    max_products: int,
    matvec: Callable[[Tensor], Tensor] | None = None,
) -> RitzValues:
    """A diagonal matrix is as good as any: the start vector has a part along every eigenvector."""
    return extreme_ritz_values(
        matvec or (lambda v: values * v),
        start_of(values),
        krylov_dim,
        ends,
        max_products=max_products,
        generator=torch.Generator().manual_seed(2),
    )


def rounding(values: Tensor) -> float:
    return 20 * torch.finfo(values.dtype).eps * float(values.abs().max())


def assert_true_bounds(ritz: RitzValues, values: Tensor) -> None:
    distance = (ritz.values[:, None] - values.double()).abs().min(dim=1).values
    assert bool((distance <= ritz.residuals + rounding(values)).all())
    assert bool((ritz.values.diff() >= 0).all())


@pytest.mark.parametrize(("smallest", "largest"), [(2, 3), (0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ends_are_those_of_the_known_spectrum(dtype: torch.dtype, name: str, smallest: int, largest: int) -> None:
    values = SPECTRA[name]().to(dtype)
    ritz = run(values, 16, Ends(smallest, largest, 1e-5), 3000)
    assert ritz.converged
    assert ritz.products < 3000
    assert ritz.values.dtype == torch.float64
    assert len(ritz.values) == len(ritz.residuals) == min(16, len(values))
    assert_true_bounds(ritz, values)
    exact = values.double().sort().values
    count = len(ritz.values)
    for end in (slice(min(smallest, count)), slice(count - min(largest, count), count)):
        expected = exact[end] if end.start is None else exact[len(exact) - count :][end]
        assert bool(((ritz.values[end] - expected).abs() <= ritz.residuals[end] + rounding(values)).all())
        allowed = (1e-5 * ritz.values[end].abs()).clamp_min(rounding(values))
        assert bool((ritz.residuals[end] <= allowed).all())


@pytest.fixture
def last_space() -> Iterator[Callable[[], KrylovSubspace]]:
    """The subspace with which the last run ended."""
    with mock.patch.object(thick_restart, "_combined", wraps=thick_restart._combined) as spy:
        yield lambda: spy.call_args.args[1]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 5e-6)], ids=str)
@pytest.mark.parametrize("name", ["dominated", "even"])
def test_a_hundred_restarts_leave_the_basis_orthonormal(
    last_space: Callable[[], KrylovSubspace], name: str, dtype: torch.dtype, bound: float
) -> None:
    values = SPECTRA[name]().to(dtype)
    ritz = run(values, 8, Ends(2, 2, 1e-15), 500)
    basis, scale = last_space().basis.double(), float(values.abs().max())
    assert dtype == torch.float32 or ritz.products == 500
    assert float((basis @ basis.T - torch.eye(len(basis))).abs().max()) <= bound
    projection = (basis * values.double()) @ basis.T
    assert float((projection - last_space().projected).abs().max()) <= bound * scale
    assert int((ritz.values > 2.0).sum()) == (name == "dominated")  # no ghosts


@pytest.mark.parametrize(
    ("values", "krylov_dim", "largest"),
    [
        (torch.linspace(0.0, 1.0, 1000, dtype=torch.float64) ** 2, 40, 10),
        (10.0 ** -torch.linspace(0.0, 6.0, 1000, dtype=torch.float64), 30, 10),
        (torch.linspace(-1.0, 1.0, 1000, dtype=torch.float64), 20, 3),
        (_negative_end().double(), 20, 10),
    ],
    ids=["square", "geometric", "even", "network"],
)
def test_no_more_products_than_arpack(values: Tensor, krylov_dim: int, largest: int) -> None:
    """Same start vector, same size of the basis, same tolerance; both stop at residuals relative to the eigenvalue."""
    spent = 0

    def counting(vector: np.ndarray) -> np.ndarray:
        nonlocal spent
        spent += 1
        return values.numpy() * vector.reshape(-1)

    operator = LinearOperator((len(values), len(values)), matvec=counting, dtype=np.float64)
    options = {"k": largest, "which": "LA", "ncv": krylov_dim, "tol": 1e-3, "v0": start_of(values).numpy()}
    expected = np.sort(eigsh(operator, return_eigenvectors=False, **options))
    ritz = run(values, krylov_dim, Ends(0, largest, 1e-3), 2000)
    assert ritz.converged
    assert ritz.products <= spent
    np.testing.assert_allclose(ritz.values[-largest:].numpy(), expected, rtol=2e-3)


def test_without_a_restart_the_values_are_those_of_lanczos() -> None:
    values = SPECTRA["even"]()
    ritz = run(values, 12, Ends(2, 2, 1e-6), 12)
    space = lanczos(lambda v: values * v, start_of(values), 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ritz.values, space.eigenvalues)
    assert torch.equal(ritz.residuals, space.residuals)
    assert (ritz.products, ritz.converged) == (12, False)


def test_more_products_only_improve_the_ends_and_leave_the_rest() -> None:
    values = SPECTRA["even"]().double()
    runs = [run(values, 10, Ends(2, 2, 1e-10), budget) for budget in (10, 11, 17, 24, 25, 60, 111)]
    assert [ritz.products for ritz in runs] == [10, 11, 17, 24, 25, 60, 111]
    assert not any(ritz.converged for ritz in runs)
    for before, after in itertools.pairwise(runs):
        assert bool((after.values[:2] <= before.values[:2] + 1e-14).all())
        assert bool((after.values[-2:] >= before.values[-2:] - 1e-14).all())
        assert torch.equal(after.values[2:-2], before.values[2:-2])
        assert_true_bounds(after, values)


@pytest.mark.parametrize("krylov_dim", [3, 4, 5])
def test_tiny_bases_converge_nevertheless(krylov_dim: int) -> None:
    values = torch.cat([torch.linspace(-1.0, 1.0, 100), torch.tensor([-3.0, 4.0])]).double()
    ritz = run(values, krylov_dim, Ends(1, 1, 1e-6), 1000)
    assert ritz.converged
    torch.testing.assert_close(ritz.values[[0, -1]], values[-2:], rtol=1e-6, atol=0)


def test_two_vectors_are_enough_for_one_end() -> None:
    values = torch.cat([torch.linspace(-1.0, 1.0, 100), torch.tensor([4.0])]).double()
    ritz = run(values, 2, Ends(0, 1, 1e-6), 1000)
    assert ritz.converged
    assert float(ritz.values[-1]) == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize(
    ("krylov_dim", "ends"), [(1, (1, 0)), (1, (1, 1)), (2, (1, 1)), (4, (2, 2)), (5, (0, 5)), (5, (4, 4))]
)
def test_a_basis_without_room_for_a_restart_is_taken_as_it_comes(krylov_dim: int, ends: tuple[int, int]) -> None:
    """To drop one of the eigenvalues asked for would return a worse one in its place."""
    values = SPECTRA["clustered"]().double()
    ritz = run(values, krylov_dim, Ends(*ends, 1e-3), 500)
    assert not ritz.converged
    assert ritz.products == krylov_dim
    assert_true_bounds(ritz, values)
    generator = torch.Generator().manual_seed(2)
    space = lanczos(lambda v: values * v, start_of(values), krylov_dim, generator=generator)
    assert torch.equal(ritz.values, space.eigenvalues)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_whole_space_is_exact_and_needs_no_restart(size: int, dtype: torch.dtype) -> None:
    values = torch.arange(size, dtype=dtype) - 1.5
    ritz = run(values, 64, Ends(10, 10, 1e-6), 256)
    assert ritz.converged
    assert ritz.products == size
    assert float((ritz.values - values.double()).abs().max()) <= rounding(values)


def test_a_zero_start_vector_is_replaced() -> None:
    values = SPECTRA["negative end"]()
    generator = torch.Generator().manual_seed(2)
    ritz = extreme_ritz_values(
        lambda v: values * v, torch.zeros(SIZE), 16, Ends(1, 2, 1e-5), max_products=500, generator=generator
    )
    assert ritz.converged
    torch.testing.assert_close(ritz.values[[0, -2, -1]].float(), torch.tensor([-0.05, 9.0, 10.0]), rtol=1e-5, atol=0)


def test_the_length_of_the_start_vector_does_not_matter() -> None:
    values, ends = SPECTRA["even"]().double(), Ends(2, 2, 1e-6)
    ritz = extreme_ritz_values(
        lambda v: values * v, 1e-6 * start_of(values), 12, ends, max_products=40, generator=torch.Generator()
    )
    torch.testing.assert_close(ritz.values, run(values, 12, ends, 40).values)


def test_nothing_asked_for_takes_one_basis() -> None:
    ritz = run(SPECTRA["even"](), 9, Ends(0, 0, 1e-12), 900)
    assert (ritz.products, ritz.converged) == (9, True)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(1, 15))
def test_what_was_known_before_a_product_that_is_not_finite_is_kept(place: int, poison: float) -> None:
    """Products 9 and 13 are the first ones after a restart."""
    values, count = SPECTRA["even"]().double(), 0

    def matvec(vector: Tensor) -> Tensor:
        nonlocal count
        count += 1
        image = values * vector
        if count == place:
            image[3] = poison
        return image

    ends = Ends(1, 1, 1e-6)
    ritz = run(values, 8, ends, 100, matvec)
    assert (ritz.products, ritz.converged) == (place, False)
    assert len(ritz.values) == min(place - 1, 8)
    assert_true_bounds(ritz, values)
    if place > 1:
        before = run(values, min(place - 1, 8), ends, place - 1)
        torch.testing.assert_close(ritz.values, before.values, rtol=0, atol=1e-6)  # two steps at a time, or one
        torch.testing.assert_close(ritz.residuals, before.residuals, rtol=0, atol=1e-6)


def space_of(count: int, coupling: float) -> KrylovSubspace:
    """Ritz values 1, 2, ...; all residuals are the coupling, but for what an identity of eigenvectors leaves out."""
    matrix = torch.diag(torch.arange(1.0, count + 1, dtype=torch.float64))
    return KrylovSubspace(torch.eye(count, dtype=torch.float64), matrix, coupling, count, count)


@pytest.mark.parametrize(
    ("ends", "coupling", "converged"),
    [
        (Ends(2, 2, 0.5), 1.0, True),  # the last vector alone has a residual, a quarter of its value
        (Ends(2, 2, 0.2), 1.0, False),
        (Ends(4, 0, 0.5), 1.0, True),  # as many as there are
        (Ends(0, 4, 0.2), 1.0, False),
        (Ends(3, 0, 0.2), 1.0, True),  # the value in question is not asked for
        (Ends(3, 2, 0.5), 1.0, False),  # more than there are
        (Ends(2, 4, 0.5), 1.0, False),
        (Ends(9, 9, 1e-9), 0.0, True),  # more than there are, and these are all
    ],
)
def test_what_is_asked_for_decides_whether_a_space_has_converged(ends: Ends, coupling: float, converged: bool) -> None:
    assert ends.converged(space_of(4, coupling)) is converged


def test_a_residual_down_to_rounding_counts_as_converged() -> None:
    matrix = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    space = KrylovSubspace(torch.eye(2), matrix, 0.0, 2, 2)
    assert Ends(1, 0, 1e-9).converged(space)  # relative to an eigenvalue of zero no residual is small


def test_no_values_are_float64_and_cost_what_was_spent() -> None:
    nothing = RitzValues.none(7)
    assert (len(nothing.values), nothing.values.dtype, nothing.residuals.dtype) == (0, torch.float64, torch.float64)
    assert (nothing.products, RitzValues.none().products, nothing.converged) == (7, 0, False)


@pytest.mark.parametrize("start", [torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)])
def test_random_vectors_come_from_the_generator_alone(start: Tensor) -> None:
    """A zero start and an exhausted space need some."""
    before, found = torch.random.get_rng_state(), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        ritz = extreme_ritz_values(lambda v: v, start, 4, Ends(1, 1, 1e-6), max_products=9, generator=generator)
        assert ritz.converged
        found.append(generator.get_state())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], torch.Generator().manual_seed(3).get_state())
