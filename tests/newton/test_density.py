"""Densities against exact spectra: Wasserstein distance, moments of the quadrature, Hutchinson's variance."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from lightning_sfn.newton.density import SpectralDensity, spectral_density

from .cases import DTYPES, symmetric, with_spectrum

SIZE = 150


def _rank_deficient() -> Tensor:
    return torch.cat([torch.linspace(-1.0, 4.0, 12), torch.zeros(SIZE - 12)]).double()


def _network() -> Tensor:
    bulk = 1e-2 * torch.linspace(-1.0, 1.0, SIZE - 8) ** 3
    return torch.cat([bulk, torch.linspace(1.0, 10.0, 7), torch.tensor([-0.5])]).double()


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "even": lambda: torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64),
    "rank deficient": _rank_deficient,
    "network": _network,
    "zero": lambda: torch.zeros(SIZE, dtype=torch.float64),
}


def density_of(matrix: Tensor, krylov_dim: int, probes: int, seed: int = 1) -> SpectralDensity:
    generator = torch.Generator().manual_seed(seed)
    density = spectral_density(lambda v: matrix @ v, matrix[0], krylov_dim, probes, generator=generator)
    assert density is not None
    return density


def rademacher(size: int, seed: int = 1) -> Tensor:
    """The first probe of that seed."""
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return (2 * signs - 1).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_wasserstein_distance_to_the_exact_spectrum_is_small(name: str, dtype: torch.dtype) -> None:
    """30 vectors and 20 probes: within 1.5 % of the width of the spectrum, twice what Hutchinson leaves."""
    values = SPECTRA[name]()
    density = density_of(with_spectrum(values).to(dtype), 30, 20)
    weights = density.weights.flatten().numpy()
    distance = wasserstein_distance(values.numpy(), density.nodes.flatten().numpy(), None, weights)
    assert distance <= 1.5e-2 * float(values.max() - values.min())
    assert density.products == 600
    assert density.size == SIZE


@pytest.mark.parametrize("name", SPECTRA)
def test_more_nodes_and_probes_bring_it_closer(name: str) -> None:
    values = SPECTRA[name]()
    matrix, distances = with_spectrum(values), []
    for krylov_dim, probes in ((3, 3), (40, 40)):
        density = density_of(matrix, krylov_dim, probes)
        nodes, weights = density.nodes.flatten().numpy(), density.weights.flatten().numpy()
        distances.append(wasserstein_distance(values.numpy(), nodes, None, weights))
    assert distances[1] < 0.5 * distances[0] or distances == [0.0, 0.0]
    assert (distances == [0.0, 0.0]) == (name == "zero")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_weights_of_every_probe_add_up_to_one(name: str, dtype: torch.dtype) -> None:
    density = density_of(with_spectrum(SPECTRA[name]()).to(dtype), 25, 3)
    assert density.nodes.shape == density.weights.shape == (3, 25)
    assert density.nodes.dtype == density.weights.dtype == torch.float64
    torch.testing.assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((density.weights >= 0).all())
    assert bool((density.nodes.diff(dim=1) >= 0).all())


def test_the_quadrature_is_exact_for_moments_up_to_its_degree() -> None:
    """Gauss quadrature with k nodes integrates polynomials of degree 2k - 1: here ``v'A^m v / n`` up to m = 9."""
    matrix = with_spectrum(SPECTRA["even"]())
    density, probe = density_of(matrix, 5, 1), rademacher(SIZE)
    vector = probe
    for degree in range(11):
        moment = float((density.weights * density.nodes**degree).sum())
        exact = float(probe @ vector) / SIZE
        assert (abs(moment - exact) <= 1e-12) == (degree < 10)
        vector = matrix @ vector


@pytest.mark.parametrize("name", SPECTRA)
def test_the_trace_is_within_its_standard_error_and_that_is_hutchinsons(name: str) -> None:
    """Rademacher probes have the variance ``2 (|A|_F^2 - sum a_ii^2)``."""
    matrix = with_spectrum(SPECTRA[name]())
    trace, error = density_of(matrix, 3, 300).trace
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    assert error == pytest.approx(math.sqrt(variance / 300), rel=0.15)
    assert trace == pytest.approx(float(matrix.trace()), abs=4 * error)


def test_the_trace_of_a_diagonal_matrix_needs_one_probe() -> None:
    values = torch.tensor([-2.0, 0.5, 1.0, 7.0], dtype=torch.float64)
    trace, error = density_of(torch.diag(values), 64, 5).trace
    assert trace == pytest.approx(6.5, rel=1e-12)
    assert error <= 1e-12


def test_a_small_matrix_is_exact_on_average() -> None:
    """With n nodes the nodes are the eigenvalues themselves, and the mean weight of each is 1 / n."""
    matrix = symmetric(6)
    density = density_of(matrix, 64, 400)
    exact = np.linalg.eigvalsh(matrix.numpy())
    assert np.abs(density.nodes.numpy() - exact).max() <= 1e-8
    scatter = density.weights.std(0) / 20
    assert bool(((density.weights.mean(0) - 1 / 6).abs() <= 4 * scatter).all())
    assert float(scatter.max()) <= 0.02
    trace, error = density.trace
    assert trace == pytest.approx(float(matrix.trace()), abs=4 * error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 16, 40])
@pytest.mark.parametrize("name", ["even", "rank deficient", "network"])
def test_the_share_below_a_bound_is_that_of_the_exact_spectrum(name: str, dim: int, dtype: torch.dtype) -> None:
    """Within its error, also where few vectors leave wide gaps between nodes: zeros are not negative, whatever sign."""
    values = SPECTRA[name]()
    density = density_of(with_spectrum(values).to(dtype), dim, 20)
    for bound in (-100.0, 0.0, 100.0):
        share, error = density.below(bound)
        assert share == pytest.approx(float((values < bound).double().mean()), abs=error + 1e-12)
        assert error <= ({8: 1.1, 16: 0.4, 40: 0.3}[dim] if bound == 0 else 1 / dim)


def test_more_probes_do_not_hide_what_few_vectors_leave_open() -> None:
    """Half of the eigenvalues lie on each side of zero, so close that eight vectors cannot tell."""
    values = torch.cat([torch.linspace(-1e-3, 1e-3, 90), torch.linspace(1, 10, 10)]).double()
    for probes in (4, 100):
        share, error = density_of(torch.diag(values), 8, probes).below(0.0)
        assert abs(share - 0.45) <= error
        assert error >= 0.2


def test_the_share_below_a_bound_of_a_diagonal_matrix_is_exact() -> None:
    density = density_of(torch.diag(torch.tensor([-3.0, -1.0, 0.0, 2.0, 4.0], dtype=torch.float64)), 5, 3)
    shares = [density.below(bound)[0] for bound in (-5.0, -2.0, 0.0, 1.0, 3.0, 9.0)]
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-12)


def test_the_density_is_a_sum_of_normal_distributions_and_integrates_to_one() -> None:
    values = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    density = density_of(torch.diag(values), 3, 4)
    points = torch.linspace(-4.0, 5.0, 4001)
    curve, error = density.on(points, 0.2)
    normals = [torch.distributions.Normal(v, 0.2).log_prob(points.double()).exp() for v in values]
    torch.testing.assert_close(curve, torch.stack(normals).mean(0), rtol=1e-9, atol=1e-12)
    assert float(torch.trapezoid(curve, points.double())) == pytest.approx(1.0, abs=1e-6)
    assert float(error.max()) <= 1e-12


@pytest.mark.parametrize("name", SPECTRA)
def test_every_density_integrates_to_one(name: str) -> None:
    density = density_of(with_spectrum(SPECTRA[name]()), 20, 4)
    points = torch.linspace(-3.0, 12.0, 6001, dtype=torch.float64)
    curve, error = density.on(points, 0.05)
    assert curve.shape == error.shape == (6001,)
    assert float(torch.trapezoid(curve, points)) == pytest.approx(1.0, abs=1e-6)


def test_one_probe_has_no_error_estimate() -> None:
    """And says so without a warning, which would fail here."""
    density = density_of(symmetric(20), 5, 1)
    assert math.isnan(density.trace[1])
    assert math.isnan(density.below(0.0)[1])
    curve, error = density.on(torch.zeros(2), 1.0)
    assert bool(error.isnan().all())
    assert bool(curve.isfinite().all())


def test_a_density_survives_json() -> None:
    density = density_of(symmetric(30), 7, 3)
    again = SpectralDensity.from_dict(json.loads(json.dumps(density.to_dict())))
    assert torch.equal(again.nodes, density.nodes)
    assert torch.equal(again.weights, density.weights)
    assert (again.size, again.products) == (30, 21)


def test_the_seed_alone_decides_the_probes() -> None:
    matrix, nodes = symmetric(30), []
    for seed in (1, 1, 2):
        torch.randn(3)
        nodes.append(density_of(matrix, 4, 2, seed).nodes)
    assert torch.equal(nodes[0], nodes[1])
    assert not torch.equal(nodes[0], nodes[2])


def test_the_seed_decides_where_a_probe_exhausts_its_krylov_space() -> None:
    """The identity takes one vector of each probe; what follows is drawn."""
    again = []
    for _ in range(2):
        torch.randn(3)
        again.append(density_of(torch.eye(9, dtype=torch.float64), 5, 2))
    assert torch.equal(again[0].weights, again[1].weights)


def test_two_probes_differ_by_twice_their_standard_error() -> None:
    density = density_of(symmetric(20), 5, 2)
    each = (density.nodes * density.weights).sum(1) * 20
    assert density.trace[0] == pytest.approx(float(each.mean()))
    assert density.trace[1] == pytest.approx(float((each[0] - each[1]).abs()) / 2)


def test_products_that_are_not_finite_give_no_density() -> None:
    generator = torch.Generator().manual_seed(1)
    assert spectral_density(lambda v: v * torch.nan, torch.zeros(9), 4, 2, generator=generator) is None
