"""Turns of subspace and momentum steps, on losses that fall as the test says."""

import math

import pytest

from lightning_sfn.newton.pace import Pace

GRADIENTS = {"subspace": 4.0, "momentum": 1.0}


def walk(pace: Pace, rates: dict[str, float], steps: int, loss: float = 1e6) -> list[str]:
    """The kinds of the steps, where each kind lowers the loss by so much for each gradient's price."""
    kinds = []
    for _ in range(steps):
        kind = pace.observe(loss)
        kinds.append(kind)
        loss -= rates[kind] * GRADIENTS[kind]
    return kinds


def test_a_subspace_comes_first_and_both_kinds_get_their_turn() -> None:
    kinds = walk(Pace(), {"subspace": 1.0, "momentum": 1.0}, 30)
    assert kinds[0] == "subspace"
    assert set(kinds) == {"subspace", "momentum"}


@pytest.mark.parametrize("better", ["subspace", "momentum"])
def test_the_kind_that_achieves_more_for_its_price_gets_most_of_it(better: str) -> None:
    rates = {"subspace": 0.1, "momentum": 0.1} | {better: 10.0}
    pace = Pace()
    kinds = walk(pace, rates, 2000)
    assert pace.favourite == better
    spent = {kind: GRADIENTS[kind] * kinds.count(kind) for kind in GRADIENTS}
    assert spent[better] > 0.85 * sum(spent.values())


def test_rates_are_decreases_for_each_gradient() -> None:
    pace = Pace()
    walk(pace, {"subspace": 3.0, "momentum": 2.0}, 100)
    assert pace.rates == {"subspace": pytest.approx(3.0), "momentum": pytest.approx(2.0)}


def test_a_change_of_the_landscape_changes_the_favourite() -> None:
    pace = Pace()
    walk(pace, {"subspace": 10.0, "momentum": 0.1}, 300)
    assert pace.favourite == "subspace"
    walk(pace, {"subspace": 0.1, "momentum": 10.0}, 300)
    assert pace.favourite == "momentum"


def test_a_turn_that_leads_astray_ends_and_counts_as_nothing() -> None:
    pace = Pace()
    while pace.observe(1.0) != "momentum":
        pass
    pace.fail()
    assert pace.kind == "subspace"
    assert pace.rates["momentum"] == -math.inf


def test_a_restored_pace_goes_on_alike() -> None:
    rates = {"subspace": 1.0, "momentum": 1.3}
    pace, restored = Pace(), Pace()
    walk(pace, rates, 37)
    restored.load_state_dict(pace.state_dict())
    assert walk(pace, rates, 200) == walk(restored, rates, 200)
