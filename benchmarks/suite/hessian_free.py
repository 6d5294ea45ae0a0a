"""Hessian-free optimization as a rival: Martens 2010, with Gauss-Newton products."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sfn.newton import FlatParameters, GaussNewtonOperator, Objective
from lightning_sfn.newton.curvature import gradient_of
from suite.tasks import Problem

__all__ = ["HessianFree", "conjugate_gradients"]

_PROGRESS = 5e-4  # relative progress per iteration under which conjugate gradients stop (Section 4.4)


class HessianFree:
    """Truncated Newton steps on the Gauss-Newton matrix.

    Conjugate gradients start from 0.95 times the last solution, and stop by the relative progress of the quadratic
    model. Damping follows Levenberg and Marquardt (Section 4.1); the step is shortened until the loss falls. Unlike
    there, no iterate but the last is tried, and nothing is preconditioned.

    Args:
        problem: Network and data; the gradient and the acceptance see all cases.
        damping: At the start.
        iterations: Most iterations of conjugate gradients.
        share: Share of the cases that products see, fresh in each step.
    """

    def __init__(self, problem: Problem, *, damping: float = 1.0, iterations: int = 50, share: float = 1.0) -> None:
        self.problem, self.damping, self.iterations, self.share = problem, damping, iterations, share
        self.parameters = FlatParameters(problem.model.parameters())
        self.solution = torch.zeros_like(self.parameters.read())

    def step(self) -> None:
        """Takes one step."""
        objective = Objective([self.problem.loss])
        loss, gradient = gradient_of(objective, self.parameters)
        chosen = self.problem.some(self.share) if self.share < 1 else slice(None)
        operator = GaussNewtonOperator(Objective([lambda: self.problem.pair(chosen)]), self.parameters)
        solution, model = conjugate_gradients(
            lambda v: operator.matvec(v) + self.damping * v, -gradient, 0.95 * self.solution, self.iterations
        )
        operator.close()
        if model >= 0:  # only where rounding has eaten everything
            self.solution.zero_()
            return
        origin, length = self.parameters.read(), 1.0
        self.solution = solution
        for _ in range(8):
            self.parameters.write(origin + length * solution)
            with torch.no_grad():
                reached = float(self.problem.loss())
            if length == 1.0:
                self._adapt((reached - loss) / model)
            if reached < loss:
                return
            length *= 0.5
        self.parameters.write(origin)
        self.solution.zero_()

    def _adapt(self, ratio: float) -> None:
        """Levenberg and Marquardt: trust the model more where it foretold the decrease; NaN counts as a failure."""
        if ratio > 0.75:
            self.damping *= 2 / 3
        elif not ratio >= 0.25:
            self.damping *= 3 / 2


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, iterations: int
) -> tuple[Tensor, float]:
    """Solves ``B x = right`` roughly, for a positive definite B.

    Args:
        product: ``B v``.
        right: Right-hand side, shape ``(n,)``.
        start: Where to start.
        iterations: Most iterations.

    Returns:
        x and the quadratic model ``x'Bx / 2 - right'x`` there.
    """
    x = start.clone()
    residual = right - product(x)
    direction, square = residual.clone(), float(residual @ residual)
    models = [-0.5 * float(x @ (right + residual))]
    for iteration in range(1, iterations + 1):
        moved = product(direction)
        curvature = float(direction @ moved)
        if square == 0.0 or not curvature > 0:
            break
        x.add_(direction, alpha=square / curvature)
        residual.sub_(moved, alpha=square / curvature)
        square, before = float(residual @ residual), square
        direction = residual + (square / before) * direction
        models.append(-0.5 * float(x @ (right + residual)))
        window = max(10, iteration // 10)
        if iteration > window and models[-1] < 0 and models[-1] - models[-1 - window] > window * _PROGRESS * models[-1]:
            break
    return x, models[-1]
