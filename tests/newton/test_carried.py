"""What steps hand to each other, on vectors small enough to follow by hand."""

import math

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import (
    DiagonalPreconditioner,
    HessianOperator,
    IdentityPreconditioner,
    KrylovSubspace,
    Objective,
)
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried, moved_to
from lightning_sfn.newton.memory import StepMemory

from .cases import quadratic

GRADIENT = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)


def carried(**entries: object) -> Carried:
    """With a step of ones that waits for the gradient after it; the one before it was zero."""
    memory = StepMemory(3, secants=True)
    memory.record(torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    return Carried(memory, **entries)  # type: ignore[arg-type]


def space(*eigenvalues: float) -> KrylovSubspace:
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return KrylovSubspace(torch.eye(len(values), dtype=torch.float64), torch.diag(values), 0.0, len(values), 0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def noise() -> Tensor:
    vector = torch.randn(3, dtype=torch.float64, generator=generator())
    return vector / torch.linalg.vector_norm(vector)


@pytest.mark.parametrize(
    ("expected", "loss", "kept"),
    [
        (None, 5.0, False),
        ((5.0, 0.0), 5.0, True),
        ((5.0, 0.0), 5.00004, True),  # a loss evaluated twice differs by rounding
        ((5.0, 0.0), 5.00006, False),
        ((-5.0, 0.0), -5.00004, True),
        ((5.0, 0.5), 5.5, True),  # an estimate may be off by its slack
        ((5.0, 0.5), 4.5, True),
        ((5.0, 0.5), 5.51, False),
    ],
)
def test_the_losses_tell_whether_the_function_is_the_same(
    expected: tuple[float, float] | None, loss: float, kept: bool
) -> None:
    state = carried(expected=expected)
    state.complete_secant(loss, GRADIENT, None, BasisStore())
    assert [d.product.tolist() for d in state.memory.directions if d.product is not None] == (
        [GRADIENT.tolist()] if kept else []
    )


@pytest.mark.parametrize(("same", "kept"), [(True, 1), (False, 0)])
def test_what_the_caller_says_of_the_function_counts_more_than_losses(same: bool, kept: int) -> None:
    state = carried(expected=(5.0, 0.0))
    state.complete_secant(9.0 if same else 5.0, GRADIENT, same, BasisStore())
    assert len(state.memory) == kept


def test_a_first_start_is_seeded_by_a_random_direction() -> None:
    seed = carried().start_seed(GRADIENT, IdentityPreconditioner(), generator())
    torch.testing.assert_close(seed, noise())


def test_the_way_out_joins_the_start_in_the_coordinates_of_the_subspace() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 100.0], dtype=torch.float64))
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    coordinates = DiagonalPreconditioner()
    coordinates.refresh(HessianOperator(Objective([quadratic(matrix)(x)]), [x]), torch.Generator().manual_seed(0))
    escape = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    seed = carried(escape=coordinates.scale(escape)).start_seed(GRADIENT, coordinates, generator())
    torch.testing.assert_close(seed, noise() + escape / 5)


@pytest.mark.parametrize(("lowest", "bent"), [(-1.01, True), (-1.0, False), (-0.5, False), (1.0, False)])
def test_a_tenth_of_the_largest_curvature_counts_as_bent(lowest: float, bent: bool) -> None:
    state = carried(bend=0.0 if bent else 1.0)
    ends = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    state.note_curvature(space(lowest, 5.0, 10.0), ends[0])
    assert state.bent is bent
    assert state.bend == max(-lowest, 0.0) / 10
    assert state.escape is not None
    assert torch.equal(state.escape, ends[0])
    assert state.escape.untyped_storage().nbytes() == ends[0].nbytes  # no view that keeps both


@pytest.mark.parametrize(("values", "bend"), [((-2.0, -1.0), math.inf), ((0.0, 0.0), 0.0), ((1.0, 2.0), 0.0)])
def test_without_positive_curvature_any_negative_one_is_beyond_measure(
    values: tuple[float, float], bend: float
) -> None:
    state = carried()
    state.note_curvature(space(*values), GRADIENT)
    assert state.bend == bend


def test_other_parameters_forget_steps_and_the_way_out() -> None:
    state = carried(escape=GRADIENT, bend=0.05)
    state.complete_secant(0.0, GRADIENT, True, BasisStore())
    state.forget()
    assert (len(state.memory), state.escape, state.bent) == (0, None, True)


def test_a_state_goes_on_where_it_was() -> None:
    first = carried(escape=GRADIENT, bend=0.05, expected=(5.0, 0.5), checked=True)
    second = Carried(StepMemory(3, secants=True))
    second.load_state_dict(first.state_dict(), BasisStore())
    for state in (first, second):
        state.complete_secant(5.2, GRADIENT, None, BasisStore())
    assert second.escape is not None
    assert (second.escape.tolist(), second.bend, second.expected) == (GRADIENT.tolist(), 0.05, (5.0, 0.5))
    assert [d.vector.tolist() for d in second.memory.directions] == [[1.0, 1.0, 1.0]]
    assert not second.checked  # another run may be given another loss


def test_a_state_takes_the_dtype_of_the_parameters() -> None:
    first = carried(escape=GRADIENT)
    second = Carried(StepMemory(3, secants=True))
    second.load_state_dict(first.state_dict(), BasisStore(working_dtype=torch.float32))
    second.memory.complete(GRADIENT.float())
    (direction,) = second.memory.directions
    assert second.escape is not None
    assert direction.product is not None
    assert {second.escape.dtype, direction.vector.dtype, direction.product.dtype} == {torch.float32}


def test_moving_reaches_tensors_at_any_depth_and_nothing_else() -> None:
    moved = moved_to(
        torch.device("meta"),
        torch.float64,
        {"a": [torch.ones(2)], "b": (1.5, {"c": torch.ones(1)}), "d": None, "e": torch.arange(2)},
    )
    assert (moved["e"].device.type, moved["e"].dtype) == ("meta", torch.int64)
    for tensor in (moved["a"][0], moved["b"][1]["c"]):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.float64)
    assert type(moved["b"]) is tuple
    assert (moved["b"][0], moved["d"]) == (1.5, None)
