"""Pieces: whatever interrupts them, parameters and results file are those of one uninterrupted run."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from paper_scale.arms import Arms
from paper_scale.full_batch import FullBatchLBFGS
from paper_scale.newton import Newton
from paper_scale.pieces import Piece
from paper_scale.results import Results, Row, read
from paper_scale.settings import METHODS
from paper_scale.task import Task


def ticking() -> Callable[[], float]:
    """A clock that is a second later whenever it is asked: no test depends on the time."""
    ticks = count()
    return lambda: float(next(ticks))


def go_on(task: Task, folder: Path, *, steps: int | None = None, methods: tuple[str, ...] = METHODS) -> bool:
    results = Results(folder / "results.jsonl", task.settings, "cpu")
    return Arms(task, results, methods).run(Piece(task, results, folder, seconds=1e9, clock=ticking(), steps=steps))


def rows_of(folder: Path, *methods: str) -> list[Row]:
    return [row for row in read(folder / "results.jsonl")[1] if not methods or row["arm"] in methods]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert go_on(task, folder)
    return folder


def test_single_steps_end_where_one_piece_does(task: Task, uninterrupted: Path, tmp_path: Path) -> None:
    for _ in range(200):
        if go_on(task, tmp_path, steps=1):
            break
    else:
        pytest.fail("200 pieces of one step were not enough")
    assert rows_of(tmp_path) == rows_of(uninterrupted)
    for method in METHODS:
        ours, theirs = (torch.load(folder / f"{method}.pt", weights_only=True) for folder in (tmp_path, uninterrupted))
        assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
        assert ours["method"]["counts"] == theirs["method"]["counts"]


def test_every_method_learns_and_counts(uninterrupted: Path) -> None:
    for method in METHODS:
        rows = rows_of(uninterrupted, method)
        assert rows[-1]["last"]
        assert rows[-1]["train_error"] < rows[0]["train_error"], method
        assert rows[-1]["updates"] > 0
        assert rows[-1]["gradients"] > 0
        assert (rows[-1]["products"] > 0) == method.startswith("sfn")
    assert [row["products"] for row in rows_of(uninterrupted, "sfn_paper")] == [0, 6, 13, 20]


def test_first_order_does_its_plan_and_newton_its_seconds(uninterrupted: Path, task: Task) -> None:
    for name in ("adam", "nesterov", "momentum"):
        assert rows_of(uninterrupted, name)[-1]["updates"] == task.settings.updates
    start = rows_of(uninterrupted, "start")[-1]
    for name in ("sfn", "sfn_paper"):
        rows = rows_of(uninterrupted, name)
        assert rows[0]["seconds"] == start["seconds"]
        assert rows[0]["train_error"] == start["train_error"]
        assert rows[-1]["seconds"] >= task.settings.seconds
    assert rows_of(uninterrupted, "lbfgs")[0]["train_error"] == rows_of(uninterrupted, "adam")[0]["train_error"]


def test_the_best_rate_of_the_search_is_used(uninterrupted: Path, task: Task) -> None:
    searched = [rows_of(uninterrupted, f"search/adam/rate={rate:g}")[-1] for rate in task.settings.adam_rates]
    assert searched[0]["train_error"] < searched[1]["train_error"]
    # One setting, as many updates: the search is the run itself.
    assert rows_of(uninterrupted, "adam")[-1]["train_error"] == searched[0]["train_error"]


@pytest.mark.parametrize(("method", "kind"), [("sfn", Newton), ("lbfgs", FullBatchLBFGS)])
def test_a_killed_piece_goes_on_from_its_last_checkpoint(
    task: Task, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: type
) -> None:
    whole = kind.advance
    calls = count(1)

    def killed(self: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        whole(self)

    monkeypatch.setattr(kind, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on(task, tmp_path, methods=(method,))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"arm": "sf')  # a line that was being written
    assert go_on(task, tmp_path, methods=(method,))
    assert rows_of(tmp_path, method) == rows_of(uninterrupted, method)


def test_time_that_is_up_stops_before_the_next_step(task: Task, tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl", task.settings, "cpu")
    piece = Piece(task, results, tmp_path, seconds=40, clock=(clock := ticking()))
    assert not Arms(task, results, ("sfn",)).run(piece)
    assert clock() < 45
    assert not any(row["arm"] == "sfn" and row["last"] for row in results.rows if "last" in row)


def test_a_finished_run_does_nothing_more(task: Task, uninterrupted: Path) -> None:
    before = (uninterrupted / "results.jsonl").read_text()
    assert go_on(task, uninterrupted)
    assert (uninterrupted / "results.jsonl").read_text() == before
