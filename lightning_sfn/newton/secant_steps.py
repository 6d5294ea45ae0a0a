"""Quasi-Newton steps after a subspace, one gradient each, for as long as they pay.

A step is ``-B g``, where B is the BFGS inverse by the secants of remembered steps (Nocedal 1980, two-loop recursion)
with the preconditioner's ``D^2`` for its first inverse: what subspaces have cost products to learn goes on to serve.
Loss and gradient are evaluated at its end at once, so that nothing is left to be judged later: a step that does not
lower the loss is taken back, and has shown the curvature along it. A quasi-Newton metric knows nothing of negative
curvature, so there are none of these steps while a subspace shows much of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.krylov import Direction
from lightning_sfn.newton.outer_step import Descent, Losses
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.preconditioner import Preconditioner
from lightning_sfn.newton.reductions import dot
from lightning_sfn.newton.step import StepRecord, clip

__all__ = ["SecantSteps", "quasi_newton_direction"]

_FIRST_RADIUS = 0.1  # longest step in the metric that it is made with, in square roots of the loss
_LONGEST_RADIUS = 2.0
_SHORTER, _LONGER = 0.5, 1.2  # factors on the radius after a step taken back, and after one that met it
_BENT = 0.3  # negative curvature of a subspace, in largest positive ones, from which there are no such steps
_JUDGED = 4  # steps whose common decrease for each gradient has to be worth more than a subspace's
_LONGEST_PAUSE = 7
_WORTHWHILE = 2.0  # how many times as much: what is given up is also what the subspace would have seen
_PART = 0.1  # price of an evaluation on a part of the data, in evaluations on all


@dataclass
class SecantSteps:
    """The quasi-Newton steps that follow each subspace.

    Attributes:
        most: Most steps after a subspace.
        radius: Longest step, ``sqrt(g' B g)``, in square roots of the loss.
        pause: After how many subspaces they are tried again, where they have not paid; longer each time.
        waiting: How many of those are left.
    """

    most: int
    radius: float = _FIRST_RADIUS
    pause: int = 0
    waiting: int = 0

    def can_follow(self, record: StepRecord, carried: Carried, store: BasisStore) -> bool:
        """Whether such steps may follow a subspace step.

        Args:
            record: The subspace step.
            carried: What it left.
            store: How remembered steps are kept: parts of them are no steps.
        """
        informed = carried.memory.has_secants and carried.memory.capacity > 0 and not store.is_shared_out
        factored = record.coordinates == "kronecker"  # else D^2 is far from an inverse
        return self.most > 0 and record.accepted and informed and factored and carried.bend < _BENT

    def run(
        self,
        parameters: FlatParameters,
        losses: Losses,
        descent: Descent,
        carried: Carried,
        store: BasisStore,
        record: StepRecord,
    ) -> StepRecord:
        """Takes steps until they pay less than the subspace did.

        Args:
            parameters: The parameters; changed by each step that lowers the loss.
            losses: What the subspace step saw.
            descent: Preconditioner, bounds and learning rates.
            carried: What the subspace step left; afterwards what these leave.
            store: By which processes agree on a point.
            record: The subspace step.

        Returns:
            The record with these steps added. Where trial losses on a part of the data have misjudged the subspace
            step, there are none, and the next call takes it back.

        Raises:
            ProcessError: Another process failed.
        """
        if self.waiting > 0:
            self.waiting -= 1
            return record
        loss, gradient = gradient_of(losses.objective, parameters, far=True)
        record = replace(record, gradients=record.gradients + 1, secant_gradients=1)
        before = record.loss_before if carried.unconfirmed is None else carried.unconfirmed.loss
        if not (loss < before and bool(torch.isfinite(gradient).all())):
            return record
        carried.unconfirmed = None
        carried.memory.complete(gradient)
        enough = _WORTHWHILE * (record.loss_before - loss) / _price(record, losses)
        unit, seen, taken, paying = max(abs(loss), record.loss_before - loss), [loss], 0, True
        while paying and len(seen) <= self.most:
            radius = self.radius * math.sqrt(unit)
            step, meets = self._step(gradient, descent, carried.memory.directions, radius)
            origin = parameters.read()
            target = store.agreed_point(origin + step)
            parameters.write(target)
            carried.memory.record(target - origin, gradient)
            after, slope = gradient_of(losses.objective, parameters, far=True)
            finite = math.isfinite(after) and bool(torch.isfinite(slope).all())
            if finite and after < loss:
                loss, gradient, taken = after, slope, taken + 1
                carried.memory.complete(gradient)
                self.radius = min(_LONGEST_RADIUS, self.radius * _LONGER) if meets else self.radius
            else:
                parameters.write(origin)
                carried.memory.refute(slope if finite else None)
                self.radius *= _SHORTER
            seen.append(loss)
            paying = len(seen) <= _JUDGED or seen[-1 - _JUDGED] - loss >= _JUDGED * enough
        self.pause = 0 if paying or len(seen) > _JUDGED + 1 else min(2 * self.pause + 1, _LONGEST_PAUSE)
        self.waiting = self.pause
        carried.expected = (loss, 0.0)
        gradients = record.gradients + len(seen) - 1
        return replace(record, loss_after=loss, gradients=gradients, secant_steps=taken, secant_gradients=len(seen))

    def _step(
        self, gradient: Tensor, descent: Descent, secants: Sequence[Direction], radius: float
    ) -> tuple[Tensor, bool]:
        """The change of the parameters, and whether the radius shortened it."""
        clipped = clip(gradient, descent.max_grad_norm)
        # What has no gradient stays: the factors would move what a hook holds along with the other units of its layer.
        direction = quasi_newton_direction(clipped, secants, descent.preconditioner) * (gradient != 0)
        length = math.sqrt(max(float(dot(direction, clipped)), 0.0))
        return descent.within_bounds(direction * -(radius / max(length, radius)))[1], length > radius

    def state_dict(self) -> dict[str, Any]:
        """Radius and pause."""
        return {"radius": self.radius, "pause": self.pause, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.radius, self.pause, self.waiting = state["radius"], state["pause"], state["waiting"]


def quasi_newton_direction(gradient: Tensor, secants: Sequence[Direction], preconditioner: Preconditioner) -> Tensor:
    """``B g`` with B the BFGS inverse by secants whose curvature is positive; B is positive definite.

    Args:
        gradient: g, shape ``(n,)``.
        secants: Steps with the differences of gradients along them, newest first; others are passed over.
        preconditioner: Its ``D^2`` is the first inverse.

    Returns:
        Shape ``(n,)``.
    """
    rest, used = gradient.clone(), []
    for secant in secants:
        step, difference, curvature = secant.vector, secant.product, secant.positive_curvature
        if difference is None or curvature == 0.0:
            continue
        share = float(dot(step, rest)) / curvature
        rest.sub_(difference, alpha=share)
        used.append((step, difference, curvature, share))
    direction = preconditioner.precondition(rest)
    for step, difference, curvature, share in reversed(used):
        direction.add_(step, alpha=share - float(dot(difference, direction)) / curvature)
    return direction


def _price(record: StepRecord, losses: Losses) -> float:
    """What a subspace step cost, in gradients of the objective: a product takes two, a trial loss a third."""
    product = 2.0 if losses.curvature is losses.objective else 2.0 * _PART
    trial = 1 / 3 if losses.trial is losses.objective else _PART / 3
    return record.gradients + product * record.products + trial * record.trials
