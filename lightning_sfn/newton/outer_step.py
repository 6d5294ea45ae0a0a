"""One outer step of Algorithm 1: losses -> operator -> descent (a model of steps) -> search among them.

A `Descent` turns curvature and gradient into a model that has a step for every damping; a `Search` decides by trial
losses which of them are taken. Either can be replaced without the other.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.confirmation import Unconfirmed
from lightning_sfn.newton.curvature import CurvatureOperator, gradient_of
from lightning_sfn.newton.damping import Damping
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.preconditioner import Preconditioner
from lightning_sfn.newton.reductions import norm
from lightning_sfn.newton.step import StepRecord, SubspaceModel, TrialLoss, build_subspace, take_inner_step
from lightning_sfn.newton.trust_region import TrustRegion

__all__ = ["Descent", "Losses", "Search", "learn_refuted", "take_outer_step"]


@dataclass(frozen=True)
class Losses:
    """The views of the loss that one outer step takes.

    Attributes:
        objective: What is minimized, by its gradient.
        curvature: What Hessian-vector products see.
        trial: What trial losses see.
        same_function: Whether ``objective`` is that of the step before; if ``None``, the losses tell where they can.
        known: Loss and gradient of ``objective`` at the present parameters, if they are known already.
    """

    objective: Objective
    curvature: Objective
    trial: Objective
    same_function: bool | None = None
    known: tuple[float, Tensor] | None = None

    def at(self, parameters: FlatParameters, operator: CurvatureOperator) -> tuple[float, Tensor]:
        """Loss and gradient at the present parameters; refuses what is not finite."""
        loss_and_gradient = self.known
        if loss_and_gradient is None:  # the graphs of the products give the gradient too, where they are the same
            same = self.curvature is self.objective
            loss_and_gradient = operator.loss_and_gradient() if same else gradient_of(self.objective, parameters)
        loss, gradient = loss_and_gradient
        self.objective.require_sound(gradient if math.isfinite(loss) else torch.tensor(loss))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at the present parameters, so no step is tried: go back to a checkpoint with a "
                "finite loss, or lower the learning rate that led here."
            )
        if not bool(torch.isfinite(gradient).all()):
            raise FloatingPointError(
                "The gradient is not finite at the present parameters, so no step is tried: look for square roots, "
                "norms and logarithms at zero in the loss."
            )
        return loss, gradient


@dataclass(frozen=True)
class Descent:
    """From curvature and gradient to a model of steps.

    Attributes:
        krylov_dim: Lanczos vectors; ``"full"`` for the whole space, ``None`` for what pays in its coordinates.
        preconditioner: Map from the subspace's coordinates to the parameters.
        rule: How eigenvalues scale the gradient.
        exploration: Share of a random vector and of the last escape direction in the start vector.
        generator: Source of random vectors, on the parameters' device.
        learning_rates: A number, or a vector of shape ``(n,)`` where parameter groups differ.
        max_grad_norm: Bound on the norm of each gradient.
        max_step_norm: Bound on the norm of each inner step.
        straight: Whether steps that the preconditioner shortens keep their direction, so that last layers are held back
            with the others: where a velocity is made of them.
    """

    krylov_dim: int | Literal["full"] | None
    preconditioner: Preconditioner
    rule: TrustRegion
    exploration: float
    generator: torch.Generator
    learning_rates: float | Tensor
    max_grad_norm: float | None
    max_step_norm: float | None
    straight: bool = False

    def dimension(self, carried: Carried, size: int) -> int | None:
        """Number of Lanczos vectors of the next subspace.

        Returns:
            The number; ``None`` for the whole space.
        """
        if self.krylov_dim == "full":
            return None
        return self.krylov_dim or min(self.preconditioner.default_krylov_dim(carried.bent), size)

    def within_bounds(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """A step that is shortened to its bounds, and the change of the parameters that it makes.

        The bounds are those of the change, as in subspace steps: learning rates come before them.

        Args:
            step: Shape ``(n,)``, before learning rates.
        """
        change = step * self.learning_rates
        share = self.preconditioner.shares(change.unsqueeze(0), straight=self.straight)[0]
        if self.max_step_norm is not None:
            length = float(norm(change * share))
            share = share * (self.max_step_norm / length) if length > self.max_step_norm else share
        return step * share, change * share

    def model(
        self,
        operator: CurvatureOperator,
        gradient: Tensor,
        carried: Carried,
        store: BasisStore,
        whole: Objective | None = None,
    ) -> SubspaceModel:
        """The quadratic model in the subspace of one outer step.

        Args:
            operator: The curvature at the present parameters.
            gradient: The gradient there, shape ``(n,)``.
            carried: Remembered steps and the last escape direction.
            store: How the basis is kept.
            whole: What is minimized, where the operator sees a part of it.

        Returns:
            The model.

        Raises:
            FloatingPointError: A product is not finite.
        """
        self.preconditioner.refresh(operator, self.generator, carried.bent, whole)
        seed = None
        if self.exploration != 0.0:
            seed = self.exploration * carried.start_seed(gradient, self.preconditioner, self.generator)
        space = build_subspace(
            operator,
            gradient,
            krylov_dim=self.dimension(carried, gradient.numel()),
            preconditioner=self.preconditioner,
            memory=carried.memory,
            seed=seed,
            generator=self.generator,
            store=store,
        )
        if not bool(torch.isfinite(space.projected).all()):
            operator.objective.require_sound(space.projected)
            raise FloatingPointError(
                "A Hessian-vector product is not finite at the present parameters, so no step is tried: look for norms "
                "and square roots at zero in the model."
            )
        return SubspaceModel(
            space,
            self.preconditioner,
            self.rule,
            self.learning_rates,
            self.max_step_norm,
            self.max_grad_norm,
            self.straight,
        )


@dataclass(frozen=True)
class Search:
    """Algorithm 1's inner loop: fresh gradients, one Hessian; ends at the first step that is not taken.

    Attributes:
        damping: How the damping of each inner step is chosen.
        inner_steps: The most steps in one subspace.
    """

    damping: Damping
    inner_steps: int

    def run(
        self,
        model: SubspaceModel,
        parameters: FlatParameters,
        objective: Objective,
        trial: TrialLoss,
        gradient: Tensor,
        record: StepRecord,
        carried: Carried,
        store: BasisStore,
    ) -> StepRecord:
        """Takes the inner steps, and books what was spent and gained.

        Args:
            model: The model of steps.
            parameters: The parameters; changed by each step that is taken.
            objective: What is minimized.
            trial: The loss around the present parameters.
            gradient: The gradient there, shape ``(n,)``.
            record: The record so far.
            carried: Where steps are remembered.
            store: How they are kept.

        Returns:
            The record with the inner steps added.
        """
        before, origin = record, parameters.read()
        for inner in range(self.inner_steps if model.moves else 0):
            carried.unconfirmed = None
            if inner > 0:
                loss, gradient = gradient_of(objective, parameters, far=True)
                spent = replace(before, gradients=record.gradients + 1, trials=record.trials, damping=record.damping)
                finite = math.isfinite(loss) and bool(torch.isfinite(gradient).all())
                if not (finite and loss < before.loss_after):
                    # The trial data promised a decrease that the objective does not show: take the step back.
                    parameters.write(origin)
                    learn_refuted(carried, gradient if finite else None, self.damping, model, store)
                    return spent
                carried.memory.complete(store.local(gradient))
                record = replace(record, gradients=spent.gradients, loss_after=loss)
                try:
                    trial = TrialLoss.at(trial.objective, objective, parameters, loss, gradient)
                except FloatingPointError:  # of the trial data alone: the steps so far stay
                    break
                before, origin = record, parameters.read()
            record, step = take_inner_step(
                model, gradient, parameters=parameters, trial=trial, damping=self.damping, record=record
            )
            if step is None:
                if inner == 0:
                    carried.memory.clear()  # what the memory says has led nowhere
                    trial.objective.require_repeatable(trial.offset)
                break
            carried.memory.record(store.local(step), store.local(gradient))
            if trial.objective is not objective:
                carried.unconfirmed = Unconfirmed.after(origin, before.loss_after, parameters)
        return record


def learn_refuted(
    carried: Carried, gradient: Tensor | None, damping: Damping, maps: Descent | SubspaceModel, store: BasisStore
) -> None:
    """Tells memory, damping and preconditioner of a step that the objective refutes.

    Args:
        carried: Its memory holds the step.
        gradient: The gradient after it, shape ``(n,)``, if it is known and finite.
        damping: Chose the step's damping.
        maps: Has the preconditioner and the rule.
        store: How remembered steps are kept.
    """
    carried.memory.refute(None if gradient is None else store.local(gradient))
    if maps.rule.damped:
        damping.feedback(accepted=False, reduction_ratio=0.0)
    maps.preconditioner.feedback(accepted=False, store=store)


def take_outer_step(
    parameters: FlatParameters,
    losses: Losses,
    operator: CurvatureOperator,
    descent: Descent,
    search: Search,
    carried: Carried,
    store: BasisStore,
) -> StepRecord:
    """A new model, and the steps in it.

    Args:
        parameters: The parameters; changed only by steps that are taken.
        losses: What gradient and trial losses see.
        operator: The curvature, as ``losses.curvature`` gives it; it is closed before the parameters change.
        descent: Makes the model.
        search: Takes the steps.
        carried: What the last step left; afterwards what this one leaves.
        store: How basis and remembered steps are kept.

    Returns:
        What was done; the norm of the whole step is left to the caller.

    Raises:
        ObjectiveError: An objective cannot be optimized.
        CurvatureError: An operation has no second derivative.
        FloatingPointError: Loss, gradient or curvature is not finite.
    """
    try:
        loss, gradient = losses.at(parameters, operator)
        around = TrialLoss.at(losses.trial, losses.objective, parameters, loss, gradient)
        if not carried.checked:
            losses.trial.require_repeatable(around.offset)
            carried.checked = True
        carried.complete_secant(loss, gradient, losses.same_function, store)
        model = descent.model(operator, gradient, carried, store, losses.objective)
    finally:
        operator.close()
    space = model.space
    carried.note_curvature(space, model.ends[0])
    own = space.of_products() if carried.memory.has_secants else space
    shown = model if own is space else replace(model, space=own)
    lowest, highest = shown.ends
    norms = torch.stack([norm(gradient), norm(lowest), norm(highest)]).cpu()
    # Rayleigh quotients in the parameters' own coordinates: their order may be another than in the preconditioner's.
    lambda_min, lambda_max = sorted((shown.space.eigenvalues[[0, -1]] / norms[1:].square()).tolist())
    record = StepRecord(
        loss_before=loss,
        loss_after=loss,
        gradient_norm=float(norms[0]),
        lambda_min=lambda_min,
        lambda_max=lambda_max,
        subspace_dim=len(space),
        products=operator.products,
        gradients=1,
        coordinates=model.preconditioner.name,
        unfactored=model.preconditioner.unfactored,
    )
    record = search.run(model, parameters, losses.objective, around, gradient, record, carried, store)
    # An estimate from trial data is off by a share of the decrease; another batch moves the loss by more.
    slack = 0.0 if losses.trial is losses.objective else 0.25 * (record.loss_before - record.loss_after)
    carried.expected = (record.loss_after, slack)
    return record
