"""Who won, on results made up by hand."""

import math

import pytest
from suite.standings import standings


def runs(losses: dict[str, list[float | None]], start: float = 4.0) -> list[dict[str, object]]:
    return [
        {"task": "a", "method": method, "seed": seed, "start": start, "final": final}
        for method, finals in losses.items()
        for seed, final in enumerate(finals)
    ]


def test_an_escape_is_judged_by_the_loss_that_adam_leaves() -> None:
    (row,) = standings(runs({"adam": [1.0, 2.0, 3.0], "kfac": [3.0] * 3, "ours": [0.5, 0.9, 5.0]}), {"a": "escape"})
    assert row.against("ours") == ("adam", pytest.approx(0.45))
    assert row.against_kfac("ours") == pytest.approx(3.1)
    assert row.reached("ours") == (True, True)
    assert row.reached("adam") == (False, True)


def test_a_decrease_is_judged_by_the_best_of_the_simple_rivals() -> None:
    finals = {"sgd": [3.9], "adam": [3.5], "lbfgs": [3.6], "kfac": [2.5], "ours": [2.4]}
    (row,) = standings(runs(finals), {"a": "last mile"})
    assert row.against("ours") == ("adam", pytest.approx(3.2))
    assert row.against_kfac("ours") == pytest.approx(1.6 / 1.5)
    assert row.reached("ours") == (True, False)


def test_divergence_is_the_worst_and_a_rival_without_progress_is_beaten() -> None:
    (row,) = standings(runs({"sgd": [None], "kfac": [4.1], "ours": [3.0]}), {"a": "recurrent"})
    assert row.median("sgd") == math.inf
    assert row.against("ours") == ("sgd", math.inf)
    assert row.reached("ours") == (True, True)


def test_only_seeds_that_all_methods_have_run_are_compared() -> None:
    (row,) = standings(runs({"adam": [1.0, 2.0], "ours": [0.5]}), {"a": "escape", "b": "escape"})
    assert row.losses == {"adam": [1.0], "ours": [0.5]}
