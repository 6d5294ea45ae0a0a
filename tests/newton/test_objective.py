import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfn.newton import Objective, ObjectiveError
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
    with pytest.raises(ObjectiveError, match="at least one closure"):
        Objective([])
