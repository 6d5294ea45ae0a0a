"""An outer step put together by hand, from halves that are ours or somebody else's."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import (
    CurvatureOperator,
    FixedDamping,
    FlatParameters,
    HessianOperator,
    IdentityPreconditioner,
    KrylovSubspace,
    LevenbergMarquardt,
    Objective,
)
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.carried import Carried
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.outer_step import Descent, Losses, Search, take_outer_step
from lightning_sfn.newton.step import StepRecord, SubspaceModel
from lightning_sfn.newton.trust_region import RULES

from .cases import bits, quadratic, symmetric
from .doubles import Listening, descent
from .ranks import Reversing

ROOT = symmetric(5)
MATRIX = ROOT @ ROOT.T + torch.eye(5, dtype=torch.float64)


def leaf() -> Tensor:
    return torch.linspace(-1.0, 2.0, 5, dtype=torch.float64).requires_grad_()


def take(
    x: Tensor,
    losses: Losses,
    descent: Descent,
    search: Search,
    carried: Carried | None = None,
    store: BasisStore | None = None,
) -> StepRecord:
    parameters = FlatParameters([x])
    carried = carried or Carried(StepMemory(3, secants=True))
    with torch.no_grad():
        operator = HessianOperator(losses.curvature, parameters)
        return take_outer_step(parameters, losses, operator, descent, search, carried, store or BasisStore())


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


# ------------------------------------------------------------------------------------------------ losses


class Watched(Objective):
    """Notes what it is asked to vouch for, how often it is evaluated, and which values it shall give again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.vouched: list[tuple[Tensor, bool]] = []
        self.again: list[float] = []
        self.evaluations = 0

    def evaluate(self, index: int) -> Any:
        self.evaluations += 1
        return super().evaluate(index)

    def require_sound(self, reduced: Tensor, *, far: bool = False) -> None:
        self.vouched.append((reduced, far))

    def require_repeatable(self, value: float) -> None:
        self.again.append(value)


class Knowing(HessianOperator):
    """Has loss and gradient at hand."""

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        return 7.0, torch.ones(5, dtype=torch.float64)


def test_the_graphs_of_the_products_give_the_gradient_where_they_are_the_objectives() -> None:
    x = leaf()
    objective = Objective([quadratic(MATRIX)(x)])
    assert same(objective).at(FlatParameters([x]), Knowing(objective, [x]))[0] == 7.0
    other = replace(same(objective), curvature=Objective([quadratic(MATRIX)(x)]))
    assert other.at(FlatParameters([x]), Knowing(objective, [x]))[0] != 7.0


@pytest.mark.parametrize(
    ("loss", "gradient", "blamed"),
    [
        (1.0, [1.0, math.nan], [1.0, math.nan]),
        (math.nan, [1.0, 2.0], math.nan),  # a gradient may be finite where the loss is not
        (1.0, [1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_processes_look_for_the_one_to_blame_before_all_refuse(loss: float, gradient: Any, blamed: Any) -> None:
    x = leaf()
    objective = Watched([quadratic(MATRIX)(x)])
    losses = same(objective, known=(loss, torch.tensor(gradient)))
    if math.isnan(loss) or math.isnan(gradient[1]):
        with pytest.raises(FloatingPointError):
            losses.at(FlatParameters([x]), Knowing(objective, [x]))
    else:
        losses.at(FlatParameters([x]), Knowing(objective, [x]))
    ((vouched, far),) = objective.vouched
    torch.testing.assert_close(vouched, torch.tensor(blamed), equal_nan=True)
    assert not far


# ------------------------------------------------------------------------------------------------ models


SCALES = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


class Uneven(IdentityPreconditioner):
    """A diagonal map that differs from entry to entry, and notes by what it is refreshed."""

    def __init__(self) -> None:
        self.refreshed: list[Any] = []

    @property
    def unfactored(self) -> tuple[str, ...]:
        return ("odd",)

    def refresh(self, operator: CurvatureOperator, generator: torch.Generator, *told: Any) -> None:
        self.refreshed.append((operator, generator))

    def scale(self, vectors: Tensor) -> Tensor:
        return vectors * SCALES

    def unscale(self, vectors: Tensor) -> Tensor:
        return vectors / SCALES


def model_of(matrix: Tensor, gradient: Tensor, carried: Carried, **options: Any) -> SubspaceModel:
    x = torch.zeros(len(matrix), dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([quadratic(matrix)(x)]), [x])
    return descent(**options).model(operator, gradient, carried, options.get("store", BasisStore()))


@pytest.mark.parametrize("exploration", [0.0, 0.1, 1.0])
def test_a_subspace_explores_so_much(exploration: float) -> None:
    """The start is the unit gradient with shares of noise and of the last escape, all in the map's coordinates."""
    escape, gradient = torch.linspace(2.0, -1.0, 5, dtype=torch.float64), torch.arange(5.0).double()
    carried = Carried(StepMemory(0, secants=True), escape=escape)
    noise = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parts = SCALES * gradient, noise, escape / SCALES
    along, random, out = (part / part.norm() for part in parts)
    start = along + exploration * (random + out)
    options = {"krylov_dim": 2, "preconditioner": Uneven(), "generator": torch.Generator().manual_seed(5)}
    model = model_of(MATRIX, gradient, carried, exploration=exploration, **options)
    torch.testing.assert_close(model.space.basis[0], start / start.norm())
    assert len(model.space) == 2


def test_a_model_is_made_of_what_the_descent_holds() -> None:
    uneven, generator = Uneven(), torch.Generator().manual_seed(0)
    ours = descent(
        preconditioner=uneven, generator=generator, rule=RULES["newton"], learning_rates=0.5, max_step_norm=3.0
    )
    x, store = leaf(), Reversing()
    operator = HessianOperator(Objective([quadratic(MATRIX)(x)]), [x])
    model = ours.model(operator, torch.ones(5, dtype=torch.float64), Carried(StepMemory(0, secants=True)), store)
    assert model.space.store is store
    assert (model.preconditioner, model.rule, model.learning_rates) == (uneven, RULES["newton"], 0.5)
    assert (model.max_step_norm, model.max_grad_norm) == (3.0, None)
    assert uneven.refreshed == [(operator, generator)]
    assert not model.straight
    assert replace(ours, straight=True).model(operator, leaf().detach(), carried(), store).straight


class Sparing(IdentityPreconditioner):
    """Lets the first parameter go the whole way and the others half of it."""

    def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
        return torch.tensor([0.5] if straight else [1.0, 0.5, 0.5], dtype=steps.dtype).expand(len(steps), -1)


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("bound", [None, 1.0, 100.0])
def test_a_step_within_bounds_keeps_its_direction_where_it_shall(straight: bool, bound: float | None) -> None:
    step, rates = torch.tensor([3.0, -4.0, 8.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 0.25]).double()
    share = torch.tensor([0.5 if straight else 1.0, 0.5, 0.5], dtype=torch.float64)
    length = float((step * rates * share).norm())
    share = share if bound is None else share * min(1.0, bound / length)
    ours = descent(preconditioner=Sparing(), learning_rates=rates, max_step_norm=bound, straight=straight)
    shortened, change = ours.within_bounds(step)
    torch.testing.assert_close(shortened, step * share)
    torch.testing.assert_close(change, step * rates * share)


class Counting(IdentityPreconditioner):
    """Asks for two vectors while there is much negative curvature, else for four; notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def refresh(self, operator: CurvatureOperator, generator: torch.Generator, *told: Any) -> None:
        self.told.append(told)

    def default_krylov_dim(self, bent: bool) -> int:
        return 2 if bent else 4


@pytest.mark.parametrize(
    ("krylov_dim", "bent", "size", "expected"),
    [
        (None, True, 5, 2),
        (None, False, 5, 4),
        (None, False, 3, 3),
        (3, True, 5, 3),
        ("full", True, 5, None),
    ],
)
def test_a_subspace_has_as_many_vectors_as_told_or_as_pay(
    krylov_dim: Any, bent: bool, size: int, expected: int | None
) -> None:
    counting = Counting()
    ours = descent(krylov_dim=krylov_dim, preconditioner=counting)
    carried = Carried(StepMemory(0, secants=True), bend=float(bent))
    assert ours.dimension(carried, size) == expected
    x = leaf().detach()[:size].requires_grad_()
    matrix = MATRIX[:size, :size]
    losses = same(Objective([quadratic(matrix)(x)]))
    record = take(x, losses, ours, Search(FixedDamping(1.0), 1), carried)
    assert record.subspace_dim == (expected or size)
    assert record.coordinates == "identity"
    assert counting.told == [(bent, losses.objective)]


def test_where_nothing_shows_the_way_the_generator_does() -> None:
    starts = [
        model_of(
            MATRIX,
            torch.zeros(5, dtype=torch.float64),
            Carried(StepMemory(0, secants=True)),
            krylov_dim=1,
            generator=torch.Generator().manual_seed(seed),
        ).space.basis[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_products_that_are_not_finite_are_refused_in_one_sentence() -> None:
    x = leaf()
    objective = Watched([quadratic(torch.full((5, 5), math.nan, dtype=torch.float64))(x)])
    operator, gradient = HessianOperator(objective, [x]), torch.ones(5, dtype=torch.float64)
    words = r"^A Hessian-vector product is not finite at the present parameters, so no step is tried: .*\.$"
    with pytest.raises(FloatingPointError, match=words):
        descent().model(operator, gradient, Carried(StepMemory(0, secants=True)), BasisStore())
    assert not bool(torch.isfinite(objective.vouched[-1][0]).all())
    assert objective.vouched[-1][1] is False


# ------------------------------------------------------------------------------------------------ inner steps


def damped(x: Tensor, curvature: Tensor = MATRIX) -> Tensor:
    """Where a step with damping 2 ends, by a dense solution."""
    step: Tensor = torch.linalg.solve(curvature + 2 * torch.eye(5, dtype=torch.float64), -(MATRIX @ x))
    return x + step


def value(x: Tensor, matrix: Tensor = MATRIX) -> float:
    return float(x @ matrix @ x) / 2


def carried(**entries: Any) -> Carried:
    return Carried(StepMemory(9, secants=True), checked=True, **entries)


def test_inner_steps_take_fresh_gradients_in_one_subspace() -> None:
    x, state = leaf(), carried()
    objective = Watched([quadratic(MATRIX)(x)])
    record = take(x, same(objective), descent(), Search(FixedDamping(2.0), 3), state)
    points = [leaf().detach()]
    for _ in range(3):
        points.append(damped(points[-1]))
    torch.testing.assert_close(x.detach(), points[-1])
    assert (record.inner_steps, record.gradients, record.trials, record.products) == (3, 3, 3, 5)
    assert record.loss_after == pytest.approx(value(points[-1]))
    assert record.predicted_decrease == pytest.approx(value(points[0]) - value(points[-1]))
    state.memory.complete(MATRIX @ x.detach())
    steps = [after - before for before, after in pairwise(points)]
    for remembered, step in zip(state.memory.directions, reversed(steps), strict=True):
        torch.testing.assert_close(remembered.vector, step)
        assert remembered.product is not None
        torch.testing.assert_close(remembered.product, MATRIX @ step)
    # Beyond the first point an overflow is nobody's fault.
    assert [far for _, far in objective.vouched] == [False] * 2 + [True] * 5
    assert objective.evaluations == 1 + 3 + 3  # the first is measured


def test_trials_of_a_later_step_have_the_slope_found_there() -> None:
    """The trial data have half of the curvature: f + g'd + d'(A/2)d / 2 from the point before."""
    x = leaf()
    losses = replace(same(Objective([quadratic(MATRIX)(x)])), trial=Objective([quadratic(MATRIX / 2)(x)]))
    record = take(x, losses, descent(), Search(FixedDamping(2.0), 2), carried())
    middle = damped(leaf().detach())
    step = damped(middle) - middle
    expected = value(middle) + float(step @ MATRIX @ middle) + value(step, MATRIX / 2)
    torch.testing.assert_close(x.detach(), middle + step)
    assert record.loss_after == pytest.approx(expected)


def walled(x: Tensor, matrix: Tensor = MATRIX) -> Objective:
    """A quadratic, but far higher where a second step with damping 2 ends."""
    middle = damped(leaf().detach())
    limit = float(middle.norm() + damped(middle).norm()) / 2
    return Objective([lambda: quadratic(matrix)(x)() + 100.0 * (float(x.detach().norm()) < limit)])


def test_a_later_step_that_trials_refuse_is_the_end() -> None:
    """The loss that is booked is that of the objective there, not what the trial data had promised."""
    x, state = leaf(), carried()
    losses = replace(same(Objective([quadratic(MATRIX)(x)])), trial=walled(x, MATRIX / 2))
    damping = Listening(2.0)
    record = take(x, losses, descent(), Search(damping, 3), state)
    middle = damped(leaf().detach())
    torch.testing.assert_close(x.detach(), middle)
    assert (record.inner_steps, record.gradients, record.trials, record.accepted) == (1, 2, 2, True)
    assert record.loss_after == pytest.approx(value(middle))
    assert len(state.memory) == 1
    assert [accepted for accepted, _ in damping.heard] == [True, False]


def test_a_later_step_whose_loss_is_higher_is_taken_back() -> None:
    x, state = leaf(), carried()
    losses = replace(same(walled(x)), trial=Objective([quadratic(MATRIX)(x)]))
    damping = Listening(2.0)
    record = take(x, losses, descent(), Search(damping, 9), state)
    middle = damped(leaf().detach())
    torch.testing.assert_close(x.detach(), middle)
    assert (record.inner_steps, record.gradients, record.trials, record.accepted) == (1, 3, 2, True)
    assert record.loss_after == pytest.approx(value(middle))
    assert record.damping == 2.0
    state.memory.complete(MATRIX @ middle)
    assert len(state.memory) == 2  # the step that was taken back has shown the curvature along it
    for direction in state.memory.directions:
        torch.testing.assert_close(direction.product, MATRIX @ direction.vector)
    assert [accepted for accepted, _ in damping.heard] == [True, True, False]
    assert damping.heard[-1] == (False, 0.0)


class Told(IdentityPreconditioner):
    """Notes what became of steps."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def feedback(self, *, accepted: bool, store: BasisStore) -> None:
        self.told.append(accepted)


def test_a_first_step_whose_loss_is_higher_is_taken_back_bit_for_bit() -> None:
    """Curvature and trials see a tenth of it, so that the step is far too long."""
    x, state, start = leaf(), carried(), bits([leaf()])
    flat = Objective([quadratic(MATRIX / 10)(x)])
    losses = replace(same(Objective([quadratic(MATRIX)(x)])), curvature=flat, trial=flat)
    damping, told = Listening(1e-9), Told()
    record = take(x, losses, descent(preconditioner=told), Search(damping, 2), state)
    assert bits([x]) == start
    assert told.told == [True, False]
    assert (record.inner_steps, record.gradients, record.trials, record.accepted) == (0, 2, 1, False)
    assert record.loss_after == record.loss_before == pytest.approx(value(leaf().detach()))
    assert (record.predicted_decrease, record.damping) == (0.0, 1e-9)
    assert state.expected == (record.loss_before, 0.0)
    assert damping.heard == [(True, pytest.approx(1.0)), (False, 0.0)]


def test_a_rule_without_damping_tells_the_damping_nothing() -> None:
    x = leaf()
    flat = Objective([quadratic(MATRIX / 10)(x)])
    losses = replace(same(Objective([quadratic(MATRIX)(x)])), curvature=flat, trial=flat)
    damping = LevenbergMarquardt()
    record = take(x, losses, descent(rule=RULES["newton"]), Search(damping, 2), carried())
    assert (record.gradients, record.accepted) == (2, False)  # taken back
    assert damping.value is None


def test_a_step_to_a_gradient_that_is_not_finite_is_taken_back_and_forgotten() -> None:
    x, start, state = leaf(), bits([leaf()]), carried()

    def closure() -> Tensor:
        y = x * 1.0
        if y.requires_grad and bits([x]) != start:
            y.register_hook(lambda gradient: gradient * math.inf)
        return quadratic(MATRIX)(y)()

    losses = replace(same(Objective([closure])), curvature=Objective([quadratic(MATRIX)(x)]))
    record = take(x, losses, descent(), Search(FixedDamping(2.0), 2), state)
    assert bits([x]) == start
    assert not record.accepted
    assert len(state.memory) == 0


def test_a_trial_gradient_that_is_not_finite_ends_the_steps_and_takes_none_back() -> None:
    x, start, state = leaf(), bits([leaf()]), carried()

    def trial() -> Tensor:  # nothing, with the slope of a root at 0
        return quadratic(MATRIX)(x)() + (0.0 if bits([x]) == start else (x - x.detach()).sqrt().sum())

    losses = replace(same(Objective([quadratic(MATRIX)(x)])), trial=Objective([trial]))
    record = take(x, losses, descent(), Search(FixedDamping(2.0), 2), state)
    assert (record.inner_steps, record.accepted) == (1, True)
    assert record.loss_after == pytest.approx(value(x.detach()))
    assert record.loss_after < record.loss_before
    assert len(state.memory) == 1
    assert state.unconfirmed is None


def test_a_first_step_that_trials_refuse_empties_the_memory_and_asks_whether_the_loss_is_fixed() -> None:
    x, state = leaf(), carried(expected=(value(leaf().detach()), 0.0))
    state.memory.record(torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    objective = Watched([lambda: quadratic(MATRIX)(x)() + 100.0 * (bits([x]) != bits([leaf()]))])
    record = take(x, same(objective), descent(), Search(FixedDamping(2.0), 2), state)
    assert (record.inner_steps, record.gradients, record.trials, record.accepted) == (0, 1, 1, False)
    assert record.subspace_dim == 5
    assert record.loss_after == record.loss_before
    assert len(state.memory) == 0
    assert objective.again == [pytest.approx(value(leaf().detach()))]


# ------------------------------------------------------------------------------------------------ the whole step


def test_a_record_tells_of_gradient_and_curvature_in_the_parameters_coordinates() -> None:
    """Rayleigh quotients of the vectors that the extreme eigenvectors of DHD stand for."""
    x = leaf()
    record = take(
        x, same(Objective([quadratic(MATRIX)(x)])), descent(preconditioner=Uneven()), Search(FixedDamping(1.0), 1)
    )
    vectors = torch.linalg.eigh(SCALES.unsqueeze(1) * MATRIX * SCALES).eigenvectors
    lowest, highest = SCALES * vectors[:, 0], SCALES * vectors[:, -1]
    quotients = [float(v @ MATRIX @ v / (v @ v)) for v in (lowest, highest)]
    assert [record.lambda_min, record.lambda_max] == pytest.approx(quotients)
    assert record.gradient_norm == pytest.approx(float((MATRIX @ leaf().detach()).norm()))
    assert record.unfactored == ("odd",)


def test_trials_of_the_objective_itself_cost_no_gradient() -> None:
    """One evaluation is measured, one keeps its graph, one is the trial."""
    x = leaf()
    objective = Watched([quadratic(MATRIX)(x)])
    take(x, same(objective), descent(), Search(FixedDamping(1.0), 1), carried())
    assert objective.evaluations == 3


@pytest.mark.parametrize(("told", "count"), [(True, 1), (None, 0), (False, 0)])
def test_a_caller_may_tell_that_the_function_is_the_same(told: bool | None, count: int) -> None:
    """The loss is not the one that is expected, which speaks against it."""
    x, state = leaf(), carried(expected=(1e6, 0.0))
    state.memory.record(torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    losses = same(Objective([quadratic(MATRIX)(x)]), same_function=told)
    take(x, losses, descent(), Search(FixedDamping(1.0), 1), state)
    assert len(state.memory) == count


def test_how_vectors_are_kept_makes_no_difference() -> None:
    """Two steps, so that remembered ones join; they are kept as the basis is."""
    x, y, state, kept = leaf(), leaf(), carried(), carried()
    for _ in range(2):
        take(x, same(Objective([quadratic(MATRIX)(x)])), descent(krylov_dim=2), Search(FixedDamping(1.0), 2), state)
        losses = same(Objective([quadratic(MATRIX)(y)]))
        take(y, losses, descent(krylov_dim=2), Search(FixedDamping(1.0), 2), kept, Reversing())
    torch.testing.assert_close(x, y)
    for ours, theirs in zip(state.memory.directions, kept.memory.directions, strict=True):
        torch.testing.assert_close(ours.vector, theirs.vector.flip(-1))
        assert ours.product is not None
        assert theirs.product is not None
        torch.testing.assert_close(ours.product, theirs.product.flip(-1))
