"""Tanh and sigmoid with second derivatives in few passes over memory.

Both are functions of their own output: ``y' = 1 - y^2`` and ``y' = y (1 - y)``. Autograd's formulas for the derivative
of the gradient take four or five passes, each as long as the layer's output; these take three.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_sfn.newton.transforms import is_transformed

__all__ = ["sigmoid", "tanh"]


def tanh(inputs: Tensor) -> Tensor:
    """Hyperbolic tangent, element by element, with exact derivatives of every order."""
    output: Tensor = _Tanh.apply(inputs)  # type: ignore[no-untyped-call]
    return output


def sigmoid(inputs: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``, element by element, with exact derivatives of every order."""
    output: Tensor = _Sigmoid.apply(inputs)  # type: ignore[no-untyped-call]
    return output


class _Tanh(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        output = torch.tanh(inputs)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not is_transformed(gradient):
            result: Tensor = _TanhBackward.apply(gradient, output)  # type: ignore[no-untyped-call]
            return result
        return torch.ops.aten.tanh_backward(gradient, output)  # type: ignore[no-any-return]


class _TanhBackward(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, output)
        return torch.ops.aten.tanh_backward(gradient, output)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor]:
        gradient, output = ctx.saved_tensors
        if torch.is_grad_enabled():
            return direction * (1 - output * output), -2 * direction * gradient * output
        bent = torch.addcmul(output.new_zeros(()), direction * gradient, output, value=-2)
        return torch.ops.aten.tanh_backward(direction, output), bent


class _Sigmoid(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        output = torch.sigmoid(inputs)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not is_transformed(gradient):
            result: Tensor = _SigmoidBackward.apply(gradient, output)  # type: ignore[no-untyped-call]
            return result
        return torch.ops.aten.sigmoid_backward(gradient, output)  # type: ignore[no-any-return]


class _SigmoidBackward(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, output)
        return torch.ops.aten.sigmoid_backward(gradient, output)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor]:
        gradient, output = ctx.saved_tensors
        if torch.is_grad_enabled():
            return direction * output * (1 - output), direction * gradient * (1 - 2 * output)
        product = direction * gradient
        return torch.ops.aten.sigmoid_backward(direction, output), product.addcmul(product, output, value=-2)
