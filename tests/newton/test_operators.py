"""Names of curvatures and of kinds of product lead to operators that are made as asked for."""

import re
from typing import Any

import pytest
import torch

from lightning_sfn.newton import (
    FiniteDifferenceOperator,
    FisherOperator,
    GaussNewtonOperator,
    GradientCovarianceOperator,
    HessianOperator,
    Objective,
)
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.operators import check_curvature, make_operator
from lightning_sfn.newton.parameters import FlatParameters

CURVATURES = "'hessian', 'gauss_newton', 'fisher', 'gradient_covariance'"
PRODUCTS = "'auto', 'retain', 'recompute', 'finite_difference'"
MISMATCH = "hvp='finite_difference' gives the Hessian: use curvature='hessian' with it."


@pytest.mark.parametrize(
    ("curvature", "hvp", "message"),
    [
        ("hesian", "auto", f"curvature is 'hesian', but one of {CURVATURES} is expected."),
        ("hessian", "jvp", f"hvp is 'jvp', but one of {PRODUCTS} is expected."),
        ("gauss_newton", "finite_difference", MISMATCH),
        ("fisher", "finite_difference", MISMATCH),
        ("gradient_covariance", "finite_difference", MISMATCH),
    ],
)
def test_names_that_are_unknown_or_do_not_go_together_are_refused(curvature: Any, hvp: Any, message: str) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        check_curvature(curvature, hvp)
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make_operator(Objective([lambda: x.sum()]), FlatParameters([x]), curvature, hvp)


@pytest.mark.parametrize(
    ("curvature", "hvp", "kind", "evaluated"),
    [
        ("hessian", "recompute", HessianOperator, 3),
        ("hessian", "finite_difference", FiniteDifferenceOperator, 6),
        ("gauss_newton", "retain", GaussNewtonOperator, 1),
        ("fisher", "recompute", FisherOperator, 3),
        ("gradient_covariance", "retain", GradientCovarianceOperator, 1),
    ],
)
def test_names_make_operators(curvature: Any, hvp: Any, kind: type, evaluated: int) -> None:
    check_curvature(curvature, hvp)
    x = torch.ones(2, requires_grad=True)

    evaluations = 0

    def closure() -> Any:
        nonlocal evaluations
        evaluations += 1
        losses = x**2
        return losses.mean(), torch.distributions.Normal(x, 1.0) if kind is FisherOperator else losses

    objective, parameters = Objective([closure]), FlatParameters([x])
    operator = make_operator(objective, parameters, curvature, hvp)
    assert type(operator) is kind
    assert operator.objective is objective
    assert operator.parameters is parameters
    evaluations = 0
    for _ in range(3):
        operator.matvec(torch.ones(2))
    assert evaluations == evaluated


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (2**20, 1)])
def test_the_budget_is_handed_on(limit: int, kept: int) -> None:
    x, budget = torch.ones(2, requires_grad=True), GraphBudget(limit)
    operator = make_operator(Objective([lambda: (x**4).sum()]), FlatParameters([x]), "hessian", "auto", budget)
    operator.matvec(torch.ones(2))
    assert operator._graphs.retained == kept  # type: ignore[attr-defined]
    assert budget.bytes_per_size is not None
