"""Momentum steps against closed forms, and what they do to an optimizer's bookkeeping."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn import SaddleFreeNewton
from lightning_sfn.newton import (
    CurvatureOperator,
    FlatParameters,
    HessianOperator,
    IdentityPreconditioner,
    KroneckerFactors,
    Objective,
)
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.kronecker_estimate import estimated
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.momentum import Glide
from lightning_sfn.newton.outer_step import Losses
from lightning_sfn.newton.pace import Pace
from lightning_sfn.newton.step import StepRecord

from .doubles import descent

D = torch.float64
CURVATURE = torch.tensor([1.0, 0.3, 0.05], dtype=D)


def bowl(x: Tensor) -> Tensor:
    return (CURVATURE * x.square()).sum() / 2


def kinds_of(optimizer: SaddleFreeNewton, closure: object, steps: int) -> list[str]:
    found = []
    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
        assert optimizer.last_step is not None
        found.append(optimizer.last_step.kind)
    return found


def step_until(optimizer: SaddleFreeNewton, closure: object, reached: Callable[[Glide], bool]) -> Glide:
    """Takes steps, not too many, up to a state of the momentum."""
    assert optimizer._glide is not None
    for _ in range(200):
        if reached(optimizer._glide):
            return optimizer._glide
        optimizer.step(closure)  # type: ignore[arg-type]
    raise AssertionError("200 steps have not come there.")


def test_without_momentum_every_step_has_a_subspace() -> None:
    x = torch.ones(3, dtype=D, requires_grad=True)
    assert set(kinds_of(SaddleFreeNewton([x]), lambda: bowl(x), 30)) == {"subspace"}


def ball(momentum: float, x: list[float], steps: int) -> tuple[list[list[float]], int]:
    """The points of a heavy ball on the bowl plus one, whose reach grows and halves, and how often it began anew.

    In plain numbers and from the words of the documentation alone: no subspaces, no way that leads astray.
    """
    bend = CURVATURE.tolist()
    reach, restarts, points, speed = 0.5, 0, [], None
    rest = wandered = best = math.inf
    there = x
    for _ in range(steps):
        loss = 1 + sum(b * c * c for b, c in zip(bend, x, strict=True)) / 2
        assert loss <= 1.25 * best
        wandered = wandered + (loss - best) / best if loss > best else 0.0
        if wandered > 0.25 and rest - best > 0.05 * best:
            x, loss, speed, reach, restarts = there, best, None, max(0.25, reach / 2), restarts + 1
        if speed is None:
            speed, rest, wandered = [0.0] * len(x), loss, 0.0
        if loss < best:
            best, there = loss, x
        new = [-0.3 * b * c for b, c in zip(bend, x, strict=True)]
        cut = min(1.0, 0.1 * math.sqrt(best) / math.hypot(*new))
        kept = max(0.0, 1 - (1 - momentum) / reach)
        speed = [kept * s + cut * n for s, n in zip(speed, new, strict=True)]
        x = [c + s for c, s in zip(x, speed, strict=True)]
        points.append(x)
        reach = min(1.0, 1.02 * reach)
    return points, restarts


@pytest.mark.parametrize(
    ("start", "momentum", "restarts"),
    [
        (1e-3, 0.9, 0),  # far inside the radius, and of no gain worth going back to
        (1e-3, 0.95, 0),
        (1e-3, 0.5, 0),  # none at the start
        (1e-3, 0.25, 0),  # none until the reach is three quarters
        (3.0, 0.9, 1),
        (1.0, 0.95, 1),
        (1.0, 0.99, 2),
    ],
)
def test_momentum_steps_are_those_of_the_heavy_ball(start: float, momentum: float, restarts: int) -> None:
    """Identity coordinates: d <- (1 - (1 - momentum) / reach) d - 0.3 c g, written out, for all of the first turn."""
    x = torch.full((3,), start, dtype=D, requires_grad=True)
    optimizer = SaddleFreeNewton([x], preconditioner=None, heavy_ball=momentum, trust_region="gradient", lr=1e-9)
    closure = lambda: bowl(x) + 1.0  # noqa: E731
    optimizer.step(closure)  # in a subspace; it goes nowhere, so that the start is known
    optimizer.param_groups[0]["lr"] = 1.0
    points, found = ball(momentum, x.tolist(), 40)
    assert found == restarts
    for point in points:
        assert kinds_of(optimizer, closure, 1) == ["momentum"]
        torch.testing.assert_close(x.detach(), torch.tensor(point, dtype=D), rtol=1e-6, atol=1e-12)


def network() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    return model, torch.randn(64, 4, dtype=D), torch.randint(3, (64,))


def optimizer_for(model: torch.nn.Module, **options: float) -> SaddleFreeNewton:
    return SaddleFreeNewton(
        model.parameters(), heavy_ball=0.95, preconditioner=KroneckerFactors(model), inner_steps=1, **options
    )


def test_both_kinds_lower_the_loss_of_a_network() -> None:
    model, x, y = network()
    before = float(F.cross_entropy(model(x), y).detach())
    optimizer = optimizer_for(model)
    assert set(kinds_of(optimizer, lambda: F.cross_entropy(model(x), y), 60)) == {"subspace", "momentum"}
    assert float(F.cross_entropy(model(x), y).detach()) < 0.5 * before


@pytest.mark.parametrize("heavy_ball", [0.0, 0.95])
def test_with_momentum_all_steps_keep_their_direction(heavy_ball: float) -> None:
    optimizer = SaddleFreeNewton(network()[0].parameters(), heavy_ball=heavy_ball)
    assert optimizer._descent(optimizer._parameters).straight == (heavy_ball > 0)


def test_a_state_without_momentum_leaves_none_of_before() -> None:
    """Else the next step could go back to the best point of before the load."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    assert "momentum" in kinds_of(optimizer, lambda: F.cross_entropy(model(x), y), 20)
    plain = SaddleFreeNewton(model.parameters(), preconditioner=KroneckerFactors(model))
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer._glide is not None
    assert (optimizer._glide.momentum, optimizer._glide.best, optimizer._glide.velocity) == (0.95, None, None)


def test_a_step_stays_within_the_radius() -> None:
    """With lr = 1 and a bound, no step is longer than it."""
    model, x, y = network()
    optimizer = optimizer_for(model, max_step_norm=1e-3)
    for _ in range(30):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_step is not None
        assert optimizer.last_step.step_norm <= 1e-3 * (1 + 1e-6)


def test_a_way_that_leads_astray_is_taken_back_to_its_best_point() -> None:
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    glide = step_until(optimizer, closure, lambda glide: glide.best is not None)
    assert glide.best is not None
    best_loss, best = glide.best[0], glide.best[1].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30.0)
    assert float(closure().detach()) > best_loss + 1.0
    settled: list[Tensor] = []
    original = glide.settle

    def settle(parameters: object, losses: object, carried: object) -> object:
        result = original(parameters, losses, carried)  # type: ignore[arg-type]
        settled.append(parameters.read().clone())  # type: ignore[attr-defined]
        return result

    glide.settle = settle  # type: ignore[assignment,method-assign]
    optimizer.step(closure)
    torch.testing.assert_close(settled[0], best, rtol=0, atol=0)
    assert optimizer.last_step is not None
    assert optimizer.last_step.kind == "subspace"
    assert optimizer.last_step.loss_before == pytest.approx(best_loss)
    assert glide.shrink < 1.0
    assert glide.reach == pytest.approx(0.5 * 1.02 / 2)  # one momentum step was taken


def astray() -> tuple[SaddleFreeNewton, torch.nn.Module, Callable[[], Tensor]]:
    """An optimizer whose network was moved far off in the middle of a momentum turn."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    step_until(optimizer, closure, lambda glide: glide.best is not None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30.0)
    return optimizer, model, closure


def test_no_cycle_ends_above_the_best_point_of_its_momentum_turn() -> None:
    """Where the harvest brings nothing, here since subspace steps are kept from moving."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    glide = step_until(optimizer, closure, lambda glide: glide.pace.kind == "momentum" and glide.pace.spent >= 10)
    assert glide.best is not None
    best_loss, best = glide.best[0], glide.best[1].clone()
    parameters = FlatParameters(model.parameters())
    parameters.write(best)
    uphill = parameters.flatten(torch.autograd.grad(closure(), parameters.tensors))
    with torch.no_grad():
        parameters.write(best + 1e-2 * uphill)  # not astray
    assert best_loss < float(closure().detach()) < 1.1 * best_loss
    glide.pace.end_momentum()
    optimizer.param_groups[0]["lr"] = 1e-12
    optimizer.step(closure)
    assert glide.best is not None
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.loss_before == pytest.approx(best_loss, abs=1e-12)
    torch.testing.assert_close(
        torch.nn.utils.parameters_to_vector(model.parameters()).detach(), best, rtol=0, atol=1e-9
    )
    assert glide.best is None


def fail_once(optimizer: SaddleFreeNewton, error: Exception) -> list[Tensor]:
    """Lets the optimizer's next step fail after the way back; the parameters that each attempt starts from."""
    original, starts = optimizer._one_step, []

    def one_step(parameters: Any, losses: Any) -> Any:
        starts.append(parameters.read().clone())
        if len(starts) == 1:
            raise error
        return original(parameters, losses)

    optimizer._one_step = one_step  # type: ignore[method-assign]
    return starts


def test_a_retry_for_want_of_memory_starts_where_the_way_back_ended() -> None:
    optimizer, _, closure = astray()
    reference, _, reference_closure = astray()
    reference.step(reference_closure)
    assert optimizer._glide is not None
    assert optimizer._glide.best is not None
    best = optimizer._glide.best[1].clone()
    starts = fail_once(optimizer, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.warns(UserWarning, match="Memory ran out"):
        optimizer.step(closure)
    assert len(starts) == 2
    assert all(torch.equal(start, best) for start in starts)
    assert reference._glide is not None
    assert optimizer._glide.pace == reference._glide.pace
    assert (optimizer._glide.shrink, optimizer._glide.reach) == (reference._glide.shrink, reference._glide.reach)
    assert optimizer._glide.reach == pytest.approx(0.5 * 1.02 / 2)  # halved once


def test_an_error_gives_back_the_parameters_and_the_way_back() -> None:
    optimizer, model, closure = astray()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    assert optimizer._glide is not None
    best, state = optimizer._glide.best, copy.deepcopy(optimizer._glide.state_dict())
    fail_once(optimizer, ArithmeticError("boom"))
    with pytest.raises(ArithmeticError, match="boom"):
        optimizer.step(closure)
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), before)
    assert optimizer._glide.best is not None
    assert best is not None
    assert torch.equal(optimizer._glide.best[1], best[1])
    assert optimizer._glide.state_dict()["pace"] == state["pace"]
    assert (optimizer._glide.shrink, optimizer._glide.reach) == (state["shrink"], state["reach"])
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.loss_before == pytest.approx(best[0])


def test_factors_are_estimated_less_often_between_momentum_steps() -> None:
    """Every third subspace step, and every ninth momentum step."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    factors = optimizer.preconditioner
    assert isinstance(factors, KroneckerFactors)
    asked, kinds = [], list[str]()

    def estimating(*args: Any) -> Any:
        asked.append(len(kinds))
        return estimated(*args)

    with mock.patch("lightning_sfn.newton.kronecker.estimated", estimating):
        while kinds.count("momentum") < 30 and len(kinds) < 200:
            kinds += kinds_of(optimizer, lambda: F.cross_entropy(model(x), y), 1)
    between = [last - first for first, last in pairwise(asked) if kinds[first] == kinds[last - 1] == "momentum"]
    assert set(between) == {9}


@pytest.mark.parametrize("before", [1, 5, 25])
def test_a_restored_optimizer_goes_on_bit_for_bit(before: int) -> None:
    model, x, y = network()
    optimizer = optimizer_for(model)
    for _ in range(before):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    other = copy.deepcopy(model)
    restored = optimizer_for(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(25):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        restored.step(lambda: F.cross_entropy(other(x), y))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert optimizer._glide is not None
    assert restored._glide is not None
    assert restored._glide.reach == optimizer._glide.reach != 0.5


def test_momentum_starts_anew_where_other_parameters_train() -> None:
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    step_until(optimizer, closure, lambda glide: glide.velocity is not None)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.kind == "subspace"
    assert optimizer._glide is not None
    assert (optimizer._glide.momentum, optimizer._glide.velocity, optimizer._glide.best) == (0.95, None, None)
    assert optimizer._glide.reach == 0.5


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="heavy_ball is"):
        SaddleFreeNewton([torch.ones(2, requires_grad=True)], heavy_ball=momentum)


# ------------------------------------------------------------------------------------------------ by hand

START = torch.tensor([1.0, -2.0, 4.0], dtype=D)
GRADIENT = torch.tensor([1.0, 2.0, -2.0], dtype=D)  # of norm 3
BEFORE = torch.tensor([0.5, 0.5, -1.0], dtype=D)  # the step before


class Doubling(IdentityPreconditioner):
    """D = 2, of whose steps a share may be taken; notes what it is asked for."""

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.refreshes, self.asked = share, 0, torch.zeros(0)
        self.told: list[Any] = []  # whether there was negative curvature, and what is minimized

    @property
    def unfactored(self) -> tuple[str, ...]:
        return ("odd",)

    def refresh(self, operator: CurvatureOperator, generator: torch.Generator, *told: Any) -> None:
        assert isinstance(generator, torch.Generator)
        operator.matvec(START)
        self.refreshes += 1
        self.told.append(told)

    def scale(self, vectors: Tensor) -> Tensor:
        return 2 * vectors

    def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
        self.asked, self.straight = steps, straight
        return torch.full((len(steps), 1), self.share, dtype=D)


class Closing(HessianOperator):
    """Notes when it is closed."""

    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


def remembering() -> Carried:
    """With a step that waits for the gradient after it."""
    memory = StepMemory(3, secants=True)
    memory.record(torch.ones(3, dtype=D), torch.zeros(3, dtype=D))
    return Carried(memory)


class Stage:
    """One vector of parameters, losses that the test makes up, and the momentum on it."""

    def __init__(self, glide: Glide, loss: float = 1e4, gradient: Tensor = GRADIENT, **options: Any) -> None:
        self.glide, self.x = glide, START.clone().requires_grad_()
        self.parameters, objective = FlatParameters([self.x]), Objective([lambda: bowl(self.x)])
        self.losses = Losses(objective, objective, objective, True, (loss, gradient))
        self.operator, self.descent = Closing(objective, self.parameters), descent(**options)
        self.carried = remembering()

    def settle(self) -> Losses:
        with torch.no_grad():
            return self.glide.settle(self.parameters, self.losses, self.carried)

    def step(self) -> StepRecord:
        with torch.no_grad():
            return self.glide.step(
                self.parameters, self.losses, self.operator, self.descent, self.carried, BasisStore()
            )

    @property
    def moved(self) -> Tensor:
        return self.x.detach() - START


def under_way(**entries: Any) -> Glide:
    """Half of each last step in the next one, at full reach; a first loss of 100, and no step yet."""
    return Glide(0.5, **{"unit": 100.0, "reach": 1.0, **entries})


@pytest.mark.parametrize(
    ("loss", "entries", "factor"),
    [
        (1e4, {}, 0.3),  # radius 10, length 0.9
        (4.0, {}, 0.2 / 3),  # radius 0.2: a tenth of the root
        (4.0, {"shrink": 0.5}, 0.1 / 3),
        (0.0, {}, 0.1 / 3),  # a loss counts as a hundredth of the first one at least
        (-4.0, {}, 0.2 / 3),
        (9.0, {"best": (4.0, START)}, 0.2 / 3),  # the best loss of the turn counts
        (4.0, {"best": (9.0, START)}, 0.2 / 3),
    ],
)
@pytest.mark.parametrize("velocity", [None, BEFORE])
def test_the_new_part_of_a_step_is_within_the_radius(
    loss: float, entries: dict[str, Any], factor: float, velocity: Tensor | None
) -> None:
    stage = Stage(under_way(velocity=velocity, **entries), loss)
    stage.step()
    expected = -factor * GRADIENT if velocity is None else 0.5 * BEFORE - factor * GRADIENT
    torch.testing.assert_close(stage.moved, expected)
    assert stage.glide.velocity is not None
    torch.testing.assert_close(stage.glide.velocity, expected)


@pytest.mark.parametrize(("loss", "factor"), [(1e4, 1.2), (4.0, 1.2 * 0.2 / 1.8)])
def test_lengths_are_those_in_the_preconditioners_coordinates(loss: float, factor: float) -> None:
    """D = 2: the step is 4 * 0.3 times the gradient, its length 0.3 * 6; the radius 10 or 0.2."""
    stage = Stage(under_way(), loss, preconditioner=Doubling())
    stage.step()
    torch.testing.assert_close(stage.moved, -factor * GRADIENT)


def test_a_gradient_of_zero_leaves_the_last_step() -> None:
    stage = Stage(under_way(velocity=BEFORE), gradient=torch.zeros(3, dtype=D))
    stage.step()
    torch.testing.assert_close(stage.moved, 0.5 * BEFORE)


@pytest.mark.parametrize(
    ("momentum", "reach", "kept"),
    [
        (0.95, 0.5, 0.9),  # ten gradients instead of twenty
        (0.95, 0.25, 0.8),
        (0.95, 1.0, 0.95),
        (0.9, 0.8, 0.875),
        (0.75, 0.5, 0.5),
        (0.5, 0.5, 0.0),
        (0.5, 0.25, 0.0),  # one gradient at least: no step is turned round
        (0.25, 0.5, 0.0),
    ],
)
def test_a_velocity_remembers_as_many_gradients_as_its_reach_allows(momentum: float, reach: float, kept: float) -> None:
    stage = Stage(Glide(momentum, unit=100.0, reach=reach, velocity=BEFORE), gradient=torch.zeros(3, dtype=D))
    stage.step()
    torch.testing.assert_close(stage.moved, kept * BEFORE)
    assert stage.glide.momentum == momentum  # the largest one
    stage = Stage(Glide(momentum, unit=100.0, reach=reach, velocity=BEFORE))
    stage.step()
    torch.testing.assert_close(stage.moved, kept * BEFORE - 0.3 * GRADIENT)


@pytest.mark.parametrize(
    ("share", "bound", "left"),
    [
        (1 / 3, None, 1 / 3),
        (1.0, None, 1.0),
        (1 / 3, 0.25, 1 / 4),
        (1 / 4, 1 / 3, 1 / 4),
        (1.0, 0.9, 0.9),
        (1.0, 2.0, 1.0),
    ],
)
@pytest.mark.parametrize("rate", [1.0, 0.1, 10.0])
def test_gradients_steps_and_learning_rates_have_their_bounds(
    share: float, bound: float | None, left: float, rate: float
) -> None:
    """The gradient is cut to 0.25, so that the step is 0.3; the bounds are those of it times the learning rates."""
    rates, doubling = rate * torch.tensor([1.0, 0.5, 0.0], dtype=D), Doubling(share)
    change = -0.1 * GRADIENT * rates
    longest = None if bound is None else bound * float(change.norm())
    stage = Stage(under_way(), max_grad_norm=0.25, max_step_norm=longest, learning_rates=rates, preconditioner=doubling)
    stage.step()
    torch.testing.assert_close(stage.moved, left * change)
    assert stage.glide.velocity is not None
    torch.testing.assert_close(stage.glide.velocity, -0.1 * left * GRADIENT)
    torch.testing.assert_close(doubling.asked, change.unsqueeze(0))


@pytest.mark.parametrize("straight", [False, True])
def test_whether_a_step_keeps_its_direction_is_for_the_descent_to_say(straight: bool) -> None:
    doubling = Doubling(0.5)
    Stage(under_way(), preconditioner=doubling, straight=straight).step()
    assert doubling.straight is straight


def test_a_learning_rate_of_zero_is_no_step() -> None:
    stage = Stage(under_way(), learning_rates=0.0, max_step_norm=1.0)
    record = stage.step()
    assert (record.accepted, record.inner_steps, record.loss_after) == (False, 0, record.loss_before)
    assert not stage.moved.any()
    stage.carried.memory.complete(GRADIENT)
    assert len(stage.carried.memory) == 1  # the step before


class Elsewhere(BasisStore):
    """Rank zero's rounding is another one."""

    def agreed_point(self, vector: Tensor) -> Tensor:
        return vector * (1 + 2**-30)


def test_the_point_after_a_step_is_that_of_rank_zero() -> None:
    stage, store = Stage(under_way()), Elsewhere()
    with torch.no_grad():
        record = stage.glide.step(stage.parameters, stage.losses, stage.operator, stage.descent, stage.carried, store)
    there = (START - 0.3 * GRADIENT) * (1 + 2**-30)
    assert torch.equal(stage.x.detach(), there)
    assert record.predicted_decrease == -float(GRADIENT @ (there - START)) / 2
    stage.carried.memory.complete(GRADIENT)
    assert torch.equal(stage.carried.memory.directions[0].vector, there - START)


def test_the_bound_on_gradients_holds_alone() -> None:
    stage = Stage(under_way(), max_grad_norm=0.25)
    stage.step()
    torch.testing.assert_close(stage.moved, -0.3 * 0.25 * GRADIENT / 3)


@pytest.mark.parametrize("shared", [True, False])
def test_a_step_finds_what_it_is_not_told(shared: bool) -> None:
    stage = Stage(under_way(unit=1e6))
    curvature = stage.losses.curvature if shared else Objective([lambda: (stage.x**4).sum()])
    stage.losses = replace(stage.losses, known=None, curvature=curvature)
    record = stage.step()
    assert record.loss_before == pytest.approx(float(bowl(START)))
    torch.testing.assert_close(stage.moved, -0.3 * CURVATURE * START)


def test_what_a_momentum_step_books_and_leaves() -> None:
    """The step is -1.2 g, so that the slope is -10.8."""
    stage = Stage(under_way(), preconditioner=Doubling())
    record = stage.step()
    assert record == StepRecord(
        loss_before=1e4,
        loss_after=pytest.approx(1e4 - 5.4),
        gradient_norm=pytest.approx(3.0),
        damping=record.damping,
        predicted_decrease=pytest.approx(5.4),
        lambda_min=record.lambda_min,
        lambda_max=record.lambda_max,
        products=1,
        gradients=1,
        inner_steps=1,
        accepted=True,
        coordinates="identity",
        unfactored=("odd",),
        kind="momentum",
    )
    assert all(math.isnan(number) for number in (record.damping, record.lambda_min, record.lambda_max))
    assert stage.carried.expected == (pytest.approx(1e4 - 5.4), pytest.approx(10.8))
    assert stage.operator.closed
    stage.carried.memory.complete(torch.ones(3, dtype=D))
    newest, oldest = stage.carried.memory.directions
    torch.testing.assert_close(newest.vector, -1.2 * GRADIENT)
    assert newest.product is not None
    torch.testing.assert_close(newest.product, 1 - GRADIENT)
    assert oldest.product is not None
    torch.testing.assert_close(oldest.product, GRADIENT)  # the secant of the step before


@pytest.mark.parametrize(("same", "count"), [(True, 2), (False, 1)])
def test_a_secant_across_two_functions_is_dropped(same: bool, count: int) -> None:
    stage = Stage(under_way())
    stage.losses = replace(stage.losses, same_function=same)
    stage.step()
    stage.carried.memory.complete(GRADIENT)
    assert len(stage.carried.memory) == count


@pytest.mark.parametrize(("loss", "best"), [(4.0, 4.0), (9.0, 9.0), (10.0, 9.0)])
def test_the_best_point_of_a_turn_is_the_start_of_a_step(loss: float, best: float) -> None:
    there = torch.zeros(3, dtype=D)
    stage = Stage(under_way(best=(9.0, there)), loss)
    stage.step()
    assert stage.glide.best is not None
    assert stage.glide.best[0] == best
    assert torch.equal(stage.glide.best[1], START if loss < 9.0 else there)


@pytest.mark.parametrize("share", ["shrink", "reach"])
def test_radius_and_reach_grow_by_a_fiftieth_up_to_one(share: str) -> None:
    glide, found = under_way(**{share: 0.97}), []
    for _ in range(3):
        Stage(glide).step()
        found.append(getattr(glide, share))
    assert found == [pytest.approx(0.97 * 1.02), 1.0, 1.0]


def test_the_reach_of_a_new_momentum_is_half_and_becomes_whole_in_36_steps() -> None:
    glide = Glide(0.95, unit=100.0)
    found = [glide.reach]
    for _ in range(40):
        Stage(glide).step()
        found.append(glide.reach)
    assert found == [pytest.approx(min(1.0, 0.5 * 1.02**step)) for step in range(41)]
    assert found.index(1.0) == 36
    assert max(found) == 1.0


@pytest.mark.parametrize("loss", [12.6, 11.0], ids=["astray", "wandered"])
@pytest.mark.parametrize(("reach", "after"), [(1.0, 0.5), (0.8, 0.4), (0.5, 0.25), (0.4, 0.25), (0.25, 0.25)])
def test_a_run_that_failed_halves_the_reach_down_to_a_quarter(loss: float, reach: float, after: float) -> None:
    entries = {"best": (10.0, torch.ones(3, dtype=D)), "rest": 20.0, "wandered": 0.2, "velocity": BEFORE}
    pace = Pace(kind="momentum", sown=(20.0, 0.0), spent=3.0)
    stage = Stage(under_way(pace=pace, reach=reach, **entries), loss)
    stage.settle()
    assert torch.equal(stage.x.detach(), torch.ones(3, dtype=D))
    assert stage.glide.reach == after
    assert stage.glide.pace.kind == ("subspace" if loss == 12.6 else "momentum")


def test_every_third_step_asks_for_a_refresh() -> None:
    glide, doubling, asked, counted = under_way(), Doubling(), [], []
    for _ in range(7):
        Stage(glide, preconditioner=doubling).step()
        asked.append(doubling.refreshes)
        counted.append(glide.steps)
    assert asked == [1, 1, 1, 2, 2, 2, 3]
    assert counted == [1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("bent", [True, False])
def test_a_refresh_is_told_whether_the_last_subspace_had_negative_curvature(bent: bool) -> None:
    doubling = Doubling()
    stage = Stage(under_way(), preconditioner=doubling)
    stage.carried.bend = float(bent)
    stage.step()
    assert doubling.told == [(bent, stage.losses.objective)]


def test_an_error_closes_the_operator_and_moves_nothing() -> None:
    stage = Stage(under_way(), math.nan)
    with pytest.raises(FloatingPointError):
        stage.step()
    assert stage.operator.closed
    assert torch.equal(stage.x.detach(), START)


@pytest.mark.parametrize(
    ("loss", "best", "harvested", "back"),
    [
        (12.5, 10.0, False, False),  # a rise by a quarter of the best loss
        (12.6, 10.0, False, True),
        (-7.5, -10.0, False, False),
        (-7.4, -10.0, False, True),
        (0.25, 0.0, False, False),  # of a hundredth of the first loss at least
        (0.26, 0.0, False, True),
        (10.0, 10.0, True, False),  # and by nothing after a harvest
        (10.1, 10.0, True, True),
        (9.0, 10.0, True, False),
        (math.nan, 10.0, False, True),
        (math.inf, 10.0, False, True),
    ],
)
def test_a_way_may_rise_so_far(loss: float, best: float, harvested: bool, back: bool) -> None:
    pace = Pace(sown=(11.0, 40.0), spent=4.0) if harvested else Pace(kind="momentum", sown=(11.0, 40.0), spent=3.0)
    stage = Stage(under_way(pace=pace, best=(best, torch.ones(3, dtype=D)), shrink=0.75, reach=0.8), loss)
    losses = stage.settle()
    assert losses.known is not None
    assert torch.equal(stage.x.detach(), torch.ones(3, dtype=D) if back else START)
    assert losses.known[0] == (pytest.approx(float(CURVATURE.sum()) / 2) if back else loss)
    torch.testing.assert_close(losses.known[1], CURVATURE if back else GRADIENT)
    assert (stage.glide.shrink, stage.glide.reach) == ((0.375, 0.4) if back else (0.75, 0.8))
    assert (stage.glide.best is None) == (back or harvested)
    assert stage.glide.pace.kind == ("subspace" if back or harvested else "momentum")
    stage.carried.memory.complete(GRADIENT)
    assert len(stage.carried.memory) == (0 if back else 1)


@pytest.mark.parametrize(
    ("loss", "best", "rest", "wandered", "again", "after"),
    [
        (11.0, 10.0, 11.0, 0.2, True, 0.3),  # a tenth of the best loss above it
        (10.5, 10.0, 11.0, 0.15, False, 0.2),
        (11.0, 10.0, 10.5, 0.2, False, 0.3),  # a gain of a twentieth is not worth it
        (11.0, 10.0, 10.6, 0.2, True, 0.3),
        (10.0, 10.0, 11.0, 0.3, False, 0.0),
        (9.0, 10.0, 11.0, 0.3, False, 0.0),
        (-9.0, -10.0, -9.0, 0.2, True, 0.3),
        (0.1, 0.0, 0.06, 0.2, True, 0.3),  # in hundredths of the first loss at least
        (0.1, 0.0, 0.04, 0.2, False, 0.3),
        (11.0, 10.0, math.inf, 0.2, True, 0.3),
    ],
)
def test_a_run_that_wanders_after_a_gain_starts_again_from_its_best_point(
    loss: float, best: float, rest: float, wandered: float, again: bool, after: float
) -> None:
    there, pace = torch.ones(3, dtype=D), Pace(kind="momentum", sown=(rest, 0.0), spent=3.0)
    entries = {"pace": pace, "best": (best, there), "rest": rest, "wandered": wandered, "velocity": BEFORE}
    stage = Stage(under_way(shrink=0.75, reach=0.8, **entries), loss)
    losses = stage.settle()
    assert losses.known is not None
    assert losses.known[0] == (pytest.approx(float(CURVATURE.sum()) / 2) if again else loss)
    assert torch.equal(stage.x.detach(), there if again else START)
    assert (stage.glide.velocity is None) == again
    assert stage.glide.wandered == pytest.approx(after)
    assert stage.glide.reach == (0.4 if again else 0.8)
    assert (stage.glide.best, stage.glide.shrink, stage.glide.pace.kind) == ((best, there), 0.75, "momentum")
    stage.carried.memory.complete(GRADIENT)
    assert len(stage.carried.memory) == (0 if again else 1)


@pytest.mark.parametrize("loss", [12.6, 11.0, math.inf])
@pytest.mark.parametrize(
    ("same", "best", "back"),
    [
        (True, 10.0, True),
        (None, 0.675, True),  # the loss there
        (None, 0.675 * 1.000_02, False),  # the best loss was another function's
        (None, 10.0, False),
        (False, 0.675, False),
    ],
)
def test_a_best_loss_of_another_function_leads_nowhere(loss: float, same: bool | None, best: float, back: bool) -> None:
    """Unless there is nowhere else to go."""
    pace, there = Pace(kind="momentum", sown=(11.0, 0.0), spent=3.0), torch.ones(3, dtype=D)
    entries = {"pace": pace, "best": (best, there), "rest": 20.0, "wandered": 1.0, "velocity": BEFORE}
    stage = Stage(under_way(unit=1.0, **entries), loss)
    stage.losses = replace(stage.losses, same_function=same)
    losses = stage.settle()
    assert losses.known is not None
    back |= loss == math.inf
    assert torch.equal(stage.x.detach(), there if back else START)
    assert losses.known[0] == (pytest.approx(0.675) if back else loss)
    torch.testing.assert_close(losses.known[1], CURVATURE if back else GRADIENT)
    assert (stage.glide.best is None) == (not back or loss > 1.25 * best)
    assert (stage.glide.velocity is None) == back
    assert stage.glide.shrink == (0.5 if back and loss > 1.25 * best else 1.0)
    assert stage.glide.reach == (0.5 if back else 1.0)


def test_a_best_point_without_a_loss_is_no_place_to_go_back_to() -> None:
    """It was another function's: this one has none there."""
    there, pace = torch.full((3,), math.nan, dtype=D), Pace(kind="momentum", sown=(11.0, 0.0), spent=3.0)
    stage = Stage(under_way(pace=pace, best=(1.0, there)), 2.0)
    stage.losses = replace(stage.losses, same_function=None)
    losses = stage.settle()
    assert losses.known is not None
    assert losses.known[0] == 2.0
    assert torch.equal(stage.x.detach(), START)
    assert (stage.glide.shrink, stage.glide.reach) == (1.0, 1.0)


def test_momentum_on_batches_of_its_own_goes_on() -> None:
    """Where each step has other data, a lucky batch is no place to go back to: with that, the mean below was 0.97."""
    above = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        centres, x = 3 * torch.randn(40, 3, dtype=D), torch.full((3,), 10.0, dtype=D, requires_grad=True)
        optimizer = SaddleFreeNewton([x], heavy_ball=0.9, preconditioner=None, inner_steps=1)
        for step in range(100):
            batch = centres[(torch.arange(4) + 4 * step) % 40]
            optimizer.step(lambda batch=batch, x=x: bowl(x - batch) / 4)
        above += float(bowl(x.detach() - centres.mean(0))) / 4
    assert above < 0.3


def test_subspaces_do_not_wander() -> None:
    pace = Pace(kind="subspace", sown=(11.0, 40.0), spent=3.0)
    stage = Stage(under_way(pace=pace, best=(10.0, torch.ones(3, dtype=D)), rest=11.0, wandered=0.2), 11.0)
    stage.settle()
    assert torch.equal(stage.x.detach(), START)
    assert (stage.glide.wandered, stage.glide.reach) == (0.2, 1.0)


@pytest.mark.parametrize(("velocity", "rest", "wandered"), [(None, 9.0, 0.0), (BEFORE, 12.0, 0.2)])
def test_a_run_begins_where_there_is_no_velocity(velocity: Tensor | None, rest: float, wandered: float) -> None:
    stage = Stage(under_way(velocity=velocity, best=(8.0, START), rest=12.0, wandered=0.2), 9.0)
    stage.step()
    assert (stage.glide.rest, stage.glide.wandered) == (rest, wandered)


def test_a_gradient_that_is_not_finite_leads_back() -> None:
    stage = Stage(under_way(best=(10.0, torch.ones(3, dtype=D))), 9.0, torch.tensor([0.0, math.inf, 0.0], dtype=D))
    stage.settle()
    assert torch.equal(stage.x.detach(), torch.ones(3, dtype=D))


def test_without_a_way_back_what_is_not_finite_is_left_to_the_step() -> None:
    stage = Stage(under_way(), math.nan)
    losses = stage.settle()
    assert losses.known is not None
    assert math.isnan(losses.known[0])
    assert stage.glide.pace == Pace()


@pytest.mark.parametrize(("loss", "unit"), [(5.0, 5.0), (-5.0, 5.0), (0.0, 1.0)])
def test_the_first_loss_is_the_unit(loss: float, unit: float) -> None:
    glide = Glide(0.5)
    Stage(glide, loss).settle()
    assert glide.unit == unit
    Stage(glide, 7.0).settle()
    assert glide.unit == unit


@pytest.mark.parametrize(
    ("pace", "velocity", "best"),
    [
        (Pace("momentum", 3.0), True, True),
        (Pace("momentum", 40.0, sown=(11.0, 0.0)), False, True),  # what momentum has gained is gathered first
        (Pace("subspace", 0.0, sown=(11.0, 40.0)), False, True),
        (Pace("subspace", 4.0, sown=(11.0, 40.0)), False, False),
    ],
)
def test_a_turn_of_subspaces_ends_the_velocity_and_its_harvest_the_best_point(
    pace: Pace, velocity: bool, best: bool
) -> None:
    stage = Stage(under_way(pace=copy.deepcopy(pace), velocity=BEFORE, best=(10.0, START)), 9.0)
    stage.settle()
    assert (stage.glide.velocity is not None) == velocity
    assert (stage.glide.best is not None) == best


class Asked(Objective):
    """Notes whether it was evaluated far from where it is known to be finite."""

    def __init__(self, x: Tensor) -> None:
        super().__init__([lambda: bowl(x)])
        self.far: list[bool] = []

    def require_sound(self, reduced: Tensor, *, far: bool = False) -> None:
        self.far.append(far)


@pytest.mark.parametrize(("best", "far"), [(None, [False]), (-1.0, [True, False]), (1e4, [True])])
def test_an_overflow_is_nobodys_fault_where_a_way_leads_back(best: float | None, far: list[bool]) -> None:
    stage = Stage(under_way(best=None if best is None else (best, START)))
    objective = Asked(stage.x)
    stage.losses = Losses(objective, objective, objective)
    losses = stage.settle()
    assert objective.far == far
    assert losses.known is not None
    torch.testing.assert_close(losses.known[1], CURVATURE * START)


def test_a_copy_keeps_its_own_turns() -> None:
    entries = {"velocity": BEFORE, "best": (9.0, START), "shrink": 0.5, "reach": 0.7, "steps": 2}
    glide = under_way(pace=Pace("momentum", 3.0), **entries)
    other = glide.copy()
    assert other == glide
    other.pace.observe(1.0)
    assert (glide.pace.spent, other.pace.spent) == (3.0, 4.0)


def test_a_restored_momentum_is_the_same() -> None:
    run = {"rest": 9.5, "wandered": 0.1, "reach": 0.1 * 7.3}  # of many digits
    glide = under_way(velocity=BEFORE, best=(9.0, START), shrink=0.5, steps=2, pace=Pace("momentum", 3.0), **run)
    other = Glide(0.5)
    other.load_state_dict(copy.deepcopy(glide.state_dict()))
    assert (other.rest, other.wandered, other.reach) == (9.5, 0.1, 0.1 * 7.3)
    assert other.velocity is not None
    assert torch.equal(other.velocity, BEFORE)
    assert other.best is not None
    assert other.best[0] == 9.0
    assert torch.equal(other.best[1], START)
    assert (other.unit, other.shrink, other.steps, other.pace) == (100.0, 0.5, 2, glide.pace)
