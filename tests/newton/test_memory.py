import pytest
import torch
from torch import Tensor

from lightning_sfn.newton.memory import StepMemory


def vector(value: float) -> Tensor:
    return torch.full((2,), value)


def contents(memory: StepMemory) -> list[tuple[float, float | None]]:
    return [(float(d.vector[0]), None if d.product is None else float(d.product[0])) for d in memory.directions]


def test_a_secant_is_the_difference_of_the_gradients_around_a_step() -> None:
    memory = StepMemory(5, secants=True)
    memory.record(vector(1), vector(10))
    assert contents(memory) == []
    memory.complete(vector(13))
    assert contents(memory) == [(1, 3)]
    memory.complete(vector(99))  # no step waits any more
    assert contents(memory) == [(1, 3)]


def test_the_newest_step_comes_first_and_the_oldest_leaves() -> None:
    memory = StepMemory(2, secants=True)
    for value in (1, 2, 3):
        memory.record(vector(value), vector(0))
        memory.complete(vector(10 * value))
    assert contents(memory) == [(3, 30), (2, 20)]
    assert len(memory) == 2


def test_without_secants_steps_join_without_a_product_whatever_the_function() -> None:
    memory = StepMemory(2, secants=False)
    memory.record(vector(1), vector(10))
    memory.abandon()
    memory.complete(vector(13))
    assert contents(memory) == [(1, None)]


def with_a_second_step(capacity: int, secants: bool) -> tuple[StepMemory, list[tuple[float, float | None]]]:
    """A memory of one step, in which a second one waits; and what it held before that."""
    memory = StepMemory(capacity, secants=secants)
    memory.record(vector(1), vector(0))
    memory.complete(vector(5))
    before = contents(memory)
    memory.record(vector(2), vector(3))
    return memory, before


@pytest.mark.parametrize("secants", [True, False])
def test_a_step_that_was_taken_back_stays_for_its_secant_alone(secants: bool) -> None:
    memory, before = with_a_second_step(2, secants)
    memory.refute(vector(7))
    assert contents(memory) == ([(2, 4), *before] if secants else before)
    memory.complete(vector(9))  # no step waits any more
    assert len(memory) == (2 if secants else 1)


@pytest.mark.parametrize("secants", [True, False])
def test_a_step_that_was_taken_back_leaves_the_others_as_they_were(secants: bool) -> None:
    memory, before = with_a_second_step(1, secants)
    memory.refute(None)
    memory.complete(vector(7))
    assert contents(memory) == before


@pytest.mark.parametrize("secants", [True, False])
def test_a_memory_without_capacity_keeps_nothing(secants: bool) -> None:
    memory = StepMemory(0, secants=secants)
    memory.record(vector(1), vector(10))
    memory.complete(vector(13))
    assert len(memory) == 0
    assert memory.state_dict() == {"steps": []}


def test_an_abandoned_secant_is_dropped_and_older_ones_stay() -> None:
    memory = StepMemory(3, secants=True)
    memory.record(vector(1), vector(0))
    memory.complete(vector(5))
    memory.record(vector(2), vector(0))
    memory.abandon()
    memory.complete(vector(7))
    assert contents(memory) == [(1, 5)]


def test_clearing_forgets_the_waiting_step_too() -> None:
    memory = StepMemory(3, secants=True)
    memory.record(vector(1), vector(0))
    memory.complete(vector(5))
    memory.record(vector(2), vector(0))
    memory.clear()
    memory.complete(vector(7))
    assert contents(memory) == []


@pytest.mark.parametrize("secants", [True, False])
def test_state_round_trip_includes_the_waiting_step(secants: bool) -> None:
    first, second = StepMemory(3, secants=secants), StepMemory(3, secants=secants)
    first.record(vector(1), vector(0))
    first.complete(vector(5))
    first.record(vector(2), vector(1))
    second.record(vector(9), vector(9))  # is replaced
    second.load_state_dict(first.state_dict())
    for memory in (first, second):
        memory.complete(vector(7))
    assert contents(second) == contents(first) == ([(2, 6), (1, 5)] if secants else [(2, None), (1, None)])


@pytest.mark.parametrize("secants", [True, False])
def test_a_mapped_memory_holds_what_the_function_makes_of_every_vector(secants: bool) -> None:
    memory = StepMemory(2, secants=secants)
    memory.record(vector(1), vector(0))
    memory.complete(vector(5))
    memory.record(vector(2), vector(1))
    other = memory.mapped(lambda v: 10 * v)
    memory.clear()
    other.complete(vector(70))
    assert contents(other) == ([(20, 60), (10, 50)] if secants else [(20, None), (10, None)])
    other.record(vector(3), vector(0))
    other.complete(vector(4))
    assert contents(other)[0] == ((3, 4) if secants else (3, None))
    assert len(other) == 2  # of the same capacity


def test_a_mapped_memory_without_capacity_keeps_nothing() -> None:
    other = StepMemory(0, secants=False).mapped(lambda v: v)
    other.record(vector(1), vector(0))
    assert len(other) == 0


def test_a_memory_of_one_step_keeps_the_last() -> None:
    memory = StepMemory(1, secants=True)
    for value in (1, 2):
        memory.record(vector(value), vector(0))
        memory.complete(vector(value))
    assert contents(memory) == [(2, 2)]


def test_gradient_differences_are_not_loaded_where_there_are_to_be_none() -> None:
    one, two = torch.ones(2), torch.full((2,), 2.0)
    memory, other = StepMemory(3, secants=True), StepMemory(3, secants=False)
    memory.record(one, two)
    memory.complete(3 * one)
    memory.record(two, one)
    other.load_state_dict(memory.state_dict())
    other.abandon()  # the next gradient is another function's
    other.complete(7 * one)
    assert [(d.vector.tolist(), d.product) for d in other.directions] == [([2.0, 2.0], None), ([1.0, 1.0], None)]
