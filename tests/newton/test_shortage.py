"""Lack of memory is recognised whatever raises it, and a step makes do with less."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import CurvatureError, CurvatureOperator, Objective, SaddleFreeNewton
from lightning_sfn.newton.processes import ProcessMean
from lightning_sfn.newton.shortage import is_out_of_memory


def chained() -> BaseException:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise CurvatureError("A second derivative failed") from error
    except CurvatureError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (chained(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (CurvatureError("no second derivative"), False),
        (None, False),
    ],
)
def test_recognising_it(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


class Limited(SaddleFreeNewton):
    """Has memory for so many Lanczos vectors and so many bytes of graphs."""

    vectors, graphs = 2, 0

    def operator(self, objective: Any, parameters: Any) -> CurvatureOperator:
        operator = super().operator(objective, parameters)
        matvec = operator.matvec

        def limited(vector: Tensor) -> Tensor:
            if (
                self._budget.limit > self.graphs
                or not isinstance(self.krylov_dim, int)
                or self.krylov_dim > self.vectors
            ):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return matvec(vector)

        operator.matvec = limited  # type: ignore[method-assign]
        operator.matmat = lambda vectors: torch.stack([limited(v) for v in vectors])  # type: ignore[method-assign]
        return operator


def quartic(x: Tensor) -> Tensor:
    return (x**4 - x**2).sum()


@pytest.mark.parametrize(("hvp", "heavy_ball"), [("auto", 0.0), ("retain", 0.0), ("auto", 0.5)])
def test_first_graphs_are_given_up_and_then_vectors(hvp: Any, heavy_ball: float) -> None:
    x = torch.full((8,), 0.3, requires_grad=True)
    optimizer = Limited([x], krylov_dim=8, graph_bytes=2**26, hvp=hvp, heavy_ball=heavy_ball)
    with pytest.warns(UserWarning, match="Memory ran out") as caught:
        loss = optimizer.step(lambda: quartic(x))
    said = [str(warning.message) for warning in caught]
    assert ["graph_bytes=16777216 and krylov_dim=8" in said[0], "graph_bytes=0 and krylov_dim=8" in said[1]] == [
        True
    ] * 2
    assert ["krylov_dim=4" in said[2], "krylov_dim=2" in said[3], len(said)] == [True, True, 4]
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted
    assert quartic(x) < loss


@pytest.mark.parametrize(
    ("had", "left"),
    [
        (("auto", 2**26, 8), ("auto", 2**24, 8)),
        (("retain", 2**26 + 3, 8), ("auto", 2**24, 8)),
        (("auto", 2**24, 8), ("auto", 0, 8)),
        (("retain", 2**24, "full"), ("auto", 0, "full")),
        (("auto", 1, 8), ("auto", 0, 8)),
        (("auto", 0, 8), ("auto", 0, 4)),
        (("recompute", 2**26, 5), ("recompute", 2**26, 2)),
        (("finite_difference", 2**26, 2), ("finite_difference", 2**26, 1)),
        (("auto", 0, None), ("auto", 0, 4)),
        (("auto", 0, 1), None),
        (("auto", 0, "full"), None),
    ],
    ids=str,
)
def test_what_is_given_up_and_what_is_said_about_it(had: tuple[Any, ...], left: tuple[Any, ...] | None) -> None:
    """Without a number of vectors, the 8 parameters have one each."""
    x = torch.full((8,), 0.3, requires_grad=True)
    optimizer = SaddleFreeNewton([x], hvp=had[0], graph_bytes=had[1], krylov_dim=had[2], preconditioner=None)
    if left is None:
        assert not optimizer._economise(optimizer._parameters)
        left = had
    else:
        vectors = "all" if left[2] == "full" else left[2]
        said = (
            f"^Memory ran out in a Newton step. It is tried again with graph_bytes={left[1]} and krylov_dim={vectors}: "
            "pass these values to begin with.$"
        )
        with pytest.warns(UserWarning, match=said):
            assert optimizer._economise(optimizer._parameters)
    assert (optimizer.hvp, optimizer._budget.limit, optimizer.krylov_dim) == left


def test_where_nothing_is_left_to_give_the_error_is_raised_and_nothing_lost() -> None:
    x = torch.full((8,), 0.3, requires_grad=True)
    optimizer = Limited([x], krylov_dim="full", graph_bytes=0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(lambda: quartic(x))
    assert torch.equal(x.detach(), torch.full((8,), 0.3))


class Shared(ProcessMean):
    """Stands for the mean over several processes."""

    def __init__(self) -> None:
        self.processes = mock.Mock(guard=lambda compute, like: compute(), collect=lambda value: [value], rank=0)

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


def test_a_step_shared_with_other_processes_is_not_repeated() -> None:
    """The others would wait for products that this process has taken already."""
    x = torch.full((8,), 0.3, requires_grad=True)
    optimizer = Limited([x], krylov_dim=8)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step_on(Objective([lambda: quartic(x)], reduce=Shared()))
    assert optimizer.krylov_dim == 8
