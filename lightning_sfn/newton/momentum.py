"""Momentum steps between subspaces: along preconditioned gradients, of limited length, as long as that pays.

A step is ``d <- momentum d - c rate D^2 g`` in parameter units, with D the preconditioner's map. It costs one gradient.
Its new part is shortened by ``c <= 1`` so that its length in the preconditioner's coordinates, ``rate sqrt(g'D^2 g)``,
stays within a radius (as K-FAC optimizers bound the change of the distribution; Martens and Grosse 2015 bound it by a
model instead). The loss may rise on the way; where it rises too far, the way is taken back to its best point. Where a
run from rest has gained something and then stays above its best loss for long, the next run starts there, again from
rest (as O'Donoghue and Candes 2015 restart accelerated gradients, for whom any rise will do). How far back a velocity
remembers gradients follows from that: it halves after such a run, and grows while none is.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.confirmation import is_same_loss
from lightning_sfn.newton.curvature import CurvatureOperator, gradient_of
from lightning_sfn.newton.outer_step import Descent, Losses
from lightning_sfn.newton.pace import Pace
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.reductions import dot, norm
from lightning_sfn.newton.step import StepRecord, clip

__all__ = ["Glide"]

_RATE = 0.3  # of a preconditioned gradient; with momentum 0.95 a lasting one adds up to six of them
_RADIUS = 0.1  # longest new part of a step in the preconditioner's coordinates, in square roots of the turn's best loss
_ASTRAY = 0.25  # rise above the turn's best loss, relative to it, after which the way is taken back, before a harvest
_GAIN = 0.05  # decrease since rest, relative to the best loss, that is worth going back to
_WANDERED = 0.25  # sum of the relative rises above the best loss, since it was seen, after which that is done
_LEAST = 0.01  # share of the first loss that a loss counts as at least, in all of them: losses may cross zero
_SHORTER, _LONGER = 0.5, 1.02  # factors on radius and reach after a way taken back, and after any other step
_FIRST_REACH, _LEAST_REACH = 0.5, 0.25  # with a momentum of 0.95: of 0.9 at first, and never less than 0.8
_RARER = 3  # a preconditioner is asked to refresh itself at every third momentum step: they are that much shorter


@dataclass
class Glide:
    """The momentum steps of an optimizer, and the turns that they share with its subspaces.

    Attributes:
        momentum: Largest share of the last step in the next one, from 0 to less than 1.
        pace: Whose turn it is.
        velocity: The last momentum step of this turn, shape ``(n,)``.
        best: The lowest loss of this turn, and the parameters there, shape ``(n,)``.
        rest: The loss where the velocity was last zero.
        wandered: The rises of the losses above the best one since that was seen, relative to it, added up.
        unit: The size of the loss when it was first seen.
        shrink: Factor on the radius, at most 1.
        reach: How many gradients a velocity remembers, as a share of the ``1 / (1 - momentum)`` that it may.
        steps: Momentum steps since the preconditioner was last asked to refresh itself.
        spent: Gradients that the last look back at the best point has cost.
    """

    momentum: float
    pace: Pace = field(default_factory=Pace)
    velocity: Tensor | None = None
    best: tuple[float, Tensor] | None = None
    rest: float = math.inf
    wandered: float = 0.0
    unit: float | None = None
    shrink: float = 1.0
    reach: float = _FIRST_REACH
    steps: int = 0
    spent: int = 0

    def copy(self) -> "Glide":
        """The same state apart: what is done with one is not seen in the other."""
        return replace(self, pace=deepcopy(self.pace))  # tensors are replaced, never written to

    def settle(self, parameters: FlatParameters, losses: Losses, carried: Carried) -> Losses:
        """Looks at the loss, takes a way back that led astray, and decides whose turn it is.

        Args:
            parameters: The parameters; changed only by a way back.
            losses: What the step sees.
            carried: What the last step left.

        Returns:
            The same with loss and gradient at the present parameters.

        Raises:
            FloatingPointError: Loss or gradient is not finite, and there is no way back.
        """
        self.spent = 0
        known = losses.known or gradient_of(losses.objective, parameters, far=self.best is not None)
        if self.unit is None:
            self.unit = abs(known[0]) or 1.0
        if self.best is not None and not self._is_on_the_way(*known):
            there = self._back_at_best(parameters, losses, known[0], carried)
            self.best = None
            if there is not None:
                known = there
                self.shrink *= _SHORTER
                self._remember_less()
                self.pace.end_momentum()
        elif self._has_wandered(known[0]):
            there = self._back_at_best(parameters, losses, known[0], carried)
            if there is not None:
                known, self.velocity = there, None
                self._remember_less()
            else:
                self.best = None
        if math.isfinite(known[0]) and self.pace.observe(known[0]) == "subspace":
            self.velocity = None
            if self.pace.gathered is not None:
                self.best = None
        return replace(losses, known=known)

    def _is_on_the_way(self, loss: float, gradient: Tensor) -> bool:
        assert self.best is not None
        allowed = 0.0 if self.pace.has_harvested else _ASTRAY * self._size
        return loss <= self.best[0] + allowed and bool(torch.isfinite(gradient).all())

    def _remember_less(self) -> None:
        self.reach = max(_LEAST_REACH, self.reach * _SHORTER)

    def _has_wandered(self, loss: float) -> bool:
        """Whether the way has been above its best loss for long, with a gain that is worth going back to."""
        if self.best is None or self.pace.kind == "subspace":
            return False
        rise = (loss - self.best[0]) / self._size
        self.wandered = self.wandered + rise if rise > 0 else 0.0
        return self.wandered > _WANDERED and self.rest - self.best[0] > _GAIN * self._size

    def _back_at_best(
        self, parameters: FlatParameters, losses: Losses, loss: float, carried: Carried
    ) -> tuple[float, Tensor] | None:
        """Loss and gradient at this turn's best point, where the parameters are then.

        ``None``, and the parameters stay, where the best loss was another function's: it says nothing of this one.
        """
        assert self.best is not None
        if losses.same_function is False and math.isfinite(loss):
            return None
        present = parameters.read()
        parameters.write(self.best[1])
        there = gradient_of(losses.objective, parameters)
        self.spent = 1
        is_other = losses.same_function is None and not is_same_loss(there[0], self.best[0])
        if is_other and math.isfinite(loss):
            parameters.write(present)
            return None
        carried.memory.abandon()
        return there

    @property
    def _size(self) -> float:
        """Size of this turn's best loss."""
        assert self.best is not None
        assert self.unit is not None
        return max(abs(self.best[0]), _LEAST * self.unit)

    def step(
        self,
        parameters: FlatParameters,
        losses: Losses,
        operator: CurvatureOperator,
        descent: Descent,
        carried: Carried,
        store: BasisStore,
    ) -> StepRecord:
        """Takes a momentum step.

        Args:
            parameters: The parameters.
            losses: As `settle` gave them.
            operator: The curvature, by which the preconditioner is brought up to date; it is closed.
            descent: Preconditioner, bounds and learning rates.
            carried: What the last step left; afterwards what this one leaves.
            store: How remembered steps are kept.

        Returns:
            What was done. ``loss_after`` takes half of the decrease that the slope promises, which is what a quadratic
            gives whose minimum the step meets.

        Raises:
            FloatingPointError: Loss or gradient is not finite.
        """
        try:
            loss, gradient = losses.at(parameters, operator)
            carried.complete_secant(loss, gradient, losses.same_function, store)
            if self.steps == 0:
                descent.preconditioner.refresh(operator, descent.generator, carried.bent, losses.objective)
        finally:
            operator.close()
        origin = parameters.read()
        if self.best is None or loss < self.best[0]:
            self.best = (loss, origin)
        if self.velocity is None:
            self.rest, self.wandered = loss, 0.0
        new = self._next(clip(gradient, descent.max_grad_norm), descent)
        self.velocity, taken = descent.within_bounds(new)
        self.shrink, self.reach = min(1.0, self.shrink * _LONGER), min(1.0, self.reach * _LONGER)
        self.steps = (self.steps + 1) % _RARER
        target = store.agreed_point(origin + taken)  # ranks with other rounding must not drift apart
        parameters.write(target)
        moved = target - origin
        changed = bool(moved.any())  # not with a learning rate of zero
        if changed:
            carried.memory.record(store.local(moved), store.local(gradient))
        slope = float(dot(gradient, moved))
        carried.expected = (loss + slope / 2, abs(slope))
        return StepRecord(
            loss_before=loss,
            loss_after=loss + slope / 2,
            gradient_norm=float(norm(gradient)),
            predicted_decrease=-slope / 2,
            products=operator.products,
            gradients=1,
            inner_steps=int(changed),
            accepted=changed,
            coordinates=descent.preconditioner.name,
            unfactored=descent.preconditioner.unfactored,
            kind="momentum",
        )

    def _next(self, gradient: Tensor, descent: Descent) -> Tensor:
        """``momentum d - c rate D^2 g``, with as much momentum as the present reach allows."""
        # What has no gradient gets none from the other units of its layer, as where a hook holds it.
        direction = descent.preconditioner.precondition(gradient) * (gradient != 0)
        length = _RATE * math.sqrt(max(float(dot(direction, gradient)), 0.0))
        radius = self.shrink * _RADIUS * math.sqrt(self._size)
        new = direction * (-_RATE * (radius / max(length, radius)))
        momentum = max(0.0, 1 - (1 - self.momentum) / self.reach)
        return new if self.velocity is None else momentum * self.velocity + new

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and numbers."""
        own = {name: value for name, value in vars(self).items() if name != "momentum"}
        return own | {"pace": self.pace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, its tensors on the parameters' device."""
        self.pace.load_state_dict(state["pace"])
        vars(self).update({"reach": _FIRST_REACH} | state | {"pace": self.pace})
