"""A linear layer whose weight gets its two shares of a Hessian-vector product in one place.

A product reaches a weight twice: through the layer, and through the layer's gradient. Autograd writes each share into
memory of its own and adds them in a third pass, up to a twentieth of a product where wide layers see few cases.
Here the layer hands its weight on to its gradient as a second output, so the gradient's share comes back through the
layer, which adds its own in the matrix product that computes it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lightning_sfn.newton.transforms import is_transformed

__all__ = ["affine"]


def affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `torch.nn.functional.linear` computes, with exact derivatives of every order.

    Args:
        inputs: Shape ``(..., I)``.
        weight: Shape ``(O, I)``.
        bias: Shape ``(O,)``, or ``None``.

    Returns:
        Shape ``(..., O)``.
    """
    output: Tensor = _Affine.apply(inputs, weight, bias)[0]  # type: ignore[no-untyped-call]
    return output


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _Affine(Function):
    """Inputs, weight and bias to outputs, and to the weight once more, for the gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        handed_on = weight.view_as(weight)
        # Data need no gradient, and that by the weight does not read the weight, which may be changed in place then.
        ctx.save_for_backward(inputs, handed_on if ctx.needs_input_grad[0] else None)
        # With a bias it may be a view of rows, and what is one of several outputs must be none to be changed in place.
        return F.linear(inputs, weight, bias).data, handed_on

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, share: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, share, None
        inputs, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return _gradients(gradient, inputs, weight, needed, share)
        compute: Callable[..., Any] = _gradients if is_transformed(gradient) else _AffineBackward.apply
        by_inputs, by_weight, by_bias = compute(gradient, inputs, weight, needed)
        return by_inputs, by_weight if share is None else by_weight + share, by_bias


class _AffineBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, inputs: Tensor, weight: Tensor | None, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient if needed[0] else None, inputs, weight)
        return _gradients(gradient, inputs, weight, needed)

    @staticmethod
    def backward(
        ctx: Any, by_inputs: Tensor | None, by_weight: Tensor | None, by_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, inputs, weight = ctx.saved_tensors
        to_gradient, to_inputs, to_weight = ctx.needs_input_grad[:3]
        for_gradient = for_inputs = for_weight = None
        if to_gradient:
            for_gradient = _tangent(inputs, weight, (by_inputs, by_weight, by_bias))
        if to_inputs and by_weight is not None:
            for_inputs = gradient @ by_weight
        if to_weight and by_inputs is not None:
            for_weight = _rows(gradient).t() @ _rows(by_inputs)
        return for_gradient, for_inputs, for_weight, None


def _tangent(inputs: Tensor, weight: Tensor | None, directions: tuple[Tensor | None, ...]) -> Tensor | None:
    """How the outputs change where inputs, weight and bias move along directions; ``None`` where none does."""
    by_inputs, by_weight, by_bias = directions
    if by_inputs is None or weight is None:
        if by_weight is not None:
            return F.linear(inputs, by_weight, by_bias)
        return by_bias if by_bias is None else by_bias.expand(*inputs.shape[:-1], -1)
    if by_weight is None:
        return F.linear(by_inputs, weight, by_bias)
    change = F.linear(inputs, by_weight, by_bias)
    if torch.is_grad_enabled():
        return change + F.linear(by_inputs, weight)
    return _rows(change).addmm_(_rows(by_inputs), weight.t()).view_as(change)


def _gradients(
    gradient: Tensor, inputs: Tensor, weight: Tensor | None, needed: tuple[bool, ...], share: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """From the gradient by the outputs, shape ``(..., O)``, those by inputs, weight and bias, as far as needed.

    Without the weight, inputs have none. The memory of ``share``, which the gradient by the weight consists of as well,
    becomes that of the sum.
    """
    by_inputs = by_weight = None
    if weight is not None and needed[0]:
        by_inputs = gradient @ weight
    if needed[1]:
        across, along = _rows(gradient).t(), _rows(inputs)
        by_weight = across @ along if share is None else share.addmm_(across, along)
    return by_inputs, by_weight, _rows(gradient).sum(0) if needed[2] else None
