"""The results file: one JSON line for the configuration, then one for each measurement."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_sfn.experiments.conditions import conditions
from lightning_sfn.experiments.runner import write_atomically
from paper_scale.settings import Settings

__all__ = ["Results", "ResultsError", "Row"]

Row = dict[str, Any]
"""One measurement: ``arm``, ``seconds``, ``updates``, ``products`` and what was measured."""


class ResultsError(ValueError):
    """A results file cannot be used."""


class Results:
    """Measurements that stay: what is there is read first, and new rows are appended.

    Args:
        path: The file; begun if it does not exist.
        settings: What the numbers depend on.
        device: Where they are computed.

    Raises:
        ResultsError: The file holds measurements of another configuration, or is damaged.
    """

    def __init__(self, path: Path, settings: Settings, device: str) -> None:
        self.path = path
        wanted = json.loads(json.dumps({"settings": asdict(settings), "device": device}))
        if path.exists():
            header, self.rows = read(path)
            _require_same(path, header["configuration"], wanted)
        else:
            self.rows = []
            write_atomically(path, json.dumps({"configuration": wanted, "conditions": conditions()}) + "\n")

    def append(self, row: Row) -> None:
        """Adds a measurement to the file at once."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget(self, arm: str, after: int) -> None:
        """Drops an arm's measurements after a number of updates: a resumed run makes them again."""
        kept = [row for row in self.rows if row["arm"] != arm or row["updates"] <= after]
        if len(kept) < len(self.rows):
            self.rows = kept
            header = self.path.read_text().split("\n", 1)[0]
            write_atomically(self.path, "\n".join([header, *map(json.dumps, kept)]) + "\n")

    def of(self, arm: str) -> list[Row]:
        """An arm's measurements, in order."""
        return [row for row in self.rows if row["arm"] == arm]


def read(path: Path) -> tuple[Row, list[Row]]:
    """Header and rows of a results file; a last line that was cut off is left out, and from the file too.

    Args:
        path: The file.

    Raises:
        ResultsError: It is no results file.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ResultsError(f"There is no results file {str(path)!r}: run the subcommand 'run' first.") from error
    lines = text.split("\n")
    if lines[-1]:
        write_atomically(path, text[: len(text) - len(lines[-1])])
    try:
        header, *rows = [json.loads(line) for line in lines[:-1]]
        header["configuration"], header["conditions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{str(path)!r} is no results file of this script: give another --folder.") from error
    return header, rows


def _require_same(path: Path, found: Row, wanted: Row) -> None:
    if found["device"] != wanted["device"]:
        raise ResultsError(
            f"{str(path)!r} was measured on {found['device']}, but this is {wanted['device']}: give another --folder."
        )
    for name, value in wanted["settings"].items():
        if found["settings"].get(name) != value:
            raise ResultsError(
                f"{str(path)!r} belongs to another configuration ({name} is {found['settings'].get(name)} there and "
                f"{value} here): give another --folder, or the same settings."
            )
