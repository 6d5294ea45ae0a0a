"""The parts of a step: the subspace, its quadratic model, trial losses, and one damped step in the subspace.

`outer_step` puts them together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from lightning_sfn.newton.basis import WHOLE, BasisStore
from lightning_sfn.newton.curvature import CurvatureOperator, gradient_of
from lightning_sfn.newton.damping import Damping, FixedDamping
from lightning_sfn.newton.dense import full_space
from lightning_sfn.newton.krylov import Direction, KrylovSubspace, lanczos
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.pace import Kind
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.preconditioner import Preconditioner
from lightning_sfn.newton.reductions import dot, norm
from lightning_sfn.newton.trust_region import TrustRegion

__all__ = ["StepRecord", "SubspaceModel", "TrialLoss", "build_subspace", "clip", "take_inner_step"]


_HARDLY = 1e-3  # share of a vector's length that is too little to tell a curvature by


@dataclass(frozen=True)
class StepRecord:
    """What one call of ``step`` did.

    Attributes:
        loss_before: The objective before the step.
        loss_after: The objective after the step, as far as trial losses tell (see `TrialLoss`); equal to
            ``loss_before`` where no step was taken. For a momentum step, which has none, ``loss_before`` less half of
            what its slope promises: far off where the loss curves much, and perhaps below zero.
        gradient_norm: Norm of the gradient before clipping.
        damping: The last damping that was chosen.
        step_norm: Norm of the whole change of the parameters.
        predicted_decrease: Decrease that the quadratic model in the subspace promised, over all inner steps taken.
        lambda_min: The lower one of the curvatures along the lowest and the highest Ritz vector of the subspace's
            products: no smaller than the smallest eigenvalue. Secants of remembered steps hold between two points, and
            have no part in it.
        lambda_max: The higher one of the two: no larger than the largest eigenvalue.
        subspace_dim: Dimension of the subspace: Lanczos vectors and remembered steps.
        products: Hessian-vector products spent.
        trials: Trial losses spent.
        gradients: Gradients spent.
        inner_steps: Inner steps that were taken.
        secant_steps: Quasi-Newton steps that followed them (see `SecantSteps`).
        secant_gradients: Gradients that those have cost, of those spent.
        accepted: Whether the parameters were changed.
        coordinates: The preconditioner: ``kronecker``, ``diagonal``, ``identity``, or the class of another one.
        unfactored: Parameters that Kronecker factors in use have no rule for.
        kind: Whether a subspace was built, or a momentum step taken (see `Glide`), which knows no damping, no curvature
            and no trial losses.
        taken_back: Whether the step before was taken back first, since it had raised the objective (see `Unconfirmed`).
    """

    loss_before: float
    loss_after: float
    gradient_norm: float
    damping: float = math.nan
    step_norm: float = 0.0
    predicted_decrease: float = 0.0
    lambda_min: float = math.nan
    lambda_max: float = math.nan
    subspace_dim: int = 0
    products: int = 0
    trials: int = 0
    gradients: int = 0
    inner_steps: int = 0
    secant_steps: int = 0
    secant_gradients: int = 0
    accepted: bool = False
    coordinates: str = ""
    unfactored: tuple[str, ...] = ()
    kind: Kind = "subspace"
    taken_back: bool = False


@dataclass(frozen=True)
class TrialLoss:
    """The objective at points around the present one, estimated on the trial data.

    Near a saddle the gradient of a part of the data is far larger than that of all of it, and would decide about every
    small step. So the part's linear term is replaced by that of the objective, whose gradient g is known:
    ``f(x) + [t(x + d) - t(x)] - (grad t - g)'d`` for a step d. What is left of the part is its curvature.

    Attributes:
        objective: The trial objective t.
        loss: The loss f(x) of the objective itself.
        offset: ``t(x)``.
        excess: ``grad t - g``, shape ``(n,)``; ``None`` where trials see the objective itself.
    """

    objective: Objective
    loss: float
    offset: float
    excess: Tensor | None

    @classmethod
    def at(
        cls, trial: Objective, objective: Objective, parameters: FlatParameters, loss: float, gradient: Tensor
    ) -> "TrialLoss":
        """The estimate around the present parameters; costs one gradient of the trial objective if it is another."""
        if trial is objective:
            return cls(trial, loss, loss, None)
        offset, own_gradient = gradient_of(trial, parameters)
        if not (math.isfinite(offset) and bool(torch.isfinite(own_gradient).all())):
            raise FloatingPointError(
                f"The trial loss or its gradient is not finite ({offset}) at the present parameters, so no step is "
                "tried: look for the batch that causes it."
            )
        return cls(trial, loss, offset, own_gradient - gradient)

    def after(
        self, parameters: FlatParameters, origin: Tensor, steps: Tensor, predicted: Tensor
    ) -> tuple[list[float], list[float]]:
        """The estimates after several steps, by one collective; leaves the parameters at one of the points.

        Args:
            parameters: The parameters.
            origin: Where the steps start, shape ``(n,)``.
            steps: Shape ``(c, n)``.
            predicted: The decreases that a model predicts for them, float64, shape ``(c,)``.

        Returns:
            The estimates, infinite where point or loss is not finite, and the predictions of rank zero.
        """
        nowhere = torch.full((), math.nan, dtype=torch.float64, device=parameters.device)
        losses, slopes = [], []
        for step in steps:
            point = origin + step
            reachable = bool(torch.isfinite(point).all())
            if reachable:
                parameters.write(point)
            losses.append(self.objective.guarded(self.objective.local_value, nowhere) if reachable else nowhere)
            slopes.append(torch.zeros_like(nowhere) if self.excess is None else dot(self.excess, step))
        # What is not a reduced number is rank zero's, so that all ranks decide alike whatever their rounding.
        own = torch.cat([torch.stack(slopes).to(nowhere), predicted.to(nowhere)])
        means, of_first = self.objective.reduce_with(torch.stack(losses).to(nowhere), own)
        self.objective.require_sound(means, far=True)
        totals, slope, decrease = torch.cat([means, of_first]).view(3, -1).tolist()
        changes = [total - self.offset - along for total, along in zip(totals, slope, strict=True)]
        return [self.loss + change if math.isfinite(change) else math.inf for change in changes], decrease


@dataclass(frozen=True)
class SubspaceModel:
    """The quadratic model of one outer step.

    Attributes:
        space: The subspace, in the preconditioner's coordinates.
        preconditioner: The map from there to the parameters.
        rule: How eigenvalues scale the gradient.
        learning_rates: A number, or a vector of shape ``(n,)`` where parameter groups differ.
        max_step_norm: Bound on the norm of each inner step, in parameter units.
        max_grad_norm: Bound on the norm of each gradient.
        straight: Whether steps that the preconditioner shortens keep their direction.
    """

    space: KrylovSubspace
    preconditioner: Preconditioner
    rule: TrustRegion
    learning_rates: float | Tensor
    max_step_norm: float | None
    max_grad_norm: float | None = None
    straight: bool = False

    @property
    def moves(self) -> bool:
        """Whether any learning rate lets the parameters move."""
        rates = self.learning_rates
        return rates != 0.0 if isinstance(rates, float) else bool(rates.any())

    @property
    def scale(self) -> float:
        """Largest absolute eigenvalue; 1 for a flat model, so that damping keeps a unit."""
        return float(self.space.eigenvalues.abs().max()) or 1.0

    @cached_property
    def ends(self) -> Tensor:
        """The Ritz vectors of the lowest and the highest Ritz value in parameter coordinates, shape ``(2, n)``.

        One of which next to nothing lies where gradient and products have reached is left whole: its Ritz value is
        rounding, and would be divided by the square of next to nothing for a curvature.
        """
        extremes = torch.eye(len(self.space), dtype=torch.float64, device="cpu")[[0, -1]]
        whole = self.preconditioner.scale(self.space.lift(extremes))
        if self.space.reached is None:
            return whole
        inside = whole * self.space.reached
        hardly = torch.stack([norm(part) < _HARDLY * norm(row) for part, row in zip(inside, whole, strict=True)])
        return torch.where(hardly.unsqueeze(1), whole, inside)

    def in_parameters(self, vectors: Tensor) -> Tensor:
        """Vectors of the subspace's coordinates in parameter coordinates, where nothing else is carried along.

        What no gradient and no product has reached, like the weights of inputs that are always zero, would only take
        the random part of the start vector.

        Args:
            vectors: Shape ``(n,)`` or ``(c, n)``.

        Returns:
            The same shape.
        """
        inside, reached = self.preconditioner.scale(vectors), self.space.reached
        return inside if reached is None else inside * reached

    def coordinates(self, gradient: Tensor, loss: float, parameters_norm: float) -> Tensor:
        """The gradient along the Ritz vectors, with a push where it is blind to an escape.

        Where the gradient has (almost) no component along the direction of most negative curvature, the step would have
        none either, however long the steepest way down is. There the component is raised to that of a point displaced
        by the shortest length whose effect on the loss can be resolved in floating point. Each step then doubles it.

        Args:
            gradient: Shape ``(n,)``, in parameter coordinates.
            loss: The present loss.
            parameters_norm: Norm of the parameters.

        Returns:
            Coordinates of shape ``(k,)``, float64.
        """
        coordinates = self.space.coordinates(self.preconditioner.scale(clip(gradient, self.max_grad_norm)))
        lowest = float(self.space.eigenvalues[0])
        precision = torch.finfo(gradient.dtype).eps
        if not self.rule.uses_negative_curvature or lowest >= -100 * precision * self.scale:
            return coordinates
        direction = self.ends[0]
        visible_loss = math.sqrt(200 * precision * abs(loss) / -lowest)
        visible_move = math.sqrt(precision) * max(1.0, parameters_norm) / float(norm(direction))
        push = max(visible_loss, visible_move) * -lowest
        if abs(float(coordinates[0])) < push:
            coordinates[0] = math.copysign(push, float(coordinates[0]))
        return coordinates

    def steps(self, coordinates: Tensor, dampings: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The steps that several dampings give, by one matrix product.

        Args:
            coordinates: The gradient along the Ritz vectors, shape ``(k,)``.
            dampings: c values.

        Returns:
            The steps in parameter units, shape ``(c, n)``, and the decreases that the quadratic model predicts for
            them, shape ``(c,)``.
        """
        along = self._along(coordinates, dampings)
        steps = self.in_parameters(self.space.lift(along)) * self.learning_rates
        shares = self.preconditioner.shares(steps, straight=self.straight)
        steps = steps * shares
        shrink = torch.ones(len(dampings), dtype=torch.float64, device="cpu")
        if self.max_step_norm is not None:
            lengths = torch.stack([norm(step) for step in steps]).cpu()
            shrink = (self.max_step_norm / lengths).clamp_max(1.0)
            steps = steps * shrink.to(steps).unsqueeze(1)
        store = self.space.store  # a shared out basis: all processes project, whatever their rounding says of shares
        if isinstance(self.learning_rates, float) and shares.shape[1] == 1 and not store.is_shared_out:
            shrink = shrink * self.learning_rates * shares[:, 0].double().cpu()
        else:  # parts differ: the steps leave the subspace's own scaling, so look at where they lie in it
            along = torch.stack([self.space.coordinates(self.preconditioner.unscale(step)) for step in steps])
            shrink = torch.ones(len(dampings), dtype=torch.float64, device="cpu")
        return steps, self._decreases(coordinates, along, shrink)

    def predicted(self, coordinates: Tensor, dampings: Sequence[float]) -> list[float]:
        """The decreases that the quadratic model predicts for the steps that several dampings give.

        Bounds on their length are left aside, and so are learning rates that differ between groups.
        """
        rate = self.learning_rates if isinstance(self.learning_rates, float) else 1.0
        along = self._along(coordinates, dampings)
        return self._decreases(coordinates, along, torch.tensor(rate, dtype=torch.float64, device="cpu")).tolist()

    def _along(self, coordinates: Tensor, dampings: Sequence[float]) -> Tensor:
        values = torch.tensor(dampings, dtype=torch.float64, device="cpu").unsqueeze(1)
        return -self.rule.inverse(self.space.eigenvalues, values) * coordinates

    def _decreases(self, coordinates: Tensor, along: Tensor, shrink: Tensor) -> Tensor:
        bend = (along.square() @ self.space.eigenvalues) / 2
        return -(shrink * (along @ coordinates) + shrink.square() * bend)


def build_subspace(
    operator: CurvatureOperator,
    gradient: Tensor,
    *,
    krylov_dim: int | None,
    preconditioner: Preconditioner,
    memory: StepMemory,
    seed: Tensor | None,
    generator: torch.Generator,
    store: BasisStore = WHOLE,
) -> KrylovSubspace:
    """The subspace of one outer step (Algorithm 2).

    Args:
        operator: The curvature at the present parameters.
        gradient: The gradient, shape ``(n,)``.
        krylov_dim: Number of Lanczos vectors; ``None`` for the whole space.
        preconditioner: Map from the subspace's coordinates to the parameters, up to date.
        memory: Past steps that join the subspace.
        seed: A vector of shape ``(n,)`` in the subspace's coordinates that is mixed into the start vector, already
            scaled relative to a unit gradient.
        generator: Source of random vectors.
        store: How the basis is kept; the memory's vectors are kept likewise. The exact method keeps it whole.

    Returns:
        The subspace, in the preconditioner's coordinates; its projected operator is NaN where a product is.
    """
    if krylov_dim is None:
        space = replace(full_space(operator, preconditioner), store=BasisStore(store.processes))
    else:
        reached = gradient != 0  # in parameter coordinates: the map may spread rounding over all of a layer

        def matvec(vector: Tensor) -> Tensor:
            image = operator.local_matvec(preconditioner.scale(vector))
            if not store.is_shared_out:
                image = operator.objective.reduce(image)
            reached.logical_or_(image != 0)
            image = preconditioner.scale(image)  # linear and the same everywhere, so it may come before the mean
            return operator.objective.reduce_part(image) if store.is_shared_out else store.local(image)

        start = preconditioner.scale(gradient)
        length = norm(start).to(start.dtype)
        start = start / length if float(length) > 0 else start
        start = start if seed is None else start + seed
        # Differences of gradients are products with the Hessian, and with no other curvature.
        known = memory.directions if operator.is_hessian or not memory.has_secants else ()
        directions = _in_coordinates(known, preconditioner.on_parts(store, len(gradient)))
        space = lanczos(matvec, start, krylov_dim, generator=generator, directions=directions, store=store)
        everywhere = store.anywhere(reached)
        space = space if bool(everywhere.all()) else replace(space, reached=everywhere)
    if not bool(torch.isfinite(space.projected).all()):
        return space
    return replace(space, decomposition=store.agreed_eigen(*torch.linalg.eigh(space.projected)))


def _in_coordinates(directions: Sequence[Direction], coordinates: Preconditioner) -> list[Direction]:
    """Remembered steps in the preconditioner's coordinates, all by one application of each map."""
    if not directions:
        return []
    vectors = coordinates.unscale(torch.stack([d.vector for d in directions]))
    known = [d.product for d in directions if d.product is not None]
    products = iter(coordinates.scale(torch.stack(known)) if known else ())
    return [
        Direction(vector, None if d.product is None else next(products))
        for vector, d in zip(vectors, directions, strict=True)
    ]


class _Candidates:
    """The steps that dampings give from an origin: their trial losses, and the best of those that were tried.

    Takes the gradient in the model's coordinates, shape ``(k,)``; leaves the parameters anywhere.
    """

    def __init__(
        self,
        model: SubspaceModel,
        coordinates: Tensor,
        parameters: FlatParameters,
        origin: Tensor,
        trial: TrialLoss,
    ) -> None:
        self._model, self._coordinates, self._parameters = model, coordinates, parameters
        self._origin, self._trial = origin, trial
        self.best: tuple[float, float, Tensor | None] = (math.inf, 0.0, None)  # loss, predicted decrease, step

    def __call__(self, dampings: Sequence[float], /) -> list[float]:
        steps, predictions = self._model.steps(self._coordinates, dampings)
        losses, decreases = self._trial.after(self._parameters, self._origin, steps, predictions)
        self.best = min((self.best, *zip(losses, decreases, steps, strict=True)), key=itemgetter(0))
        return losses

    def predicted(self, dampings: Sequence[float], /) -> list[float]:
        own = self._model.predicted(self._coordinates, dampings)
        return self._model.space.store.agreed(*own)


def take_inner_step(
    model: SubspaceModel,
    gradient: Tensor,
    *,
    parameters: FlatParameters,
    trial: TrialLoss,
    damping: Damping,
    record: StepRecord,
) -> tuple[StepRecord, Tensor | None]:
    """One step inside the subspace: all dampings at once, the best one taken if it lowers the trial loss.

    Args:
        model: The subspace model.
        gradient: The gradient at the present parameters, shape ``(n,)``.
        parameters: The parameters; changed only if the step is taken, else left bit for bit.
        trial: The loss around the present parameters.
        damping: How the damping is chosen.
        record: The record so far.

    Returns:
        The record with this step added, and the step of shape ``(n,)``, or ``None`` if none was taken.
    """
    origin = parameters.read()
    coordinates = model.coordinates(gradient, trial.loss, float(norm(origin)))
    candidates = _Candidates(model, coordinates, parameters, origin, trial)
    try:
        strategy = damping if model.rule.damped else FixedDamping(1.0)
        choice = strategy.choose(candidates, scale=model.scale, baseline=trial.loss)
    finally:
        parameters.write(origin)
    after, predicted, step = candidates.best
    accepted = step is not None and after < trial.loss
    strategy.feedback(accepted=accepted, reduction_ratio=(trial.loss - after) / predicted if predicted > 0 else 0.0)
    model.preconditioner.feedback(accepted=accepted, store=model.space.store)
    chosen = choice.damping if model.rule.damped else math.nan
    record = replace(record, damping=chosen, trials=record.trials + choice.trials)
    if not accepted or step is None:
        return record, None
    target = model.space.store.agreed_point(origin + step)
    parameters.write(target)
    return (
        replace(
            record,
            loss_after=after,
            predicted_decrease=record.predicted_decrease + predicted,
            inner_steps=record.inner_steps + 1,
            accepted=True,
        ),
        target - origin,
    )


def clip(gradient: Tensor, max_norm: float | None) -> Tensor:
    """Scales a gradient down to a norm (Pascanu et al. 2013; Appendix F.3), if it exceeds it."""
    if max_norm is None:
        return gradient
    length = float(norm(gradient))
    return gradient * (max_norm / length) if length > max_norm else gradient
