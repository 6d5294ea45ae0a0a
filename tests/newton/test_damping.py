import itertools
import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch

from lightning_sfn.newton import (
    FixedDamping,
    GridDamping,
    LevenbergMarquardt,
    SaddleFreeNewton,
    WarmDamping,
)
from lightning_sfn.newton.damping import Damping, make_damping

from .cases import bits


class Trials:
    """Trial losses by a function of the damping, beside a model that promises anything; notes what was asked."""

    def __init__(self, loss: Callable[[float], float], promise: Callable[[float], float] = lambda d: math.inf) -> None:
        self.loss, self.promise, self.calls = loss, promise, list[list[float]]()

    def __call__(self, dampings: Sequence[float]) -> list[float]:
        self.calls.append(list(dampings))
        return [self.loss(d) for d in dampings]

    def predicted(self, dampings: Sequence[float]) -> list[float]:
        return [self.promise(d) for d in dampings]

    @property
    def all(self) -> list[float]:
        return [d for call in self.calls for d in call]


def well(centre: float, depth: float = 1.0) -> Callable[[float], float]:
    """Lowest at a damping, one unit lower than far away."""
    return lambda d: 1.0 - depth / (1 + math.log(d / centre) ** 2)


def test_grid_takes_the_lowest_loss_and_asks_once() -> None:
    trials = Trials(well(2e-3))
    strategy = GridDamping()
    choice = strategy.choose(trials, scale=123.0, baseline=1.0)
    assert trials.calls == [[1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]]
    assert choice.damping == strategy.value == 1e-3
    assert choice.loss == min(trials.loss(d) for d in trials.all)
    assert choice.trials == 6


def test_grid_values_can_be_chosen() -> None:
    assert GridDamping([5, 7]).choose(Trials(lambda d: -d), scale=1.0, baseline=0.0).damping == 7.0


def test_fixed_tries_its_value_alone() -> None:
    trials = Trials(well(1.0))
    choice = FixedDamping(0.3).choose(trials, scale=123.0, baseline=1.0)
    assert trials.calls == [[0.3]]
    assert (choice.damping, choice.trials) == (0.3, 1)


def test_warm_begins_at_a_hundredth_and_looks_on_both_sides() -> None:
    trials = Trials(well(0.05))
    strategy = WarmDamping()
    choice = strategy.choose(trials, scale=5.0, baseline=1.0)
    assert trials.all == pytest.approx([0.05, 0.0125, 0.2])
    assert choice.damping == strategy.value == pytest.approx(0.05)


@pytest.mark.parametrize("centre", [1e-6, 3.0])
def test_warm_follows_the_improvement(centre: float) -> None:
    strategy = WarmDamping()
    for _ in range(12):
        trials = Trials(well(centre))
        choice = strategy.choose(trials, scale=1.0, baseline=1.0)
        assert choice.loss == min(trials.loss(d) for d in trials.all)
        assert choice.trials == len(trials.all)
    assert centre / 4 <= choice.damping <= centre * 4


def test_warm_goes_on_from_the_last_value() -> None:
    strategy = WarmDamping()
    strategy.value = 0.4
    trials = Trials(well(0.4))
    strategy.choose(trials, scale=1.0, baseline=1.0)
    assert trials.all == pytest.approx([0.4, 0.1, 1.6])


@pytest.mark.parametrize(
    ("losses", "asked"),
    [
        ({0.0025: 0.5, 0.000625: 0.2, 0.00015625: 0.1999, 0.04: 0.9}, [0.0025, 0.000625, 0.00015625, 0.04]),
        ({0.0025: 0.9, 0.04: 0.5, 0.16: 0.4751}, [0.0025, 0.04, 0.16]),  # under a twentieth more
        ({0.0025: 0.9, 0.04: 0.5, 0.16: 0.4749, 0.64: 0.9}, [0.0025, 0.04, 0.16, 0.64]),  # over a twentieth
        ({0.0025: 0.9, 0.04: 0.5, 0.16: 0.7}, [0.0025, 0.04, 0.16]),
        ({0.01: 0.5, 0.0025: 0.9, 0.04: 0.9}, [0.0025, 0.04]),
        ({0.01: 0.5, 0.0025: 0.4751, 0.04: 0.9}, [0.0025, 0.04]),
        ({0.01: 0.5, 0.0025: 0.4749, 0.000625: 0.4, 0.04: 0.9}, [0.0025, 0.000625, 0.00015625, 0.04]),
        ({0.01: 1.5, 0.0025: 0.5, 0.04: 1.5}, [0.0025, 0.000625, 0.04]),
        ({0.01: 1.5, 0.0025: 1.5, 0.04: 1.5, 0.32: 0.9985, 2.56: 0.5}, [0.0025, 0.04, 0.32]),
    ],
    ids=[
        "down",
        "too little",
        "enough",
        "worse",
        "middle",
        "neighbour: too little",
        "neighbour: enough",
        "neighbour alone",
        "rescued",
    ],
)
def test_warm_follows_by_factors_of_four_while_the_decrease_grows_by_a_twentieth(
    losses: dict[float, float], asked: list[float]
) -> None:
    losses = {0.01: 0.9} | losses
    trials = Trials(lambda d: next((loss for known, loss in losses.items() if math.isclose(d, known)), 0.999))
    strategy = WarmDamping()
    choice = strategy.choose(trials, scale=1.0, baseline=1.0)
    assert trials.all == pytest.approx([0.01, *asked])
    best = min(trials.all, key=trials.loss)
    assert (choice.damping, choice.loss, choice.trials) == (best, trials.loss(best), 1 + len(asked))
    assert strategy.value == max(d for d in trials.all if 1.0 - trials.loss(d) >= 0.98 * (1.0 - choice.loss))


@pytest.mark.parametrize(
    ("promised", "tried"),
    [
        ({0.01: 0.5, 0.0025: 0.524, 0.04: 0.4}, []),  # no more than a twentieth above what was found
        ({0.01: 0.5, 0.0025: 0.526, 0.04: 0.4}, [0.0025]),
        ({0.01: 0.2, 0.0025: 0.209, 0.04: 0.1}, []),  # it promises too little everywhere
        ({0.01: 0.2, 0.0025: 0.211, 0.04: 0.1}, [0.0025]),
        ({0.01: 0.9, 0.0025: 0.95, 0.04: 0.53}, [0.0025, 0.04]),  # it has promised too much, and may do so for less
        ({0.01: 0.9, 0.0025: 0.95, 0.04: 0.52}, [0.0025]),
    ],
    ids=["no more", "more", "modest: no more", "modest: more", "boastful", "boastful: no more"],
)
def test_warm_pays_for_a_trial_only_where_the_model_promises_a_twentieth_more(
    promised: dict[float, float], tried: list[float]
) -> None:
    """Each damping halves the loss of one; the neighbours are told apart by what the model says of them alone."""
    trials = Trials(lambda d: 0.5, lambda d: next(gain for known, gain in promised.items() if math.isclose(d, known)))
    choice = WarmDamping().choose(trials, scale=1.0, baseline=1.0)
    assert trials.all == pytest.approx([0.01, *tried])
    assert (choice.loss, choice.trials) == (0.5, 1 + len(tried))


def test_warm_asks_the_model_again_before_each_further_trial() -> None:
    """Each fourth of the damping doubles the decrease; below a thousandth the model promises no more than there."""
    trials = Trials(lambda d: 1.0 - 1e-4 / d, lambda d: 1e-4 / max(d, 1e-3))
    WarmDamping().choose(trials, scale=1.0, baseline=1.0)
    assert trials.all == pytest.approx([0.01, 0.0025, 0.000625])


def test_warm_looks_on_the_side_of_the_last_move_and_then_on_the_other() -> None:
    strategy = WarmDamping()
    trials = Trials(well(0.04))
    for _ in range(5):
        strategy.choose(trials, scale=1.0, baseline=1.0)
    # both sides of 0.01, then above 0.04, below, above
    assert trials.all == pytest.approx([0.01, 0.0025, 0.04, 0.16, 0.04, 0.16, 0.04, 0.01, 0.04, 0.16, 0.04, 0.01])


def test_warm_does_not_drift_down_where_dampings_differ_by_nothing() -> None:
    """Below all eigenvalues a smaller damping is better in the last digits only."""
    strategy = WarmDamping()
    for _ in range(20):
        choice = strategy.choose(Trials(lambda d: 0.5 + 1e-6 * d), scale=1.0, baseline=1.0)
    assert choice.loss == min(0.5 + 1e-6 * d for d in (strategy.value, choice.damping) if d is not None)
    assert strategy.value is not None
    assert strategy.value >= 1e-2


@pytest.mark.parametrize(("share", "larger"), [(0.981, True), (0.979, False)])
def test_warm_remembers_more_damping_that_is_as_good_and_takes_the_best_step(share: float, larger: bool) -> None:
    strategy = WarmDamping()
    losses = {0.01: 1.0 - share, 0.0025: 0.0, 0.000625: 0.9, 0.04: 2.0}
    trials = Trials(lambda d: next(loss for known, loss in losses.items() if math.isclose(d, known)))
    choice = strategy.choose(trials, scale=1.0, baseline=1.0)
    assert (choice.damping, choice.loss) == (0.0025, 0.0)
    assert strategy.value == (0.01 if larger else 0.0025)


@pytest.mark.parametrize(
    ("side", "decreases", "value", "after"),
    [
        (0, {4.0: 0.5, 16.0: 1.0}, 16.0, 1),
        (-1, {4.0: 0.5, 16.0: 1.0}, 16.0, 1),
        (1, {4.0: 0.5, 1.0: 1.0}, 1.0, -1),
        (0, {4.0: 1.0, 16.0: 0.5, 1.0: 0.5}, 4.0, -1),
        (1, {4.0: 1.0, 16.0: 0.5}, 4.0, -1),
        (-1, {4.0: 1.0, 1.0: 0.5}, 4.0, 1),
        (1, {4.0: 1.0, 16.0: 0.98}, 16.0, 1),  # as good as the best
        (1, {4.0: 1.0, 16.0: 0.979}, 4.0, -1),
        (1, {4.0: 0.0, 16.0: -1.0}, 100.0, 0),
        (1, {4.0: 0.0, 16.0: 0.0}, 100.0, 0),
        (-1, {4.0: -2.0, 16.0: -1.0}, 100.0, 0),
    ],
)
def test_warm_goes_on_where_it_ended_and_looks_where_it_moved_to(
    side: int, decreases: dict[float, float], value: float, after: int
) -> None:
    """From 4; 100 is the largest value."""
    damping = WarmDamping()
    damping.load_state_dict({"value": 4.0, "side": side})
    damping._settle(decreases, 4.0, 100.0)
    assert damping.state_dict() == {"value": value, "side": after}


def test_warm_looks_on_both_sides_of_a_value_that_another_strategy_saved() -> None:
    damping = WarmDamping()
    damping.load_state_dict({"value": 4.0})
    assert damping.state_dict() == {"value": 4.0, "side": 0}


def test_warm_looks_on_both_sides_after_nothing_improved() -> None:
    strategy = WarmDamping()
    strategy.choose(Trials(well(0.04)), scale=1.0, baseline=1.0)
    strategy.choose(Trials(lambda d: 2.0), scale=1.0, baseline=1.0)
    trials = Trials(well(0.04))
    strategy.choose(trials, scale=4.0, baseline=1.0)
    assert trials.all[:2] == pytest.approx([10.0, 2.5])
    assert 40.0 in trials.all


def test_a_restored_search_goes_on_as_the_saved_one() -> None:
    saved, restored = WarmDamping(), WarmDamping()
    saved.choose(Trials(well(0.04)), scale=1.0, baseline=1.0)
    restored.load_state_dict(saved.state_dict())
    calls = []
    for strategy in (saved, restored):
        trials = Trials(well(0.04))
        strategy.choose(trials, scale=1.0, baseline=1.0)
        calls.append(trials.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("saved", ["warm", "grid", "levenberg_marquardt", 0.3])
@pytest.mark.parametrize("other", ["warm", "grid", "levenberg_marquardt"])
def test_a_strategy_goes_on_from_the_damping_of_another(saved: str | float, other: str) -> None:
    def optimizer(damping: str | float) -> SaddleFreeNewton:
        return SaddleFreeNewton([x], damping=damping, preconditioner=None, inner_steps=1)

    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    before, after = optimizer(saved), optimizer(other)
    before.step(lambda: (x**4).sum())
    after.load_state_dict(before.state_dict())
    assert after.damping.value == before.damping.value is not None
    after.step(lambda: (x**4).sum())
    assert after.last_step is not None
    assert after.last_step.accepted


@pytest.mark.parametrize("saved", ["warm", "grid", "levenberg_marquardt", 0.3])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_fixed_damping_is_an_option_and_stays_what_it_is(saved: str | float, steps: int) -> None:
    """Whichever strategy wrote the state, and whether or not it had taken a step."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    before, after = (SaddleFreeNewton([x], damping=damping, preconditioner=None) for damping in (saved, 0.7))
    for _ in range(steps):
        before.step(lambda: (x**4).sum())
    after.load_state_dict(before.state_dict())
    assert after.damping.value == 0.7
    after.step(lambda: (x**4).sum())
    assert after.last_step is not None
    assert after.last_step.damping == 0.7


def test_warm_asks_no_further_at_its_bounds() -> None:
    for start, trend in ((1e-9, 1.0), (10.0, -1.0)):
        strategy = WarmDamping()
        strategy.value = start
        trials = Trials(lambda d, trend=trend: trend * math.log(d) - 100)  # type: ignore[misc]
        assert strategy.choose(trials, scale=1.0, baseline=1.0).damping == start
        assert trials.all == pytest.approx([start, 4 * start if trend > 0 else start / 4])


@pytest.mark.parametrize(("start", "side", "bound"), [(2e-9, -1, 1e-9), (5.0, 1, 10.0)])
def test_warm_asks_no_further_where_the_neighbour_is_a_bound(start: float, side: int, bound: float) -> None:
    strategy, trials = WarmDamping(), Trials(lambda d: abs(math.log(d / bound)) / 100)
    strategy.load_state_dict({"value": start, "side": side})
    assert strategy.choose(trials, scale=1.0, baseline=1.0).damping == bound
    assert trials.all == [start, bound]


def test_warm_rescues_by_factors_of_eight_up_to_its_bound() -> None:
    """A loss that only equals the baseline is no improvement."""
    trials = Trials(lambda d: 1.0)
    strategy = WarmDamping()
    choice = strategy.choose(trials, scale=1.0, baseline=1.0)
    assert trials.all == pytest.approx([0.01, 0.0025, 0.04, 0.32, 2.56, 10.0])
    assert choice.trials == 6
    assert strategy.value == 10.0


def test_warm_goes_up_until_a_loss_improves() -> None:
    trials = Trials(lambda d: 0.5 if d > 3.0 else 2.0)
    strategy = WarmDamping()
    choice = strategy.choose(trials, scale=1.0, baseline=1.0)
    assert choice.loss == 0.5
    assert strategy.value == choice.damping > 3.0
    assert [d for d in trials.all if d > 3.0] == [choice.damping]  # the first that improves is enough


def test_warm_starts_the_next_step_at_the_top_when_nothing_improves() -> None:
    strategy = WarmDamping()
    strategy.choose(Trials(lambda d: 2.0), scale=1.0, baseline=1.0)
    assert strategy.value == 10.0


@pytest.mark.parametrize(
    "loss",
    [lambda d: -d, lambda d: d - 1e9, lambda d: -math.log(d), lambda d: math.log(d) - 100, lambda d: 2.0],
    ids=["up", "down", "log_up", "log_down", "none"],
)
def test_warm_never_leaves_its_bounds(loss: Callable[[float], float]) -> None:
    for scale, start in itertools.product((1.0, 1e-3, 1e5), (None, 1e-30, 1e-9, 3e-9, 0.3, 1.25, 3.0, 10.0, 1e30)):
        strategy = WarmDamping()
        strategy.value = None if start is None else start * scale
        trials = Trials(loss)
        strategy.choose(trials, scale=scale, baseline=1.0)
        assert strategy.value is not None
        for value in (*trials.all, strategy.value):
            assert value / scale * (1 + 1e-12) >= 1e-9, (scale, start)
            assert value / scale <= 10 * (1 + 1e-12), (scale, start)


@pytest.mark.parametrize(
    ("accepted", "ratio", "factor"),
    [(True, 0.9, 2 / 3), (True, 0.5, 1.0), (True, 0.1, 1.5), (True, -1.0, 1.5), (False, 0.9, 4.0), (False, 0.0, 4.0)],
)
def test_levenberg_marquardt_follows_the_ratio(accepted: bool, ratio: float, factor: float) -> None:
    strategy = LevenbergMarquardt()
    trials = Trials(well(1.0))
    assert strategy.choose(trials, scale=20.0, baseline=1.0).damping == pytest.approx(0.2)
    strategy.feedback(accepted=accepted, reduction_ratio=ratio)
    assert strategy.choose(trials, scale=99.0, baseline=1.0).damping == pytest.approx(0.2 * factor)
    assert [len(call) for call in trials.calls] == [1, 1]


@pytest.mark.parametrize(("scale", "start", "used"), [(1e-3, 1e-30, 1e-12), (1e-3, 1e30, 1e-2), (50.0, 1.0, 1.0)])
def test_levenberg_marquardt_stays_within_its_bounds(scale: float, start: float, used: float) -> None:
    strategy = LevenbergMarquardt()
    strategy.value = start
    choice = strategy.choose(Trials(well(1.0)), scale=scale, baseline=1.0)
    assert (choice.damping, strategy.value, choice.trials) == (pytest.approx(used), pytest.approx(used), 1)


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_levenberg_marquardt_keeps_the_damping_at_martens_bounds(ratio: float) -> None:
    strategy = LevenbergMarquardt()
    strategy.value = 1.0
    strategy.feedback(accepted=True, reduction_ratio=ratio)
    assert strategy.value == 1.0


@pytest.mark.parametrize("strategy", ["warm", "grid"])
@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_losses_that_are_not_finite_never_win(strategy: str, bad: float) -> None:
    """Small dampings jump to where the loss is not finite: to the far side of x = -0.5, from x = 1 with curvature 2."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    seen = []

    def closure() -> torch.Tensor:
        loss = (x**2).sum() if float(x.detach()) > 0.2 else (x**2).sum() * 0 + bad
        seen.append(float(loss.detach()))
        return loss

    optimizer = SaddleFreeNewton([x], damping=strategy, preconditioner=None, inner_steps=1)
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert any(not math.isfinite(value) for value in seen)  # such losses were met
    assert optimizer.last_step.accepted
    assert 0.2 < float(x.detach()) < 1.0
    assert optimizer.last_step.loss_after == pytest.approx(float(x.detach()) ** 2)


@pytest.mark.parametrize("strategy", ["warm", "grid", "levenberg_marquardt", 1e-3])
def test_no_step_is_taken_where_every_trial_loss_is_not_finite(strategy: str | float) -> None:
    x = torch.tensor([1.0], requires_grad=True)
    before = bits([x])
    optimizer = SaddleFreeNewton([x], damping=strategy, inner_steps=3)
    optimizer.step(lambda: (x**2).sum() if float(x.detach()) == 1.0 else x.sum() * math.nan)
    assert optimizer.last_step is not None
    assert not optimizer.last_step.accepted
    assert bits([x]) == before


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, math.inf])
def test_dampings_that_are_not_positive_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^damping is {value}, but a positive number is expected\.$"):
        make_damping(value)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0], [math.nan]])
def test_grids_that_are_not_positive_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"damping grid is .*at least one positive number"):
        GridDamping(values)


def test_names_numbers_and_strategies_are_understood() -> None:
    own = GridDamping([1.0])
    made = [make_damping(d) for d in ("warm", "grid", "levenberg_marquardt", 2, own)]
    assert [type(d) for d in made] == [WarmDamping, GridDamping, LevenbergMarquardt, FixedDamping, GridDamping]
    assert made[-1] is own
    assert all(isinstance(d, Damping) for d in made)


@pytest.mark.parametrize("damping", ["hot", True, None, [1.0]])
def test_what_is_neither_name_nor_number_is_refused(damping: object) -> None:
    sentence = re.escape(f"damping is {damping!r}, but one of 'grid', 'warm', 'levenberg_marquardt' or a positive ")
    with pytest.raises(ValueError, match=rf"^{sentence}number is expected\.$"):
        make_damping(damping)  # type: ignore[arg-type]
