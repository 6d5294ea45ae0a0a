"""Quasi-Newton steps against the dense BFGS formula, and what they do to an optimizer's bookkeeping."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn import SaddleFreeNewton
from lightning_sfn.newton import FlatParameters, IdentityPreconditioner, KroneckerFactors, Objective
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.confirmation import Unconfirmed
from lightning_sfn.newton.krylov import Direction
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.outer_step import Losses
from lightning_sfn.newton.secant_steps import SecantSteps, quasi_newton_direction
from lightning_sfn.newton.step import StepRecord

from .cases import symmetric
from .doubles import descent

D = torch.float64
N = 5


class Scaled(IdentityPreconditioner):
    """A dense symmetric map."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def scale(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix


def secants(bad: bool) -> list[Direction]:
    """Three secants of a positive definite matrix, oldest first; with bad ones between them."""
    torch.manual_seed(1)
    root = symmetric(N)
    hessian = root @ root.T + torch.eye(N, dtype=D)
    good = [Direction(s, hessian @ s) for s in torch.randn(3, N, dtype=D)]
    if not bad:
        return good
    other = torch.randn(N, dtype=D)
    return [Direction(other, -other), good[0], Direction(other, None), good[1], Direction(other, 0 * other), good[2]]


@pytest.mark.parametrize("bad", [False, True], ids=["good", "some say nothing, or of negative curvature"])
def test_the_direction_is_that_of_the_dense_inverse(bad: bool) -> None:
    """B <- (1 - s y' / s'y) B (1 - y s' / s'y) + s s' / s'y, from the oldest secant to the newest."""
    root = torch.eye(N, dtype=D) + 0.1 * symmetric(N)
    inverse, one = root @ root, torch.eye(N, dtype=D)
    for s, y in ((d.vector, d.product) for d in secants(False)):
        assert y is not None
        rho = 1 / float(s @ y)
        inverse = (one - rho * s.outer(y)) @ inverse @ (one - rho * y.outer(s)) + rho * s.outer(s)
    gradient = torch.randn(N, dtype=D)
    found = quasi_newton_direction(gradient, secants(bad)[::-1], Scaled(root))
    torch.testing.assert_close(found, inverse @ gradient, rtol=1e-12, atol=1e-12)


def test_without_secants_the_gradient_is_preconditioned_and_stays_as_it_is() -> None:
    gradient = torch.randn(N, dtype=D)
    before = gradient.clone()
    found = quasi_newton_direction(gradient, [], IdentityPreconditioner())
    torch.testing.assert_close(found, gradient, rtol=0, atol=0)
    found.zero_()
    torch.testing.assert_close(gradient, before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- one run


RECORD = StepRecord(loss_before=100.0, loss_after=90.0, gradient_norm=1.0, accepted=True, coordinates="kronecker")
CURVATURE = torch.tensor([1.0, 10.0, 100.0], dtype=D)


def bowl(x: Tensor) -> Tensor:
    return (CURVATURE * x.square()).sum() / 2


def follow(
    x: Tensor, steps: SecantSteps, carried: Carried | None = None, record: StepRecord = RECORD, **options: Any
) -> tuple[StepRecord, list[float]]:
    """The record of a run on the bowl, and the loss at every evaluation."""
    seen: list[float] = []

    def closure() -> Tensor:
        loss = bowl(x)
        seen.append(float(loss.detach()))
        return loss

    objective = Objective([closure])
    losses = Losses(objective, objective, objective)
    carried = carried or Carried(StepMemory(10, secants=True), bend=0.0)
    with torch.no_grad():
        after = steps.run(FlatParameters([x]), losses, descent(**options), carried, BasisStore(), record)
    return after, seen


def test_every_step_that_stays_lowers_the_loss_and_is_booked() -> None:
    x = torch.ones(3, dtype=D, requires_grad=True)
    carried = Carried(StepMemory(10, secants=True), bend=0.0)
    record, seen = follow(x, SecantSteps(20), carried, replace(RECORD, loss_before=60.0, gradients=50))
    assert record.gradients == 50 + len(seen)
    assert record.secant_gradients == len(seen)
    assert record.loss_after == float(bowl(x).detach()) == min(seen)
    best = [min(seen[: i + 1]) for i in range(len(seen))]
    assert record.secant_steps == sum(after < before for before, after in pairwise(best))
    assert 3 <= record.secant_steps <= len(seen) - 1
    assert carried.expected == (record.loss_after, 0.0)


def test_a_step_that_raises_the_loss_is_taken_back_and_has_shown_its_curvature() -> None:
    x = torch.tensor([0.0, 0.0, 1.0], dtype=D, requires_grad=True)
    carried = Carried(StepMemory(10, secants=True), bend=0.0)
    steps = SecantSteps(1, radius=1.0)  # -g of length 100 is cut to about seven: across to the far side
    record, seen = follow(x, steps, carried, replace(RECORD, gradients=4))
    assert len(seen) == 2
    assert seen[1] > seen[0]
    assert x.tolist() == [0.0, 0.0, 1.0]
    assert (record.secant_steps, record.loss_after, steps.radius) == (0, 50.0, 0.5)
    (secant,) = carried.memory.directions
    assert secant.product is not None
    torch.testing.assert_close(secant.product, CURVATURE * secant.vector, rtol=1e-12, atol=1e-12)
    steps.waiting, steps.radius = 0, 2.0
    follow(x, steps, carried)  # the secant tells the minimum
    assert float(x.detach().abs().max()) <= 1e-12


def test_steps_keep_to_the_radius_which_grows_where_it_is_met() -> None:
    x = torch.tensor([1.0, 0.0, 0.0], dtype=D, requires_grad=True)
    steps = SecantSteps(1, radius=0.1)
    follow(x, steps, record=replace(RECORD, loss_before=0.5 + 1e-3))
    assert 1 - float(x.detach()[0]) == pytest.approx(0.1 * math.sqrt(0.5))  # of the loss
    assert steps.radius == pytest.approx(0.12)
    x = torch.tensor([1e-2, 0.0, 0.0], dtype=D, requires_grad=True)
    steps = SecantSteps(1, radius=2.0)
    follow(x, steps)  # the whole step is shorter
    assert float(x.detach().abs().max()) <= 1e-12
    assert steps.radius == 2.0


def test_bounds_and_learning_rates_hold() -> None:
    for options, length in (({"max_step_norm": 1e-3}, 1e-3), ({"learning_rates": 0.25}, 0.025 * math.sqrt(0.5))):
        x = torch.tensor([1.0, 0.0, 0.0], dtype=D, requires_grad=True)
        follow(x, SecantSteps(1, radius=0.1), record=replace(RECORD, loss_before=0.5 + 1e-3), **options)
        assert 1 - float(x.detach()[0]) == pytest.approx(length)


def test_layers_that_may_go_the_whole_way_do() -> None:
    class Sparing(IdentityPreconditioner):
        def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
            return torch.tensor([[1.0, 0.5, 1.0]], dtype=steps.dtype)

    x = torch.tensor([0.1, 1e-3, 0.0], dtype=D, requires_grad=True)
    follow(x, SecantSteps(1, radius=2.0), preconditioner=Sparing())
    torch.testing.assert_close(x.detach(), torch.tensor([0.0, 1e-3 - 5e-3, 0.0], dtype=D))  # x - share * curvature * x


@pytest.mark.parametrize(("subspace", "evaluations"), [(1e-9, 1 + 6), (1e9, 1 + 4)], ids=["less", "more"])
def test_steps_go_on_while_they_are_worth_more_than_the_subspace_was(subspace: float, evaluations: int) -> None:
    """Four are taken in any case, in order to see."""
    x = torch.ones(3, dtype=D, requires_grad=True)
    before = float(bowl(x).detach())
    record = replace(RECORD, loss_before=before + subspace, gradients=1)
    _, seen = follow(x, SecantSteps(6), record=record)
    assert len(seen) == evaluations


def test_where_they_do_not_pay_they_wait_longer_each_time() -> None:
    steps, tried = SecantSteps(12), []
    for _ in range(30):
        x = torch.ones(3, dtype=D, requires_grad=True)
        _, seen = follow(x, steps, record=replace(RECORD, loss_before=1e9))
        tried.append(bool(seen))
    assert [i for i, each in enumerate(tried) if each] == [0, 2, 6, 14, 22]
    x = torch.ones(3, dtype=D, requires_grad=True)
    steps.waiting, steps.radius = 0, 0.1
    follow(x, steps, record=replace(RECORD, loss_before=56.0, gradients=10))
    assert (steps.pause, steps.waiting) == (0, 0)


@pytest.mark.parametrize("inner", [1, 2])
def test_a_subspace_step_that_raised_the_loss_is_left_to_be_taken_back(inner: int) -> None:
    """From what it was where that inner step began, which may be less than where the first one did."""
    x = torch.ones(3, dtype=D, requires_grad=True)
    carried = Carried(StepMemory(10, secants=True), bend=0.0)
    begun = 20.0 if inner == 2 else 1.0
    waiting = carried.unconfirmed = Unconfirmed(torch.zeros(3, dtype=D), begun, float(x.detach().norm()))
    subspace = replace(RECORD, loss_before=100.0 if inner == 2 else 1.0, loss_after=0.5)
    record, seen = follow(x, SecantSteps(12), carried, subspace)
    assert record == replace(subspace, gradients=1, secant_gradients=1)
    assert len(seen) == 1
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert carried.unconfirmed is waiting


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"most": 0}, False),
        ({"accepted": False}, False),
        ({"coordinates": "diagonal"}, False),
        ({"bend": 0.29}, True),
        ({"bend": 0.31}, False),
        ({"secants": False}, False),
        ({"capacity": 0}, False),
    ],
    ids=str,
)
def test_when_they_may_follow_a_subspace(change: dict[str, Any], expected: bool) -> None:
    record = replace(RECORD, **{k: v for k, v in change.items() if k in ("accepted", "coordinates")})
    memory = StepMemory(change.get("capacity", 10), secants=change.get("secants", True))
    carried = Carried(memory, bend=change.get("bend", 0.0))
    assert SecantSteps(change.get("most", 5)).can_follow(record, carried, BasisStore()) is expected


# ---------------------------------------------------------------------------------------------------- optimizers


def network() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    return model, torch.randn(128, 4, dtype=D), torch.randint(3, (128,))


def losses_of(gradients: int, **options: Any) -> tuple[list[float], int]:
    """The loss before each step, as long as a number of gradients lasts, and how many quasi-Newton steps there were."""
    model, x, y = network()
    optimizer = SaddleFreeNewton(model.parameters(), **options)
    spent, found, taken = 0.0, [], 0
    while spent < gradients:
        found.append(float(optimizer.step(lambda: F.cross_entropy(model(x), y))))
        record = optimizer.last_step
        assert record is not None
        spent += record.gradients + 2 * record.products + record.trials / 3
        taken += record.secant_steps
    return found, taken


def test_a_network_learns_faster_with_them_and_never_takes_a_step_uphill() -> None:
    with_them, taken = losses_of(300)
    without, none = losses_of(300, secant_steps=0)
    assert taken > 30
    assert none == 0
    assert all(after < before for before, after in pairwise(with_them))
    assert with_them[-1] < 0.5 * without[-1]


@pytest.mark.parametrize("options", [{"heavy_ball": 0.95}, {"preconditioner": "diagonal"}, {"secants": False}], ids=str)
def test_other_methods_have_none(options: dict[str, Any]) -> None:
    assert losses_of(100, **options)[1] == 0


@pytest.mark.parametrize("heavy_ball", [0.0, 0.95])
def test_what_a_hook_holds_stays_where_it_is(heavy_ball: float) -> None:
    """Kronecker factors would move a unit's weights along with those of the other units of its layer."""
    model, x, y = network()
    weight = model[0].weight
    weight.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) > 0).unsqueeze(1))
    before = weight.detach().clone()
    optimizer, kinds = SaddleFreeNewton(model.parameters(), heavy_ball=heavy_ball), set()
    for _ in range(12):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_step is not None
        kinds |= {optimizer.last_step.kind, "quasi-Newton" if optimizer.last_step.secant_steps else ""}
    assert ("momentum" if heavy_ball else "quasi-Newton") in kinds
    moved = (weight.detach() - before).abs().amax(1)
    assert moved[0] == 0
    assert bool((moved[1:] > 0).all())


@pytest.mark.parametrize("rule", ["saddle_free", "newton", "damped_newton", "truncated_newton", "gradient"])
def test_only_saddle_free_steps_are_followed(rule: str) -> None:
    """What shows where another trust region leads must lead there itself."""
    model, x, y = network()
    optimizer = SaddleFreeNewton(model.parameters(), lr=0.1 if rule == "gradient" else 1.0, trust_region=rule)
    taken = 0
    for _ in range(6):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_step is not None
        taken += optimizer.last_step.secant_steps
    assert (taken > 0) == (rule == "saddle_free")


def test_the_papers_method_has_none() -> None:
    model, x, y = network()
    optimizer = SaddleFreeNewton.as_in_paper(model.parameters(), krylov_dim=8, preconditioner=KroneckerFactors(model))
    for _ in range(5):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_step is not None
        assert optimizer.last_step.secant_steps == 0


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    model, x, y = network()
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    optimizer = SaddleFreeNewton(model.parameters())
    for _ in range(6):
        optimizer.step(closure)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert state["newton"]["secants"]["radius"] != 0.1
    ends = []
    for _ in range(2):
        model.load_state_dict(weights)
        again = SaddleFreeNewton(model.parameters())
        again.load_state_dict(copy.deepcopy(state))
        for _ in range(6):
            again.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    model.load_state_dict(weights)
    for _ in range(6):
        optimizer.step(closure)
    ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_a_state_of_other_parameters_knows_no_radius_yet() -> None:
    model, x, y = network()
    optimizer = SaddleFreeNewton(model.parameters())
    for _ in range(6):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    learned = optimizer.state_dict()["newton"]["secants"]
    model[0].requires_grad_(False)
    assert optimizer.state_dict()["newton"]["secants"] == SecantSteps(0).state_dict() != learned
    model[0].requires_grad_(True)
    assert optimizer.state_dict()["newton"]["secants"] == learned  # to take a state changes nothing


def test_a_state_without_them_is_one_of_an_earlier_version() -> None:
    model, x, y = network()
    optimizer = SaddleFreeNewton(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    state = copy.deepcopy(optimizer.state_dict())
    del state["newton"]["secants"], state["newton"]["bend"]
    again = SaddleFreeNewton(model.parameters())
    again.load_state_dict(state)
    assert again._carried.bent is optimizer._carried.bent


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="secant_steps is -1, but a number of at least 0 is expected"):
        SaddleFreeNewton([torch.zeros(2, requires_grad=True)], secant_steps=-1)
