import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfn.newton import FlatParameters, HessianOperator, Objective, ObjectiveError, SaddleFreeNewton
from lightning_sfn.newton.curvature import evaluate_without_backward
from lightning_sfn.newton.processes import ContributionError, Processes, ProcessMean
from lightning_sfn.newton.randomness import RandomState

from .ranks import HalfShare


def test_value_is_the_weighted_mean_of_the_parts() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    objective = Objective([lambda: (x**2).sum(), lambda: x.sum()], weights=[1, 3])
    assert objective.value() == pytest.approx((9 + 3 * 3) / 4)
    assert len(objective) == 2
    assert sum(objective.weights) == pytest.approx(1.0)


def test_parts_count_equally_without_weights() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    assert Objective([lambda: (x**2).sum(), lambda: x.sum()]).value() == 6.0


def test_random_numbers_are_frozen_within_one_objective_and_fresh_in_the_next() -> None:
    x = torch.ones(50, requires_grad=True)

    def closure() -> Tensor:
        return (F.dropout(x, 0.5) + torch.randn(50)).sum()

    objective = Objective([closure])
    values = {objective.value() for _ in range(3)}
    assert len(values) == 1
    assert Objective([closure]).value() not in values


def test_only_the_first_evaluation_moves_the_global_stream() -> None:
    x = torch.ones(50, requires_grad=True)

    def closure() -> Tensor:
        return F.dropout(x, 0.5).sum()

    torch.manual_seed(5)
    closure()
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    objective = Objective([closure])
    for _ in range(4):
        objective.value()
        assert torch.equal(torch.get_rng_state(), expected)


def test_given_random_states_are_used_from_the_first_evaluation_on() -> None:
    state = RandomState.capture()
    expected = float(torch.randn(()))
    x = torch.ones((), requires_grad=True)
    before = torch.get_rng_state()
    assert Objective([lambda: x * torch.randn(())], random_states=[state]).value() == pytest.approx(expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("parameters", "in_use", "device"),
    [
        (torch.device("cuda", 1), True, torch.device("cuda", 1)),
        (torch.device("cpu"), True, torch.device("cuda", 0)),
        (None, True, torch.device("cuda", 0)),
        (torch.device("cpu"), False, None),
        (None, False, None),
    ],
)
def test_random_numbers_of_the_parameters_device_are_replayed(
    parameters: torch.device | None, in_use: bool, device: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current device is the first one."""
    noted: list[torch.device | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(RandomState, "capture", noted.append)
    objective = Objective([lambda: torch.ones(())])
    objective.device = parameters
    objective.evaluate(0)
    assert noted == [device]
    assert objective.local().device == parameters


def test_operators_and_gradients_say_where_the_parameters_are() -> None:
    x = torch.ones(2, requires_grad=True)
    parameters = FlatParameters([x])
    evaluated, asked, known = (Objective([lambda: x.sum()]) for _ in range(3))
    evaluate_without_backward(evaluated, 0, parameters)
    HessianOperator(asked, parameters)
    assert evaluated.device == asked.device == x.device
    assert known.device is None


def test_local_shares_random_numbers_but_not_the_reduction() -> None:
    x = torch.ones((), requires_grad=True)
    objective = Objective([lambda: x * torch.rand(())], reduce=HalfShare())
    value = objective.value()
    assert objective.local().value() == pytest.approx(2 * value)


def test_losses_that_differentiate_inside_work_under_no_grad() -> None:
    module = nn.Linear(1, 1)

    def closure() -> Tensor:
        x = torch.ones(4, 1, requires_grad=True)
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return slope.square().mean()

    with torch.no_grad():
        assert Objective([closure]).value() == pytest.approx(float(module.weight) ** 2)


def test_losses_that_are_not_finite_are_shown_as_they_are() -> None:
    x = torch.ones((), requires_grad=True)
    assert math.isnan(Objective([lambda: x * math.nan]).value())
    assert Objective([lambda: x * math.inf]).value() == math.inf


def test_a_loss_of_one_element_is_a_scalar_and_pairs_keep_their_output() -> None:
    x = torch.ones(1, requires_grad=True)
    evaluation = Objective([lambda: (2 * x, x + 1)]).evaluate(0)
    assert evaluation.loss.shape == ()
    assert evaluation.output is not None
    assert evaluation.output.tolist() == [2.0]


@pytest.mark.parametrize(
    ("result", "word"),
    [
        (torch.ones(3), "shape (3,)"),
        (None, "NoneType"),
        (1.5, "float"),
        ((torch.ones(()), torch.ones(2), 1), "a tuple of 3"),
        ((), "a tuple of 0"),
        (torch.ones((), dtype=torch.complex64), "scalar"),
        (torch.ones((), dtype=torch.int64), "scalar"),
    ],
)
def test_results_that_are_no_scalar_loss_are_refused(result: object, word: str) -> None:
    with pytest.raises(ObjectiveError, match=r"^[^\n]+\.$") as refusal:
        Objective([lambda: result]).value()  # type: ignore[list-item, return-value]
    assert word in str(refusal.value)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ObjectiveError, match=r"2 parts.*positive weights"):
        Objective([lambda: torch.ones(())] * 2, weights)


def test_an_objective_without_closures_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"^An objective needs at least one closure, but none was given\.$"):
        Objective([])


def test_a_loss_in_place_of_a_closure_is_refused() -> None:
    message = (
        "The loss was given as a Tensor, but a function that computes it is expected, since it is evaluated again and "
        "again: write lambda: loss_fn(model(inputs), targets)."
    )
    with pytest.raises(ObjectiveError, match="^" + re.escape(message) + "$"):
        Objective([torch.ones(())])  # type: ignore[list-item]


def test_sizes_are_the_weights_as_given_or_ones() -> None:
    closures = [lambda: torch.ones(())] * 2
    assert Objective(closures, [6, 2]).sizes == (6.0, 2.0)
    assert Objective(closures).sizes == (1.0, 1.0)


def test_closures_that_set_random_numbers_themselves_are_not_replayed() -> None:
    objective = Objective([lambda: torch.rand(())], self_seeding=True)
    torch.manual_seed(2)
    expected = [float(torch.rand(())) for _ in range(3)]
    torch.manual_seed(2)
    local = objective.local()
    assert [objective.value(), local.value(), local.value()] == pytest.approx(expected)


def test_local_keeps_the_weights() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    objective = Objective([lambda: (x**2).sum(), lambda: x.sum()], weights=[1, 3])
    assert objective.local().value() == pytest.approx((9 + 3 * 3) / 4)


@pytest.mark.parametrize("scale", [1e-20, 1.0, -1e20])
@pytest.mark.parametrize(("change", "repeatable"), [(0.0, True), (0.9e-4, True), (-0.9e-4, True), (1.1e-4, False)])
def test_values_repeat_if_they_differ_by_less_than_a_ten_thousandth(
    scale: float, change: float, repeatable: bool
) -> None:
    objective = Objective([lambda: torch.tensor(scale * (1 + change), dtype=torch.float64)])
    if repeatable:
        objective.require_repeatable(scale)
        return
    with pytest.raises(ObjectiveError, match="at the same parameters"):
        objective.require_repeatable(scale)


@pytest.mark.parametrize(("before", "now"), [(1.0, -1.0), (0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan)])
def test_values_that_do_not_repeat_are_refused(before: float, now: float) -> None:
    message = (
        f"The loss was {before:.8g} and then {now:.8g} at the same parameters, but it must be a fixed function within "
        "one step: draw the batch outside of it and leave the batch unchanged, draw random numbers from torch's, "
        "NumPy's or Python's global generators, which are replayed, and keep modules that update themselves in each "
        "forward pass (spectral_norm) in eval()."
    )
    with pytest.raises(ObjectiveError, match="^" + re.escape(message) + "$"):
        Objective([lambda: torch.tensor(now)]).require_repeatable(before)


def test_a_module_that_updates_itself_needs_eval() -> None:
    """As the message says."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(80, 80))  # too large for the first iterations to end
    x = torch.randn(3, 80)
    with pytest.raises(ObjectiveError, match=r"\(spectral_norm\) in eval\(\)"):
        SaddleFreeNewton(layer.parameters()).step(lambda: layer(x).square().mean())
    layer.eval()
    optimizer = SaddleFreeNewton(layer.parameters())
    assert [float(optimizer.step(lambda: layer(x).square().mean())) for _ in range(3)][-1] < 1e-2


def test_zero_repeats() -> None:
    Objective([lambda: torch.zeros(())]).require_repeatable(0.0)


# ------------------------------------------------------------------------------------------------ processes


class Second(Processes):
    """The second of two processes; the first one has nothing but zeros to add, and no failure."""

    def __init__(self) -> None:
        self.rank, self.size = 1, 2
        self._group = self._device = self._failure = self._first_bad = None
        self._contributions = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def scatter_sum(self, vector: Tensor) -> Tensor:
        return vector[len(vector) // 2 :]

    def collect(self, value: Any) -> list[Any]:
        return [(None, math.inf), value]


def shared() -> Objective:
    return Objective([lambda: torch.ones(())], reduce=ProcessMean(Second()))


def test_means_over_processes() -> None:
    vector, numbers = torch.tensor([2.0, 4.0, 6.0, 8.0]), torch.tensor([5.0])
    assert shared().reduce(vector).tolist() == [1, 2, 3, 4]
    assert shared().reduce_part(vector).tolist() == [3, 4]
    assert [each.tolist() for each in shared().reduce_with(vector, numbers)] == [[1, 2, 3, 4], [0]]
    assert shared().is_shared
    assert shared().processes is not None


def test_one_process_has_its_own_numbers_and_errors() -> None:
    objective = Objective([lambda: torch.ones(())])
    vector, numbers = torch.tensor([2.0, math.nan]), torch.tensor([5.0])
    assert objective.reduce(vector) is objective.reduce_part(vector) is vector
    assert all(a is b for a, b in zip(objective.reduce_with(vector, numbers), (vector, numbers), strict=True))
    objective.require_sound(vector)
    assert not objective.is_shared
    assert objective.processes is None
    with pytest.raises(KeyError):
        objective.guarded(lambda: {}[0], vector)
    assert objective.guarded(lambda: numbers, vector) is numbers


def test_a_failure_of_one_of_several_processes_shows_as_nan_and_is_raised_where_all_hear_of_it() -> None:
    objective, numbers = shared(), torch.tensor([5.0])
    assert objective.guarded(lambda: numbers, numbers) is numbers
    failed = objective.guarded(lambda: {}[0], torch.ones(2, 3))
    assert failed.shape == (2, 3)
    assert bool(failed.isnan().all())
    objective.require_sound(numbers)
    with pytest.raises(KeyError):
        objective.require_sound(failed)


@pytest.mark.parametrize("far", [False, True])
def test_a_number_that_is_not_finite_is_blamed_unless_it_comes_from_afar(far: bool) -> None:
    objective = shared()
    reduced = objective.reduce(torch.tensor([1.0, math.inf]))
    if far:
        objective.require_sound(reduced, far=True)
        return
    with pytest.raises(ContributionError, match="rank 1 of 2"):
        objective.require_sound(reduced)
