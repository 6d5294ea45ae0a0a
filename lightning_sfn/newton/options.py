"""Checks of the optimizer's plain options.

Options that name something are checked where the names are: `operators`, `basis`, `damping`, `coordinates`,
`trust_region`.
"""

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

__all__ = [
    "is_number",
    "is_whole",
    "require_at_least",
    "require_group_entries",
    "require_krylov_dim",
    "require_positive_or_none",
    "require_seed",
    "require_whole",
]


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a number, NumPy's included; a boolean is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether something is an integer, NumPy's included; a boolean is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_at_least(name: str, value: float, minimum: float) -> float:
    """Refuses what is no finite number, or is below a minimum.

    Returns:
        The number as Python's own: with one of NumPy's in single precision, everything would be computed in that.

    Raises:
        ValueError: The value is none of those.
    """
    if not (is_number(value) and math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} is {value!r}, but a number of at least {minimum:g} is expected.")
    return float(value)


def require_whole(name: str, value: float, minimum: int) -> int:
    """Refuses what is no whole number, or is below a minimum.

    Returns:
        The number as an integer: ``2e9`` is one too, as configuration files have it.

    Raises:
        ValueError: The value is none of those.
    """
    require_at_least(name, value, minimum)
    if int(value) != value:
        raise ValueError(f"{name} is {value}, but a whole number of at least {minimum} is expected.")
    return int(value)


def require_seed(seed: Any) -> int:
    """Refuses what seeds no random generator.

    Returns:
        The seed as an integer.

    Raises:
        ValueError: It is no integer.
    """
    if not is_whole(seed):
        raise ValueError(f"seed is {seed!r}, but an integer is expected, so that results repeat.")
    return int(seed)


def require_positive_or_none(name: str, value: float | None) -> float | None:
    """Refuses a bound that is neither positive nor left out.

    Returns:
        The bound as Python's own number.

    Raises:
        ValueError: The value is neither.
    """
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(f"{name} is {value!r}, but a positive number or None is expected.")
    return None if value is None else float(value)


def require_group_entries(entries: Mapping[str, Any], options: Collection[str]) -> None:
    """Refuses entries of a parameter group that look as if they changed something, and would not.

    Args:
        entries: What the group holds.
        options: Names of the options that hold for all groups alike.

    Raises:
        ValueError: One of them is among the entries, or the group asks for another objective than the loss.
    """
    misplaced = ", ".join(f"{name}={value!r}" for name, value in entries.items() if name in options)
    if misplaced:
        raise ValueError(
            f"A parameter group has {misplaced}, but groups may differ in lr alone: write "
            f"SaddleFreeNewton(params, {misplaced})."
        )
    if decay := entries.get("weight_decay"):
        raise ValueError(
            f"A parameter group has weight_decay={decay!r}, but saddle-free Newton minimizes the loss alone: add "
            "weight_decay / 2 times the sum of squares to the loss, and leave weight_decay out."
        )
    if maximize := entries.get("maximize"):
        raise ValueError(
            f"A parameter group has maximize={maximize!r}, but saddle-free Newton minimizes: negate the loss, and "
            "leave maximize out."
        )


def require_krylov_dim(krylov_dim: int | Literal["full"] | None, size: int) -> int | Literal["full"] | None:
    """Refuses what is no number of Lanczos vectors.

    Args:
        krylov_dim: A number, ``"full"``, or ``None`` for the default.
        size: Number of parameters.

    Returns:
        The number as Python's own.

    Raises:
        ValueError: It is no positive integer, or more than there are parameters.
    """
    if krylov_dim is None or krylov_dim == "full":
        return krylov_dim
    if not is_whole(krylov_dim) or krylov_dim < 1:
        raise ValueError(f"krylov_dim is {krylov_dim!r}, but a positive integer, 'full' or None is expected.")
    if krylov_dim > size:
        raise ValueError(
            f"krylov_dim is {krylov_dim}, but there are only {size} trainable parameters: use at most that, or 'full'."
        )
    return int(krylov_dim)
