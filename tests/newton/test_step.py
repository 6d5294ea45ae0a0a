import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_sfn.newton import (
    DiagonalPreconditioner,
    FixedDamping,
    FlatParameters,
    GridDamping,
    HessianOperator,
    IdentityPreconditioner,
    KrylovSubspace,
    Objective,
    SaddleFreeNewton,
    StepRecord,
)
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.step import SubspaceModel, TrialLoss, build_subspace, clip, take_inner_step
from lightning_sfn.newton.trust_region import RULES

from .cases import DTYPES, bits, make, quadratic, reference, saddle, symmetric

PLAIN = {"previous_directions": 0, "preconditioner": None, "exploration": 0.0, "inner_steps": 1}


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters]).clone()


# ------------------------------------------------------------------------------------------------ exact steps


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


def inner_step(trial: Callable[[Tensor], Tensor], **options: object) -> tuple[StepRecord, Tensor | None, Tensor]:
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
    model = SubspaceModel(space, IdentityPreconditioner(), RULES["saddle_free"], 1.0, None)
    record, step = take_inner_step(
        model,
        gradient,
        parameters=FlatParameters([x]),
        trial=TrialLoss(Objective([lambda: trial(x)]), loss=4.75, offset=4.75, excess=None),
        damping=options.get("damping", FixedDamping(1e-9)),  # type: ignore[arg-type]
        record=StepRecord(4.75, 4.75, 1.0),
    )
    return record, step, x.detach()


class Listening(FixedDamping):
    """Notes what it learns of a step."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.heard: list[tuple[bool, float]] = []

    def feedback(self, *, accepted: bool, reduction_ratio: float) -> None:
        self.heard.append((accepted, reduction_ratio))


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
    """In roots of the rounding unit: curvature -4 lowers the loss by 100 units of it, in parameters halved by D."""

    class Halving(IdentityPreconditioner):
        def scale(self, vectors: Tensor) -> Tensor:
            return 0.5 * vectors

    matrix = torch.diag(torch.tensor([-4.0, 8.0], dtype=torch.float64))
    space = KrylovSubspace(torch.eye(2, dtype=torch.float64), matrix, coupling=0.0, lanczos_dim=2, products=2)
    model = SubspaceModel(space, Halving(), RULES["saddle_free"], 1.0, None)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_permutation_symmetry_is_broken(dtype: torch.dtype) -> None:
    """One hidden unit cannot learn XOR below 1/8; three can. Gradient descent keeps the three alike."""
    module, closure = symmetric_network(dtype)
    descent = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(300):
        descent.zero_grad()
        closure().backward()
        descent.step()
    assert asymmetry(module) < 1e-5
    stuck = float(closure().detach())
    assert stuck > 0.1

    module, closure = symmetric_network(dtype)
    optimizer = SaddleFreeNewton(module.parameters())
    for _ in range(60):
        optimizer.step(closure)
    assert asymmetry(module) > 0.1
    assert float(closure().detach()) < 0.01
