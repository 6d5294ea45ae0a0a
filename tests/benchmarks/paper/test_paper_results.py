"""The results file: what it refuses, and what it keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
from paper_scale.results import Results, ResultsError, read
from paper_scale.settings import Settings
from paper_scale.task import Task


@pytest.fixture
def settings(task: Task) -> Settings:
    return task.settings


def test_rows_are_there_again(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(path, settings, "cpu")
    for update in range(4):
        first.append({"arm": "sfn", "updates": update, "train_error": 1 / (update + 3)})
    first.append({"arm": "adam", "updates": 9})
    again = Results(path, settings, "cpu")
    assert again.rows == first.rows
    again.forget("sfn", after=1)
    assert [row["updates"] for row in Results(path, settings, "cpu").rows] == [0, 1, 9]
    assert read(path)[0]["conditions"]["torch"]


def test_another_configuration_is_refused(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, settings, "cpu")
    before = path.read_text()
    with pytest.raises(ResultsError, match=r"another configuration \(krylov_dim is 6 there and 7 here\)"):
        Results(path, replace(settings, krylov_dim=7), "cpu")
    with pytest.raises(ResultsError, match="was measured on cpu, but this is NVIDIA H200"):
        Results(path, settings, "NVIDIA H200")
    assert path.read_text() == before


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, settings, "cpu").append({"arm": "sfn", "updates": 0})
    whole = path.read_text()
    path.write_text(whole + '{"arm": "sfn", "upd')
    assert len(Results(path, settings, "cpu").rows) == 1
    assert path.read_text() == whole


@pytest.mark.parametrize("text", ["", "hello\n", "[1, 2]\n", '{"a": 1}\n', '{"configuration": 1}\n'])
def test_foreign_files_are_refused(tmp_path: Path, settings: Settings, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ResultsError, match="is no results file"):
        Results(path, settings, "cpu")
    assert path.read_text() == text
    with pytest.raises(ResultsError, match="There is no results file"):
        read(tmp_path / "none.jsonl")
