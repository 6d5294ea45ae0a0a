import math

import pytest

from lightning_sfn.newton import IdentityPreconditioner, KroneckerFactors
from lightning_sfn.newton.options import (
    require_at_least,
    require_positive_or_none,
    require_whole,
    resolve_krylov_dim,
)


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, True])
def test_numbers_from_the_minimum_on_are_let_through(value: float) -> None:
    require_at_least("lr", value, 0.0)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan, "1", None])
def test_other_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^lr is {value!r}, but a number of at least 0 is expected\.$"):
        require_at_least("lr", value, 0.0)


def test_whole_numbers_are_let_through_whatever_their_type() -> None:
    require_whole("inner_steps", 3, 3)
    require_whole("inner_steps", 4.0, 3)


def test_numbers_that_are_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^inner_steps is 3\.5, but a whole number of at least 3 is expected\.$"):
        require_whole("inner_steps", 3.5, 3)
    with pytest.raises(ValueError, match=r"^inner_steps is 2, but a number of at least 3 is expected\.$"):
        require_whole("inner_steps", 2, 3)


@pytest.mark.parametrize("value", [None, 1e-30, 3, math.inf])
def test_bounds_may_be_left_out(value: float | None) -> None:
    require_positive_or_none("max_step_norm", value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1"])
def test_bounds_that_are_not_positive_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^max_step_norm is {value!r}, but a positive number or None is expected\.$"):
        require_positive_or_none("max_step_norm", value)


@pytest.mark.parametrize(
    ("asked", "size", "factored", "expected"),
    [
        (None, 1000, False, 16),
        (None, 16, False, 16),
        (None, 7, False, 7),
        (None, 1000, True, 4),
        (None, 3, True, 3),
        ("full", 1000, False, None),
        (1, 1, False, 1),
        (500, 500, True, 500),
    ],
)
def test_the_size_of_the_subspace(asked: int | None, size: int, factored: bool, expected: int | None) -> None:
    coordinates = KroneckerFactors() if factored else IdentityPreconditioner()
    assert resolve_krylov_dim(asked, size, coordinates) == expected  # type: ignore[arg-type]
