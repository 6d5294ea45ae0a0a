"""Checks of the optimizer's plain options, and the size of the subspace where none is asked for.

Options that name something are checked where the names are: `operators`, `basis`, `damping`, `coordinates`,
`trust_region`.
"""

import math
from typing import Literal

from lightning_sfn.newton.kronecker import KroneckerFactors
from lightning_sfn.newton.preconditioner import Preconditioner

__all__ = ["require_at_least", "require_positive_or_none", "require_whole", "resolve_krylov_dim"]

_DEFAULT_KRYLOV_DIM = 16
_DEFAULT_IN_KRONECKER_COORDINATES = 4  # the factors know most of what further vectors would tell


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Refuses what is no finite number, or is below a minimum.

    Args:
        name: The option.
        value: What was given for it.
        minimum: The least value.

    Raises:
        ValueError: The value is none of those.
    """
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} is {value!r}, but a number of at least {minimum:g} is expected.")


def require_whole(name: str, value: float, minimum: int) -> None:
    """Refuses what is no whole number, or is below a minimum.

    Args:
        name: The option.
        value: What was given for it.
        minimum: The least value.

    Raises:
        ValueError: The value is none of those.
    """
    require_at_least(name, value, minimum)
    if int(value) != value:
        raise ValueError(f"{name} is {value}, but a whole number of at least {minimum} is expected.")


def require_positive_or_none(name: str, value: float | None) -> None:
    """Refuses a bound that is neither positive nor left out.

    Args:
        name: The option.
        value: What was given for it.

    Raises:
        ValueError: The value is neither.
    """
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ValueError(f"{name} is {value!r}, but a positive number or None is expected.")


def resolve_krylov_dim(krylov_dim: int | Literal["full"] | None, size: int, coordinates: Preconditioner) -> int | None:
    """The number of Lanczos vectors.

    Args:
        krylov_dim: A number, ``"full"``, or ``None`` for the default.
        size: Number of parameters.
        coordinates: The coordinates of the subspace, on which the default depends.

    Returns:
        The number; ``None`` for the whole space.

    Raises:
        ValueError: It is no positive integer, or more than there are parameters.
    """
    if krylov_dim is None:
        factored = isinstance(coordinates, KroneckerFactors)
        return min(_DEFAULT_IN_KRONECKER_COORDINATES if factored else _DEFAULT_KRYLOV_DIM, size)
    if krylov_dim == "full":
        return None
    if not isinstance(krylov_dim, int) or isinstance(krylov_dim, bool) or krylov_dim < 1:
        raise ValueError(f"krylov_dim is {krylov_dim!r}, but a positive integer, 'full' or None is expected.")
    if krylov_dim > size:
        raise ValueError(
            f"krylov_dim is {krylov_dim}, but there are only {size} trainable parameters: use at most that, or 'full'."
        )
    return krylov_dim
