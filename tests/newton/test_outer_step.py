"""An outer step put together by hand, from halves that are ours or somebody else's."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import (
    FixedDamping,
    FlatParameters,
    HessianOperator,
    IdentityPreconditioner,
    KrylovSubspace,
    Objective,
)
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.outer_step import Descent, Losses, Search, take_outer_step
from lightning_sfn.newton.step import StepRecord, SubspaceModel
from lightning_sfn.newton.trust_region import RULES

from .cases import bits, quadratic, symmetric

ROOT = symmetric(5)
MATRIX = ROOT @ ROOT.T + torch.eye(5, dtype=torch.float64)


def leaf() -> Tensor:
    return torch.linspace(-1.0, 2.0, 5, dtype=torch.float64).requires_grad_()


def descent(**options: Any) -> Descent:
    return Descent(
        **{
            "krylov_dim": 5,
            "preconditioner": IdentityPreconditioner(),
            "rule": RULES["saddle_free"],
            "exploration": 0.0,
            "generator": torch.Generator().manual_seed(0),
            "learning_rates": 1.0,
            "max_grad_norm": None,
            "max_step_norm": None,
            **options,
        }
    )


def take(x: Tensor, losses: Losses, descent: Descent, search: Search, carried: Carried | None = None) -> StepRecord:
    parameters = FlatParameters([x])
    carried = carried or Carried(StepMemory(3, secants=True))
    with torch.no_grad():
        operator = HessianOperator(losses.curvature, parameters)
        return take_outer_step(parameters, losses, operator, descent, search, carried, BasisStore())


def same(objective: Objective, **entries: Any) -> Losses:
    return Losses(objective, objective, objective, **entries)


def test_a_quadratic_is_solved_and_booked() -> None:
    x = leaf()
    before = float((x @ MATRIX @ x).detach() / 2)
    record = take(x, same(Objective([quadratic(MATRIX)(x)])), descent(), Search(FixedDamping(1e-13), 1))
    assert float(x.detach().norm()) <= 1e-10
    assert record.accepted
    assert record.loss_before == pytest.approx(before)
    assert record.predicted_decrease == pytest.approx(before)
    extremes = torch.linalg.eigvalsh(MATRIX)
    assert (record.lambda_min, record.lambda_max) == pytest.approx((float(extremes[0]), float(extremes[-1])))
    assert (record.subspace_dim, record.products, record.gradients, record.trials) == (5, 5, 1, 1)


def test_what_a_step_leaves_behind() -> None:
    """Its loss, to an accuracy that depends on what trials saw; the lowest Ritz vector; that the loss was checked."""
    x, values = leaf(), torch.linalg.eigh(MATRIX)
    objective = Objective([quadratic(MATRIX)(x)])
    carried = Carried(StepMemory(3, secants=True))
    record = take(x, same(objective), descent(), Search(FixedDamping(10.0), 1), carried)
    assert carried.checked
    assert carried.expected == (record.loss_after, 0.0)
    assert carried.escape is not None
    assert abs(float(carried.escape @ values.eigenvectors[:, 0])) == pytest.approx(1.0)
    assert not carried.bent
    losses = replace(same(objective), trial=Objective([quadratic(MATRIX)(x)]))
    record = take(x, losses, descent(), Search(FixedDamping(10.0), 1), carried)
    assert carried.expected == (record.loss_after, pytest.approx((record.loss_before - record.loss_after) / 4))


class Trusting(Search):
    """Takes the step of one damping, whatever the trial losses would say."""

    def run(self, model: SubspaceModel, parameters: FlatParameters, *rest: Any) -> StepRecord:
        _, trial, gradient, record, _, _ = rest
        steps, predicted = model.steps(model.coordinates(gradient, trial.loss, 1.0), [1e-13])
        parameters.write(parameters.read() + steps[0])
        return replace(record, accepted=True, loss_after=record.loss_before - float(predicted[0]))


def test_another_search_goes_with_our_descent() -> None:
    x = leaf()
    record = take(x, same(Objective([quadratic(MATRIX)(x)])), descent(), Trusting(FixedDamping(1.0), 1))
    assert float(x.detach().norm()) <= 1e-10
    assert record.loss_after == pytest.approx(0.0, abs=1e-10)


class Coordinate(Descent):
    """Moves the first parameter alone, by its own curvature."""

    def model(self, operator: Any, gradient: Tensor, *_: Any) -> SubspaceModel:
        unit = torch.eye(5, dtype=torch.float64)[:1]
        bend = (operator.matvec(unit[0]) @ unit[0]).reshape(1, 1)
        space = KrylovSubspace(unit, bend, coupling=0.0, lanczos_dim=1, products=1)
        return SubspaceModel(space, self.preconditioner, self.rule, self.learning_rates, None)


def test_another_descent_goes_with_our_search() -> None:
    x, start = leaf(), leaf().detach()
    ours = descent()
    coordinate = Coordinate(**{name: getattr(ours, name) for name in Descent.__dataclass_fields__})
    record = take(x, same(Objective([quadratic(MATRIX)(x)])), coordinate, Search(FixedDamping(1e-13), 1))
    assert record.accepted
    assert torch.equal(x[1:].detach(), start[1:])
    assert float(x[0].detach()) == pytest.approx(float(start[0] - (MATRIX @ start)[0] / MATRIX[0, 0]))


def test_gradients_are_bounded_in_the_subspace_and_in_the_model() -> None:
    x, start = leaf(), leaf().detach()
    gradient = MATRIX @ start
    bounded = descent(rule=RULES["gradient"], max_grad_norm=1e-3, learning_rates=0.5)
    take(x, same(Objective([quadratic(MATRIX)(x)])), bounded, Search(FixedDamping(1.0), 1))
    torch.testing.assert_close(x.detach() - start, -0.5e-3 * gradient / gradient.norm())


def test_a_known_loss_and_gradient_are_taken_as_they_are() -> None:
    x = leaf()
    known = (123.0, torch.ones(5, dtype=torch.float64))
    losses = same(Objective([quadratic(MATRIX)(x)]), known=known)
    loss, gradient = losses.at(FlatParameters([x]), HessianOperator(losses.curvature, [x]))
    assert loss == 123.0
    assert gradient is known[1]


@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_is_the_objectives_whatever_products_see(shared: bool) -> None:
    x = leaf()
    objective = Objective([quadratic(MATRIX)(x)])
    losses = same(objective) if shared else replace(same(objective), curvature=Objective([lambda: (x**4).sum()]))
    _, gradient = losses.at(FlatParameters([x]), HessianOperator(losses.curvature, [x]))
    torch.testing.assert_close(gradient, MATRIX @ x.detach())


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ((math.nan, torch.ones(5)), "The loss is nan"),
        ((math.inf, torch.ones(5)), "The loss is inf"),
        ((1.0, torch.tensor([1.0, math.nan, 0.0, 0.0, 0.0])), "The gradient is not finite"),
    ],
)
def test_what_is_not_finite_is_refused_in_one_sentence(known: tuple[float, Tensor], words: str) -> None:
    x = leaf()
    before = bits([x])
    with pytest.raises(FloatingPointError, match=rf"^{words} at the present parameters, so no step is tried: .*\.$"):
        take(x, same(Objective([quadratic(MATRIX)(x)]), known=known), descent(), Search(FixedDamping(1.0), 1))
    assert bits([x]) == before
