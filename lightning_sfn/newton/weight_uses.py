"""Where weights are used in a loss: inputs and output gradients of every linear map, seen from outside the model.

A torch function mode sees the calls that layers make, whoever makes them (modules, functional code, a replayed training
step), so no hook is placed and no module has to be known.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_sfn.newton.attention import attended
from lightning_sfn.newton.convolution import for_each_dimension, padded
from lightning_sfn.newton.sampled_targets import ElementwiseLosses
from lightning_sfn.newton.saved_tensors import saved_tensor_hooks
from lightning_sfn.newton.unrolled import FUSED, unrolled

__all__ = ["Kind", "Use", "WatchingWeights"]

Kind = Literal["dense", "embedding", "norm"]
"""How a weight acts: as a matrix on vectors, as a table of rows, or element by element."""


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        kind: How the weight acts.
        weight: The weight, the parameter itself.
        bias: The bias that is added, if any.
        gather: Makes `inputs` from what the graph keeps anyway: patches of images are many times as large.
        output: Where the gradient by the output is found.
        channels: The dimension of the output that belongs to the weight's rows.
    """

    kind: Kind
    weight: Tensor
    bias: Tensor | None
    gather: Callable[[], Tensor]
    output: GradientEdge
    channels: int = -1

    @property
    def inputs(self) -> Tensor:
        """What the weight acted on, a row for each place: ``(u, i)``, or indices ``(u,)`` for an embedding."""
        inputs = self.gather()
        return inputs if self.kind == "embedding" else inputs.to(self.weight.dtype)

    def rows(self, gradient: Tensor) -> Tensor:
        """The gradient by the output as rows of shape ``(u, o)``, in the parameters' dtype."""
        moved = gradient.movedim(self.channels, -1)
        return moved.reshape(-1, moved.shape[-1]).to(self.weight.dtype)


class WatchingWeights(TorchFunctionMode):
    """Watches the calls of one evaluation of a loss.

    Under activation checkpointing functions that hide their products are left alone: they are evaluated a second time
    later, unwatched, and must then do the same.

    Args:
        parameters: The parameters whose uses count.
        losses: What answers known loss functions, if targets are to be sampled.

    Attributes:
        uses: What was seen, in order.
    """

    def __init__(self, parameters: Iterable[Tensor], losses: ElementwiseLosses | None) -> None:
        super().__init__()
        self._ids = {id(p) for p in parameters}
        self._losses = losses
        self._hooks = saved_tensor_hooks()
        self.uses: list[Use] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RULES:
            seen = _RULES[func](*args, **kwargs)
            output = func(*args, **kwargs)
            self._note(seen, output)
            return output
        if self._losses is not None and (loss := self._losses.answer(func, args, kwargs)) is not None:
            return loss
        if func in _HIDING and saved_tensor_hooks() == self._hooks:
            results = self._written_out(func, args, kwargs)
            return func(*args, **kwargs) if results is None else results
        return func(*args, **kwargs)

    def _written_out(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...] | None:
        """The results of a function whose products are out of sight, by products that are watched."""
        results = attended(func, args, kwargs, self._linear)
        return unrolled(func, args, self._linear) if results is None else results

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = F.linear(inputs, weight, bias)
        self._note(_of_linear(inputs, weight, bias), output)
        return output

    def _note(self, seen: "_Seen | None", output: Any) -> None:
        if seen is not None and id(seen.weight) in self._ids and isinstance(output, Tensor) and output.requires_grad:
            # A change in place gives a view a new node, and leaves that of the rows behind it in the graph.
            edge = get_gradient_edge(output if output._base is None else output._base)
            self.uses.append(Use(seen.kind, seen.weight, seen.bias, seen.rows, edge, seen.channels))


@dataclass(frozen=True)
class _Seen:
    kind: Kind
    weight: Tensor
    bias: Tensor | None
    rows: Callable[[], Tensor]
    channels: int = -1


def _of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Seen | None:
    if weight.dim() != 2:
        return None
    return _Seen("dense", weight, bias, lambda: input.detach().reshape(-1, input.shape[-1]))


def _of_embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> _Seen:
    return _Seen("embedding", weight, None, lambda: input.detach().reshape(-1))


def _of_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int, normalize: Callable[[Tensor], Tensor]
) -> _Seen | None:
    """A norm with a number for each entry of one dimension of its input, the channels."""
    if weight is None or weight.dim() != 1:
        return None
    size = len(weight)
    rows = lambda: normalize(input.detach()).movedim(channels, -1).reshape(-1, size)  # noqa: E731
    return _Seen("norm", weight, bias, rows, channels)


def _of_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> _Seen | None:
    return _of_norm(input, weight, bias, -1, lambda x: F.layer_norm(x, normalized_shape, eps=eps))


def _of_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> _Seen | None:
    return _of_norm(input, weight, None, -1, lambda x: F.rms_norm(x, normalized_shape, eps=eps))


def _of_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Seen | None:
    known = (None, None) if training else (running_mean, running_var)  # watching must not count the batch once more
    return _of_norm(input, weight, bias, 1, lambda x: F.batch_norm(x, *known, training=training, eps=eps))


def _of_group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> _Seen | None:
    return _of_norm(input, weight, bias, 1, lambda x: F.group_norm(x, num_groups, eps=eps))


def _of_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Seen | None:
    """The patches that a convolution multiplies with its weight (Grosse and Martens 2016)."""
    spatial = weight.dim() - 2
    if groups != 1 or spatial not in (1, 2) or input.dim() != weight.dim():
        return None
    flat = spatial == 1  # as an image of height one

    def rows() -> Tensor:
        image, around = padded(input.detach(), weight, padding, dilation)
        image = image.unsqueeze(-2) if flat else image
        lengths = (for_each_dimension(dilation, spatial), around, for_each_dimension(stride, spatial))
        kernel = (1, *weight.shape[2:]) if flat else tuple(weight.shape[2:])
        fill = [(neutral, *value) if flat else value for neutral, value in zip((1, 0, 1), lengths, strict=True)]
        patches = F.unfold(image, kernel, *fill)
        return patches.movedim(1, -1).reshape(-1, patches.shape[1])

    return _Seen("dense", weight, bias, rows, channels=1)


_RULES: dict[Callable[..., Any], Callable[..., _Seen | None]] = {
    F.linear: _of_linear,
    F.embedding: _of_embedding,
    F.layer_norm: _of_layer_norm,
    F.rms_norm: _of_rms_norm,
    F.batch_norm: _of_batch_norm,
    F.group_norm: _of_group_norm,
    F.conv1d: _of_convolution,
    F.conv2d: _of_convolution,
}

_HIDING = FUSED | {F.multi_head_attention_forward}
"""Functions whose products with weights no torch function mode sees."""
