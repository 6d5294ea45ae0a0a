"""Section 5's generalised trust-region family: how the eigenvalues of the subspace scale the gradient.

Each member divides the gradient along an eigenvector by a function of its eigenvalue. A new member is one function and
one entry in `RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RULES", "TrustRegion", "trust_region"]


@dataclass(frozen=True)
class TrustRegion:
    """One member of the family.

    Attributes:
        inverse: Maps eigenvalues (shape ``(k,)``) and a damping (shape broadcastable) to the factors that multiply the
            gradient's coordinates; the step is their negative product.
        damped: Whether the damping has any effect.
        uses_negative_curvature: Whether the rule moves away from a saddle along directions of negative curvature.
    """

    inverse: Callable[[Tensor, Tensor], Tensor]
    damped: bool = True
    uses_negative_curvature: bool = False


def _saddle_free(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    return 1 / (eigenvalues.abs() + damping)


def _newton(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    # Directions that the projection shows as flat to rounding have no Newton step: leave them where they are.
    flat = eigenvalues.abs() <= torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
    return torch.where(flat, 0.0, 1 / eigenvalues) + 0.0 * damping


def _damped_newton(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    return 1 / (eigenvalues + damping)


def _truncated_newton(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    return torch.where(eigenvalues > 0, 1 / (eigenvalues.clamp_min(0) + damping), 0.0)


def _gradient(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    return torch.ones_like(eigenvalues) + 0.0 * damping


RULES: dict[str, TrustRegion] = {
    "saddle_free": TrustRegion(_saddle_free, uses_negative_curvature=True),  # |H|: Section 5, Algorithm 1
    "newton": TrustRegion(_newton, damped=False),  # H: attracted by saddles, Section 4
    "damped_newton": TrustRegion(_damped_newton),  # H + lambda I: "trust region" of Section 4
    "truncated_newton": TrustRegion(_truncated_newton),  # ignores negative curvature, Section 4
    "gradient": TrustRegion(_gradient, damped=False),  # gradient descent: the learning rate is all there is
}
"""The members by name."""


def trust_region(name: str) -> TrustRegion:
    """Looks a member up.

    Args:
        name: A key of `RULES`.

    Returns:
        The member.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in RULES:
        raise ValueError(f"trust_region is {name!r}, but one of {', '.join(map(repr, RULES))} is expected.")
    return RULES[name]
