"""Verdicts on functions whose Hessians are known, and never more than the error bounds allow."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sfn.newton import Objective, Spectrum, hessian_spectrum
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.verdict import NewtonTrial, try_newton_step, verdict

from .cases import DTYPES, bits, make
from .ranks import HalfShare

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "saddle": lambda x: x[0] ** 2 - x[1] ** 2,
    "raised saddle": lambda x: 1 + x[0] ** 2 - x[1] ** 2,
    "bowl": lambda x: x[0] ** 2 + x[1] ** 2,
    "raised bowl": lambda x: 1 + x[0] ** 2 + x[1] ** 2,
    "gutter": lambda x: 1 + x[0] ** 2 + 0 * x[1] ** 2,
    "hill": lambda x: -(x[0] ** 2) - 3 * x[1] ** 2,
    "quartic": lambda x: x[0] ** 4 + x[1] ** 4,
    "monkey saddle": lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2,
    "plane": lambda x: 1 + x[0] + 0 * x[1] ** 2,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "place", "start"),
    [
        ("saddle", (0.0, 0.0), "saddle: the smallest eigenvalue is -2 "),
        ("raised saddle", (1e-6, 1e-6), "saddle: the smallest eigenvalue is -2 "),
        ("saddle", (1.0, 0.5), "slope, with negative curvature: the smallest eigenvalue is -2 "),
        ("hill", (0.0, 0.0), "saddle: the smallest eigenvalue is -6 "),
        ("bowl", (0.0, 0.0), "minimum to tolerance: the smallest eigenvalue is 2 "),
        ("raised bowl", (1e-6, 0.0), "minimum to tolerance: the smallest eigenvalue is 2 "),
        ("bowl", (1.0, 0.5), "slope: the smallest eigenvalue is 2 "),
        ("gutter", (0.0, 0.7), "minimum to tolerance: "),
        ("quartic", (1.0, 1.0), "slope: the smallest eigenvalue is 12 "),
        ("quartic", (0.0, 0.0), "unknown: gradient and curvature are zero"),
        ("monkey saddle", (0.0, 0.0), "unknown: gradient and curvature are zero"),
        ("monkey saddle", (1.0, 0.5), "slope, with negative curvature: the smallest eigenvalue is -6.71 "),
        ("plane", (0.0, 0.0), "slope: the smallest eigenvalue is 0 "),
    ],
)
def test_points_of_known_functions_get_their_name(
    name: str, place: tuple[float, float], start: str, dtype: torch.dtype
) -> None:
    x = torch.tensor(place, dtype=dtype, requires_grad=True)
    words = verdict(hessian_spectrum(lambda: FUNCTIONS[name](x), [x]))
    assert words.startswith(start), words
    assert words.endswith(".")
    assert "\n" not in words


def measured(
    values: list[float], bounds: list[float], gradient_norm: float = 0.0, loss: float = 1.0, **options: Any
) -> Spectrum:
    ritz, residuals = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, bounds))
    return Spectrum(ritz, residuals, loss, gradient_norm, len(values), **options)


@pytest.mark.parametrize(
    ("spectrum", "start"),
    [
        (measured([-1.0, 5.0], [0.99, 0.1]), "saddle: "),
        (measured([-1.0, 5.0], [1.01, 0.1]), "saddle: "),  # a Ritz value is an upper bound
        (measured([-1.0, 5.0], [1.01, 0.1], gradient_norm=9.0), "slope, with negative curvature: "),
        (measured([-1.0, 5.0], [1.01, 0.1], rounding=1.1), "not converged: "),  # it may be positive
        (measured([0.5, 5.0], [0.6, 0.1]), "not converged: "),  # it may be negative
        (measured([0.5, 5.0], [0.4, 0.1]), "minimum to tolerance: "),
        (measured([-1e-4, 5.0], [2e-4, 0.1], rounding=2e-4), "minimum to tolerance: "),  # zero to tolerance, either way
        (measured([-1e-2, 5.0], [1e-3, 0.1]), "saddle: "),
        (measured([0.5, 50.0], [0.4, 0.1], gradient_norm=0.9), "minimum to tolerance: "),  # gains 0.81 %
        (measured([0.5, 50.0], [0.4, 0.1], gradient_norm=1.1), "slope: "),  # gains 1.21 %
        (measured([0.5, 50.0], [0.4, 0.1], gradient_norm=1.1, loss=-100.0), "minimum to tolerance: "),
        (measured([-3.0, 50.0], [0.4, 0.1], gradient_norm=1.1), "slope, with negative curvature: "),
        (measured([-50.0, -0.1], [0.4, 0.01], gradient_norm=0.9), "saddle: "),
        (measured([0.0], [0.0], gradient_norm=1e-30), "slope: "),
        (measured([], [], nonfinite=3), "unknown: 3 numbers "),
        (measured([-1.0, 1.0], [0.1, 0.1], nonfinite=1), "unknown: 1 numbers "),
        (measured([], [], loss=float("nan"), nonfinite=1), "unknown: 1 numbers "),
    ],
)
def test_words_never_say_more_than_the_error_bounds(spectrum: Spectrum, start: str) -> None:
    words = verdict(spectrum)
    assert words.startswith(start), words
    claims_negative = words.startswith("saddle") or "with negative curvature" in words
    known = len(spectrum.eigenvalues) > 0
    assert not claims_negative or (known and spectrum.lambda_min + spectrum.rounding < 0)


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (NewtonTrial(2.0, 0.7, 0.5), "SFN predicts a decrease of 0.7 in one step; tried on these data it lowers the"),
        (NewtonTrial(2.0, 0.7, 0.5), "loss by 0.5 (0.25 of the loss)."),
        (NewtonTrial(-2.0, 0.7, 0.5), "loss by 0.5 (0.25 of the loss)."),
        (NewtonTrial(0.0, 0.7, 0.5), "loss by 0.5."),
        (NewtonTrial(2.0, 0.0, 0.0), "One SFN step does not lower the loss on these data."),
    ],
)
@pytest.mark.parametrize(
    "spectrum",
    [
        measured([-3.0, 5.0], [0.1, 0.1]),
        measured([-3.0, 5.0], [4.0, 0.1]),
        measured([-3.0, 5.0], [0.1, 0.1], gradient_norm=9.0),
        measured([3.0, 5.0], [0.1, 0.1]),
    ],
    ids=["saddle", "not converged", "slope", "minimum"],
)
def test_the_tried_step_is_told_as_measured(trial: NewtonTrial, words: str, spectrum: Spectrum) -> None:
    told = verdict(spectrum, trial)
    assert words in told
    assert told.endswith(".")
    assert told.count("the smallest eigenvalue is") == told.count("SFN") == 1
    assert ".  " not in told


@pytest.mark.parametrize(
    ("spectrum", "trial", "start", "why"),
    [
        (measured([0.5, 50.0], [0.1, 0.1]), NewtonTrial(1.0, 0.0101, 0.0), "slope: ", "a Newton step gains more"),
        (measured([0.5, 50.0], [0.1, 0.1]), NewtonTrial(1.0, 0.0, 0.0101), "slope: ", "a Newton step gains more"),
        (measured([0.5, 50.0], [0.1, 0.1]), NewtonTrial(1.0, 0.0099, 0.0099), "minimum to tolerance: ", "no direction"),
        (measured([0.5, 50.0], [0.1, 0.1], 1.1), NewtonTrial(1.0, 0.5, 0.5), "slope: ", "the gradient is not small"),
        (measured([-3.0, 50.0], [0.1, 0.1]), NewtonTrial(1.0, 0.0101, 0.2), "slope, with negative", "a Newton step"),
        (measured([-3.0, 50.0], [0.1, 0.1]), NewtonTrial(1.0, 0.0099, 0.2), "saddle: ", "so this is no minimum"),
        (measured([0.5, 50.0], [0.6, 0.1]), NewtonTrial(1.0, 0.2, 0.2), "not converged: ", "its sign is open"),
    ],
)
def test_where_a_newton_step_gains_much_there_is_no_minimum(
    spectrum: Spectrum, trial: NewtonTrial, start: str, why: str
) -> None:
    told = verdict(spectrum, trial)
    assert told.startswith(start), told
    assert why in told


def test_a_long_valley_is_no_minimum() -> None:
    """The gradient is small because curvature is: a Newton step goes to the minimum at once."""
    scales = torch.tensor([1e2, 1.0, 1e-3], dtype=torch.float64)
    x = torch.tensor([0.0, 0.0, 10.0], dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return (scales * x**2).sum()

    spectrum = hessian_spectrum(loss, [x])
    trial = try_newton_step(Objective([loss]), FlatParameters([x]))
    assert verdict(spectrum).startswith("minimum to tolerance: ")  # as far as a gradient step tells
    assert verdict(spectrum, trial).startswith("slope: ")
    with torch.no_grad():
        x.zero_()
    x_there = try_newton_step(Objective([lambda: 1 + loss()]), FlatParameters([x]))
    assert verdict(hessian_spectrum(lambda: 1 + loss(), [x]), x_there).startswith("minimum to tolerance: ")


@pytest.mark.parametrize(("gradient_norm", "start"), [(0.0999, "minimum to tolerance: "), (0.1001, "slope: ")])
@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_a_point_is_critical_where_a_gradient_step_gains_under_a_hundredth(
    gradient_norm: float, start: str, unit: float
) -> None:
    """The step of length 1 / lambda_max gains half the squared gradient over lambda_max, whatever the unit."""
    spectrum = measured([0.1 * unit, 0.5 * unit], [1e-9, 1e-9], gradient_norm=gradient_norm * unit, loss=unit)
    assert verdict(spectrum).startswith(start)


def test_processes_try_the_step_together() -> None:
    """A failure on one of them must not leave the others waiting: they release each other after the step."""
    released = []

    class Shared(HalfShare):
        def __init__(self) -> None:
            super().__init__()
            self.processes = SimpleNamespace(  # type: ignore[assignment]
                size=1,
                rank=0,
                collect=lambda value: [value],
                release=lambda: released.append(1),
                require_equal=lambda *_: None,
                guard=lambda compute, like: compute(),
                require_sound=lambda **_: None,
                from_first=lambda tensor: tensor,
            )
            self.share = 1.0

        def with_numbers(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
            return values, numbers

    x = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    try_newton_step(Objective([lambda: FUNCTIONS["saddle"](x)], reduce=Shared()), FlatParameters([x]))
    assert released == [1]


@pytest.mark.parametrize("name", ["mlp", "mlp_classifier", "rnn"])
def test_a_tried_step_gains_what_it_says_and_is_taken_back(name: str) -> None:
    case = make(name)
    before, loss = bits(case.parameters), case.closure().item()
    lowest = loss
    points = []

    def closure() -> Tensor:
        nonlocal lowest
        value = case.closure()
        lowest = min(lowest, value.item())
        points.append(bits(case.parameters))
        return value

    trial = try_newton_step(Objective([closure]), FlatParameters(case.parameters))
    assert bits(case.parameters) == before
    assert any(point != before for point in points)
    assert trial.loss == pytest.approx(loss)
    assert trial.loss - trial.measured == pytest.approx(lowest, rel=1e-9)  # the best of its trial losses
    assert trial.predicted > 0
    assert all(p.grad is None for p in case.parameters)


def test_the_prediction_for_a_quadratic_is_what_is_measured() -> None:
    x = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    trial = try_newton_step(Objective([lambda: FUNCTIONS["saddle"](x)]), FlatParameters([x]))
    assert trial.measured == pytest.approx(trial.predicted, rel=1e-9)
    assert trial.loss == 0.75


def test_at_a_minimum_the_tried_step_gains_nothing() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    trial = try_newton_step(Objective([lambda: FUNCTIONS["raised bowl"](x)]), FlatParameters([x]))
    assert trial == NewtonTrial(1.0, 0.0, 0.0)


class BrokenError(RuntimeError):
    """What a user's closure may raise."""


@pytest.mark.parametrize("evaluation", [1, 2, 3, 5, 6, 7])  # the fourth is of Kronecker factors, which are not needed
def test_parameters_survive_a_closure_that_raises(evaluation: int) -> None:
    """Evaluations from the fifth on see parameters that have been moved."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = torch.randn(9, 3, dtype=torch.float64)
    with torch.no_grad():
        net[0].bias[0] = -0.0  # its sign is a bit as well
    before, moved, count = bits(list(net.parameters())), False, 0

    def closure() -> Tensor:
        nonlocal count, moved
        count += 1
        moved = bits(list(net.parameters())) != before
        if count == evaluation:
            raise BrokenError
        return (net(data) - data[:, :1]).square().mean()

    with pytest.raises(BrokenError):
        try_newton_step(Objective([closure]), FlatParameters(net.parameters()))
    assert bits(list(net.parameters())) == before
    assert moved == (evaluation >= 5)
