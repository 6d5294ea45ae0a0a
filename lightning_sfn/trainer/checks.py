"""Checks of the options of callbacks, strategies and the mixin, each with one sentence about what is expected."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.newton.options import is_number, is_whole, require_at_least

__all__ = [
    "misconfigured",
    "require_choice",
    "require_count",
    "require_factory",
    "require_name",
    "require_number",
    "require_share",
]


@contextmanager
def misconfigured() -> Iterator[None]:
    """Lets what plain torch calls a `ValueError`, in the body, be the error that users of Lightning expect.

    Raises:
        MisconfigurationException: The body raised one.
    """
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def require_count(name: str, value: Any, least: int = 1, *, of: str = "", otherwise: Sequence[Any] = ()) -> None:
    """Refuses what is no whole number, or is below a minimum.

    Args:
        name: The option.
        value: What was given for it.
        least: The least value.
        of: What it counts, for the message.
        otherwise: What else may be given.

    Raises:
        MisconfigurationException: The value is none of those.
    """
    whole = is_whole(value)
    if not (whole and value >= least) and not _is_one_of(value, otherwise):
        counted = f" of {of}" if of else ""
        wanted = f"a positive number{counted}" if least == 1 else f"a number{counted} of at least {least}"
        where = "" if whole else ", where numbers are whole"
        _refuse(name, value, " or ".join([wanted, *map(repr, otherwise)]), where)


def require_number(name: str, value: Any) -> None:
    """Refuses what is no finite number, or is negative.

    Raises:
        MisconfigurationException: The value is none of those.
    """
    with misconfigured():
        require_at_least(name, value, 0.0)


def require_share(name: str, value: Any) -> None:
    """Refuses what is no share above 0 and up to 1.

    Raises:
        MisconfigurationException: The value is none.
    """
    if not (is_number(value) and 0 < value <= 1):
        _refuse(name, value, "a share above 0 and up to 1")


def require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses what is none of a few values.

    Raises:
        MisconfigurationException: The value is none of them.
    """
    if not _is_one_of(value, choices):
        _refuse(name, value, " or ".join(map(repr, choices)))


def require_name(name: str, value: Any) -> None:
    """Refuses what is no name of a metric.

    Raises:
        MisconfigurationException: The value is none.
    """
    if not (isinstance(value, str) and value):
        _refuse(name, value, "the name of a metric")


def require_factory(optimizer: Any) -> None:
    """Refuses what cannot make an optimizer.

    Raises:
        MisconfigurationException: It is not callable.
    """
    if not callable(optimizer):
        raise MisconfigurationException(
            f"optimizer is an object of class {type(optimizer).__name__}, but something that makes one from "
            "parameters is expected: SaddleFreeNewton itself, or functools.partial(SaddleFreeNewton, ...)."
        )


def _is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    return any(isinstance(value, type(choice)) and value == choice for choice in choices)


def _refuse(name: str, value: Any, wanted: str, where: str = "") -> None:
    raise MisconfigurationException(f"{name} is {value!r}, but {wanted} is expected{where}.")
