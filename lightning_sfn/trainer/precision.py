"""Curvature in float32 or float64 whatever the precision of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = ["cast", "curvature_dtype", "in_precision", "widened_stand_ins"]

_BITS = {32: torch.float32, 64: torch.float64}


def curvature_dtype(module: nn.Module, bits: int) -> torch.dtype:
    """The dtype in which a module's curvature is computed.

    Args:
        module: The module.
        bits: 32 or 64, the least that is wanted.

    Returns:
        float32 or float64: what is wanted, or the dtype of the widest parameter if that is more.
    """
    wanted = _BITS[bits]
    trainable = [p.dtype for p in module.parameters() if p.requires_grad and p.is_floating_point()]
    for dtype in trainable:
        wanted = torch.promote_types(wanted, dtype)
    return wanted


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Nested data whose real tensors and NumPy arrays are at least as wide as a dtype; nothing is narrowed."""

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(_at_least(dtype, leaf)) if leaf.is_floating_point() else leaf
        wanted = np.float64 if dtype == torch.float64 else np.float32
        return leaf.astype(np.promote_types(wanted, leaf.dtype), copy=False) if leaf.dtype.kind == "f" else leaf

    return apply_to_collection(value, (Tensor, np.ndarray), widened)


@contextmanager
def in_precision(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Runs the body with copies of a module's parameters and buffers in a wider dtype; nothing if they have it.

    So it does with tensors that are plain attributes of the module or a submodule (a hidden state, a mask), where they
    are no functions of parameters.

    The originals are not touched but set aside: converting them in place would cost them their gradient accumulators,
    and with those the hooks by which data-parallel training averages gradients.

    Args:
        module: The module.
        dtype: float32 or float64.
    """
    copies: dict[int, nn.Parameter] = {}  # tied weights stay tied
    aside: list[tuple[nn.Module, str, Tensor]] = []
    plain: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for submodule in module.modules():
            for name, tensor in (*submodule._parameters.items(), *submodule._buffers.items()):
                if tensor is None or not _is_narrower(tensor, dtype):
                    continue
                aside.append((submodule, name, tensor))
                if isinstance(tensor, nn.Parameter):
                    copy = nn.Parameter(tensor.detach().to(dtype), tensor.requires_grad)
                    setattr(submodule, name, copies.setdefault(id(tensor), copy))  # recurrent layers listen
                else:
                    submodule._buffers[name] = tensor.to(dtype)
            attributes = vars(submodule)
            for name, value in attributes.items():
                if isinstance(value, Tensor) and not value.requires_grad and _is_narrower(value, dtype):
                    plain.append((attributes, name, value))
        for attributes, name, value in plain:
            attributes[name] = value.to(dtype)
        yield
    finally:
        for attributes, name, value in plain:
            attributes[name] = value
        for submodule, name, tensor in aside:
            if isinstance(tensor, nn.Parameter):
                setattr(submodule, name, tensor)
            else:
                submodule._buffers[name] = tensor


def widened_stand_ins(module: nn.Module) -> list[Tensor]:
    """Tensors of one element at most that are otherwise what `in_precision` makes of a module's parameters for float64.

    Returns:
        One for each parameter, of its dtype and device, dense or sparse: enough to tell whether curvature can be taken.
    """
    return [
        torch.empty(
            min(p.numel(), 1),  # empty parameters do not count as trained
            dtype=torch.float64 if p.is_floating_point() else p.dtype,
            layout=torch.strided if p.layout == torch.strided else torch.sparse_coo,
            device=p.device,
            requires_grad=p.requires_grad,
        )
        for p in module.parameters()
    ]


def _at_least(dtype: torch.dtype, tensor: Tensor) -> torch.dtype:
    return torch.promote_types(dtype, tensor.dtype)


def _is_narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype != _at_least(dtype, tensor)
