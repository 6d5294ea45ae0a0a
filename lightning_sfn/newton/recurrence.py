"""A layer of tanh units over a sequence, with a hand-written second derivative.

Autograd sees a recurrence as hundreds of small operations, and a Hessian-vector product through it as a thousand. Here
the recurrence is one function, its gradient one, and the derivative of that gradient one (Pearlmutter 1994, written out
for ``s_t = tanh(x_t + s_{t-1} W')``). Inside the loops over time there is one matrix product for each step; everything
that does not depend on the step before, the gradients of the weight above all, is one product over all steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_sfn.newton.transforms import is_batched, is_transformed

__all__ = ["tanh_recurrence"]


def tanh_recurrence(inputs: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """The states ``s_t = tanh(inputs_t + s_{t-1} weight')``.

    Exact derivatives of every order; the first two are fast.

    Args:
        inputs: What comes from outside at each step, biases included, shape ``(T, B, H)``.
        start: The state before the first step, shape ``(B, H)``.
        weight: Shape ``(H, H)``.

    Returns:
        The states, shape ``(T, B, H)``.
    """
    if is_transformed():  # these want operations that they see through
        now, seen = start, []
        for given in inputs.unbind(0):
            now = torch.tanh(given + now @ weight.t())
            seen.append(now)
        return torch.stack(seen)
    states: Tensor = _States.apply(inputs, start, weight)  # type: ignore[no-untyped-call]
    return states


class _States(Function):
    """Inputs, start and weight to states."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, start: Tensor, weight: Tensor) -> Tensor:
        states = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        before, transposed = start, weight.t().contiguous()
        for now, x in zip(states.unbind(0), inputs.unbind(0), strict=True):
            before = torch.addmm(x, before, transposed, out=now).tanh_()
        ctx.save_for_backward(states, start, weight)
        ctx.slopes = None  # kept from the first gradient, for the products that follow
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, start, weight = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad)
        if torch.is_grad_enabled() and not is_transformed(gradient):
            ctx.slopes = torch.addcmul(states.new_ones(()), states.detach(), states.detach(), value=-1)
            results: tuple[Tensor | None, ...] = _Adjoint.apply(  # type: ignore[no-untyped-call]
                gradient, states, start, weight, ctx.slopes, needed
            )
            return results
        return _gradients(_adjoint(gradient, states, weight, ctx.slopes)[0], states, start, weight, needed)


class _Adjoint(Function):
    """The gradient of `_States`: from that by the states to those by inputs, start and weight."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        states: Tensor,
        start: Tensor,
        weight: Tensor,
        slopes: Tensor,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        adjoint, bend = _adjoint(gradient, states, weight, slopes, with_bend=True)
        ctx.save_for_backward(gradient, states, start, weight, adjoint, slopes, bend)
        return _gradients(adjoint, states, start, weight, (True, *needed[1:]))

    @staticmethod
    def backward(
        ctx: Any, by_inputs: Tensor | None, by_start: Tensor | None, by_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, states, start, weight, adjoint, slopes, bend = ctx.saved_tensors
        directions = (by_inputs, by_start, by_weight)
        if all(direction is None for direction in directions):
            return None, None, None, None, None, None
        if torch.is_grad_enabled() or any(is_batched(d) for d in directions):
            return *_tangent_step_by_step(gradient, states, start, weight, directions), None, None
        return *_tangent(states, start, weight, adjoint, slopes, bend, directions), None, None


def _adjoint(
    gradient: Tensor, states: Tensor, weight: Tensor, slopes: Tensor | None, *, with_bend: bool = False
) -> tuple[Tensor, Tensor]:
    """Back through time: from the gradient by the states that by the inputs, both of shape ``(T, B, H)``.

    With ``q_t = gradient_t + a_{t+1} W`` it is ``a_t = q_t (1 - s_t^2)``, of which the last factor is ``slopes``, if
    known. The second result is the bend ``-2 q_t s_t``, the change of a_t with s_t; empty where it is not wanted.
    """
    if is_transformed(gradient) or is_batched(states):
        return torch.stack(_adjoint_step_by_step(gradient, states, weight)), states[:0]
    if slopes is None:
        slopes = torch.addcmul(states.new_ones(()), states, states, value=-1)
    adjoint = torch.empty_like(states)
    sums = torch.empty_like(states) if with_bend else states[:0]
    rows = sums.unbind(0) if with_bend else (torch.empty_like(states[0]),) * len(states)
    after = None
    for q, a, g, slope in zip(*(reversed(x) for x in (rows, *_steps(adjoint, gradient, slopes))), strict=True):
        q.copy_(g) if after is None else torch.addmm(g, after, weight, out=q)
        after = torch.mul(q, slope, out=a)
    return adjoint, sums.mul_(states).mul_(-2) if with_bend else sums


def _steps(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.unbind(0) for tensor in tensors]


def _gradients(
    adjoint: Tensor, states: Tensor, start: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients by inputs, start and weight: one product for all steps."""
    by_weight = None
    if needed[2]:
        by_weight = adjoint[0].t() @ start + adjoint[1:].reshape(-1, weight.shape[0]).t() @ states[:-1].reshape(
            -1, weight.shape[0]
        )
    return adjoint if needed[0] else None, adjoint[0] @ weight if needed[1] else None, by_weight


def _tangent(
    states: Tensor,
    start: Tensor,
    weight: Tensor,
    adjoint: Tensor,
    slopes: Tensor,
    bend: Tensor,
    directions: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivative of `_Adjoint`, forward through time.

    For directions U, z, V of the gradients by inputs, start and weight, ``l_t = U_t + s_{t-1} V' + m_{t-1} W'`` and
    ``m_t = l_t (1 - s_t^2)`` with ``m_0 = z``. Then m is the derivative by the incoming gradient, ``l_t bend_t +
    a_{t+1} V`` that by s_t, and ``sum a_{t+1}' m_t`` that by the weight.

    Returns:
        The derivatives by the incoming gradient, the states, the start and the weight.
    """
    by_inputs, by_start, by_weight = directions
    units = len(weight)
    change = torch.empty_like(states)
    if by_weight is not None:
        torch.mm(states[:-1].view(-1, units), by_weight.t(), out=change[1:].view(-1, units))
        torch.mm(start, by_weight.t(), out=change[0])
        if by_inputs is not None:
            change += by_inputs
    else:
        change.copy_(by_inputs) if by_inputs is not None else change.zero_()
    move, transposed, before = torch.empty_like(states), weight.t().contiguous(), by_start
    for now, moved, slope in zip(*_steps(change, move, slopes), strict=True):
        if before is not None:
            now.addmm_(before, transposed)
        before = torch.mul(now, slope, out=moved)
    turned = adjoint[1:].view(-1, units).t() @ move[:-1].view(-1, units)
    if by_start is not None:
        turned.addmm_(adjoint[0].t(), by_start)
    for_states = change.mul_(bend)
    for_start = torch.zeros_like(start)
    if by_weight is not None:
        for_states[:-1].view(-1, units).addmm_(adjoint[1:].view(-1, units), by_weight)
        for_start = adjoint[0] @ by_weight
    return move, for_states, for_start, turned


def _adjoint_step_by_step(gradient: Tensor, states: Tensor, weight: Tensor) -> list[Tensor]:
    """`_adjoint` in operations that autograd and ``vmap`` see through."""
    after, adjoint = None, []
    for g, s in zip(reversed(gradient.unbind(0)), reversed(states.unbind(0)), strict=True):
        after = (g if after is None else g + after @ weight) * (1 - s * s)
        adjoint.append(after)
    return adjoint[::-1]


def _tangent_step_by_step(
    gradient: Tensor, states: Tensor, start: Tensor, weight: Tensor, directions: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_tangent` in operations that autograd and ``vmap`` see through."""
    by_inputs, move, by_weight = directions
    adjoint = _adjoint_step_by_step(gradient, states, weight)
    moves, for_states, for_start, turned = [], [], torch.zeros_like(start), torch.zeros_like(weight)
    for t, s in enumerate(states.unbind(0)):
        change = torch.zeros_like(s) if by_inputs is None else by_inputs[t]
        if move is not None:
            change = change + move @ weight.t()
            turned = turned + adjoint[t].t() @ move
        if by_weight is not None:
            change = change + (states[t - 1] if t else start) @ by_weight.t()
            if t == 0:
                for_start = for_start + adjoint[0] @ by_weight
        later = gradient[t] + adjoint[t + 1] @ weight if t + 1 < len(states) else gradient[t]
        bent = -2 * change * later * s
        if by_weight is not None and t + 1 < len(states):
            bent = bent + adjoint[t + 1] @ by_weight
        move = change * (1 - s * s)
        moves.append(move)
        for_states.append(bent)
    return torch.stack(moves), torch.stack(for_states), for_start, turned
