import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_sfn.newton import (
    Damping,
    DiagonalPreconditioner,
    FixedDamping,
    FlatParameters,
    GridDamping,
    HessianOperator,
    IdentityPreconditioner,
    KrylovSubspace,
    Objective,
    Preconditioner,
    SaddleFreeNewton,
    StepRecord,
)
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.damping import Choice
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.processes import ProcessMean
from lightning_sfn.newton.step import SubspaceModel, TrialLoss, build_subspace, clip, take_inner_step
from lightning_sfn.newton.trust_region import RULES

from .cases import DTYPES, bits, make, quadratic, reference, saddle, symmetric
from .doubles import Listening
from .ranks import Reversing

PLAIN = {"previous_directions": 0, "preconditioner": None, "exploration": 0.0, "inner_steps": 1}


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters]).clone()


# ------------------------------------------------------------------------------------------------ exact steps


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "auto"])
def test_parameters_that_nothing_reaches_have_no_curvature(preconditioner: str | None) -> None:
    """A linear least squares problem half of whose inputs are zero; single precision, in which that is rounding."""
    model, x, y = nn.Linear(8, 1), torch.randn(300, 8), torch.randn(300, 1)
    x[:, 4:] = 0
    joined = torch.cat([x, torch.ones(300, 1)], 1).double()
    largest = float(torch.linalg.eigvalsh(2 * joined.T @ joined / 300)[-1])
    optimizer = SaddleFreeNewton(model.parameters(), preconditioner=preconditioner, krylov_dim=8)
    for _ in range(3):
        optimizer.step(lambda: nn.functional.mse_loss(model(x), y))
        record = optimizer.last_step
        assert record is not None
        assert -1e-4 * largest < record.lambda_min <= record.lambda_max < largest * (1 + 1e-4)


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "auto"])
def test_curvatures_of_a_record_lie_within_the_spectrum(preconditioner: str | None) -> None:
    """Of the dense float64 Hessian before each step, whatever secants of earlier steps say."""
    case = make("mlp")
    optimizer = SaddleFreeNewton(case.parameters, preconditioner=preconditioner)
    for _ in range(20):
        exact = torch.linalg.eigvalsh(dense_matrix(HessianOperator(Objective([case.closure]), case.parameters)))
        optimizer.step(case.closure)
        record, slack = optimizer.last_step, 1e-9 * float(exact.abs().max())
        assert record is not None
        assert exact[0] - slack <= record.lambda_min <= record.lambda_max <= exact[-1] + slack


def test_a_default_device_of_the_user_is_no_matter() -> None:
    case = make("mlp")
    optimizer = SaddleFreeNewton(case.parameters, heavy_ball=0.9)
    before = float(case.closure().detach())
    with torch.device("meta"):
        for _ in range(5):
            optimizer.step(case.closure)
    assert float(case.closure().detach()) < before


def test_an_escape_along_what_nothing_reaches_does_not_hide_the_gradient() -> None:
    """Once the curvature is positive, the lowest Ritz vector is that of the parameter without any effect."""
    x = torch.tensor([0.3, 5.0], requires_grad=True)
    optimizer = SaddleFreeNewton([x], krylov_dim=2, preconditioner=None)
    for _ in range(8):
        optimizer.step(lambda: -(x[0] ** 2) + 0.01 * x[0] ** 4)
        assert optimizer.last_step is not None
        assert math.isfinite(optimizer.last_step.lambda_min)
    assert x.tolist() == [pytest.approx(math.sqrt(50.0), rel=1e-5), 5.0]


def test_the_full_step_is_the_inverse_absolute_hessian_times_the_gradient() -> None:
    """-|H|^-1 g by numpy, on an indefinite network Hessian; what is flat to rounding is left out of the comparison."""
    case, expected = make("mlp"), reference("mlp")
    values, vectors = np.linalg.eigh(expected.hessian.numpy())
    assert values[0] < -1e-3
    assert np.abs(values).min() > 1e-7
    operator = HessianOperator(Objective([case.closure]), case.parameters)
    space = build_subspace(
        operator,
        expected.gradient,
        krylov_dim=None,
        preconditioner=IdentityPreconditioner(),
        memory=StepMemory(0, secants=True),
        seed=None,
        generator=torch.Generator(),
    )
    model = SubspaceModel(space, IdentityPreconditioner(), RULES["saddle_free"], 1.0, None)
    coordinates = space.coordinates(expected.gradient)
    steps, _ = model.steps(coordinates, [1e-18])
    right = -vectors @ ((vectors.T @ expected.gradient.numpy()) / np.abs(values))
    assert np.linalg.norm(steps[0].numpy() - right) <= 1e-8 * np.linalg.norm(right)


def test_the_optimizer_takes_the_full_step() -> None:
    case, expected = make("mlp"), reference("mlp")
    before = flat(case.parameters)
    optimizer = SaddleFreeNewton(case.parameters, krylov_dim="full", damping=0.05, **PLAIN)  # type: ignore[arg-type]
    optimizer.step(case.closure)
    values, vectors = np.linalg.eigh(expected.hessian.numpy())
    right = -vectors @ ((vectors.T @ expected.gradient.numpy()) / (np.abs(values) + 0.05))
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted
    step = (flat(case.parameters) - before).numpy()
    assert np.linalg.norm(step - right) <= 1e-8 * np.linalg.norm(right)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("preconditioner", [None, "diagonal"])
def test_a_positive_definite_quadratic_is_solved_in_one_step(
    dtype: torch.dtype, bound: float, preconditioner: str | None
) -> None:
    """With as many Krylov vectors as dimensions."""
    root = symmetric(8)
    matrix = (root @ root.T + torch.eye(8)).to(dtype)
    linear = torch.randn(8, dtype=dtype)
    x = torch.randn(8, dtype=dtype, requires_grad=True)
    options = {**PLAIN, "preconditioner": preconditioner, "damping": 1e-12, "krylov_dim": 8}
    SaddleFreeNewton([x], **options).step(quadratic(matrix, linear)(x))  # type: ignore[arg-type]
    solution = torch.linalg.solve(matrix.double(), -linear.double())
    assert float((x.detach() - solution).norm()) <= bound * float(solution.norm())


def test_the_preconditioner_does_not_change_newton_steps() -> None:
    """Newton's method is invariant to linear maps; a transposed or misplaced D would show."""
    matrix, x = symmetric(6), torch.randn(6, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([quadratic(matrix)(x)]), [x])
    preconditioner = DiagonalPreconditioner()
    preconditioner.refresh(operator, torch.Generator().manual_seed(0))
    gradient = matrix @ x.detach()
    memory = StepMemory(2, secants=True)
    memory.record(torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    memory.complete(matrix @ torch.ones(6, dtype=torch.float64))
    space = build_subspace(
        operator,
        gradient,
        krylov_dim=5,
        preconditioner=preconditioner,
        memory=memory,
        seed=None,
        generator=torch.Generator(),
    )
    assert len(space) == 6
    model = SubspaceModel(space, preconditioner, RULES["newton"], 1.0, None)
    steps, _ = model.steps(model.coordinates(gradient, 0.0, 1.0), [1.0])
    torch.testing.assert_close(steps[0], -x.detach(), rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------------ inner steps


def inner_step(
    trial: Callable[[Tensor], Tensor],
    damping: Damping | None = None,
    rule: str = "saddle_free",
    record: StepRecord | None = None,
    store: BasisStore | None = None,
    preconditioner: Preconditioner | None = None,
) -> tuple[StepRecord, Tensor | None, Tensor]:
    """One inner step from (1, 0.5) with the model of the saddle and given trial losses."""
    x = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([saddle(x)]), [x])
    gradient = torch.tensor([10.0, -1.0], dtype=torch.float64)
    space = build_subspace(
        operator,
        gradient,
        krylov_dim=None,
        preconditioner=IdentityPreconditioner(),
        memory=StepMemory(0, secants=True),
        seed=None,
        generator=torch.Generator(),
    )
    space = replace(space, store=store or BasisStore())
    model = SubspaceModel(space, preconditioner or IdentityPreconditioner(), RULES[rule], 1.0, None)
    record, step = take_inner_step(
        model,
        gradient,
        parameters=FlatParameters([x]),
        trial=TrialLoss(Objective([lambda: trial(x)]), loss=4.75, offset=4.75, excess=None),
        damping=damping or FixedDamping(1e-9),
        record=record or StepRecord(4.75, 4.75, 1.0),
    )
    return record, step, x.detach()


@pytest.mark.parametrize(("share", "accepted"), [(1.0, True), (0.5, True), (-0.5, False)])
def test_the_damping_learns_the_ratio_of_actual_to_predicted_decrease(share: float, accepted: bool) -> None:
    """The trial loss falls from 4.75 to -1 if the model of the saddle is right."""
    damping = Listening(1e-9)
    record, _, _ = inner_step(lambda x: 4.75 - share * 5.75 + 0 * x.sum(), damping=damping)
    assert record.accepted is accepted
    ((taken, ratio),) = damping.heard
    assert taken is accepted
    assert ratio == pytest.approx(share)


@pytest.mark.parametrize(
    ("loss", "parameters_norm", "length"),
    [
        (1e8, 1.0, (2 * 100 * 1e8 / 4) ** 0.5),  # a loss so large that only a long way changes it visibly
        (0.0, 1e3, 1e3 / 0.5),  # parameters so large that a short way is lost in them
        (0.0, 1e-3, 1.0 / 0.5),
    ],
)
def test_a_push_is_as_long_as_can_be_resolved(loss: float, parameters_norm: float, length: float) -> None:
    """In roots of the rounding unit: curvature -4 lowers the loss by 100 units of it, along a parameter halved by D."""

    class HalvingOne(IdentityPreconditioner):
        def scale(self, vectors: Tensor) -> Tensor:
            return vectors * torch.tensor([0.5, 3.0], dtype=torch.float64)

    matrix = torch.diag(torch.tensor([-4.0, 8.0], dtype=torch.float64))
    space = KrylovSubspace(torch.eye(2, dtype=torch.float64), matrix, coupling=0.0, lanczos_dim=2, products=2)
    model = SubspaceModel(space, HalvingOne(), RULES["saddle_free"], 1.0, None)
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64)
    pushed = model.coordinates(gradient, loss, parameters_norm)
    assert abs(float(pushed[0])) == pytest.approx(4 * length * torch.finfo(torch.float64).eps ** 0.5)


def test_a_step_that_lowers_the_trial_loss_is_taken_and_booked() -> None:
    record, step, x = inner_step(lambda x: 5 * x[0] ** 2 - x[1] ** 2)
    assert step is not None
    torch.testing.assert_close(x, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(x, torch.tensor([1.0, 0.5], dtype=torch.float64) + step, rtol=0, atol=0)
    assert record.accepted
    assert (record.inner_steps, record.trials, record.damping) == (1, 1, 1e-9)
    assert record.loss_after == pytest.approx(float(5 * x[0] ** 2 - x[1] ** 2))
    assert record.predicted_decrease == pytest.approx(4.75 + 1.0)


@pytest.mark.parametrize("loss", [4.75, 5.0, math.nan, math.inf, -math.inf])
def test_a_step_that_does_not_lower_the_trial_loss_is_not_taken(loss: float) -> None:
    record, step, x = inner_step(lambda x: 0 * x.sum() + loss)
    assert step is None
    assert not record.accepted
    assert (record.inner_steps, record.trials, record.loss_after) == (0, 1, 4.75)
    assert bits([x]) == bits([torch.tensor([1.0, 0.5], dtype=torch.float64)])


def test_the_best_of_several_dampings_is_taken_not_the_last() -> None:
    """With damping 2 the step ends at x = 1 - 10/12."""
    record, _, x = inner_step(lambda x: (x[0] - 1 / 6) ** 2, damping=GridDamping([20.0, 2.0, 0.1]))
    assert record.damping == 2.0
    assert record.trials == 3
    assert float(x[0]) == pytest.approx(1 / 6)


def test_an_error_inside_a_trial_puts_the_parameters_back() -> None:
    seen: list[Tensor] = []

    def broken(x: Tensor) -> Tensor:
        seen.append(x)
        raise KeyError("trial")

    with pytest.raises(KeyError, match="trial"):
        inner_step(broken)
    assert bits(seen) == bits([torch.tensor([1.0, 0.5], dtype=torch.float64)])


@pytest.mark.parametrize(("bound", "expected"), [(None, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_gradients_are_clipped_to_a_norm(bound: float | None, expected: float) -> None:
    clipped = clip(torch.tensor([3.0, -4.0]), bound)
    assert float(clipped.norm()) == pytest.approx(expected)
    torch.testing.assert_close(clipped * (5 / expected), torch.tensor([3.0, -4.0]))


def test_trial_losses_on_other_data_have_the_slope_of_the_objective() -> None:
    """On quadratics: loss and gradient of the objective, curvature of the trial data."""
    own, other = symmetric(5, 1), symmetric(5, 2)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    origin, step = x.detach().clone(), torch.randn(5, dtype=torch.float64)
    objective = Objective([quadratic(own)(x)])
    trial = Objective([quadratic(other, torch.randn(5, dtype=torch.float64))(x)])
    loss, gradient = float(origin @ own @ origin / 2), own @ origin
    parameters = FlatParameters([x])
    steps, promised = torch.stack([step, torch.zeros(5)]), torch.tensor([7.0, 8.0], dtype=torch.float64)
    estimate = TrialLoss.at(trial, objective, parameters, loss, gradient).after(parameters, origin, steps, promised)
    assert estimate == (
        [pytest.approx(loss + float(gradient @ step + step @ other @ step / 2)), pytest.approx(loss)],
        [7, 8],
    )
    (same, _), _ = TrialLoss.at(objective, objective, parameters, loss, gradient).after(
        parameters, origin, steps, promised
    )
    assert same == pytest.approx(float((origin + step) @ own @ (origin + step) / 2))


def test_trial_losses_are_infinite_where_the_point_is_not_finite() -> None:
    x = torch.ones(2, requires_grad=True)
    trial = TrialLoss(Objective([pytest.fail]), loss=1.0, offset=1.0, excess=None)
    estimate, _ = trial.after(FlatParameters([x]), torch.ones(2), torch.tensor([[math.nan, 0.0]]), torch.zeros(1))
    assert estimate == [math.inf]
    assert x.tolist() == [1, 1]


def test_a_step_is_added_to_those_before() -> None:
    before = StepRecord(9.0, 4.75, 1.0, trials=3, gradients=2, inner_steps=4, predicted_decrease=2.0, products=7)
    record, _, _ = inner_step(lambda x: 5 * x[0] ** 2 - x[1] ** 2, record=before)
    assert (record.trials, record.inner_steps, record.predicted_decrease) == (4, 5, pytest.approx(2.0 + 5.75))
    assert (record.loss_before, record.gradients, record.products, record.gradient_norm) == (9.0, 2, 7, 1.0)


def test_a_rule_without_damping_asks_for_one_trial_and_books_none() -> None:
    """Newton's step from (1, 0.5) ends at the saddle."""
    record, _, x = inner_step(lambda x: x[0] ** 2, GridDamping([20.0, 2.0]), "newton")
    torch.testing.assert_close(x, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert record.trials == 1
    assert math.isnan(record.damping)


def test_of_two_equal_losses_the_first_counts() -> None:
    record, _, x = inner_step(lambda x: 0 * x.sum(), GridDamping([2.0, 20.0]))
    assert record.damping == 2.0
    assert float(x[0]) == pytest.approx(1 / 6)


@pytest.mark.parametrize(("loss", "value", "heard"), [(math.nan, 1e-9, (False, 0.0)), (None, 1e3, (True, 1.0))])
def test_the_damping_learns_of_failures_and_of_small_decreases(
    loss: float | None, value: float, heard: tuple[bool, float]
) -> None:
    """The model is right about the saddle; it promises 0.1 where the damping is 1000."""
    damping = Listening(value)
    inner_step(lambda x: 5 * x[0] ** 2 - x[1] ** 2 + (0.0 if loss is None else loss), damping)
    assert damping.heard == [(heard[0], pytest.approx(heard[1]))]


class Searching(Damping):
    """Asks twice, the better one first; notes what it is told."""

    told: tuple[float, float] = (0.0, 0.0)

    def choose(self, trial_losses: Any, *, scale: float, baseline: float) -> Choice:
        self.told = (scale, baseline)
        return Choice(2.0, min(trial_losses([2.0, 20.0])[0], trial_losses([0.1])[0]), 3)


def test_a_damping_is_told_the_unit_and_the_present_loss_and_may_ask_again() -> None:
    damping = Searching()
    record, _, x = inner_step(lambda x: (x[0] - 1 / 6) ** 2, damping)
    assert damping.told == (pytest.approx(10.0), 4.75)
    assert float(x[0]) == pytest.approx(1 / 6)
    assert record.loss_after == pytest.approx(0.0)


class Predicting(Damping):
    """Notes what the model predicts, before and after the steps were tried."""

    predictions: Sequence[float] = ()

    def choose(self, trial_losses: Any, *, scale: float, baseline: float) -> Choice:
        before = trial_losses.predicted([2.0, 1e-9])
        loss = trial_losses([2.0])[0]
        self.predictions = [*before, *trial_losses.predicted([2.0])]
        return Choice(2.0, loss, 1)


def test_a_damping_may_ask_what_the_model_predicts_without_a_trial() -> None:
    """From (1, 1/2), where the gradient is (10, -1) and the curvature (10, -2): by hand."""
    damping = Predicting()
    record, _, _ = inner_step(lambda x: 5 * x[0] ** 2 - x[1] ** 2, damping)
    damped = 100 / 12 - 10 * (10 / 12) ** 2 / 2 + 1 / 4 + 2 / 4**2 / 2
    assert damping.predictions == pytest.approx([damped, 5.75, damped])
    assert (record.trials, record.predicted_decrease) == (1, pytest.approx(damped))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_predictions_without_a_trial_are_those_with_one(rate: float) -> None:
    model = diagonal_model(0.25, 0.75, learning_rates=rate)
    coordinates = torch.tensor([1.0, -2.0], dtype=torch.float64)
    _, expected = model.steps(coordinates, [0.1, 3.0])
    assert model.predicted(coordinates, [0.1, 3.0]) == pytest.approx(expected.tolist())


def test_a_model_that_promises_nothing_has_no_ratio() -> None:
    """Newton's step uphill: the decrease that it predicts is negative."""
    x = torch.tensor([0.1, 1.0], dtype=torch.float64, requires_grad=True)
    matrix = torch.diag(torch.tensor([10.0, -2.0], dtype=torch.float64))
    space = KrylovSubspace(torch.eye(2, dtype=torch.float64), matrix, coupling=0.0, lanczos_dim=2, products=2)
    model, damping = SubspaceModel(space, IdentityPreconditioner(), RULES["damped_newton"], 1.0, None), Listening(1e-9)
    record, step = take_inner_step(
        model,
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        parameters=FlatParameters([x]),
        trial=TrialLoss(Objective([lambda: 0 * x.sum() - 2.0]), loss=-0.95, offset=-0.95, excess=None),
        damping=damping,
        record=StepRecord(-0.95, -0.95, 1.0),
    )
    assert step is not None
    assert record.predicted_decrease == pytest.approx(-0.95)
    assert damping.heard == [(True, 0.0)]


class Agreeing(BasisStore):
    """All processes end at a point that another one has computed, and have its eigenvalues."""

    def agreed_point(self, vector: Tensor) -> Tensor:
        return vector + 1.0

    def agreed_eigen(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return values + 1.0, -vectors


def test_processes_agree_on_the_point_and_on_the_eigenvalues() -> None:
    _, step, x = inner_step(lambda x: 5 * x[0] ** 2 - x[1] ** 2, store=Agreeing())
    assert step is not None
    torch.testing.assert_close(x, torch.tensor([1.0, 2.0], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(step, torch.tensor([0.0, 1.5], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    space = subspace(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)), store=Agreeing())
    torch.testing.assert_close(space.eigenvalues, torch.tensor([2.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf)], ids=["nan", "inf", "gradient"]
)
def test_a_trial_objective_that_is_not_finite_here_is_refused(loss: float, slope: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    trial = Objective([lambda: (slope * x).sum() * (0.0 if slope == 1.0 else 1.0) + (0.0 if loss == 1.0 else loss)])
    words = (
        r"^The trial loss or its gradient is not finite \(.*\) at the present parameters, so no step is tried: .*\.$"
    )
    with pytest.raises(FloatingPointError, match=words):
        TrialLoss.at(trial, Objective([lambda: x.sum()]), FlatParameters([x]), 1.0, torch.ones(1))


class Watched(Objective):
    """One of two processes, of which the other is rank zero and has twice the numbers; this one's losses may fail."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.far: list[bool] = []

    def guarded(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        try:
            return compute()
        except ArithmeticError:
            return like

    def reduce_with(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        assert values.dtype == numbers.dtype == torch.float64
        return values + 1.0, 2 * numbers

    def require_sound(self, reduced: Tensor, *, far: bool = False) -> None:
        assert reduced.isnan().tolist() == [False, True, True, False]
        self.far.append(far)


def test_several_trials_share_one_reduction_and_what_rank_zero_says() -> None:
    """The second point is not finite, at the third the loss fails; all others are off by the reduction's 1."""
    x = torch.zeros(1, dtype=torch.float32, requires_grad=True)

    def loss() -> Tensor:
        if float(x.detach()) == 7.0:
            raise ArithmeticError
        return (x**2).sum()

    objective = Watched([loss])
    trial = TrialLoss(objective, loss=10.0, offset=1.0, excess=torch.tensor([0.5]))
    steps = torch.tensor([[2.0], [math.inf], [7.0], [3.0]])
    predicted = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    estimates, decreases = trial.after(FlatParameters([x]), torch.zeros(1), steps, predicted)
    # loss + (f + 1 - offset) - 2 * excess * step
    assert estimates == [10.0 + 4.0 - 2.0, math.inf, math.inf, 10.0 + 9.0 - 3.0]
    assert decreases == [0.2, 0.4, 0.6, 0.8]
    assert objective.far == [True]


# ------------------------------------------------------------------------------------------------ the model


def diagonal_model(*eigenvalues: float, **options: Any) -> SubspaceModel:
    """A model with known eigenvalues along the axes."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    unit = torch.eye(len(values), dtype=torch.float64)
    space = KrylovSubspace(unit, torch.diag(values), 0.0, len(values), 0, decomposition=(values, unit))
    entries = {"preconditioner": IdentityPreconditioner(), "rule": RULES["saddle_free"], "learning_rates": 1.0}
    return SubspaceModel(space, **{**entries, "max_step_norm": None, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(("units", "pushed"), [(99.0, False), (100.0, False), (100.5, True), (-1e9, False)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_curvature_counts_as_negative_beyond_rounding(
    units: float, pushed: bool, scale: float, dtype: torch.dtype
) -> None:
    """In units of rounding of the largest eigenvalue."""
    model = diagonal_model(-units * torch.finfo(dtype).eps * scale, scale)
    coordinates = model.coordinates(torch.tensor([0.0, 1.0], dtype=dtype), 1.0, 1.0)
    assert (coordinates[0] != 0) == pushed


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_push_keeps_the_sign_and_takes_the_size_of_a_negative_loss(sign: float) -> None:
    gradient = torch.tensor([sign * 1e-30, 1.0], dtype=torch.float64)
    pushed = diagonal_model(-4.0, 8.0).coordinates(gradient, -1e8, 1.0)
    assert float(pushed[0]) == pytest.approx(sign * (200 * torch.finfo(torch.float64).eps * 1e8 / 4) ** 0.5 * 4)
    assert float(pushed[1]) == 1.0


def test_a_gradient_is_clipped_before_it_is_projected() -> None:
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    coordinates = diagonal_model(1.0, 8.0, max_grad_norm=0.5).coordinates(gradient, 1.0, 1.0)
    torch.testing.assert_close(coordinates, torch.tensor([0.3, 0.4], dtype=torch.float64))


class Halving(IdentityPreconditioner):
    """D = 1/2, of whose steps so large parts may be taken: a number for each, or two for its entries."""

    def __init__(self, *shares: float | tuple[float, float]) -> None:
        self.allowed = shares

    def scale(self, vectors: Tensor) -> Tensor:
        return 0.5 * vectors

    def unscale(self, vectors: Tensor) -> Tensor:
        return 2.0 * vectors

    def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
        allowed = torch.tensor(self.allowed or [1.0] * len(steps)).to(steps).view(len(steps), -1)
        return allowed.amin(1, keepdim=True) if straight else allowed


@pytest.mark.parametrize(
    "shares", [(1.0, 1.0), (1.0, 0.5), (0.25, 0.5), (1.0, 1e-3), ((0.5, 1.0), (1.0, 0.25))], ids=str
)
@pytest.mark.parametrize("bound", [None, 0.1, 100.0])
@pytest.mark.parametrize("rates", [1.0, 0.5, torch.tensor([1.0, 0.25], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("straight", [False, True])
def test_steps_are_shortened_and_predictions_with_them(
    shares: tuple[float | tuple[float, float], ...], bound: float | None, rates: float | Tensor, straight: bool
) -> None:
    """By what the preconditioner allows or the bound; the prediction is the decrease of the quadratic at the step."""
    hessian = torch.tensor([1.0, 3.0], dtype=torch.float64)  # of the parameters; a fourth of it in coordinates
    gradient = torch.tensor([0.75, 1.6], dtype=torch.float64)
    limits = {"learning_rates": rates, "max_step_norm": bound, "straight": straight}
    model = diagonal_model(0.25, 0.75, preconditioner=Halving(*shares), **limits)
    steps, predicted = model.steps(model.coordinates(gradient, 1.0, 1.0), [0.1, 0.3])
    for step, promise, share, damping in zip(steps, predicted, shares, [0.1, 0.3], strict=True):
        allowed = torch.tensor(share).amin() if straight else torch.tensor(share)
        expected = -gradient / (hessian + 4 * damping) * rates * allowed
        expected = expected * min(1.0, math.inf if bound is None else bound / float(expected.norm()))
        torch.testing.assert_close(step, expected, rtol=1e-12, atol=0)
        decrease = -(gradient @ expected + expected @ (hessian * expected) / 2)
        torch.testing.assert_close(promise, decrease, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shares", [(1.0,), (0.5,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_have_the_dtype_of_the_parameters(shares: tuple[float], dtype: torch.dtype) -> None:
    matrix = torch.tensor([[2.0]], dtype=torch.float64)
    space = KrylovSubspace(torch.ones(1, 1, dtype=dtype), matrix, coupling=0.0, lanczos_dim=1, products=1)
    model = SubspaceModel(space, Halving(*shares), RULES["newton"], 1.0, None)
    steps, predicted = model.steps(torch.ones(1, dtype=torch.float64), [1.0])
    assert (steps.dtype, predicted.dtype) == (dtype, torch.float64)


# ------------------------------------------------------------------------------------------------ the subspace


class Told(IdentityPreconditioner):
    """Notes what became of steps."""

    def __init__(self) -> None:
        self.told: list[tuple[bool, BasisStore]] = []

    def feedback(self, *, accepted: bool, store: BasisStore) -> None:
        self.told.append((accepted, store))


@pytest.mark.parametrize("accepted", [True, False])
def test_a_map_is_told_whether_its_step_was_taken_and_how_vectors_are_kept(accepted: bool) -> None:
    store, told = BasisStore(), Told()
    record, _, _ = inner_step(lambda x: (x**2).sum() * 0 + (0.0 if accepted else 9.0), store=store, preconditioner=told)
    assert record.accepted is accepted
    assert [(taken, kept is store) for taken, kept in told.told] == [(accepted, True)]


class SharedOut(BasisStore):
    """Each process keeps a part of every vector, but there is one process."""

    is_shared_out = True  # type: ignore[assignment]


class Scattering(ProcessMean):
    """The mean with another process that has nothing to add, whole or in parts; notes which of them."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.asked.append("whole")
        return tensor / 2

    def part(self, vector: Tensor) -> Tensor:
        self.asked.append("part")
        return vector / 2


@pytest.mark.parametrize(("store", "way"), [(BasisStore(), "whole"), (SharedOut(), "part")], ids=["kept", "shared out"])
def test_products_are_averaged_once_whole_or_in_the_parts_that_processes_keep(store: BasisStore, way: str) -> None:
    matrix, mean = symmetric(4), Scattering()
    mean.processes = mock.Mock(guard=lambda compute, like: compute())
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    space = build_subspace(
        HessianOperator(Objective([quadratic(matrix)(x)], reduce=mean), [x]),
        torch.ones(4, dtype=torch.float64),
        krylov_dim=4,
        preconditioner=IdentityPreconditioner(),
        memory=StepMemory(0, secants=True),
        seed=None,
        generator=torch.Generator().manual_seed(0),
        store=store,
    )
    torch.testing.assert_close(space.eigenvalues, torch.linalg.eigvalsh(matrix / 2))
    assert mean.asked == [way] * 4


def subspace(matrix: Tensor, gradient: Tensor | None = None, **options: Any) -> KrylovSubspace:
    x = torch.zeros(len(matrix), dtype=matrix.dtype, requires_grad=True)
    return build_subspace(
        HessianOperator(Objective([quadratic(matrix)(x)]), [x]),
        torch.ones(len(matrix), dtype=matrix.dtype) if gradient is None else gradient,
        **{
            "krylov_dim": len(matrix),
            "preconditioner": IdentityPreconditioner(),
            "memory": StepMemory(0, secants=True),
            "seed": None,
            "generator": torch.Generator().manual_seed(0),
            **options,
        },
    )


SCALES = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


class Uneven(IdentityPreconditioner):
    """A diagonal map that differs from entry to entry."""

    def on_parts(self, store: BasisStore, size: int) -> Preconditioner:
        assert size == len(SCALES)
        return Preconditioner.on_parts(self, store, size)

    def scale(self, vectors: Tensor) -> Tensor:
        return vectors * SCALES

    def unscale(self, vectors: Tensor) -> Tensor:
        return vectors / SCALES


@pytest.mark.parametrize("length", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("seeded", [True, False])
def test_a_subspace_starts_from_the_unit_gradient_and_the_seed(length: float, seeded: bool) -> None:
    """Both in the preconditioner's coordinates, where the operator is DHD; from a random vector without either."""
    matrix, seed = symmetric(5), torch.linspace(0.1, 0.2, 5, dtype=torch.float64) if seeded else None
    gradient = length * torch.nn.functional.normalize(torch.arange(5.0).double() - 1, dim=0)
    options = {"krylov_dim": 3, "preconditioner": Uneven(), "seed": seed}
    space, again = (subspace(matrix, gradient, **options) for _ in range(2))
    assert torch.equal(space.basis, again.basis)
    start = torch.zeros(5, dtype=torch.float64) if seed is None else seed
    if length > 0:
        start = start + SCALES * gradient / (SCALES * gradient).norm()
    if length > 0 or seeded:
        torch.testing.assert_close(space.basis[0], start / start.norm())
    torch.testing.assert_close(space.basis @ space.basis.T, torch.eye(3, dtype=torch.float64))
    right = space.basis @ (SCALES.unsqueeze(1) * matrix * SCALES) @ space.basis.T
    torch.testing.assert_close(space.projected, right)
    torch.testing.assert_close(space.eigenvalues, torch.linalg.eigvalsh(right))


def test_what_nothing_reaches_is_not_carried_along() -> None:
    """Gradient: entries 0 and 2. Products: 0 and 1. The seed: all of them."""
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    gradient = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    space = subspace(matrix, gradient, krylov_dim=3, seed=torch.full((5,), 0.1, dtype=torch.float64))
    assert space.reached is not None
    assert space.reached.tolist() == [True, True, True, False, False]
    model = SubspaceModel(space, IdentityPreconditioner(), RULES["saddle_free"], 1.0, None)
    steps, _ = model.steps(model.coordinates(gradient, 1.0, 1.0), [0.1, 1.0])
    assert (steps != 0).tolist() == [[True, True, True, False, False]] * 2


def remembered(*steps: tuple[list[float], list[float] | None]) -> StepMemory:
    memory = StepMemory(len(steps), secants=True)
    both = [[None if v is None else torch.tensor(v, dtype=torch.float64) for v in step] for step in steps]
    memory.load_state_dict({"steps": both})
    return memory


def test_remembered_steps_and_their_products_are_brought_into_the_coordinates() -> None:
    """Along the axes, so that a basis of e0, e4, e3 follows; a product that is given need not be that of the matrix."""
    matrix = symmetric(5)
    space = subspace(
        matrix,
        torch.tensor([7.0, 0, 0, 0, 0], dtype=torch.float64),
        krylov_dim=1,
        preconditioner=Uneven(),
        memory=remembered(([0, 0, 0, 0, 2.0], None), ([0, 0, 0, 5.0, 0], [10.0, 20.0, 30.0, 40.0, 50.0])),
    )
    axes = [0, 4, 3]
    torch.testing.assert_close(space.basis, torch.eye(5, dtype=torch.float64)[axes])
    product = SCALES * torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], dtype=torch.float64) / (5.0 / SCALES[3])
    expected = (SCALES.unsqueeze(1) * matrix * SCALES)[axes][:, axes]
    expected[2, :] = expected[:, 2] = product[axes]
    torch.testing.assert_close(space.projected, expected)
    assert space.products == 2


def test_remembered_steps_without_products_cost_one_each() -> None:
    axis = [0.0, 0.0, 0.0, 0.0, 2.0]
    gradient = torch.tensor([7.0, 0, 0, 0, 0], dtype=torch.float64)
    space = subspace(symmetric(5), gradient, krylov_dim=1, memory=remembered((axis, None)))
    torch.testing.assert_close(space.projected, symmetric(5)[[0, 4]][:, [0, 4]])
    assert space.products == 2


@pytest.mark.parametrize("preconditioner", [IdentityPreconditioner(), Uneven()], ids=["identity", "uneven"])
def test_how_vectors_are_kept_makes_no_difference(preconditioner: Preconditioner) -> None:
    matrix, gradient = symmetric(5), torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    matrix[2:, :] = matrix[:, 2:] = 0.0  # the last entry is reached by nothing
    step, product = [1.0, 2.0, 3.0, 4.0, 0.0], [3.0, 1.0, 0.0, 1.0, 0.0]
    backwards = remembered((step[::-1], product[::-1]))
    options = {"krylov_dim": 2, "preconditioner": preconditioner, "seed": torch.ones(5, dtype=torch.float64)}
    plain = subspace(matrix, gradient, memory=remembered((step, product)), **options)
    kept = subspace(matrix, gradient, memory=backwards, store=Reversing(), **options)
    assert len(kept) == 3
    torch.testing.assert_close(kept.projected, plain.projected)
    torch.testing.assert_close(kept.basis.flip(-1), plain.basis)
    for space in (plain, kept):
        assert space.reached is not None
        assert space.reached.tolist() == [True, True, True, True, False]


def test_the_exact_method_keeps_its_basis_whole() -> None:
    processes: Any = object()
    space = subspace(symmetric(5), krylov_dim=None, store=Agreeing(processes), preconditioner=Uneven())
    assert space.store == BasisStore(processes)
    expected = torch.linalg.eigvalsh(SCALES.unsqueeze(1) * symmetric(5) * SCALES)
    torch.testing.assert_close(space.eigenvalues, expected + 1.0)


@pytest.mark.parametrize("krylov_dim", [2, None])
def test_products_that_are_not_finite_end_a_subspace(krylov_dim: int | None) -> None:
    space = subspace(torch.full((3, 3), math.nan, dtype=torch.float64), krylov_dim=krylov_dim)
    assert not bool(torch.isfinite(space.projected).all())
    assert space.decomposition is None


# ------------------------------------------------------------------------------------------------ escapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [(1.0, 0.0), (1e-3, 0.0), (0.0, 0.0), (0.0, 1e-30)])
@pytest.mark.parametrize("options", [{}, {"preconditioner": None, "exploration": 0.0}, {"damping": "grid"}], ids=str)
def test_the_saddle_is_left_where_the_gradient_does_not_show_the_way(
    start: tuple[float, float], dtype: torch.dtype, options: dict
) -> None:
    x = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimizer = SaddleFreeNewton([x], krylov_dim=2, **options)
    for _ in range(40):
        optimizer.step(saddle(x))
    assert abs(float(x[1].detach())) > 1.0
    assert abs(float(x[0].detach())) < 1e-2 * abs(float(x[1].detach()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [(1.0, 0.0), (0.1, 0.0)])
def test_the_monkey_saddle_is_left_from_its_axis(start: tuple[float, float], dtype: torch.dtype) -> None:
    """x^3 - 3xy^2: on the axis the gradient has no y component, while y is the way of negative curvature."""
    x = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimizer = SaddleFreeNewton([x], krylov_dim=2)
    for _ in range(40):
        if float((x[0] ** 3 - 3 * x[0] * x[1] ** 2).detach()) < -10:
            break
        optimizer.step(lambda: x[0] ** 3 - 3 * x[0] * x[1] ** 2)
    assert float((x[0] ** 3 - 3 * x[0] * x[1] ** 2).detach()) < -10


def symmetric_network(dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """XOR with three hidden units that are all the same: gradients cannot tell them apart."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.5, -0.3]]).expand(3, 2))
        module[0].bias.fill_(0.1)
        module[2].weight.fill_(0.4)
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=dtype)
    targets = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=dtype)
    return module, lambda: nn.functional.mse_loss(module(inputs), targets)


def asymmetry(module: nn.Module) -> float:
    weight = module[0].weight.detach()  # type: ignore[index]
    return float((weight - weight[0]).abs().max())


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_permutation_symmetry_is_broken(dtype: torch.dtype, seed: int) -> None:
    """One hidden unit cannot learn XOR below 1/8; three can. Gradient descent keeps the three alike.

    Of forty seeds in either dtype one (float32, 1) saturates its units and stays at 1/8.
    """
    module, closure = symmetric_network(dtype)
    descent = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(300):
        descent.zero_grad()
        closure().backward()
        descent.step()
    assert asymmetry(module) < 1e-5
    stuck = float(closure().detach())
    assert stuck > 0.1

    torch.manual_seed(seed)
    module, closure = symmetric_network(dtype)
    optimizer = SaddleFreeNewton(module.parameters())
    for _ in range(60):
        optimizer.step(closure)
    assert asymmetry(module) > 0.1
    assert float(closure().detach()) < 0.01
