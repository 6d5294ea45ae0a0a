"""L-BFGS on the whole training set."""

from typing import Any

import torch
from torch import Tensor

from lightning_sfn.experiments.plateau import Problem
from lightning_sfn.newton.curvature import gradient_of
from paper_scale.method import Counts

__all__ = ["FullBatchLBFGS"]


class FullBatchLBFGS:
    """`torch.optim.LBFGS` with a strong Wolfe line search, a few iterations at a time.

    Args:
        problem: The problem.
        history: Pairs of steps and gradient differences that it keeps.
        iterations: Iterations in one `advance`.
    """

    def __init__(self, problem: Problem, *, history: int, iterations: int) -> None:
        self.problem, self.counts = problem, Counts()
        self._parameters = list(problem.model.parameters())
        self._optimizer = torch.optim.LBFGS(
            self._parameters, max_iter=iterations, history_size=history, line_search_fn="strong_wolfe"
        )
        self._stuck = False

    @property
    def finished(self) -> bool:
        """Whether it can go no further."""
        return self._stuck

    def advance(self) -> None:
        """Some iterations."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        self._optimizer.step(self._loss)
        self.counts.updates = int(self._state["n_iter"])
        self._stuck = all(torch.equal(old, new) for old, new in zip(before, self._parameters, strict=True))

    @property
    def _state(self) -> dict[str, Any]:
        return self._optimizer.state[self._parameters[0]]

    def _loss(self) -> Tensor:
        flat = self.problem.parameters
        loss, gradient = gradient_of(self.problem.objective(), flat)
        for parameter, part in zip(flat.tensors, flat.unflatten(gradient), strict=True):
            parameter.grad = part.clone()
        self.counts.gradients += 1
        return torch.tensor(loss, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the counts."""
        return {"optimizer": self._optimizer.state_dict(), "counts": self.counts.to_dict(), "stuck": self._stuck}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        self.counts, self._stuck = Counts(**state["counts"]), state["stuck"]
