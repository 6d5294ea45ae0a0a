from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import Direction, KrylovSubspace, krylov, lanczos, unattended
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.krylov import fill_basis, lanczos_step, random_unit
from lightning_sfn.newton.unattended import Steps, Watch

from .cases import DTYPES, symmetric
from .ranks import Padded, Reversing


def run(matrix: Tensor, krylov_dim: int, start: Tensor | None = None, **options: object) -> KrylovSubspace:
    start = torch.randn(len(matrix), dtype=matrix.dtype) if start is None else start
    return lanczos(lambda v: matrix @ v, start, krylov_dim, generator=torch.Generator().manual_seed(1), **options)  # type: ignore[arg-type]


def orthogonality(space: KrylovSubspace) -> float:
    basis = space.basis.double()
    return float((basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max())


def projection_error(space: KrylovSubspace, matrix: Tensor) -> float:
    """Distance of the projected operator from ``V H V'``, relative to ``|H|``."""
    basis, dense = space.basis.double(), matrix.double()
    return float((basis @ dense @ basis.T - space.projected).abs().max() / torch.linalg.matrix_norm(dense, 2))


def rotated(spectrum: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with ``Q diag(spectrum) Q`` for a random reflection Q: dense, but cheap."""
    mirror = torch.nn.functional.normalize(torch.randn(len(spectrum), dtype=torch.float64), dim=0).to(spectrum)

    def reflect(v: Tensor) -> Tensor:
        return v - 2 * (mirror @ v) * mirror

    return lambda v: reflect(spectrum * reflect(v))


@pytest.fixture(scope="module")
def dominated() -> tuple[Callable[[Tensor], Tensor], KrylovSubspace]:
    """200 vectors in float32 on a matrix with one eigenvalue a thousand times as large as all others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spectrum = torch.linspace(-0.3, 1.0, 5000)
        spectrum[17] = 1000.0
        matvec = rotated(spectrum)
        return matvec, lanczos(matvec, torch.randn(5000), 200, generator=torch.Generator().manual_seed(1))


def test_a_dominant_eigenvalue_leaves_the_float32_basis_orthonormal(dominated: tuple) -> None:
    _, space = dominated
    assert space.basis.dtype == torch.float32
    assert len(space) == 200
    assert orthogonality(space) <= 2e-6


def test_a_dominant_eigenvalue_has_no_ghosts(dominated: tuple) -> None:
    _, space = dominated
    values = space.eigenvalues
    assert int((values > 2.0).sum()) == 1
    assert float(values[-1]) == pytest.approx(1000.0, rel=1e-6)
    assert float(values[0]) == pytest.approx(-0.3, abs=2e-3)


def test_the_float32_recurrence_equals_the_projected_matrix(dominated: tuple) -> None:
    matvec, space = dominated
    images = torch.stack([matvec(v) for v in space.basis]).double()
    error = (space.basis.double() @ images.T - space.projected).abs().max()
    assert float(error) <= 1e-6 * 1000.0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_a_full_subspace_has_the_eigenvalues_of_the_matrix(dtype: torch.dtype, bound: float) -> None:
    matrix = symmetric(40, dtype=dtype)
    space = run(matrix, 40)
    expected = np.linalg.eigvalsh(matrix.double().numpy())
    assert np.abs(space.eigenvalues.numpy() - expected).max() <= bound * np.abs(expected).max()
    assert float(space.residuals.max()) <= bound * np.abs(expected).max()
    assert space.products == 40


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_the_recurrence_equals_the_projected_matrix(dtype: torch.dtype, bound: float) -> None:
    matrix = symmetric(300, dtype=dtype)
    space = run(matrix, 60)
    assert orthogonality(space) <= bound
    assert projection_error(space, matrix) <= bound
    assert torch.equal(space.projected, space.projected.T)
    assert float(space.projected.triu(2).abs().max()) == 0.0


def test_the_subspace_is_the_krylov_space_of_the_start_vector() -> None:
    matrix, start = symmetric(30), torch.randn(30, dtype=torch.float64)
    space = run(matrix, 4, start)
    powers = torch.stack([torch.linalg.matrix_power(matrix, j) @ start for j in range(4)])
    outside = powers - powers @ space.basis.T @ space.basis
    assert float((outside.norm(dim=1) / powers.norm(dim=1)).max()) <= 1e-12
    torch.testing.assert_close(space.basis[0], start / start.norm())


def test_residuals_are_those_of_the_ritz_pairs_and_bound_the_distance_to_an_eigenvalue() -> None:
    matrix = symmetric(120)
    space = run(matrix, 25)
    spectrum = torch.from_numpy(np.linalg.eigvalsh(matrix.numpy()))
    vectors = torch.stack([space.ritz_vector(i) for i in range(25)])
    true = (vectors @ matrix - space.eigenvalues[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(space.residuals, true, rtol=1e-8, atol=1e-10 * float(spectrum.abs().max()))
    distance = (space.eigenvalues[:, None] - spectrum).abs().min(dim=1).values
    assert bool((distance <= true + 1e-10).all())
    assert float(true.max()) > 1.0  # the bound was put to a test


def test_coordinates_and_lift_are_inverse_on_the_subspace() -> None:
    matrix = symmetric(20)
    space = run(matrix, 5)
    coordinates = torch.randn(3, 5, dtype=torch.float64)
    vectors = space.lift(coordinates)
    assert vectors.shape == (3, 20)
    for vector, expected in zip(vectors, coordinates, strict=True):
        torch.testing.assert_close(space.coordinates(vector), expected)
    torch.testing.assert_close(space.lift(torch.eye(5, dtype=torch.float64)[2]), space.ritz_vector(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_goes_on_after_the_krylov_space_is_exhausted(dtype: torch.dtype) -> None:
    factor = torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64))[0]
    matrix = (factor @ torch.diag(torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)) @ factor.T).to(dtype)
    space = run(matrix, 12)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    assert len(space) == 12
    assert orthogonality(space) <= bound
    assert projection_error(space, matrix) <= bound
    expected = torch.tensor([-2.0, *[0.0] * 9, 1.0, 4.0], dtype=torch.float64)
    assert float((space.eigenvalues - expected).abs().max()) <= 10 * bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_eigenvector_as_start_does_not_hide_the_rest(dtype: torch.dtype) -> None:
    matrix = torch.diag(torch.arange(1.0, 9.0, dtype=dtype))
    start = torch.zeros(8, dtype=dtype)
    start[2] = 5.0
    space = run(matrix, 8, start)
    bound = 1e-12 if dtype == torch.float64 else 5e-6
    assert orthogonality(space) <= bound
    assert float((space.eigenvalues - matrix.diag().double()).abs().max()) <= 10 * bound


def test_an_invariant_start_space_has_no_coupling() -> None:
    start = torch.zeros(8)
    start[2] = 5.0
    space = run(torch.diag(torch.arange(1.0, 9.0)), 1, start)
    assert space.coupling == 0.0
    # Only what rounding leaves: ten units of the eigenvalue 3.
    assert space.residuals.tolist() == pytest.approx([30 * torch.finfo(torch.float32).eps])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_start_vector_is_replaced_by_a_random_one(dtype: torch.dtype) -> None:
    matrix = symmetric(10, dtype=dtype)
    space = run(matrix, 10, torch.zeros(10, dtype=dtype))
    expected = np.linalg.eigvalsh(matrix.double().numpy())
    assert np.abs(space.eigenvalues.numpy() - expected).max() <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("start", [torch.ones(6), torch.zeros(6)], ids=["ones", "zeros"])
def test_the_zero_matrix_gives_zeros_on_an_orthonormal_basis(start: Tensor) -> None:
    space = run(torch.zeros(6, 6), 4, start)
    assert orthogonality(space) <= 1e-6
    assert not space.projected.any()
    assert space.coupling == 0.0


def test_no_more_vectors_than_dimensions_are_built() -> None:
    space = run(symmetric(4), 9, directions=[Direction(torch.randn(4, dtype=torch.float64))])
    assert len(space) == 4
    assert space.products == 4


def test_length_of_the_start_vector_does_not_matter() -> None:
    matrix, start = symmetric(30), torch.randn(30, dtype=torch.float64)
    torch.testing.assert_close(run(matrix, 5, start * 1e-100).projected, run(matrix, 5, start).projected)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_added_directions_complete_the_projected_matrix(given: bool, count: int) -> None:
    """The row of an added direction is the dense projection, whether its product is given or computed."""
    matrix = symmetric(60)
    directions = torch.randn(count, 60, dtype=torch.float64)
    start = torch.randn(60, dtype=torch.float64)
    added = [Direction(d, matrix @ d if given else None) for d in directions]
    matvec = mock.Mock(side_effect=lambda v: matrix @ v)
    space = lanczos(matvec, start, 10, generator=torch.Generator(), directions=added)
    assert len(space) == 10 + count
    assert space.lanczos_dim == 10
    assert space.products == matvec.call_count == (10 if given else 10 + count)
    assert orthogonality(space) <= 1e-12
    assert projection_error(space, matrix) <= 1e-12
    inside = directions @ space.basis.T @ space.basis
    torch.testing.assert_close(inside, directions)  # each direction lies in the subspace
    without = lanczos(matvec, start, 10, generator=torch.Generator())
    assert torch.equal(space.projected[:10, :10], without.projected)


def test_given_and_computed_products_agree_in_float32() -> None:
    matrix, directions = symmetric(800, dtype=torch.float32), torch.randn(3, 800)
    spaces = [
        run(matrix, 20, torch.ones(800), directions=[Direction(d, matrix @ d if given else None) for d in directions])
        for given in (True, False)
    ]
    torch.testing.assert_close(spaces[0].projected, spaces[1].projected, rtol=0, atol=1e-4)
    assert max(projection_error(space, matrix) for space in spaces) <= 1e-6
    assert max(orthogonality(space) for space in spaces) <= 2e-6


def test_given_products_are_right_after_the_krylov_space_was_exhausted() -> None:
    """No leftover of the recurrence may leak into the image of a direction."""
    matrix = torch.diag(torch.tensor([3.0, 3.0, 3.0, 3.0, -1.0, -1.0, 2.0, 0.5], dtype=torch.float64))
    start = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    direction = torch.randn(8, dtype=torch.float64)
    space = run(matrix, 2, start, directions=[Direction(direction, matrix @ direction)])
    assert space.coupling == 0.0
    assert projection_error(space, matrix) <= 1e-12


def test_dependent_and_zero_directions_are_skipped() -> None:
    matrix, start = symmetric(30), torch.randn(30, dtype=torch.float64)
    new = torch.randn(30, dtype=torch.float64)
    noise = 1e-3 * torch.randn(30, dtype=torch.float64)
    dependent = [start, matrix @ start, torch.zeros(30, dtype=torch.float64), new, -2 * new, new + noise, new + start]
    space = run(matrix, 5, start, directions=[Direction(d) for d in dependent])
    assert len(space) == 6
    assert space.products == 6
    assert orthogonality(space) <= 1e-12


@pytest.mark.parametrize("length", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize(("outside", "joins"), [(0.04, False), (0.06, True)])
def test_a_direction_joins_if_a_twentieth_of_it_is_new_whatever_its_length(
    length: float, outside: float, joins: bool
) -> None:
    matrix = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    unit = torch.eye(5, dtype=torch.float64)
    direction = length * ((1 - outside**2) ** 0.5 * unit[0] + outside * unit[3])
    space = run(matrix, 1, unit[0], directions=[Direction(direction, matrix @ direction)])
    assert len(space) == 1 + joins
    torch.testing.assert_close(space.eigenvalues, torch.tensor([1.0, 4.0], dtype=torch.float64)[: len(space)])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_given_products_are_right_in_any_unit_of_the_operator(scale: float) -> None:
    matrix, direction = scale * symmetric(9), torch.randn(9, dtype=torch.float64)
    space = run(matrix, 3, directions=[Direction(direction, matrix @ direction)])
    assert len(space) == 4
    assert projection_error(space, matrix) <= 1e-13


def test_a_basis_kept_in_another_way_is_the_same_space() -> None:
    """The operator then gives parts; zero starts and exhausted spaces draw whole vectors and keep their parts."""
    matrix = symmetric(7)
    low_rank = matrix[:2].T @ matrix[:2]
    directions = [Direction(d, low_rank @ d) for d in torch.randn(2, 7, dtype=torch.float64)]
    kept = [Direction(d.vector.flip(0), None if d.product is None else d.product.flip(0)) for d in directions]
    for start in (torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)):
        plain = run(low_rank, 4, start, directions=directions)
        other = lanczos(
            lambda v: (low_rank @ v).flip(0),
            start,
            4,
            generator=torch.Generator().manual_seed(1),
            directions=kept,
            store=Reversing(),
        )
        assert other.size == 7
        assert other.basis.shape == plain.basis.shape
        torch.testing.assert_close(other.basis[:2].flip(1), plain.basis[:2])  # later ones amplify rounding
        torch.testing.assert_close(other.eigenvalues, plain.eigenvalues)
        torch.testing.assert_close(other.ritz_vector(-1).abs(), plain.ritz_vector(-1).abs())


@pytest.mark.parametrize("start", [torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)])
def test_random_vectors_come_from_the_generator_alone(start: Tensor) -> None:
    """Those of a zero start, and those after an exhausted space; each seed has its own."""
    before = torch.random.get_rng_state()
    spaces = [lanczos(lambda v: v, start, 3, generator=torch.Generator().manual_seed(seed)).basis for seed in (4, 4, 5)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(spaces[0], spaces[1])
    assert not torch.equal(spaces[0], spaces[2])


@pytest.mark.parametrize("place", [1, 3])
def test_a_product_that_is_not_finite_ends_the_space(place: int) -> None:
    matrix, count, store = symmetric(6), 0, Reversing()

    def matvec(vector: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return (matrix @ vector).flip(0) * (torch.nan if count == place else 1.0)

    added = [Direction(torch.ones(6, dtype=torch.float64))]
    generator = torch.Generator().manual_seed(1)
    space = lanczos(matvec, torch.ones(6).double(), 4, generator=generator, directions=added, store=store)
    assert bool(space.projected.isnan().all())
    assert (space.projected.dtype, space.projected.shape, len(space)) == (torch.float64, (4, 4), 4)
    assert (space.coupling, space.lanczos_dim, space.products, space.size) == (0.0, 4, place, 6)
    assert space.basis.shape == (4, 6)
    assert space.store is store
    assert count == place


def test_a_random_unit_vector_is_orthogonal_to_the_rows() -> None:
    rows = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0].T.contiguous()
    before = torch.random.get_rng_state()
    vector = random_unit(rows, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (vector.shape, vector.dtype) == ((5,), torch.float64)
    assert float(vector.norm()) == pytest.approx(1.0)
    assert float((rows @ vector).abs().max()) <= 1e-15
    like = torch.zeros(5, dtype=torch.float32)
    assert random_unit(rows[:0], torch.Generator().manual_seed(1), Reversing(), like).dtype == torch.float32


DIAGONAL = [3.0, -1.0, 2.0, 5.0, 1.0, 4.0, -2.0, 0.5]
COUPLINGS = [4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.25]


def tridiagonal() -> Tensor:
    """A matrix that Lanczos leaves as it is: from the first unit vector it finds the others, and these numbers."""
    couplings = torch.tensor(COUPLINGS, dtype=torch.float64)
    return torch.diag(torch.tensor(DIAGONAL, dtype=torch.float64)) + couplings.diag(1) + couplings.diag(-1)


def unknown(size: int) -> Tensor:
    return torch.full((size, size), torch.nan, dtype=torch.float64)


@pytest.fixture
def projections() -> Iterator[mock.Mock]:
    """Every reading of a basis for one vector: one a pass of Gram-Schmidt."""
    with mock.patch.object(BasisStore, "project", autospec=True, side_effect=BasisStore.project) as spy:
        yield spy


@pytest.fixture
def looks() -> Iterator[mock.Mock]:
    """Every course of steps, after which the host looks at the numbers."""
    with mock.patch.object(krylov, "unattended_steps", side_effect=krylov.unattended_steps) as spy:
        yield spy


@pytest.fixture(params=[False, True], ids=["at once", "at the end"])
def heard(request: pytest.FixtureRequest) -> Iterator[str]:
    """When the host hears that something has come up."""
    with mock.patch.object(unattended, "Watch", lambda *a, **k: Watch(*a, **(k | {"deaf": request.param}))):
        yield "at the end" if request.param else "at once"


@pytest.mark.parametrize("j", range(8))
def test_one_step_finds_its_column_of_a_tridiagonal_matrix_in_one_pass(j: int, projections: mock.Mock) -> None:
    """What is not known yet plays no part; the recurrence alone removes what lies inside."""
    matrix, basis, projected = tridiagonal(), unknown(8), torch.full((8, 8), 1e30, dtype=torch.float64)
    basis[: j + 1] = torch.eye(8, dtype=torch.float64)[: j + 1]
    projected[:j, : j + 1] = matrix[:j, : j + 1]
    projected[j, :j] = matrix[j, :j]
    leftover, coupling = lanczos_step(lambda v: matrix @ v, basis, projected, j)
    expected = torch.zeros(8, dtype=torch.float64)
    if j < 7:
        expected[j + 1] = COUPLINGS[j]
        assert projections.call_count == 1
    assert torch.equal(leftover, expected)
    assert coupling == (COUPLINGS[j] if j < 7 else 0.0)
    assert torch.equal(projected[: j + 1, : j + 1], matrix[: j + 1, : j + 1])
    assert bool((projected[j + 1 :] == 1e30).all())


def test_one_step_after_a_restart_removes_all_kept_vectors_in_one_pass(projections: mock.Mock) -> None:
    """The operator then is an arrow: each kept vector is coupled with the next one."""
    arrow = torch.diag(torch.tensor([-3.0, 6.0, 5.0, 2.0, 1.0], dtype=torch.float64))
    arrow[:3, 3] = arrow[3, :3] = torch.tensor([2.0, -1.0, 3.0])
    arrow[3, 4] = arrow[4, 3] = 0.5
    projected, unit = arrow.clone(), torch.eye(5, dtype=torch.float64)
    projected[3, 3] = 0.0
    leftover, coupling = lanczos_step(lambda v: arrow @ v, unit[:4], projected, 3)
    assert torch.equal(leftover, 0.5 * unit[4])
    assert coupling == 0.5
    assert torch.equal(projected, arrow)
    assert projections.call_count == 1


@pytest.mark.parametrize(
    ("dtype", "coupling", "known", "remains"),
    [
        (torch.float64, 1e-14, 1.0, True),
        (torch.float64, 1e-16, 1.0, False),
        (torch.float32, 1e-5, 1.0, True),
        (torch.float32, 1e-7, 1.0, False),
        (torch.float64, 1e-8, 1e6, True),
        (torch.float64, 1e-10, 1e6, False),
        (torch.float64, 1e-100, 0.0, True),
    ],
)
def test_what_a_step_leaves_counts_unless_it_is_rounding_next_to_the_largest_number(
    dtype: torch.dtype, coupling: float, known: float, remains: bool
) -> None:
    """The matrix ``[[known, 0, 0], [0, 0, coupling], [0, coupling, 0]]``, from its second vector."""
    projected = torch.diag(torch.tensor([known, 0.0], dtype=torch.float64))
    unit = torch.eye(3, dtype=dtype)
    leftover, norm = lanczos_step(lambda v: coupling * v[[0, 2, 1]], unit[:2], projected, 1)
    assert norm == (pytest.approx(coupling) if remains else 0.0)
    torch.testing.assert_close(leftover, coupling * unit[2])


def test_a_step_from_rounded_rows_is_computed_in_working_precision() -> None:
    square = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))[0]
    values = torch.linspace(-1.0, 1.0, 50)
    rows, asked = square[:3].bfloat16(), []

    def matvec(vector: Tensor) -> Tensor:
        asked.append(vector)
        return values * vector

    store = BasisStore(dtype=torch.bfloat16, working_dtype=torch.float32)
    projected = torch.zeros(3, 3, dtype=torch.float64)
    projected[1, 2] = projected[2, 1] = 0.3
    leftover, coupling = lanczos_step(matvec, rows, projected, 2, store)
    (vector,) = asked
    assert vector.dtype == leftover.dtype == torch.float32
    exact = rows.double()
    assert float(projected[2, 2]) == pytest.approx(float(values.double() @ exact[2] ** 2), rel=1e-6)
    image = values.double() * exact[2]
    outside = image - exact.T @ torch.linalg.lstsq(exact.T, image).solution
    torch.testing.assert_close(leftover.double(), outside, rtol=0, atol=1e-4)
    assert coupling == pytest.approx(float(leftover.norm()))


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("steps", [5, 6, 7])
def test_a_basis_is_filled_from_any_row_with_one_look_at_the_numbers(first: int, steps: int, looks: mock.Mock) -> None:
    """Two steps share what they read of the basis, the last two where there is a row of scratch."""
    matrix, unit = tridiagonal(), torch.eye(8, dtype=torch.float64)
    basis, projected = unknown(8), torch.zeros(8, 8, dtype=torch.float64)
    basis[: first + 1] = unit[: first + 1]
    known = slice(first + 1)
    projected[known, known] = matrix[known, known]
    projected[first, first] = 0.0
    recent = [basis[first], basis[first - 1]] if first else [basis[first]]
    with mock.patch.object(BasisStore, "project_rows", autospec=True, side_effect=BasisStore.project_rows) as pairs:
        rows, leftover, coupling = fill_basis(
            lambda v: matrix @ v, basis, projected, steps, recent, torch.Generator(), first=first
        )
    torch.testing.assert_close(basis[:steps], unit[:steps])
    torch.testing.assert_close(projected[:steps, :steps], matrix[:steps, :steps])
    assert rows == steps
    torch.testing.assert_close(leftover, COUPLINGS[steps - 1] * unit[steps])
    assert coupling == pytest.approx(COUPLINGS[steps - 1])
    assert looks.call_count == 1
    assert pairs.call_count == (steps - first - (first == 0)) // 2
    untouched = slice(steps + (first > 0), None)
    assert bool(basis[untouched].isnan().all())


@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [0, 3])
def test_rows_before_a_product_that_is_not_finite_keep_what_the_last_of_them_leads_to(
    first: int, place: int, heard: str
) -> None:
    """The vector whose product was not finite is asked for last, however late the host hears of it."""
    matrix, unit, asked = tridiagonal(), torch.eye(8, dtype=torch.float64), []
    basis, projected = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.float64)
    basis[: first + 1] = unit[: first + 1]
    known = slice(first + 1)
    projected[known, known] = matrix[known, known]
    projected[first, first] = 0.0

    def matvec(vector: Tensor) -> Tensor:
        asked.append(vector)
        return (matrix @ vector.double()).float() * (torch.nan if len(asked) == place else 1.0)

    recent = [basis[first], basis[first - 1]] if first else [basis[first]]
    rows, _, coupling = fill_basis(matvec, basis, projected, 7, recent, torch.Generator(), first=first)
    assert rows == first + place - 1
    assert coupling == pytest.approx(COUPLINGS[rows - 1] if rows else 0.0)
    torch.testing.assert_close(projected[:rows, :rows], matrix[:rows, :rows])
    assert len(asked) == (place if heard == "at once" else 7 - first + (place < 7 - first))
    torch.testing.assert_close(asked[-1], unit[rows].float())


def test_a_second_look_takes_out_what_a_step_has_left_inside() -> None:
    unit = torch.eye(5, dtype=torch.float64)
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    left = 5.0 * unit[0] - 4.0 * unit[1] + 3.0 * unit[2] + 0.5 * unit[4]
    found = Steps(0, diagonal=numbers, couplings=10 * numbers, sound=2, leftover=left)
    projected = torch.zeros(3, 3, dtype=torch.float64)
    leftover, coupling = krylov._settled(found, 3, mock.Mock(), unit[:3], projected, BasisStore())
    torch.testing.assert_close(leftover, 0.5 * unit[4])
    assert coupling == pytest.approx(0.5)
    expected = torch.tensor([[1.0, 10.0, 0.0], [10.0, 2.0, 20.0], [0.0, 20.0, 3.0]], dtype=torch.float64)
    assert torch.equal(projected, expected)


def test_exhausted_spaces_and_zero_starts_go_on_in_working_precision(heard: str) -> None:
    """Each vector of the identity is a space of its own, so each next one is random."""
    store, asked = BasisStore(dtype=torch.bfloat16, working_dtype=torch.float32), []

    def matvec(vector: Tensor) -> Tensor:
        asked.append(vector)
        return vector.clone()

    space = lanczos(matvec, torch.zeros(40), 6, generator=torch.Generator().manual_seed(1), store=store)
    assert {vector.dtype for vector in asked} == {torch.float32}
    assert space.basis.dtype == torch.bfloat16
    assert orthogonality(space) <= 2**-7
    torch.testing.assert_close(space.eigenvalues, torch.ones(6, dtype=torch.float64), rtol=0, atol=2**-6)


@pytest.mark.parametrize("start", [torch.zeros(9), torch.ones(9)], ids=["zeros", "ones"])
@pytest.mark.parametrize("store", [Reversing(), Padded()], ids=lambda store: type(store).__name__)
def test_random_vectors_are_drawn_whole_and_kept_as_others_are(store: BasisStore, start: Tensor) -> None:
    """Each vector of the identity is a space of its own, so each next one is random."""
    plain, other = (
        lanczos(each.local, start, 4, generator=torch.Generator().manual_seed(3), store=each)
        for each in (BasisStore(), store)
    )
    torch.testing.assert_close(store.whole(other.basis, 9), plain.basis)


def test_a_dominant_eigenvalue_costs_fewer_and_fewer_looks_at_the_numbers(looks: mock.Mock) -> None:
    """Where steps by two are too coarse the rest is taken one by one, with looks after 1, 2, 4, ... of them."""
    spectrum = torch.linspace(-0.3, 1.0, 2000)
    spectrum[17] = 5000.0
    lanczos(rotated(spectrum), torch.randn(2000), 40, generator=torch.Generator().manual_seed(1))
    assert looks.call_count <= 7


@pytest.mark.parametrize("kinds", [2, 3, 6])
def test_where_many_steps_stumble_few_are_lost_however_late_the_host_hears(kinds: int) -> None:
    """So many eigenvalues: each space that a vector opens is exhausted after as many steps. The basis is the same."""
    values, start = torch.arange(1.0, 1.0 + kinds).repeat(30)[:60], torch.linspace(-1.0, 2.0, 60)
    spaces = []
    for never in (False, True):
        with mock.patch.object(unattended, "Watch", lambda *a, never=never, **k: Watch(*a, **(k | {"deaf": never}))):
            spaces.append(lanczos(lambda v: values * v, start, 40, generator=torch.Generator().manual_seed(1)))
    attended, late = spaces
    assert attended.products == 40
    assert late.products <= 3 * 40
    torch.testing.assert_close(late.basis, attended.basis, rtol=0, atol=1e-4)
    torch.testing.assert_close(late.projected, attended.projected, rtol=0, atol=1e-4)


def test_an_eigenvalue_beyond_all_others_in_single_precision_costs_twice_the_products_at_most() -> None:
    """Nearly every step needs a second look then."""
    spectrum = torch.linspace(-0.3, 1.0, 300)
    spectrum[17] = 1e7
    product = rotated(spectrum)
    with mock.patch.object(unattended, "Watch", lambda *a, **k: Watch(*a, **(k | {"deaf": True}))):
        space = lanczos(product, torch.randn(300), 64, generator=torch.Generator().manual_seed(1))
    assert orthogonality(space) <= 1e-6
    assert 64 < space.products <= 128


class Distant(Watch):
    """Of a device that is heard of a number of steps late."""

    def __init__(self, capacity: int, device: torch.device, *, deaf: bool, late: int) -> None:
        super().__init__(capacity, device)
        self.is_prompt, self.late = False, late

    def raised(self) -> bool:
        while self._heard + self.late < self._posted:
            self._heard += 1
            if self._flags[self._heard - 1]:
                return True
        return False


@pytest.mark.parametrize("outlier", [None, 5e3, 1e6])
def test_the_basis_does_not_depend_on_when_the_host_hears_of_a_device(outlier: float | None) -> None:
    """Without an outlier each space is exhausted after three vectors."""
    spectrum = torch.arange(1.0, 4.0).repeat(20) if outlier is None else torch.linspace(-0.3, 1.0, 60)
    spectrum[17] = outlier or 1.0
    product, start = rotated(spectrum), torch.randn(60)
    spaces = []
    for late in (0, 1, 2, 5, 100):
        with mock.patch.object(unattended, "Watch", lambda *a, late=late, **k: Distant(*a, **k, late=late)):
            spaces.append(lanczos(product, start, 30, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(space.basis, spaces[0].basis) for space in spaces)
    assert all(torch.equal(space.projected, spaces[0].projected) for space in spaces)


def test_directions_that_are_not_finite_and_those_beyond_a_whole_space_are_left_out() -> None:
    matrix, directions = symmetric(5), torch.randn(4, 5, dtype=torch.float64)
    directions[0, 2] = directions[3, 2] = torch.nan
    space = run(matrix, 4, directions=[Direction(direction) for direction in directions])
    assert len(space) == space.products == 5
    assert projection_error(space, matrix) <= 1e-13


def test_a_direction_is_orthogonalised_twice_where_rows_are_rounded() -> None:
    """A pass against rows in bfloat16 leaves a hundredth of what lies inside, ten times as much as is new."""
    store = BasisStore(dtype=torch.bfloat16, working_dtype=torch.float32)
    values, start = torch.linspace(-1.0, 1.0, 400), torch.randn(400)
    inside = lanczos(lambda v: values * v, start, 12, generator=torch.Generator(), store=store).basis.float()
    new = torch.nn.functional.normalize(torch.randn(400), dim=0)
    direction = torch.nn.functional.normalize(inside.sum(dim=0), dim=0) + 0.07 * new
    space = lanczos(
        lambda v: values * v, start, 12, generator=torch.Generator(), store=store, directions=[Direction(direction)]
    )
    assert len(space) == 13
    assert float((inside @ space.basis[-1].float()).abs().max()) <= 1e-3


def test_whole_vectors_have_the_length_of_the_operator_or_else_of_the_rows() -> None:
    rows, numbers = torch.eye(3, 6, dtype=torch.float64), torch.diag(torch.arange(3.0, dtype=torch.float64))
    padded = KrylovSubspace(rows, numbers, 0.0, 3, 3, Padded(), 5)
    assert torch.equal(padded.ritz_vector(1), torch.eye(5, dtype=torch.float64)[1])
    assert torch.equal(padded.coordinates(torch.arange(5.0).double()), torch.arange(3.0).double())
    plain = KrylovSubspace(rows, numbers, 0.0, 3, 3, Reversing())
    assert torch.equal(plain.ritz_vector(1), torch.eye(6, dtype=torch.float64)[1].flip(0))


@pytest.mark.parametrize("seed", range(12))
def test_products_that_are_off_by_more_than_rounding_leave_the_projection_as_right_as_they_are(seed: int) -> None:
    """Few eigenvalues, so that vectors after the first few are made of what products are off by."""
    draw = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=draw, dtype=torch.float64))
    values = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[torch.randint(0, 3, (16,), generator=draw)]
    matrix = ((rotation * values) @ rotation.T).float()
    space = lanczos(lambda v: (matrix @ v).bfloat16().float(), torch.randn(16, generator=draw), 12, generator=draw)
    basis = space.basis.double()
    off = (basis @ ((rotation * values) @ rotation.T) @ basis.T - space.projected).abs().max()
    assert float(off) <= torch.finfo(torch.bfloat16).eps
