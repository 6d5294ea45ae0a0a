"""The outlook at a point, against what can be computed by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton.curvature import HessianOperator
from lightning_sfn.newton.finite_difference import FiniteDifferenceOperator
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.outlook import Outlook, outlook_of

from .cases import DTYPES, make, reference
from .ranks import HalfShare

H = torch.diag(torch.tensor([-0.5, 1.0, 2.0, 10.0], dtype=torch.float64))
G = torch.tensor([0.0, 0.3, -0.2, 1.0], dtype=torch.float64)


def outlook(hessian: Tensor, gradient: Tensor, krylov_dim: int = 4, **options: Any) -> Outlook:
    x = torch.zeros(len(gradient), dtype=torch.float64, requires_grad=True)
    objective = Objective([lambda: 7 + gradient @ x + x @ hessian @ x / 2])
    return outlook_of(HessianOperator(objective, [x]), krylov_dim, **options)


def test_the_whole_space() -> None:
    found = outlook(H, G)
    step = -G / (H.diag().abs() + 0.1)
    assert found.loss == pytest.approx(7.0)
    assert found.lambda_min == pytest.approx(-0.5)
    assert found.predicted_decrease == pytest.approx(-float(G @ step + step @ H @ step / 2))
    assert found.has_negative_curvature


def test_curvature_that_the_gradient_is_blind_to_is_seen() -> None:
    """The gradient has no component along the only negative direction."""
    found = outlook(H, G)
    assert G[0] == 0
    assert found.has_negative_curvature


def test_a_bowl_has_none_and_a_small_space_promises_no_more_than_the_whole() -> None:
    bowl = H + 0.6 * torch.eye(4, dtype=torch.float64)
    whole, part = outlook(bowl, G), outlook(bowl, G, krylov_dim=2)
    assert not whole.has_negative_curvature
    assert not part.has_negative_curvature
    assert part.predicted_decrease > 0
    assert part.residual > whole.residual


def test_a_negative_value_is_certain_beyond_rounding_whatever_its_residual() -> None:
    assert not Outlook(1.0, -0.1, 0.2, 0.0, rounding=0.15).has_negative_curvature
    assert Outlook(1.0, -0.1, 0.2, 0.0, rounding=0.05).has_negative_curvature


def test_at_a_critical_point_nothing_is_promised() -> None:
    found = outlook(H, torch.zeros(4, dtype=torch.float64))
    assert found.predicted_decrease == 0.0
    assert found.has_negative_curvature


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("options", [{}, {"seed": 5}])
def test_the_start_is_half_gradient_half_noise(scale: float, options: dict[str, int]) -> None:
    """One vector shows its Rayleigh quotient, and how far it is from an eigenvector."""
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    noise = torch.randn(4, dtype=torch.float64, generator=generator)
    start = noise / noise.norm() + (G / G.norm() if scale else 0)
    unit = start / start.norm()
    theta = float(unit @ H @ unit)
    found = outlook(H, scale * G, krylov_dim=1, **options)
    assert found.lambda_min == pytest.approx(theta)
    assert found.residual == pytest.approx(float((H @ unit - theta * unit).norm()))
    along = float(unit @ G) * scale
    step = -along / (1.01 * abs(theta))
    assert found.predicted_decrease == pytest.approx(-(along * step + theta * step**2 / 2))


def test_the_residual_is_that_of_the_smallest_value() -> None:
    part = outlook(H, G, krylov_dim=3)
    exact = H.diag()
    assert float((exact - part.lambda_min).abs().min()) <= part.residual
    assert part.residual < 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_finite_differences_count_their_error(dtype: torch.dtype) -> None:
    """In the whole space nothing else is left of the residual."""
    case, exact = make("rnn", dtype), torch.linalg.eigvalsh(reference("rnn").hessian)
    operator = FiniteDifferenceOperator(Objective([case.closure]), case.parameters)
    found = outlook_of(operator, operator.parameters.size)
    assert abs(found.lambda_min - float(exact[0])) <= found.rounding <= found.residual
    assert found.residual <= 1e-3 * float(exact.abs().max())


def test_global_random_numbers_are_left_alone() -> None:
    """Also where the space is exhausted early and goes on from another vector."""
    before = torch.random.get_rng_state()
    outlook(torch.eye(4, dtype=torch.float64), G)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_products_that_are_not_finite_promise_nothing() -> None:
    """And are not blamed on a process whose own numbers are sound: a replay far from training may overflow."""
    blamed = []

    class Shared(HalfShare):
        def __init__(self) -> None:
            self.share = 1.0
            self.processes = SimpleNamespace(  # type: ignore[assignment]
                size=1, guard=lambda compute, like: compute(), require_sound=lambda **how: blamed.append(how)
            )

    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    objective = Objective([lambda: 7 + (x.abs() ** 1.5).sum()], reduce=Shared())
    found = outlook_of(HessianOperator(objective, [x]), 2)
    assert found.loss == 7.0
    assert all(math.isnan(v) for v in (found.lambda_min, found.residual, found.predicted_decrease))
    assert not found.has_negative_curvature
    assert blamed == [{"blame_nan": False}]
