"""Why a second derivative failed, in one sentence: the operation that has none, and what to do about it."""

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["CurvatureError", "differentiate", "explain", "require_double_backward"]


class CurvatureError(RuntimeError):
    """A Hessian-vector product could not be computed."""


_FINITE_DIFFERENCE = "use hvp='finite_difference' (with curvature='hessian', which alone has it)"

# Each entry: what autograd says, and our sentence. Group 1 of the pattern, if there is one, is the operation's name.
_KNOWN: tuple[tuple[str, str], ...] = (
    (
        r"(_scaled_dot_product\w*backward)",
        "The attention kernel {0} has no second derivative: run the forward pass under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or " + _FINITE_DIFFERENCE + ".",
    ),
    (
        r"(_cudnn_rnn_backward|CudnnRnnBackward0?)",
        "The cuDNN kernel {0} has no second derivative: run the forward pass under "
        "torch.backends.cudnn.flags(enabled=False), or " + _FINITE_DIFFERENCE + ".",
    ),
    (
        r"aot_autograd does not currently support double backward|donated buffers",
        "A torch.compile'd module has no second derivative: give the closure the original module (its _orig_mod), "
        "evaluate under torch.compiler.set_stance('force_eager'), or " + _FINITE_DIFFERENCE + ".",
    ),
    (
        r"[Cc]heckpointing is not compatible with \.grad\(\)|use_reentrant=True",
        "Reentrant activation checkpointing has no second derivative: checkpoint with use_reentrant=False.",
    ),
    (
        r"marked with @?once_differentiable",
        "An autograd.Function of the model is marked once_differentiable, so it has no second derivative: write its "
        "backward with differentiable operations, or " + _FINITE_DIFFERENCE + ".",
    ),
    (
        r"WeightNormInterface",
        "PyTorch's second derivative of weight normalisation is wrong: let the closure compute the weight, outside of "
        "checkpointed layers, where that is mended, or " + _FINITE_DIFFERENCE + ".",
    ),
    (
        r"derivative for (\S+) is not implemented|(?:^|\s)(\S*_backward) is not implemented",
        "The operation {0} has no second derivative: replace it, or " + _FINITE_DIFFERENCE + ".",
    ),
    (
        r"modified by an inplace operation",
        "A tensor that the gradient needs was changed in place: do not change parameters, buffers or the output of a "
        "layer (inplace=True, or methods whose names end with _) inside the closure.",
    ),
)


def explain(error: Exception) -> CurvatureError:
    """Turns an autograd error met in a second derivative into one sentence.

    Returns:
        The error to raise in its place (``raise explain(error) from error``).
    """
    text = str(error)
    for pattern, sentence in _KNOWN:
        found = re.search(pattern, text)
        if found:
            names = [name for name in found.groups() if name]
            return CurvatureError(sentence.format(names[0].strip("'\"") if names else ""))
    first_line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return CurvatureError(f"A second derivative failed ({first_line}): replace the operation, or {_FINITE_DIFFERENCE}.")


def differentiate(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` with its arguments, but with errors that say what to do.

    Raises:
        CurvatureError: An operation has no derivative.
    """
    try:
        results: tuple[Tensor, ...] = torch.autograd.grad(*args, **options)
    except RuntimeError as error:
        raise explain(error) from error
    return results


_WRAPPER = torch.autograd.function.once_differentiable(lambda ctx: None).__code__  # of every backward so marked


def require_double_backward(loss: Tensor) -> None:
    """Looks for functions whose second derivative is wrong without autograd saying so.

    That through a ``once_differentiable`` function is pruned to zero when gradients are asked for by input, that of
    PyTorch's weight normalisation takes norms for constants; curvature would be silently wrong.

    Raises:
        CurvatureError: There is such a function in the graph.
    """
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        cls = getattr(node, "_forward_cls", None)
        if cls is not None and getattr(cls.backward, "__code__", None) is _WRAPPER:
            raise explain(RuntimeError("marked with @once_differentiable"))
        if node.name().startswith("WeightNormInterface"):
            raise explain(RuntimeError(node.name()))
        todo += [following for following, _ in node.next_functions]
