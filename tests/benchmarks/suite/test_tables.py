"""Tables of the race, on results made up by hand."""

from typing import Any

import pytest
import tables


def run(method: str, final: float, *, seconds: float = 5.0, date: str = "2026-01-01", **more: Any) -> dict[str, Any]:
    made = {"task": "mnist escape", "method": method, "seed": 0, "seconds": seconds, "settings": {}, "start": 4.0}
    return made | {"final": final, "date": date, "processor": "A"} | more


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    runs = [
        run("adam", 3.0, seconds=12.0, date="2025-01-01", settings={"lr": 0.5}),
        run("sgd", 3.5, settings={"lr": 0.3}),
        run("adam", 2.0, settings={"lr": 0.1}),
        run("lbfgs", 3.0),
        run("kfac", 1.5),
        run("turns", 1.0),
        run("turns", 0.1, seconds=12.0, date="2025-01-01"),
        run("adam", 0.2, seconds=12.0, date="2025-01-01", settings={"lr": 0.7}),
    ]
    conditions = {"cores": 1, "threads": 1, "torch": "2", "processor": "A"}
    monkeypatch.setattr(tables, "_load", lambda _: {"conditions": conditions, "runs": runs})
    return runs


def test_all_tables_of_a_race_speak_of_its_one_budget(results: list[dict[str, Any]]) -> None:
    table = tables.race(tuning=True)
    assert "after 5 s" in table
    assert "2025" not in table
    assert "**1**" in table
    assert tables.searched().count("lr 0.1") == 1
    assert "0.7" not in tables.searched()


def test_the_lowest_loss_is_bold_and_the_targets_compare_with_adam_and_kfac(results: list[dict[str, Any]]) -> None:
    assert "| mnist escape | loss / Adam's | 0.50 | <= 0.5 | yes | 1.20 | yes |" in tables.targets(tuning=True)
    for made in results:  # the winners swapped
        made["final"] = {"turns": 2.0, "adam": 1.0}.get(made["method"], made["final"])
    assert "| mnist escape | loss / Adam's | 2.00 | <= 0.5 | no | 0.80 | no |" in tables.targets(tuning=True)
    assert "| 3.5 | **1** | 3 | 1.5 | 2 |" in tables.race(tuning=True)
