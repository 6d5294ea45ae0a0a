"""Curvature that factors do not tell, against dense matrices in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn.newton import HessianOperator, KroneckerFactors, Objective
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.kronecker_excess import Excess

D = torch.float64


def settled(row_sizes: Tensor, column_sizes: Tensor, times: int) -> Tensor:
    """The map that probes end with, for a diagonal operator of these sizes times one."""
    generator = torch.Generator().manual_seed(0)
    operator = row_sizes[:, None] * column_sizes
    excess = Excess.none(operator)
    for _ in range(times):
        probe = torch.randn(operator.shape, dtype=D, generator=generator)
        excess = excess.after(operator / excess.product * probe)
    return operator / excess.product


def test_rows_and_columns_with_more_curvature_are_scaled_to_one() -> None:
    rows, columns = 10.0 ** torch.arange(0, 1.2, 0.02, dtype=D), 10.0 ** torch.arange(0, 1.3, 0.02, dtype=D)
    sizes = settled(rows, columns, 12)
    assert float((rows[:, None] * columns).max()) > 250
    assert sizes.log10().abs().max() < 0.5
    assert float(sizes.log().mean()) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("sides", [(1e8, 1.0), (1.0, 1e8), (1e6, 1e6)])
def test_no_curvature_is_scaled_down_by_more_than_ten_thousand(sides: tuple[float, float]) -> None:
    rows, columns = (torch.where(torch.arange(20) < 10, size, 1.0).double() for size in sides)
    sizes = settled(rows, columns, 10)
    assert float((rows[:, None] * columns / sizes).max()) == pytest.approx(1e4)


def test_curvature_below_what_factors_say_is_not_believed() -> None:
    small = torch.full((40,), 1e-2, dtype=D)
    assert torch.equal(settled(small, small, 5), small[:, None] * small)


def test_excess_that_is_gone_is_taken_back() -> None:
    generator = torch.Generator().manual_seed(0)
    excess = Excess.none(torch.empty(20, 30, dtype=D))
    probe = torch.randn(20, 30, dtype=D, generator=generator)
    large = excess.after(1e2 * probe)
    assert float(large.product.mean()) == pytest.approx(1e2, rel=0.2)
    for _ in range(10):
        large = large.after(torch.randn(20, 30, dtype=D, generator=generator) / large.product)
    assert float(large.product.max()) < 2.5
    assert torch.equal(large.after(torch.zeros(20, 30, dtype=D)).product, torch.ones(20, 30, dtype=D))


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (3, 500), (500, 3), (1, 1), (7, 8), (8, 7)])
def test_means_over_few_numbers_say_nothing_of_single_rows(shape: tuple[int, int]) -> None:
    excess = Excess.none(torch.empty(shape, dtype=D)).after(100 * torch.randn(shape, dtype=D))
    few_columns, few_rows = shape[1] < 8, shape[0] < 8
    assert len(excess.rows.unique()) == (1 if few_columns else shape[0])
    assert len(excess.columns.unique()) == (1 if few_rows else shape[1])
    assert excess.product.shape == excess.shape == Excess.none(excess.product).shape == shape
    assert (excess.rows.shape, excess.columns.shape) == ((shape[0], 1), (1, shape[1]))


class Plateau(nn.Module):
    """Small weights, so that the Hessian is much that the Fisher matrix is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 10)).double()
        with torch.no_grad():
            for layer in self.layers[::2]:
                layer.weight.mul_(0.7)

    def loss(self) -> Tensor:
        x = torch.rand(60, 10, dtype=D, generator=torch.Generator().manual_seed(1))
        return F.mse_loss(self.layers(x), x, reduction="sum") / len(x)


def operator_of(plateau: Plateau) -> HessianOperator:
    return HessianOperator(Objective([plateau.loss]), plateau.parameters())


def known(plateau: Plateau, times: int, probes: int = 1) -> KroneckerFactors:
    factors, generator = KroneckerFactors(plateau, refresh_every=1, probes=probes), torch.Generator().manual_seed(0)
    for _ in range(times):
        factors.refresh(operator_of(plateau), generator)
    return factors


def in_coordinates(factors: KroneckerFactors, hessian: Tensor) -> Tensor:
    root = factors.scale(torch.eye(len(hessian), dtype=D))
    return root @ hessian @ root


def test_probes_bring_the_hessian_of_a_plateau_to_the_size_of_one() -> None:
    """Against the dense Hessian: without probes its eigenvalues are up to hundreds in the factors' coordinates."""
    plateau = Plateau()
    hessian = dense_matrix(operator_of(plateau))
    alone, probed = (in_coordinates(known(plateau, 12, probes=probes), hessian) for probes in (0, 1))
    assert float(torch.linalg.eigvalsh(alone).abs().max()) > 100
    values = torch.linalg.eigvalsh(probed)
    assert 0.3 < float(values.abs().max()) < 10
    assert float(values[0]) < -0.1  # the saddle is as visible as before
    assert math.isclose(float(probed.square().sum(1).mean()), 1.0, rel_tol=0.6)


def test_probes_are_counted_and_renewed_with_the_factors() -> None:
    operator, generator = operator_of(Plateau()), torch.Generator().manual_seed(0)
    factors = KroneckerFactors(probes=2, refresh_every=3)
    for expected in (2, 2, 2, 4):
        factors.refresh(operator, generator)
        assert operator.products == expected


def test_without_much_negative_curvature_factors_are_left_as_they_are() -> None:
    plateau = Plateau()
    factors, unit = known(plateau, 4), torch.eye(10 * 9 + 9 + 90 + 10, dtype=D)
    operator, generator = operator_of(plateau), torch.Generator().manual_seed(1)
    factors.refresh(operator, generator, bent=False)
    assert operator.products == 0
    again = KroneckerFactors(plateau, probes=0)
    again.load_state_dict(factors.state_dict())
    assert torch.equal(factors.scale(unit), again.scale(unit))
    factors.refresh(operator, generator, bent=True)
    assert operator.products == 1
    assert not torch.equal(factors.scale(unit), again.scale(unit))


@pytest.mark.parametrize(("bent", "products"), [({}, 1), ({"bent": True}, 1), ({"bent": False}, 0)], ids=str)
def test_before_the_first_subspace_negative_curvature_is_looked_for(bent: dict[str, bool], products: int) -> None:
    for way in (KroneckerFactors.renew, KroneckerFactors.refresh):
        operator = operator_of(Plateau())
        way(KroneckerFactors(), operator, torch.Generator().manual_seed(0), **bent)
        assert operator.products == products


def test_excess_is_saved_and_forgotten() -> None:
    plateau = Plateau()
    factors, unit = known(plateau, 4), torch.eye(10 * 9 + 9 + 90 + 10, dtype=D)
    state = copy.deepcopy(factors.state_dict())
    restored = KroneckerFactors(plateau)
    restored.load_state_dict(state)
    assert torch.equal(restored.scale(unit), factors.scale(unit))
    alone, without = KroneckerFactors(plateau, probes=0), KroneckerFactors(plateau)
    alone.load_state_dict(state)  # would never renew an excess
    without.load_state_dict(state | {"excess": []})
    assert torch.equal(alone.scale(unit), without.scale(unit))
    assert not torch.equal(alone.scale(unit), factors.scale(unit))
    factors.reset()
    factors.refresh(operator_of(plateau), torch.Generator().manual_seed(0))
    assert torch.equal(factors.scale(unit), known(plateau, 1).scale(unit))


def test_a_preconditioned_gradient_is_that_of_the_factors_alone() -> None:
    plateau = Plateau()
    factors, alone = known(plateau, 4), KroneckerFactors(plateau, probes=0)
    alone.load_state_dict(factors.state_dict())
    unit = torch.eye(199, dtype=D)
    torch.testing.assert_close(factors.precondition(unit), alone.scale(alone.scale(unit)))
    torch.testing.assert_close(alone.precondition(unit), alone.scale(alone.scale(unit)))
    assert not torch.allclose(factors.precondition(unit), factors.scale(factors.scale(unit)))


def test_a_probe_that_is_not_finite_changes_nothing() -> None:
    class Broken(HessianOperator):
        def _matvec(self, vector: Tensor) -> Tensor:
            return torch.full_like(vector, math.inf)

    plateau = Plateau()
    broken, generator = Broken(Objective([plateau.loss]), plateau.parameters()), torch.Generator().manual_seed(0)
    factors = KroneckerFactors(plateau)
    factors.refresh(broken, generator)
    unit = torch.eye(199, dtype=D)
    assert torch.equal(factors.scale(unit), known(plateau, 1, probes=0).scale(unit))
