"""Newton with a trust region and Lanczos as a rival: scipy's `trust-krylov` (Gould et al. 1999) on all data."""

import math
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from lightning_sfn.newton import FlatParameters, HessianOperator, Objective
from lightning_sfn.newton.curvature import gradient_of
from suite.tasks import Problem

__all__ = ["trust_krylov"]


def trust_krylov(problem: Problem, radius: float) -> Iterator[None]:
    """Iterations of scipy's minimizer, with the products of this package (one graph for each point).

    Scipy calls back and cannot be interrupted, so it runs in a thread of its own that works while this one waits.

    Args:
        problem: Network and data; loss, gradient and products see all cases.
        radius: Of the trust region at the start.
    """
    solver = _Solver(problem)
    thread = threading.Thread(target=solver.run, args=(radius,), daemon=True)
    thread.start()
    try:
        while (event := solver.events.get()) is None:
            yield
            solver.turns.put(True)
        if event is not _CONVERGED:
            raise event
    finally:
        solver.turns.put(False)
        thread.join()


_CONVERGED = object()


class _Solver:
    """What scipy asks for, and the two queues by which the threads take turns."""

    def __init__(self, problem: Problem) -> None:
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.turns: SimpleQueue[bool] = SimpleQueue()
        self._objective = Objective([problem.loss])
        self._parameters = FlatParameters(problem.model.parameters())
        self._threads = torch.get_num_threads()
        self._operator: HessianOperator | None = None
        self._at: np.ndarray[Any, Any] | None = None

    def run(self, radius: float) -> None:
        """Minimizes until it is told to stop."""
        torch.set_num_threads(self._threads)  # which a new thread does not take over
        start = self._parameters.read().double().cpu().numpy()
        options = {"initial_trust_radius": radius, "max_trust_radius": 1e3 * radius}
        options |= {"gtol": 1e-12, "maxiter": 10**6}
        try:
            minimize(
                self._loss,
                start,
                jac=True,
                hessp=self._product,
                method="trust-krylov",
                callback=self._pause,
                options=options,
            )
            self.events.put(_CONVERGED)
        except StopIteration:
            pass
        except Exception as error:  # the other thread is where it belongs
            self.events.put(error)
        finally:
            self._forget()

    def _write(self, point: np.ndarray[Any, Any]) -> None:
        self._forget()  # its graph is of the weights that were there
        like = self._parameters.read()
        self._parameters.write(torch.from_numpy(point.copy()).to(like))

    def _loss(self, point: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        self._write(point)
        loss, gradient = gradient_of(self._objective, self._parameters)
        if not math.isfinite(loss):
            if self._at is None:
                raise FloatingPointError("The loss is not finite.")
            return math.inf, np.zeros_like(point)  # the step is not taken, and the radius shrinks
        return loss, gradient.double().cpu().numpy()

    def _product(self, point: np.ndarray[Any, Any], vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self._operator is None or not np.array_equal(point, self._at):
            self._write(point)
            self._operator, self._at = HessianOperator(self._objective, self._parameters), point.copy()
        like = self._parameters.read()
        image: np.ndarray[Any, Any] = self._operator.matvec(torch.from_numpy(vector).to(like)).double().cpu().numpy()
        return image

    def _forget(self) -> None:
        if self._operator is not None:
            self._operator.close()
            self._operator = None

    def _pause(self, point: np.ndarray[Any, Any]) -> None:
        """The point of an iteration is in the network while the other thread looks."""
        self._write(point)
        self.events.put(None)
        if not self.turns.get():
            raise StopIteration
