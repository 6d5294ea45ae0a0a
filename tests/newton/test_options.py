import math
from typing import Any

import numpy as np
import pytest

from lightning_sfn.newton.options import (
    require_at_least,
    require_krylov_dim,
    require_positive_or_none,
    require_seed,
    require_whole,
)


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, np.float32(0.5), np.int64(3)])
def test_numbers_from_the_minimum_on_are_let_through(value: float) -> None:
    found = require_at_least("lr", value, 0.0)
    assert (type(found), found) == (float, value)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan, "1", None, True])
def test_other_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^lr is {value!r}, but a number of at least 0 is expected\.$"):
        require_at_least("lr", value, 0.0)


def test_whole_numbers_are_let_through_whatever_their_type() -> None:
    assert require_whole("inner_steps", 3, 3) == 3
    for value in (4.0, np.int64(4), np.float32(4)):
        assert type(require_whole("inner_steps", value, 3)) is int


def test_numbers_that_are_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^inner_steps is 3\.5, but a whole number of at least 3 is expected\.$"):
        require_whole("inner_steps", 3.5, 3)
    with pytest.raises(ValueError, match=r"^inner_steps is 2, but a number of at least 3 is expected\.$"):
        require_whole("inner_steps", 2, 3)


@pytest.mark.parametrize("value", [None, 1e-30, 3, math.inf, np.float32(2)])
def test_bounds_may_be_left_out(value: float | None) -> None:
    found = require_positive_or_none("max_step_norm", value)
    assert found == value
    assert found is None or type(found) is float


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1", True])
def test_bounds_that_are_not_positive_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^max_step_norm is {value!r}, but a positive number or None is expected\.$"):
        require_positive_or_none("max_step_norm", value)


@pytest.mark.parametrize(
    ("asked", "size"),
    [(None, 1), ("full", 1000), (1, 1), (500, 500)],
)
def test_sizes_of_a_subspace_are_let_pass(asked: Any, size: int) -> None:
    assert require_krylov_dim(asked, size) == asked


def test_numbers_of_numpy_become_pythons_own() -> None:
    assert type(require_krylov_dim(np.int32(4), 5)) is int  # type: ignore[arg-type]
    assert type(require_seed(np.int64(4))) is int


@pytest.mark.parametrize("seed", [None, 1.0, "0", True])
def test_what_seeds_no_generator_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match=rf"^seed is {seed!r}, but an integer is expected, so that results repeat\.$"):
        require_seed(seed)


@pytest.mark.parametrize("asked", [0, -2, 1.5, True, "all"])
def test_what_is_no_size_is_refused(asked: object) -> None:
    sentence = rf"^krylov_dim is {asked!r}, but a positive integer, 'full' or None is expected\.$"
    with pytest.raises(ValueError, match=sentence):
        require_krylov_dim(asked, 1000)  # type: ignore[arg-type]


def test_a_space_larger_than_the_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^krylov_dim is 5, but there are only 4 trainable parameters: .*'full'\.$"):
        require_krylov_dim(5, 4)
