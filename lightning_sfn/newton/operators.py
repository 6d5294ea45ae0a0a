"""From names to operators: the one place that knows which curvature and which kind of product there are."""

from collections.abc import Callable
from typing import Literal, get_args

from lightning_sfn.newton.curvature import CurvatureOperator, HessianOperator
from lightning_sfn.newton.finite_difference import FiniteDifferenceOperator
from lightning_sfn.newton.fisher import FisherOperator
from lightning_sfn.newton.gauss_newton import GaussNewtonOperator
from lightning_sfn.newton.gradient_covariance import GradientCovarianceOperator
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.parameters import FlatParameters

__all__ = ["CurvatureName", "ProductMethod", "check_curvature", "make_operator"]

CurvatureName = Literal["hessian", "gauss_newton", "fisher", "gradient_covariance"]
ProductMethod = Literal["auto", "retain", "recompute", "finite_difference"]

_KINDS: dict[str, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "fisher": FisherOperator,
    "gradient_covariance": GradientCovarianceOperator,
}


def check_curvature(curvature: str, hvp: str) -> None:
    """Checks the names of a curvature and of a kind of product.

    Args:
        curvature: ``"hessian"``, ``"gauss_newton"``, ``"fisher"`` or ``"gradient_covariance"``.
        hvp: ``"auto"``, ``"retain"``, ``"recompute"`` or ``"finite_difference"``.

    Raises:
        ValueError: A name is unknown, or the two do not go together.
    """
    for name, value, choices in (
        ("curvature", curvature, get_args(CurvatureName)),
        ("hvp", hvp, get_args(ProductMethod)),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, but one of {', '.join(map(repr, choices))} is expected.")
    if curvature != "hessian" and hvp == "finite_difference":
        raise ValueError("hvp='finite_difference' gives the Hessian: use curvature='hessian' with it.")


def make_operator(
    objective: Objective,
    parameters: FlatParameters,
    curvature: CurvatureName,
    hvp: ProductMethod,
    budget: GraphBudget | None = None,
) -> CurvatureOperator:
    """Makes an operator.

    Args:
        objective: What products see.
        parameters: The parameters to differentiate by.
        curvature: ``"hessian"``, ``"gauss_newton"``, ``"fisher"`` or ``"gradient_covariance"``.
        hvp: How products are computed.
        budget: Byte budget for kept graphs; 1 GiB if left out.

    Returns:
        The operator.

    Raises:
        ValueError: A name is unknown, or the two do not go together.
    """
    check_curvature(curvature, hvp)
    if hvp == "finite_difference":
        return FiniteDifferenceOperator(objective, parameters)
    return _KINDS[curvature](objective, parameters, retention=hvp, budget=budget)
