"""Which operations of a model are evaluated by functions with a better second derivative, seen from outside the model.

A torch function mode sees the calls that layers make, whoever makes them, so no model has to be changed. What is put in
place computes the same function with exact derivatives. Most of it is there because that costs less; weight
normalisation because PyTorch's own second derivative of it is wrong (its norms count as constants). Kernels without a
second derivative, cuDNN's recurrent one and the fused ones of attention, are not used.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda as kernels
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_sfn.newton.activations import sigmoid, tanh
from lightning_sfn.newton.affine import affine
from lightning_sfn.newton.convolution import Geometry, convolution, for_each_dimension, padded
from lightning_sfn.newton.recurrence import tanh_recurrence
from lightning_sfn.newton.saved_tensors import saved_tensor_hooks
from lightning_sfn.newton.transforms import is_transformed
from lightning_sfn.newton.unrolled import stacked

__all__ = ["FastSecondDerivatives"]


class FastSecondDerivatives(TorchFunctionMode):
    """While it is active, convolutions, linear layers, tanh, sigmoid and tanh RNNs have fast second derivatives.

    Weight normalisation has a right one, and attention any. Left alone are calls under autocast (but for these two),
    under functorch transforms, and where somebody else's hooks on saved tensors are active: activation checkpointing
    evaluates a second time later, and must then see the same operations.

    Attributes:
        rounds_otherwise: Whether it has put something in place so far whose values are off by rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks = saved_tensor_hooks()
        self.rounds_otherwise = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None and self._may(func, args[0] if args else kwargs.get("query")):
            result = rule(*args, **kwargs)
            if result is not None:
                self.rounds_otherwise |= func in _ROUNDED
                return result
        return func(*args, **kwargs)

    def _may(self, func: Callable[..., Any], first: Any) -> bool:
        return (
            isinstance(first, Tensor)
            and first.is_floating_point()
            and torch.is_grad_enabled()
            and (func in _UNDER_AUTOCAST or not torch.is_autocast_enabled(first.device.type))
            and not is_transformed()
            and saved_tensor_hooks() == self._hooks
        )


def _tanh(input: Tensor, **others: Any) -> Tensor | None:
    return tanh(input) if input.requires_grad and not others else None


def _sigmoid(input: Tensor, **others: Any) -> Tensor | None:
    return sigmoid(input) if input.requires_grad and not others else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return affine(input, weight, bias) if weight.requires_grad and weight.dim() == 2 else None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    spatial = weight.dim() - 2
    if input.dim() != weight.dim() or not (input.requires_grad or weight.requires_grad):
        return None
    strides = for_each_dimension(stride, spatial)
    if isinstance(padding, str) and padding != "valid" and not (padding == "same" and set(strides) == {1}):
        return None  # for torch to refuse
    image, lengths = padded(input, weight, padding, dilation)
    return convolution(image, weight, bias, Geometry(strides, lengths, for_each_dimension(dilation, spatial), groups))


def _rnn_tanh(*args: Any) -> tuple[Tensor, ...] | None:
    """`torch.nn.RNN`; ``None`` for packed sequences, and where units are dropped between layers."""
    if len(args) == 9 and args[5] and args[6] and args[4] > 1:
        return None  # the masks would be others than those of an evaluation without a product
    results = stacked(args, _tanh_layer)
    if results is None or args[7]:
        return results  # outputs of two directions are put together, in a copy
    return results[0].clone(), *results[1:]  # products need the states, whatever is done to these in place


def _tanh_layer(
    sequence: Tensor, start: list[Tensor], weights: Sequence[Tensor], backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    w_ih, w_hh, *biases = weights
    given = F.linear(sequence, w_ih, sum(biases[1:], biases[0]) if biases else None)
    states = tanh_recurrence(given.flip(0) if backwards else given, start[0], w_hh)
    return states.flip(0) if backwards else states, [states[-1]]


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Any:
    dropout = args[3] if len(args) > 3 else kwargs.get("dropout_p", 0.0)
    return _by_math(F.scaled_dot_product_attention, query, dropout, query, *args, **kwargs)


def _attention_layer(*args: Any, **kwargs: Any) -> Any:
    call = _ATTENTION_LAYER.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if given["need_weights"]:
        return None  # written out by PyTorch itself
    dropout = given["dropout_p"] if given["training"] else 0.0
    return _by_math(F.multi_head_attention_forward, given["query"], dropout, *args, **kwargs)


def _by_math(function: Callable[..., Any], query: Tensor, dropout: float, *args: Any, **kwargs: Any) -> Any:
    """Attention by the one kernel with second derivatives; ``None`` where that is taken anyway, or ruled out.

    Frozen attention needs none.
    """
    if not any(isinstance(given, Tensor) and given.requires_grad for given in (query, *args, *kwargs.values())):
        return None
    if not (any(enabled() for enabled in _FUSED) and _BY_MATH()):
        return None
    if dropout > 0 and query.device.type != "cpu":
        return None  # the masks would be others than those of an evaluation without a product
    with sdpa_kernel(SDPBackend.MATH):
        return function(*args, **kwargs)


_FUSED: tuple[Callable[[], bool], ...] = (
    kernels.flash_sdp_enabled,
    kernels.mem_efficient_sdp_enabled,
    kernels.cudnn_sdp_enabled,
)
_BY_MATH: Callable[[], bool] = kernels.math_sdp_enabled
_ATTENTION_LAYER = inspect.signature(F.multi_head_attention_forward)

_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    torch.rnn_tanh: _rnn_tanh,
    torch._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention_layer,
}

_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
_UNDER_AUTOCAST: frozenset[Callable[..., Any]] = frozenset({torch._weight_norm, *_ATTENTION})

# The others run the same kernels as the model does, so that their values are the same bit for bit.
_ROUNDED: frozenset[Callable[..., Any]] = frozenset({torch.rnn_tanh, torch._weight_norm, *_ATTENTION})
