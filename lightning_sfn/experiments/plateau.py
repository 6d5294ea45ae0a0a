"""SGD until learning stalls, then several ways to go on from the same point: the frame of Figure 4."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_sfn.experiments.runner import Result
from lightning_sfn.newton import FlatParameters, Objective, SaddleFreeNewton, Spectrum
from lightning_sfn.newton.operators import make_operator
from lightning_sfn.newton.spectrum import SpectrumSettings, spectrum_of

__all__ = ["Budget", "Curve", "Problem", "newton_arm", "sgd_arm"]


@dataclass(frozen=True)
class Problem:
    """A training problem as plain functions.

    Attributes:
        model: The network; its parameters are what is trained.
        cases: The training cases, the first dimension counts them.
        loss: Mean loss of some cases, with its graph.
        metric: What is reported, from the whole training set.
        part: Cases in one part of a full batch (memory, not mathematics).
    """

    model: torch.nn.Module
    cases: Tensor
    loss: Callable[[Tensor], Tensor]
    metric: Callable[[], float]
    part: int

    @property
    def parameters(self) -> FlatParameters:
        """The parameters as one vector."""
        return FlatParameters(self.model.parameters())

    def objective(self, rows: Tensor | None = None) -> Objective:
        """The mean loss over some cases, all by default, in parts."""
        cases = self.cases if rows is None else self.cases[rows]
        parts = torch.split(cases, self.part)
        return Objective([partial(self.loss, part) for part in parts], [len(part) for part in parts])

    def spectrum(self, rows: Tensor, krylov_dim: int) -> Spectrum:
        """Ritz values of the Hessian on some cases.

        Args:
            rows: Indices of the cases.
            krylov_dim: Lanczos vectors.
        """
        operator = make_operator(self.objective(rows), self.parameters, "hessian", "auto")
        return spectrum_of(operator, SpectrumSettings(krylov_dim))


@dataclass(frozen=True)
class Budget:
    """When an arm ends: by what the processor has spent on it, or by epochs.

    Attributes:
        seconds: Process seconds on a CPU (what other programs do does not count), wall seconds on an accelerator.
        epochs: Most epochs (SGD) or outer steps (Newton).
    """

    seconds: float = math.inf
    epochs: int = 10**9


class Curve:
    """What is noted along an arm; measuring does not count as time.

    Args:
        problem: The problem.
        rows: Cases for spectra.
        krylov_dim: Lanczos vectors of spectra; 0 for none.
    """

    def __init__(self, problem: Problem, rows: Tensor, krylov_dim: int) -> None:
        self._problem, self._rows, self._krylov_dim = problem, rows, krylov_dim
        self._clock = time.process_time if problem.cases.device.type == "cpu" else time.perf_counter
        self._spent, self._since = 0.0, self._clock()
        self.seconds: list[float] = []
        self.epochs: list[float] = []
        self.metric: list[float] = []
        self.spectra: list[Result] = []

    def spent(self) -> float:
        """The seconds spent on training so far."""
        return self._spent + self._clock() - self._since

    def note(self, epoch: float, *, spectrum: bool = False) -> float:
        """Notes the metric, and perhaps a spectrum; returns the seconds spent on training so far."""
        self._spent = self.spent()
        self.seconds.append(self._spent)
        self.epochs.append(epoch)
        self.metric.append(self._problem.metric())
        if spectrum and self._krylov_dim > 0:
            found = self._problem.spectrum(self._rows, self._krylov_dim)
            self.spectra.append({"epoch": epoch, "metric": self.metric[-1], **found.to_dict()})
        self._since = self._clock()
        return self._spent

    def result(self) -> Result:
        """Everything as lists."""
        return {"seconds": self.seconds, "epochs": self.epochs, "metric": self.metric, "spectra": self.spectra}


def sgd_arm(
    problem: Problem,
    curve: Curve,
    *,
    budget: Budget,
    batch_size: int,
    schedule: Callable[[int], tuple[float, float]],
    generator: torch.Generator,
    max_grad_norm: float = math.inf,
    patience: int = 0,
    min_gain: float = 0.0,
    probe_every: int = 1,
) -> None:
    """Mini-batch SGD with momentum.

    Args:
        problem: The problem; its parameters are changed.
        curve: Where the run is noted, once an epoch.
        budget: When to end at the latest.
        batch_size: Cases in a mini-batch.
        schedule: Learning rate and momentum of an update, counted from 0.
        generator: Order of the cases.
        max_grad_norm: Gradients are clipped to this norm.
        patience: Epochs without a relative gain of `min_gain` after which learning has stalled; 0 goes on regardless.
        min_gain: Relative gain of the metric that counts.
        probe_every: Epochs between spectra.
    """
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1.0, momentum=0.5)
    best, waited, update, epoch = math.inf, 0, 0, 0
    spent = curve.note(0.0, spectrum=True)
    while spent < budget.seconds and epoch < budget.epochs:
        for rows in torch.split(torch.randperm(len(problem.cases), generator=generator), batch_size):
            group = optimizer.param_groups[0]
            group["lr"], group["momentum"] = schedule(update)
            optimizer.zero_grad()
            problem.loss(problem.cases[rows]).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(problem.model.parameters(), max_grad_norm)
            optimizer.step()
            update += 1
        epoch += 1
        spent = curve.note(epoch, spectrum=epoch % probe_every == 0)
        if not math.isfinite(curve.metric[-1]):
            break
        waited = 0 if curve.metric[-1] < best * (1 - min_gain) else waited + 1
        best = min(best, curve.metric[-1]) if waited == 0 else best
        if patience and waited >= patience:
            break
    optimizer.zero_grad()


def newton_arm(
    problem: Problem,
    curve: Curve,
    optimizer: SaddleFreeNewton,
    *,
    budget: Budget,
    curvature_cases: int,
    generator: torch.Generator,
    probe_every: int = 1,
) -> Sequence[bool]:
    """Newton steps on the whole training set, with Hessian products on a fresh part of it.

    A step that ends after the budget's seconds does not count: the parameters are those before it.

    Args:
        problem: The problem; its parameters are changed.
        curve: Where the run is noted, once a step.
        optimizer: The optimizer over the problem's parameters.
        budget: When to end at the latest.
        curvature_cases: Cases that Hessian products see.
        generator: Which cases these are.
        probe_every: Steps between spectra.

    Returns:
        Which steps were taken.
    """
    whole, parameters = problem.objective(), problem.parameters
    accepted: list[bool] = []
    spent = curve.note(0.0, spectrum=True)
    while spent < budget.seconds and len(accepted) < budget.epochs:
        part = curvature_cases < len(problem.cases)
        rows = torch.randperm(len(problem.cases), generator=generator)[:curvature_cases]
        before = parameters.read()
        record = optimizer.step_on(whole, curvature=problem.objective(rows) if part else None, same_function=True)
        if curve.spent() > budget.seconds:
            parameters.write(before)
            break
        accepted.append(record.accepted)
        spent = curve.note(len(accepted), spectrum=len(accepted) % probe_every == 0)
        if not record.accepted and not part:
            break  # the same step would be refused for ever
    return accepted
