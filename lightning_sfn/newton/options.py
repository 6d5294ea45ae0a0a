"""Checks of the optimizer's plain options.

Options that name something are checked where the names are: `operators`, `basis`, `damping`, `coordinates`,
`trust_region`.
"""

import math
from typing import Literal, TypeGuard

__all__ = ["is_number", "require_at_least", "require_krylov_dim", "require_positive_or_none", "require_whole"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a number; a boolean is none.

    Args:
        value: What was given.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Refuses what is no finite number, or is below a minimum.

    Args:
        name: The option.
        value: What was given for it.
        minimum: The least value.

    Raises:
        ValueError: The value is none of those.
    """
    if not (is_number(value) and math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} is {value!r}, but a number of at least {minimum:g} is expected.")


def require_whole(name: str, value: float, minimum: int) -> int:
    """Refuses what is no whole number, or is below a minimum.

    Args:
        name: The option.
        value: What was given for it.
        minimum: The least value.

    Returns:
        The number as an integer: ``2e9`` is one too, as configuration files have it.

    Raises:
        ValueError: The value is none of those.
    """
    require_at_least(name, value, minimum)
    if int(value) != value:
        raise ValueError(f"{name} is {value}, but a whole number of at least {minimum} is expected.")
    return int(value)


def require_positive_or_none(name: str, value: float | None) -> None:
    """Refuses a bound that is neither positive nor left out.

    Args:
        name: The option.
        value: What was given for it.

    Raises:
        ValueError: The value is neither.
    """
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(f"{name} is {value!r}, but a positive number or None is expected.")


def require_krylov_dim(krylov_dim: int | Literal["full"] | None, size: int) -> None:
    """Refuses what is no number of Lanczos vectors.

    Args:
        krylov_dim: A number, ``"full"``, or ``None`` for the default.
        size: Number of parameters.

    Raises:
        ValueError: It is no positive integer, or more than there are parameters.
    """
    if krylov_dim is None or krylov_dim == "full":
        return
    if not isinstance(krylov_dim, int) or isinstance(krylov_dim, bool) or krylov_dim < 1:
        raise ValueError(f"krylov_dim is {krylov_dim!r}, but a positive integer, 'full' or None is expected.")
    if krylov_dim > size:
        raise ValueError(
            f"krylov_dim is {krylov_dim}, but there are only {size} trainable parameters: use at most that, or 'full'."
        )
