"""Newton's method as a finder of critical points of any index (Section 3, Appendix C)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfn.newton.curvature import HessianOperator, gradient_of
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.parameters import FlatParameters

__all__ = ["CriticalPoint", "find_critical_point"]

_CAUTION = 2.0  # factor on the regularisation after a refused step; it doubles with each refusal in a row
_HOPELESS = 1e12
_SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring


@dataclass(frozen=True)
class CriticalPoint:
    """Where a search ended.

    Attributes:
        found: Whether the gradient's norm is below the bound, so that this is a critical point.
        loss: The loss there.
        gradient_norm: The gradient's norm there.
        eigenvalues: All eigenvalues of the Hessian there, ascending, float64, shape ``(n,)``.
        steps: Newton steps taken.
    """

    found: bool
    loss: float
    gradient_norm: float
    eigenvalues: Tensor
    steps: int

    @property
    def index(self) -> float:
        """Share of negative eigenvalues, the paper's alpha; what rounding cannot tell from zero does not count."""
        return float((self.eigenvalues < -self.resolution).double().mean())

    @property
    def resolution(self) -> float:
        """Size below which an eigenvalue is zero to rounding."""
        return 1e-10 * float(self.eigenvalues.abs().max())


def find_critical_point(
    closure: Callable[[], Tensor], parameters: FlatParameters, *, bound: float, max_steps: int
) -> CriticalPoint:
    """Moves the parameters to a critical point nearby, whatever its index.

    Newton's method on ``grad f = 0``, globalised by Levenberg and Marquardt: the step is ``-(H^2 + mu)^-1 H g``, which
    tends to Newton's ``-H^-1 g`` as mu falls, and a step is taken only if the gradient's norm falls (mu follows Nielsen
    1999). The loss plays no part, so saddle points attract it as they attract Newton's method.

    Args:
        closure: The loss as a fixed function, in float64.
        parameters: The parameters, which are moved.
        bound: Norm of the gradient below which a point counts as critical.
        max_steps: Hessians spent at most.

    Returns:
        The point where the search ended.

    Raises:
        ValueError: The parameters are not float64, in which the bound would mean little.
    """
    if parameters.dtype != torch.float64:
        raise ValueError(f"The parameters are {parameters.dtype}, but critical points are looked for in float64.")
    objective = Objective([closure])
    loss, gradient = gradient_of(objective, parameters)
    norm, steps, caution, regularisation = float(gradient.norm()), 0, _CAUTION, None
    values, vectors = _eigen(objective, parameters)
    while norm > bound and steps < max_steps and caution < _HOPELESS:
        along = vectors.T @ gradient
        if regularisation is None:
            regularisation = 1e-3 * float(values.abs().max()) ** 2
        step = -(values * along / (values.square() + regularisation))
        origin = parameters.read()
        parameters.write(origin + vectors @ step)
        new_loss, new_gradient = gradient_of(objective, parameters)
        new_norm = float(new_gradient.norm())
        promised = norm**2 - float((along + values * step).norm()) ** 2
        ratio = (norm**2 - new_norm**2) / promised if promised > 0 else -1.0
        if ratio > _SUFFICIENT:
            loss, gradient, norm, steps = new_loss, new_gradient, new_norm, steps + 1
            values, vectors = _eigen(objective, parameters)
            regularisation *= max(0.1, 1 - (2 * ratio - 1) ** 3)
            caution = _CAUTION
        else:  # also where the new gradient is not finite
            parameters.write(origin)
            regularisation *= caution
            caution *= 2
    return CriticalPoint(norm <= bound, loss, norm, values.cpu(), steps)


def _eigen(objective: Objective, parameters: FlatParameters) -> tuple[Tensor, Tensor]:
    """All eigenvalues and eigenvectors of the Hessian."""
    operator = HessianOperator(objective, parameters)
    matrix = dense_matrix(operator).to(parameters.device)
    operator.close()
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
