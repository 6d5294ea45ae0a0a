"""Products with the Jacobian of an output, against the dense one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sfn.newton import CurvatureError
from lightning_sfn.newton.jacobian import OutputJacobian


def test_products_both_ways_are_those_of_the_dense_jacobian() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    unused = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def output(a: Tensor, b: Tensor) -> Tensor:
        return (a.T @ b).sin() + a.sum()

    jacobian = OutputJacobian(output(first, second), [first, second, unused])
    dense = torch.autograd.functional.jacobian(output, (first, second))
    directions = [torch.randn_like(t) for t in (first, second, unused)]
    for _ in range(2):  # the graph is kept
        moved = jacobian.forward(directions)
    expected = sum(torch.tensordot(block, d, dims=2) for block, d in zip(dense, directions, strict=False))
    torch.testing.assert_close(moved, expected)
    for _ in range(2):
        *slopes, nothing = jacobian.backward(torch.ones(2, 2, dtype=torch.float64))
    assert nothing is None
    for slope, block in zip(slopes, dense, strict=True):
        torch.testing.assert_close(slope, block.sum((0, 1)))


def test_an_output_that_the_parameters_do_not_move() -> None:
    x, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    jacobian = OutputJacobian(2 * other, [x])
    assert jacobian.forward([torch.ones(2)]) is None
    assert jacobian.backward(torch.ones(2)) == (None,)


class Undifferentiable(torch.autograd.Function):
    """Has no derivative at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("derivative for aten::refusing is not implemented")


class Refusing(torch.autograd.Function):
    """Has derivatives for so many backward passes, and no second ones."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Refusing.passes -= 1
        return Undifferentiable.apply(gradient if Refusing.passes >= 0 else _refused())


def _refused() -> Tensor:
    raise RuntimeError("derivative for aten::refusing is not implemented")


@pytest.mark.parametrize(("way", "passes"), [("neither", 0), ("forward", 1), ("backward", 1)])
def test_an_operation_without_derivative_is_named(way: str, passes: int) -> None:
    layer = nn.Linear(2, 2)
    Refusing.passes = passes

    def products() -> None:
        jacobian = OutputJacobian(Refusing.apply(layer(torch.ones(1, 2))), list(layer.parameters()))
        if way == "forward":
            jacobian.forward(list(layer.parameters()))
        else:
            jacobian.backward(torch.ones(1, 2))

    with pytest.raises(CurvatureError, match=r"^The operation aten::refusing has no second derivative: replace it"):
        products()
