"""Attention written out with ``linear`` calls, so that the gradient of each product with a weight can be seen.

PyTorch's function makes these products where no torch function mode sees them. This is the same function up to
rounding (Vaswani et al. 2017, "Attention is all you need"; see the documentation of `torch.nn.MultiheadAttention`).
"""

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn.newton.unrolled import Linear

__all__ = ["attended"]

_UNSUPPORTED = ("bias_k", "bias_v", "static_k", "static_v")


def attended(
    function: Callable[..., Any], args: Any, kwargs: Any, linear: Linear
) -> tuple[Tensor, Tensor | None] | None:
    """Computes what PyTorch's attention function computes.

    Dropout draws the same random numbers. A packed weight acts as a whole on each distinct tensor among query, key and
    value, each of which takes its third of what comes out: the other thirds have no gradient, so that the packed weight
    is one layer with several uses.

    Args:
        function: ``torch.nn.functional.multi_head_attention_forward``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        linear: What multiplies inputs ``(..., i)`` with a weight ``(o, i)`` and adds a bias.

    Returns:
        The function's results: outputs of shape ``(L, N, E)``, or ``(L, E)`` without a batch, and the attention weights
        where they are asked for. ``None`` for another function, for keys and values that are appended (``bias_k``,
        ``bias_v``, ``add_zero_attn``) or given already projected (``static_k``, ``static_v``), and for ``is_causal``
        without a mask, which PyTorch refuses.
    """
    if function is not F.multi_head_attention_forward:
        return None
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    call = SimpleNamespace(**bound.arguments)
    if call.add_zero_attn or any(getattr(call, name) is not None for name in _UNSUPPORTED):
        return None
    if call.is_causal and call.attn_mask is None:
        return None
    queries, keys, values = (_heads(projection, call.num_heads) for projection in _projections(call, linear))
    mask, dropout = _mask(call, len(queries)), call.dropout_p if call.training else 0.0
    weights = None
    if call.need_weights:
        scores = queries / math.sqrt(queries.shape[-1]) @ keys.transpose(-2, -1)
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        mixed = weights @ values
    else:
        # As in PyTorch the hint counts only here and without padding; the mask itself is not looked at then.
        hinted = call.is_causal and call.key_padding_mask is None
        mixed = F.scaled_dot_product_attention(queries, keys, values, None if hinted else mask, dropout, hinted)
    joined = mixed.permute(2, 0, 1, 3).flatten(2)
    has_batch = call.query.dim() == 3
    output = linear(joined if has_batch else joined.squeeze(1), call.out_proj_weight, call.out_proj_bias)
    if weights is not None:
        weights = weights.mean(1) if call.average_attn_weights else weights
        weights = weights if has_batch else weights.squeeze(0)
    return output, weights


def _projections(call: SimpleNamespace, linear: Linear) -> list[Tensor]:
    """Query, key and value after their projections, each of shape ``(L, N, E)`` or ``(L, E)``."""
    sources = (call.query, call.key, call.value)
    if call.use_separate_proj_weight:
        biases = (None,) * 3 if call.in_proj_bias is None else call.in_proj_bias.chunk(3)
        weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
        return [linear(*each) for each in zip(sources, weights, biases, strict=True)]
    distinct = {id(source): source for source in sources}
    packed = {key: linear(source, call.in_proj_weight, call.in_proj_bias) for key, source in distinct.items()}
    return [packed[id(source)].chunk(3, -1)[third] for third, source in enumerate(sources)]


def _heads(projection: Tensor, heads: int) -> Tensor:
    """From shape ``(L, N, E)``, or ``(L, E)`` without a batch, to ``(N, h, L, E / h)``."""
    batch = projection if projection.dim() == 3 else projection.unsqueeze(1)
    return batch.reshape(*batch.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _mask(call: SimpleNamespace, batch: int) -> Tensor | None:
    """What both masks add to the scores, for shape ``(N, h, L, S)``; ``None`` without masks."""
    mask = None
    if call.attn_mask is not None:
        mask = _added(call.attn_mask, call.query.dtype)
        if mask.dim() == 3:  # one for each case and head
            mask = mask.reshape(batch, -1, *mask.shape[1:])
    if call.key_padding_mask is not None:
        padding = _added(call.key_padding_mask, call.query.dtype).reshape(batch, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of numbers; true in a mask of truth values takes a place away."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
