"""The comparison at equal time takes everything from the run that it belongs to."""

import sys
from pathlib import Path
from typing import Any

import pytest
import sgd_equal_time

from lightning_sfn.experiments.figure3_runs import Settings
from lightning_sfn.experiments.reproduce import Sources, reproduce


def test_data_sizes_and_seeds_are_those_of_the_run(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        hidden=(2, 3), image_size=3, cases=40, newton_epochs=2, sgd_epochs=3, draws=2, part=25, probes=2
    )
    sources = Sources("sample", None, "sample")
    output = empty_folder / "runs"
    reproduce("fig3", scale="small", output=output, seeds=2, sources=sources, progress=False, settings=settings)
    written: dict[str, Any] = {}
    monkeypatch.setattr(sgd_equal_time.record, "write", lambda name, content: written.update({name: content}))
    monkeypatch.setattr(sys, "argv", ["sgd_equal_time.py", "--runs", str(output), "--epochs", "5"])
    sgd_equal_time.main()
    rows = written["sgd_equal_time"]["runs"]
    assert [(row["dataset"], row["seed"]) for row in rows] == [("mnist", 0), ("mnist", 1)]
    assert written["sgd_equal_time"]["settings"] == {"epochs": 5, "hidden": 3}
