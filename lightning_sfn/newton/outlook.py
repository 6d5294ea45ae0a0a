"""What saddle-free Newton could achieve at a point, before any step is taken."""

import math
from dataclasses import dataclass

import torch

from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.krylov import lanczos
from lightning_sfn.newton.precision import full_precision
from lightning_sfn.newton.reductions import norm

__all__ = ["Outlook", "outlook_of"]

_DAMPING = 1e-2  # times the largest absolute Ritz value: what a first step of `WarmDamping` is damped with


@dataclass(frozen=True)
class Outlook:
    """The prospects at a point.

    Attributes:
        loss: The loss there.
        lambda_min: Smallest Ritz value, an upper bound on the smallest eigenvalue.
        residual: Error bound of ``lambda_min``.
        predicted_decrease: Decrease of the loss that the quadratic model promises for one damped saddle-free step.
        rounding: The part of the residual that is rounding, or the error of finite differences.
    """

    loss: float
    lambda_min: float
    residual: float
    predicted_decrease: float
    rounding: float = 0.0

    @property
    def has_negative_curvature(self) -> bool:
        """Whether an eigenvalue is negative for certain: the smallest is no larger than the smallest Ritz value."""
        return self.lambda_min < -self.rounding


@full_precision(tf32=False)
def outlook_of(operator: CurvatureOperator, krylov_dim: int, *, seed: int = 0) -> Outlook:
    """Probes a point in a Krylov subspace.

    The start vector is half gradient, half random, so that the subspace sees what a step would see and also curvature
    that the gradient is blind to. For Ritz pairs (theta_i, y_i) with gradient components c_i and damping d, the step
    ``-c_i / (|theta_i| + d)`` changes the quadratic model by
    ``-c_i^2 / (|theta_i| + d) + theta_i c_i^2 / (2 (|theta_i| + d)^2)``.

    Args:
        operator: The curvature; it is closed afterwards.
        krylov_dim: Lanczos vectors, at most the number of parameters.
        seed: Seed of the random half.

    Returns:
        The outlook.
    """
    parameters = operator.parameters
    generator = torch.Generator(parameters.device).manual_seed(seed)
    noise = parameters.random(generator)
    start = noise / norm(noise).to(noise.dtype)
    with torch.no_grad():
        try:
            loss, gradient = operator.loss_and_gradient()
            length = norm(gradient).to(gradient.dtype)
            if float(length) > 0:
                start = start + gradient / length
            space = lanczos(operator.matvec, start, krylov_dim, generator=generator)
        finally:
            operator.close()
        if not bool(torch.isfinite(space.projected).all()):
            operator.objective.require_sound(space.projected, far=True)
            return Outlook(loss, math.nan, math.nan, math.nan)  # promises nothing
        values, along = space.eigenvalues, space.coordinates(gradient)
        inverse = 1 / (values.abs() + _DAMPING * values.abs().max())
        decrease = (along.square() * inverse * (1 - values * inverse / 2)).sum()
    off = operator.inaccuracy * float(values.abs().max())
    residual, rounding = (math.hypot(error, off) for error in (float(space.residuals[0]), space.rounding))
    return Outlook(loss, float(values[0]), residual, float(decrease), rounding)
