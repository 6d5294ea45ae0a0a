"""Krylov subspace descent (Vinyals and Povey 2012): BFGS inside a Krylov subspace. A baseline, named in Section 6."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.krylov import Direction, KrylovSubspace, lanczos
from lightning_sfn.newton.objective import Closure, Objective, ObjectiveError
from lightning_sfn.newton.operators import CurvatureName, make_operator
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.precision import full_precision

__all__ = ["KrylovSubspaceDescent"]

_FLOOR = 1e-4  # smallest absolute Ritz value, as a share of the largest, in the scaling of the coordinates


class KrylovSubspaceDescent(Optimizer):
    """Builds a Krylov subspace from the gradient and the last step, and minimizes the loss in it by BFGS.

    Where saddle-free Newton takes a step from the subspace's eigenvalues, this baseline uses them only to scale the
    coordinates, ``(|theta| + floor)^(-1/2)`` along each Ritz vector, and lets BFGS look at the loss itself.

    Args:
        params: The parameters.
        krylov_dim: Lanczos vectors; as many as there are parameters at most.
        bfgs_steps: BFGS iterations in one subspace, all of which are remembered.
        curvature: What the subspace is built from.

    Raises:
        ValueError: A count is not positive.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> optimizer = KrylovSubspaceDescent([x], krylov_dim=2)
        >>> loss = optimizer.step(lambda: 5 * x[0] ** 2 + x[1] ** 2)
        >>> bool(x.abs().max() < 1e-3)
        True
    """

    def __init__(
        self, params: Any, krylov_dim: int = 20, *, bfgs_steps: int = 20, curvature: CurvatureName = "hessian"
    ) -> None:
        for name, count in (("krylov_dim", krylov_dim), ("bfgs_steps", bfgs_steps)):
            if count < 1:
                raise ValueError(f"{name} is {count}, but a positive number is expected.")
        super().__init__(params, {})
        self.krylov_dim, self.bfgs_steps, self.curvature = krylov_dim, bfgs_steps, curvature
        self._last: Tensor | None = None

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Takes one outer step.

        Args:
            closure: Returns the loss with its graph (or a pair, as ``curvature`` asks for); called several times.

        Returns:
            The loss before the step, a scalar tensor.

        Raises:
            ObjectiveError: There is no closure, or its result cannot be optimized.
        """
        if closure is None:
            raise ObjectiveError("step() needs a closure that returns the loss with its graph: step(lambda: loss()).")
        parameters, objective = FlatParameters.of_groups(self.param_groups), Objective([closure])
        origin = parameters.read()
        try:
            with torch.no_grad(), full_precision():
                loss, space = self._subspace(objective, parameters)
                after, step = self._minimize(space, objective, parameters, origin)
        except BaseException:
            parameters.write(origin)
            raise
        better = math.isfinite(after) and after < loss
        parameters.write(origin + step if better else origin)
        self._last = step if better else None
        return torch.tensor(loss, dtype=parameters.dtype, device=parameters.device)

    def _subspace(self, objective: Objective, parameters: FlatParameters) -> tuple[float, KrylovSubspace]:
        operator = make_operator(objective, parameters, self.curvature, "auto")
        try:
            loss, gradient = operator.loss_and_gradient()
            last = [] if self._last is None else [Direction(self._last)]
            generator = torch.Generator(parameters.device).manual_seed(0)
            return loss, lanczos(operator.matvec, gradient, self.krylov_dim, generator=generator, directions=last)
        finally:
            operator.close()

    def _minimize(
        self, space: KrylovSubspace, objective: Objective, parameters: FlatParameters, origin: Tensor
    ) -> tuple[float, Tensor]:
        """The loss that BFGS reaches in the subspace, and the step there of shape ``(n,)``."""
        largest = float(space.eigenvalues.abs().max()) or 1.0
        scales = (space.eigenvalues.abs() + _FLOOR * largest).rsqrt()
        along = torch.zeros(len(space), dtype=torch.float64, device="cpu")
        # With a memory as long as the run, L-BFGS is BFGS.
        bfgs = torch.optim.LBFGS(
            [along],
            max_iter=self.bfgs_steps,
            history_size=self.bfgs_steps,
            tolerance_grad=0.0,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def evaluate() -> float:
            parameters.write(origin + space.lift(scales * along))
            loss, gradient = gradient_of(objective, parameters)
            along.grad = scales * space.coordinates(gradient)
            return loss

        bfgs.step(evaluate)  # type: ignore[no-untyped-call]
        step = space.lift(scales * along)
        parameters.write(origin + step)
        return objective.value(), step
