"""How an epoch is shared out over windows: by hand, and for every length, budget and accumulation."""

import math
from itertools import product

import pytest

from lightning_sfn.trainer.budgets import DataBudgets

EPOCH = DataBudgets()


def windows(budgets: DataBudgets, epoch: int, accumulated: int, announced: float) -> list[int]:
    """The sizes that a loop over an epoch comes to, which looks after each accumulation."""
    sizes, offered = [], 0
    for seen in range(1, epoch + 1):
        offered += 1
        if seen % accumulated and seen < epoch:
            continue
        if seen == epoch or offered >= budgets.target(announced - (seen - offered), accumulated):
            sizes.append(offered)
            offered = 0
    return sizes


@pytest.mark.parametrize(("epoch", "accumulated"), list(product([1, 5, 41], [1, 4])))
def test_an_epoch_is_one_window_by_default(epoch: int, accumulated: int) -> None:
    for announced in (epoch, epoch + 10, math.inf):
        assert windows(EPOCH, epoch, accumulated, announced) == [epoch]
    assert EPOCH.is_whole(epoch, epoch)
    assert EPOCH.is_enough(epoch, math.inf)
    assert not EPOCH.is_whole(epoch - 1, epoch)


@pytest.mark.parametrize("accumulated", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 40])
def test_windows_are_even_and_no_larger_than_asked_for(budget: int, accumulated: int) -> None:
    budgets = DataBudgets(gradient_batches=budget)
    for epoch in range(1, 90):
        sizes = windows(budgets, epoch, accumulated, epoch)
        assert sum(sizes) == epoch
        assert max(sizes) <= max(budget, accumulated)
        assert max(sizes) - min(sizes) <= 2 * accumulated - 1 if accumulated > 1 else max(sizes) - min(sizes) <= 1
        assert len(sizes) == budgets.windows(epoch, accumulated)
        assert accumulated > 1 or all(budgets.is_whole(size, epoch) for size in sizes)
        assert all(budgets.is_enough(size, epoch, accumulated) for size in sizes)
        assert any(budgets.is_whole(size, epoch, accumulated) for size in sizes)


@pytest.mark.parametrize(
    ("count", "epoch", "enough", "whole"),
    [
        (1, 41, False, False),  # two windows of 20.5
        (10, 41, False, False),
        (11, 41, True, False),
        (20, 41, True, True),
        (21, 41, True, True),
        (5, 10, True, False),  # a short epoch is a window
        (4, 10, False, False),
        (10, 10, True, True),
        (19, math.inf, False, False),
        (20, math.inf, True, False),
        (40, math.inf, True, True),
    ],
)
def test_half_of_a_window_is_enough(count: int, epoch: float, enough: bool, whole: bool) -> None:
    budgets = DataBudgets(gradient_batches=40)
    assert budgets.is_enough(count, epoch) == enough
    assert budgets.is_whole(count, epoch) == whole


def test_accumulations_stay_together() -> None:
    assert windows(DataBudgets(gradient_batches=3), 6, 2, 6) == [2, 2, 2]
    assert windows(DataBudgets(gradient_batches=3), 7, 2, 7) == [2, 2, 2, 1]
    assert windows(DataBudgets(gradient_batches=5), 20, 4, 20) == 5 * [4]
    assert windows(DataBudgets(gradient_batches=9), 20, 4, 20) == [8, 8, 4]
