"""The spectrum of a Hessian, without a Trainer: Ritz values with error bounds, index, loss and gradient norm."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.krylov import lanczos
from lightning_sfn.newton.objective import Closure, Objective
from lightning_sfn.newton.operators import CurvatureName, ProductMethod, make_operator
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.reductions import norm

__all__ = ["Spectrum", "hessian_spectrum", "spectrum_of"]


@dataclass(frozen=True)
class Spectrum:
    """Ritz values of a Hessian on a Krylov subspace.

    Attributes:
        eigenvalues: Ritz values in ascending order, float64, shape ``(k,)``. Every one lies between the Hessian's
            smallest and largest eigenvalue, and the ends converge first.
        residuals: Error bounds: within ``residuals[i]`` of ``eigenvalues[i]`` there is an eigenvalue.
        loss: The loss at which the Hessian was taken.
        gradient_norm: Norm of the gradient there.
        products: Hessian-vector products spent.
    """

    eigenvalues: Tensor
    residuals: Tensor
    loss: float
    gradient_norm: float
    products: int

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value: an upper bound on the smallest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value: a lower bound on the largest eigenvalue."""
        return float(self.eigenvalues[-1])

    @property
    def residual_max(self) -> float:
        """The larger of the error bounds of `lambda_min` and `lambda_max`."""
        return max(float(self.residuals[0]), float(self.residuals[-1]))

    @property
    def negative_fraction(self) -> float:
        """Share of the Ritz values that are negative beyond rounding (the paper's index alpha, within the subspace)."""
        return float((self.eigenvalues < -self.residuals.min()).double().mean())  # residuals include rounding

    def __str__(self) -> str:
        """The numbers in one line."""
        return (
            f"eigenvalues from {self.lambda_min:.4g} to {self.lambda_max:.4g} (error up to {self.residual_max:.1g}), "
            f"{self.negative_fraction:.0%} of {len(self.eigenvalues)} Ritz values negative; loss {self.loss:.6g}, "
            f"gradient norm {self.gradient_norm:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            "lambda_min": self.lambda_min,
            "lambda_max": self.lambda_max,
            "negative_fraction": self.negative_fraction,
            "gradient_norm": self.gradient_norm,
            "loss": self.loss,
            "products": self.products,
        }


def hessian_spectrum(
    closure: Closure,
    params: Iterable[Tensor],
    krylov_dim: int | None = None,
    *,
    curvature: CurvatureName = "hessian",
    hvp: ProductMethod = "auto",
    seed: int = 0,
) -> Spectrum:
    """Ritz values of the Hessian of a loss, by Lanczos from a random vector.

    Args:
        closure: Returns the loss with its graph (with ``curvature="gauss_newton"`` the pair of loss and output). It is
            evaluated once or a few times and must not call ``backward``.
        params: The parameters; nothing about them is changed.
        krylov_dim: Number of Lanczos vectors, each one Hessian-vector product. 64 (or the number of parameters, if
            smaller) when left out.
        curvature: ``"hessian"`` or ``"gauss_newton"``.
        hvp: ``"auto"``, ``"retain"``, ``"recompute"`` or ``"finite_difference"``, as in `SaddleFreeNewton`.
        seed: Seed of the start vector.

    Returns:
        The spectrum.

    Raises:
        ValueError: ``krylov_dim`` is not between 1 and the number of parameters, or a name is unknown.
        CurvatureError: An operation has no second derivative.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> hessian_spectrum(lambda: 5 * x[0] ** 2 - x[1] ** 2, [x], krylov_dim=2).eigenvalues.round(decimals=4)
        tensor([-2., 10.], dtype=torch.float64)
    """
    parameters = FlatParameters(params)
    krylov_dim = min(64, parameters.size) if krylov_dim is None else krylov_dim
    if not 1 <= krylov_dim <= parameters.size:
        raise ValueError(
            f"krylov_dim is {krylov_dim}, but a number from 1 to {parameters.size} (all parameters) is expected."
        )
    operator = make_operator(Objective([closure]), parameters, curvature, hvp)
    return spectrum_of(operator, krylov_dim, seed=seed)


def spectrum_of(operator: CurvatureOperator, krylov_dim: int, *, seed: int = 0) -> Spectrum:
    """Ritz values of a curvature operator, by Lanczos from a random vector.

    Args:
        operator: The operator; it is closed afterwards.
        krylov_dim: Number of Lanczos vectors; at most the number of parameters are built.
        seed: Seed of the start vector.

    Returns:
        The spectrum.
    """
    parameters = operator.parameters
    generator = torch.Generator(parameters.device).manual_seed(seed)
    start = torch.randn(parameters.size, dtype=parameters.dtype, device=parameters.device, generator=generator)
    with torch.no_grad():
        try:
            loss, gradient = operator.loss_and_gradient()
            space = lanczos(operator.matvec, start, krylov_dim, generator=generator)
        finally:
            operator.close()
    return Spectrum(space.eigenvalues, space.residuals, loss, float(norm(gradient)), space.products)
