"""The outlook at a point, against what can be computed by hand."""

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton.curvature import HessianOperator
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.outlook import Outlook, outlook_of

H = torch.diag(torch.tensor([-0.5, 1.0, 2.0, 10.0], dtype=torch.float64))
G = torch.tensor([0.0, 0.3, -0.2, 1.0], dtype=torch.float64)


def outlook(hessian: Tensor, gradient: Tensor, krylov_dim: int = 4) -> Outlook:
    x = torch.zeros(len(gradient), dtype=torch.float64, requires_grad=True)
    objective = Objective([lambda: 7 + gradient @ x + x @ hessian @ x / 2])
    return outlook_of(HessianOperator(objective, [x]), krylov_dim)


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


def test_a_negative_value_within_its_residual_is_not_certain() -> None:
    assert not Outlook(1.0, -0.1, 0.2, 0.0).has_negative_curvature
    assert Outlook(1.0, -0.3, 0.2, 0.0).has_negative_curvature


def test_at_a_critical_point_nothing_is_promised() -> None:
    found = outlook(H, torch.zeros(4, dtype=torch.float64))
    assert found.predicted_decrease == 0.0
    assert found.has_negative_curvature
