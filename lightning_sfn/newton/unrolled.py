"""Recurrent layers written out step by step, so that the gradient of each product with a weight can be seen.

PyTorch's fused kernels hide what Kronecker factors need. These are the same equations (see the documentation of
`torch.nn.RNN`, `torch.nn.LSTM` and `torch.nn.GRU`) with ``linear`` calls.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FUSED", "stacked", "unrolled"]

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Run = Callable[[Tensor, list[Tensor], Sequence[Tensor], bool], tuple[Tensor, list[Tensor]]]


def unrolled(function: Callable[..., Any], args: Any, linear: Linear) -> tuple[Tensor, ...] | None:
    """Computes what a fused recurrent function computes.

    Args:
        function: ``torch.rnn_tanh``, ``torch.rnn_relu``, ``torch.lstm`` or ``torch.gru``.
        args: Its arguments.
        linear: What multiplies inputs ``(..., i)`` with a weight ``(o, i)`` and adds a bias.

    Returns:
        The function's results; ``None`` for another function, packed sequences, and projections.
    """
    if function not in _CELLS:
        return None
    return stacked(args, partial(_run, _CELLS[function], linear))


def stacked(args: Any, run: Run) -> tuple[Tensor, ...] | None:
    """Puts recurrent layers one upon another, each in one direction or both.

    Args:
        args: The arguments of a fused recurrent function.
        run: Computes one layer in one direction: from a sequence of shape ``(T, B, i)``, the states before it, its
            weights (then biases), and whether it runs backwards, to its outputs ``(T, B, o)`` and the states after it.

    Returns:
        What the fused function returns; ``None`` for packed sequences and projections.
    """
    if len(args) != 9 or not isinstance(args[2], (list, tuple)):
        return None
    inputs, states, weights, has_biases, layers, dropout, train, bidirectional, batch_first = args
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    for_each = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    if len(weights) != for_each * layers * directions:
        return None  # projections bring a further weight
    sequence = inputs.transpose(0, 1) if batch_first else inputs
    finals = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = weights[for_each * index : for_each * (index + 1)]
            output, final = run(sequence, [state[index] for state in states], own, direction == 1)
            outputs.append(output)
            finals.append(final)
        sequence = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            sequence = F.dropout(sequence, dropout)
    result = sequence.transpose(0, 1) if batch_first else sequence
    return (result, *(torch.stack([final[i] for final in finals]) for i in range(len(states))))


def _run(
    cell: Callable[..., list[Tensor]],
    linear: Linear,
    sequence: Tensor,
    state: list[Tensor],
    weights: Sequence[Tensor],
    backwards: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction over a sequence of shape ``(T, B, i)``."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:] if len(weights) == 4 else (None, None)
    from_input = linear(sequence, w_ih, b_ih).unbind(0)
    steps = range(len(from_input))
    outputs: list[Tensor] = [sequence] * len(from_input)
    for t in reversed(steps) if backwards else steps:
        state = cell(from_input[t], linear(state[0], w_hh, b_hh), *state)
        outputs[t] = state[0]
    return torch.stack(outputs), state


def _tanh(x: Tensor, h: Tensor, _: Tensor) -> list[Tensor]:
    return [torch.tanh(x + h)]


def _relu(x: Tensor, h: Tensor, _: Tensor) -> list[Tensor]:
    return [torch.relu(x + h)]


def _lstm(x: Tensor, h: Tensor, _: Tensor, cell: Tensor) -> list[Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return [o.sigmoid() * cell.tanh(), cell]


def _gru(x: Tensor, h: Tensor, state: Tensor) -> list[Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    new = torch.tanh(x_n + (x_r + h_r).sigmoid() * h_n)
    return [(1 - z) * new + z * state]


_CELLS: dict[Callable[..., Any], Callable[..., list[Tensor]]] = {
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
    torch.lstm: _lstm,
    torch.gru: _gru,
}

FUSED = frozenset(_CELLS)
"""The functions that `unrolled` knows."""
