"""The race end to end on tiny tasks: searched, measured, resumed, and its clock."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import race
import torch
from suite import methods
from suite.tasks import TASKS, Problem


def test_a_race_runs_is_resumed_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = race.Course(0.02, tmp_path, tmp_path, tmp_path)
    names, runners = ["mnist escape", "shakespeare tanh"], ["adam", "lbfgs"]
    assert race.race(course, names, runners[:1], 1, tiny=True) == 0
    assert race.race(course, names, runners, 2, tiny=True) == 0
    runs = course.load("race")
    assert len({race._key(run) for run in runs}) == len(runs) == 8
    searched = course.load("race_search")
    assert len(searched) == 2 * len(methods.SEARCHED["adam"])
    for run in runs:
        assert run["curve"][0] == [0.0, run["start"]]
    chosen = {run["task"]: run["settings"] for run in runs if run["method"] == "adam"}
    for name in names:
        best = min((r for r in searched if r["task"] == name), key=lambda r: r["final"])
        assert chosen[name] == best["settings"]
    monkeypatch.setattr(race, "measure", lambda *_: pytest.fail("a finished run was repeated"))
    race.race(course, names, runners, 2, tiny=True)


def test_an_unfinished_write_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = race.Course(0.02, tmp_path, tmp_path, tmp_path)
    course.append("race", {"task": "a"})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        course.append("race", {"task": "b"})
    assert [run["task"] for run in course.load("race")] == ["a"]


def test_races_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    course = race.Course(0.02, tmp_path, tmp_path, tmp_path)

    def append(first: int) -> None:  # a lock holds for every opening of a folder, in one process as in two
        for seed in range(first, first + 20):
            course.append("race", {"seed": seed})

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(append, (0, 20)))
    assert sorted(run["seed"] for run in course.load("race")) == list(range(40))
    assert not list(tmp_path.glob("*.new"))


def test_a_search_of_other_seconds_is_not_taken_for_this_one(tmp_path: Path) -> None:
    task, one = TASKS["mnist escape"].tiny(), len(methods.SEARCHED["hessian_free"])
    for seconds, expected in ((0.02, one), (0.02, one), (0.05, 2 * one)):
        course = race.Course(seconds, tmp_path, tmp_path, tmp_path)
        race.search(course, task, "hessian_free")
        assert len(course.load("race_search")) == expected


def test_a_file_that_a_method_lacks_is_no_missing_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(_: Problem) -> Iterator[None]:
        raise FileNotFoundError("a file of its own")
        yield

    monkeypatch.setitem(methods.METHODS, "lacking", lacking)
    with pytest.raises(FileNotFoundError, match="of its own"):
        race.race(race.Course(0.02, tmp_path, tmp_path, tmp_path), ["mnist escape"], ["lacking"], 1, tiny=True)


def test_a_step_that_ends_too_late_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.process_time", lambda: clock[0])

    def slow(problem: Problem) -> Iterator[None]:
        for _ in range(10):
            with torch.no_grad():
                problem.model[0].weight.add_(1.0)
            clock[0] += 0.4
            yield

    monkeypatch.setitem(methods.METHODS, "slow", slow)
    task = TASKS["mnist escape"].tiny()
    start = task.start(0, tmp_path, tmp_path)
    run = race.measure(race.Course(1.0, tmp_path, tmp_path, tmp_path), task, "slow", 0, {}, 1.0)
    with torch.no_grad():
        start.model[0].weight.add_(2.0)
    assert run["steps"] == 2
    assert run["final"] == pytest.approx(float(start.loss().detach()))


def test_a_method_that_diverges_is_recorded_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(problem: Problem) -> Iterator[None]:
        with torch.no_grad():
            problem.model[0].weight.fill_(torch.nan)
        yield
        raise FloatingPointError("gone")

    monkeypatch.setitem(methods.METHODS, "diverging", diverging)
    course = race.Course(0.02, tmp_path, tmp_path, tmp_path)
    race.race(course, ["mnist escape"], ["diverging"], 1, tiny=True)
    (run,) = json.loads((tmp_path / "race.json").read_text())["runs"]
    assert run["final"] is None
    assert run["error"] == "gone"


def test_tasks_without_data_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    course = race.Course(0.02, tmp_path, tmp_path, tmp_path)
    assert race.race(course, ["cifar escape"], ["lbfgs"], 1) == 1
    assert "cifar escape was left out" in capsys.readouterr().err


def test_a_best_setting_at_the_edge_of_a_search_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert methods.at_edge("adam", {"lr": 1e-3}) == []
    assert methods.at_edge("kfac", {"lr": 0.3, "damping": 1.0, "share": 1.0, "kl_clip": 1e-2}) == ["damping"]
    assert methods.at_edge("lbfgs", {}) == []
    monkeypatch.setattr(race, "search", lambda *_: {"lr": 0.1})
    course = race.Course(0.02, tmp_path, tmp_path, tmp_path)
    race.race(course, ["mnist escape"], ["adam"], 2, tiny=True)
    assert capsys.readouterr().out.count("mnist escape, adam: the best lr lies at the edge") == 1
