"""Which transformations of torch are at work: what is evaluated under them must be made of operations they see through.

A loss may differentiate inside: several gradients at a time (``is_grads_batched``, ``vmap``), or forward
(``torch.func.jvp``, ``torch.autograd.forward_ad``). None of them sees into an `torch.autograd.Function` of ours: some
say so, and the graph of a batched gradient is lost without a word.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_batched", "is_transformed"]


def is_batched(tensor: Tensor | None) -> bool:
    """Whether ``vmap`` has made several tensors look like one, into which nothing can be written.

    Args:
        tensor: The tensor, if there is one.
    """
    kinds = torch._C._functorch
    return tensor is not None and (kinds.is_batchedtensor(tensor) or kinds.is_legacy_batchedtensor(tensor))


def is_transformed(tensor: Tensor | None = None) -> bool:
    """Whether a transformation of torch is at work, or has made what a tensor is.

    Args:
        tensor: A tensor that may be of several; transformations alone are looked for if left out.
    """
    return torch._C._are_functorch_transforms_active() or _in_dual_level() or is_batched(tensor)


def _in_dual_level() -> bool:
    """Whether tensors may carry tangents; torch has no public way to ask, so without its private one: no."""
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)
