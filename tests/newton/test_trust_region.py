import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import IdentityPreconditioner, KrylovSubspace, SaddleFreeNewton
from lightning_sfn.newton.step import SubspaceModel
from lightning_sfn.newton.trust_region import RULES, trust_region

from .cases import saddle

EIGENVALUES = [-4.0, -0.5, 0.0, 0.25, 1.0, 8.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("saddle_free", [1 / 4.5, 1.0, 2.0, 1 / 0.75, 1 / 1.5, 1 / 8.5]),
        ("newton", [-0.25, -2.0, 0.0, 4.0, 1.0, 0.125]),
        ("damped_newton", [1 / -3.5, float("inf"), 2.0, 1 / 0.75, 1 / 1.5, 1 / 8.5]),
        ("truncated_newton", [0.0, 0.0, 0.0, 1 / 0.75, 1 / 1.5, 1 / 8.5]),
        ("gradient", [1.0] * 6),
    ],
)
def test_rules_equal_their_closed_forms(name: str, expected: list[float]) -> None:
    factors = trust_region(name).inverse(torch.tensor(EIGENVALUES).double(), torch.tensor([[0.5]]).double())
    torch.testing.assert_close(factors, torch.tensor([expected]).double())


@pytest.mark.parametrize("name", RULES)
def test_rules_broadcast_over_dampings(name: str) -> None:
    values, dampings = torch.tensor(EIGENVALUES).double(), torch.tensor([[0.1], [10.0]]).double()
    factors = RULES[name].inverse(values, dampings)
    assert factors.shape == (2, 6)
    for row, damping in zip(factors, dampings, strict=True):
        assert torch.equal(row, RULES[name].inverse(values, damping))
    assert torch.equal(factors[0], factors[1]) != RULES[name].damped


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_newton_stays_where_it_is_along_what_is_flat_to_rounding(damping: float) -> None:
    """Relative to the largest eigenvalue, whatever the unit; where all are zero there is nowhere to go."""
    newton, values = trust_region("newton").inverse, torch.tensor([1e-9, -1e-5, 1e10]).double()
    for unit in (1.0, 1e-12):
        factors = newton(unit * values, torch.tensor([damping]).double())
        torch.testing.assert_close(unit * factors, torch.tensor([0.0, -1e5, 1e-10]).double())
    assert newton(torch.zeros(3), torch.tensor([damping])).tolist() == [0.0, 0.0, 0.0]


def test_the_gradient_rule_needs_no_damping() -> None:
    assert trust_region("gradient").inverse(torch.tensor([2.0, -3.0]), torch.tensor([0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", RULES)
def test_only_saddle_free_newton_uses_negative_curvature(name: str) -> None:
    assert RULES[name].uses_negative_curvature == (name == "saddle_free")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^trust_region is 'cubic', but one of 'saddle_free', .* is expected\.$"):
        trust_region("cubic")


def path(name: str, start: tuple[float, float], steps: int, **options: object) -> Tensor:
    """Positions on ``5x^2 - y^2``, one row a step, the start first."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    exact = {"previous_directions": 0, "preconditioner": None, "exploration": 0.0, "inner_steps": 1, "damping": 1e-12}
    optimizer = SaddleFreeNewton([x], trust_region=name, **{**exact, "krylov_dim": "full", **options})  # type: ignore[arg-type]
    rows = [x.detach().clone()]
    for _ in range(steps):
        optimizer.step(saddle(x))
        rows.append(x.detach().clone())
    return torch.stack(rows)


@pytest.mark.parametrize("krylov_dim", [2, "full"])
def test_saddle_free_newton_doubles_the_distance_from_a_saddle(krylov_dim: int | str) -> None:
    rows = path("saddle_free", (1.0, 0.5), 5, krylov_dim=krylov_dim)
    torch.testing.assert_close(rows[:, 1], 0.5 * 2.0 ** torch.arange(6).double(), rtol=1e-9, atol=0)
    assert float(rows[1:, 0].abs().max()) <= 1e-9


@pytest.mark.parametrize("krylov_dim", [2, "full"])
def test_newton_is_attracted_by_a_saddle(krylov_dim: int | str) -> None:
    """From (1, 0.5) the saddle point is lower, so the step is taken."""
    assert float(path("newton", (1.0, 0.5), 1, krylov_dim=krylov_dim)[1].abs().max()) <= 1e-12


def test_newton_is_not_followed_uphill() -> None:
    rows = path("newton", (0.1, 1.0), 2)
    assert torch.equal(rows[0], rows[2])


def test_gradient_descent_leaves_a_saddle_slowly() -> None:
    """(1 - lr lambda)^t: at the largest learning rates that x allows, y grows by a fifth where SFN doubles it."""
    rows = path("gradient", (1.0, 0.5), 5, lr=0.08)
    t = torch.arange(6).double()
    torch.testing.assert_close(rows[:, 0], (1 - 0.08 * 10) ** t)
    torch.testing.assert_close(rows[:, 1], 0.5 * (1 + 0.08 * 2) ** t)


def test_damped_newton_is_gradient_descent_where_damping_is_large() -> None:
    rows = path("damped_newton", (1.0, 0.5), 3, damping=20.0)
    t = torch.arange(4).double()
    torch.testing.assert_close(rows[:, 0], (1 - 10 / 30) ** t)
    torch.testing.assert_close(rows[:, 1], 0.5 * (1 + 2 / 18) ** t)


def test_truncated_newton_ignores_negative_curvature() -> None:
    rows = path("truncated_newton", (1.0, 0.5), 1)
    assert float(rows[1, 0].abs()) <= 1e-11
    assert float(rows[1, 1]) == pytest.approx(0.5, rel=1e-14)


def test_the_learning_rate_scales_every_step() -> None:
    rows = path("saddle_free", (1.0, 0.5), 3, lr=0.25)
    t = torch.arange(4).double()
    torch.testing.assert_close(rows[:, 0], 0.75**t)
    torch.testing.assert_close(rows[:, 1], 0.5 * 1.25**t)


def model(name: str, lr: float | Tensor = 1.0, max_step_norm: float | None = None) -> SubspaceModel:
    """The exact model of ``5x^2 - y^2``."""
    matrix = torch.diag(torch.tensor([10.0, -2.0], dtype=torch.float64))
    space = KrylovSubspace(torch.eye(2, dtype=torch.float64), matrix, coupling=0.0, lanczos_dim=2, products=2)
    return SubspaceModel(space, IdentityPreconditioner(), RULES[name], lr, max_step_norm)


GRADIENT = torch.tensor([10.0, -1.0], dtype=torch.float64)  # at (1, 0.5)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("newton", [-1.0, -0.5]),
        ("saddle_free", [-10 / 13, 1 / 5]),
        ("damped_newton", [-10 / 13, 1.0]),
        ("truncated_newton", [-10 / 13, 0.0]),
        ("gradient", [-10.0, 1.0]),
    ],
)
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_steps_and_predictions_equal_the_quadratic(name: str, step: list[float], lr: float) -> None:
    subspace = model(name, lr)
    coordinates = subspace.coordinates(GRADIENT, 4.75, 1.0)
    steps, predicted = subspace.steps(coordinates, [3.0, 3.0])
    move = lr * torch.tensor(step, dtype=torch.float64)
    torch.testing.assert_close(steps, torch.stack([move, move]))
    decrease = -(GRADIENT @ move + move @ (torch.tensor([10.0, -2.0], dtype=torch.float64) * move) / 2)
    torch.testing.assert_close(predicted, torch.stack([decrease, decrease]))


def test_a_step_bound_shortens_the_step_and_its_prediction() -> None:
    subspace = model("newton", max_step_norm=0.1)
    steps, predicted = subspace.steps(subspace.coordinates(GRADIENT, 4.75, 1.0), [1.0])
    move = 0.1 * torch.tensor([-1.0, -0.5], dtype=torch.float64) / 1.25**0.5
    torch.testing.assert_close(steps[0], move)
    expected = -(GRADIENT @ move + move @ (torch.tensor([10.0, -2.0], dtype=torch.float64) * move) / 2)
    torch.testing.assert_close(predicted[0], expected)


def test_learning_rates_of_their_own_scale_coordinates() -> None:
    subspace = model("newton", torch.tensor([1.0, 0.0], dtype=torch.float64))
    steps, _ = subspace.steps(subspace.coordinates(GRADIENT, 4.75, 1.0), [1.0])
    assert steps.tolist() == [[-1.0, 0.0]]


def test_only_a_gradient_blind_to_negative_curvature_is_pushed() -> None:
    """A visible component stays as it is; an invisible one is raised, sign kept, for saddle-free Newton alone."""
    blind = torch.tensor([10.0, -1e-14], dtype=torch.float64)
    pushed = model("saddle_free").coordinates(blind, 5.0, 1.0)
    assert pushed[0] < -1e-9  # ascending order: the negative eigenvalue comes first
    assert abs(float(pushed[0])) < 1e-4
    assert abs(float(pushed[1])) == 10.0
    assert abs(float(model("newton").coordinates(blind, 5.0, 1.0)[0])) == 1e-14
    assert abs(float(model("saddle_free").coordinates(GRADIENT, 5.0, 1.0)[0])) == 1.0
