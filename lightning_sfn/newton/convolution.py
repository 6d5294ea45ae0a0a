"""A convolution whose second derivative is made of the convolutions that it needs and no others.

PyTorch's own takes the derivative by the weight as a convolution with a kernel as large as the image, several times
slower than the weight gradient that it equals.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_sfn.newton.transforms import is_transformed

__all__ = ["Geometry", "convolution", "for_each_dimension", "padded"]


class Geometry(NamedTuple):
    """How the kernel moves over the image, each a number for every spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def for_each_dimension(value: Any, count: int) -> tuple[int, ...]:
    """A length that was given as one number or several, as one for each of ``count`` dimensions."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * count if len(values) == 1 else values


def padded(inputs: Tensor, weight: Tensor, padding: Any, dilation: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Images and their padding in numbers, where it may have been given in a word.

    Args:
        inputs: Shape ``(B, C, ...)``.
        weight: Shape ``(O, C / groups, ...)``.
        padding: Numbers, ``"valid"``, or ``"same"``, which puts what is odd behind the image, as PyTorch does.
        dilation: One number or several.

    Returns:
        The images, longer by what is odd, and a number for every spatial dimension.
    """
    spatial = weight.dim() - 2
    if padding != "same":
        return inputs, for_each_dimension(0 if padding == "valid" else padding, spatial)
    lengths = zip(for_each_dimension(dilation, spatial), weight.shape[2:], strict=True)
    total = [step * (size - 1) for step, size in lengths]
    if any(length % 2 for length in total):
        behind = [side for length in reversed(total) for side in (0, length % 2)]
        inputs = torch.nn.functional.pad(inputs, behind)
    return inputs, tuple(length // 2 for length in total)


def convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """What `torch.nn.functional.conv2d` and its siblings compute, with exact derivatives of every order.

    Args:
        inputs: Shape ``(B, C, ...)``.
        weight: Shape ``(O, C / groups, ...)``.
        bias: Shape ``(O,)``, or ``None``.
        geometry: Stride, padding, dilation and groups.

    Returns:
        Shape ``(B, O, ...)``.
    """
    output: Tensor = _Convolution.apply(inputs, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return output


def _forward(inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(inputs, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by inputs, weight and bias, as far as the mask wants them."""
    stride, padding, dilation, groups = geometry
    zero = [0] * len(stride)
    sizes = [weight.shape[0]]
    results: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        gradient, inputs, weight, sizes, stride, padding, dilation, False, zero, groups, mask
    )
    return results


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry = geometry
        return _forward(inputs, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not is_transformed(gradient):
            results = _ConvolutionBackward.apply(gradient, inputs, weight, ctx.geometry, mask)  # type: ignore[no-untyped-call]
        else:
            results = _backward(gradient, inputs, weight, ctx.geometry, mask)
        return *results, None


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, inputs, weight)
        ctx.geometry = geometry
        by_inputs, by_weight, by_bias = _backward(gradient, inputs, weight, geometry, mask)
        # With an empty mask entry PyTorch gives an undefined tensor or an empty one, depending on its version.
        return tuple(x if m else None for x, m in zip((by_inputs, by_weight, by_bias), mask, strict=True))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, inputs, weight = ctx.saved_tensors
        by_inputs, by_weight, by_bias = directions
        geometry, (to_gradient, to_inputs, to_weight) = ctx.geometry, ctx.needs_input_grad[:3]
        for_gradient = for_inputs = for_weight = None
        if to_gradient:
            terms = [_forward(inputs, by_weight, None, geometry)] if by_weight is not None else []
            if by_inputs is not None:
                terms.append(_forward(by_inputs, weight, None, geometry))
            if by_bias is not None:
                terms.append(by_bias.view(-1, *[1] * len(geometry.stride)).expand_as(gradient))
            for_gradient = sum(terms[1:], terms[0]) if terms else None
        if to_inputs and by_weight is not None:
            for_inputs = _backward(gradient, inputs, by_weight, geometry, [True, False, False])[0]
        if to_weight and by_inputs is not None:
            for_weight = _backward(gradient, by_inputs, weight, geometry, [False, True, False])[1]
        return for_gradient, for_inputs, for_weight, None, None
