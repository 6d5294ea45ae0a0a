"""Turns of subspace and momentum steps, on losses that fall as the test says."""

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


def test_the_shortest_turns_are_one_subspace_step_and_forty_of_momentum() -> None:
    """The second subspace step after momentum is the turn, the first one the harvest."""
    kinds = walk(Pace(), {"subspace": 1.0, "momentum": 2.0}, 1 + 40 + 2 + 80 + 2 + 1)
    cycles = [["subspace"], ["momentum"] * 40, ["subspace"] * 2, ["momentum"] * 80, ["subspace"] * 2, ["momentum"]]
    assert kinds == [kind for turn in cycles for kind in turn]


@pytest.mark.parametrize("better", ["subspace", "momentum"])
def test_the_kind_that_achieves_more_for_its_price_gets_most_of_it(better: str) -> None:
    rates = {"subspace": 0.1, "momentum": 0.1} | {better: 10.0}
    pace = Pace()
    kinds = walk(pace, rates, 2000)
    assert pace.favourite == better
    spent = {kind: GRADIENTS[kind] * kinds.count(kind) for kind in GRADIENTS}
    assert spent[better] > 0.85 * sum(spent.values())


def test_the_turns_of_the_better_kind_double_up_to_a_limit() -> None:
    pace, lengths, loss = Pace(), [], 1e6
    for _ in range(1500):
        loss -= 8.0 if pace.observe(loss) == "momentum" else 4.0
        if not lengths or lengths[-1] != pace.lengths["momentum"]:
            lengths.append(pace.lengths["momentum"])
    assert lengths == [40.0, 80.0, 160.0, 320.0]
    assert pace.lengths["subspace"] == 4.0


def test_rates_are_decreases_for_each_gradient() -> None:
    """The first subspace step after momentum (price 4) counts as its own, after a turn of price 40."""
    pace = Pace()
    walk(pace, {"subspace": 3.0, "momentum": 2.0}, 1 + 40 + 1 + 1 + 1)
    assert pace.rates == {"subspace": pytest.approx(3.0), "momentum": pytest.approx((40 * 2.0 + 4 * 3.0) / 44)}


def test_an_oscillation_that_subspaces_end_is_not_held_against_momentum() -> None:
    """Momentum leaves the loss where it was; one subspace step then brings a fall of 44, and others nothing more."""
    pace = Pace()
    losses = [100.0] * (1 + 40 + 1) + [56.0] * 2
    for loss in losses:
        pace.observe(loss)
    assert pace.rates == {"subspace": 0.0, "momentum": 1.0}
    assert pace.favourite == "momentum"


def test_a_change_of_the_landscape_changes_the_favourite() -> None:
    pace = Pace()
    walk(pace, {"subspace": 10.0, "momentum": 0.1}, 300)
    assert pace.favourite == "subspace"
    walk(pace, {"subspace": 0.1, "momentum": 10.0}, 300)
    assert pace.favourite == "momentum"


def test_a_turn_that_leads_astray_ends_and_is_measured_by_what_it_cost() -> None:
    pace = Pace()
    while pace.observe(1.0) != "momentum":
        pass
    pace.observe(1.0)
    pace.end_momentum()
    assert pace.kind == "subspace"
    kinds = [pace.observe(1.0 - 0.5 * (step == 1)) for step in range(2)]
    assert kinds == ["subspace"] * 2
    assert pace.rates["momentum"] == pytest.approx(0.5 / (2 + 4))


def test_a_harvest_takes_one_subspace_step_after_momentum() -> None:
    pace, harvested = Pace(), []
    for _ in range(1 + 40 + 5):
        harvested.append(pace.has_harvested)
        pace.observe(1.0)
    assert [index for index, yes in enumerate(harvested) if yes] == [1 + 40 + 1]


def test_a_turn_of_subspaces_is_not_ended_by_momentum() -> None:
    pace = Pace()
    walk(pace, {"subspace": 1.0, "momentum": 1.0}, 1 + 40 + 1)
    before = pace.state_dict()
    pace.end_momentum()
    assert pace.kind == "subspace"
    assert pace.state_dict() == before


def test_a_restored_pace_goes_on_alike() -> None:
    rates = {"subspace": 1.0, "momentum": 1.3}
    pace, restored = Pace(), Pace()
    walk(pace, rates, 37)
    restored.load_state_dict(pace.state_dict())
    assert walk(pace, rates, 200) == walk(restored, rates, 200)
