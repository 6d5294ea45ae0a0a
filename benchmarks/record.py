"""What every results file starts with: versions, hardware and date."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_sfn.experiments.conditions import conditions, rounded

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

RESULTS = Path(__file__).parent / "results"


def write(name: str, content: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Writes ``<folder>/<name>.json``, numbers rounded to six digits, and returns its path.

    An interruption leaves the old file or the new one, never half of one.
    """
    folder.mkdir(exist_ok=True)
    path, unfinished = folder / f"{name}.json", folder / f"{name}.json.{os.getpid()}.new"
    try:
        unfinished.write_text(json.dumps({"conditions": conditions(), **rounded(content)}, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps others that ask for the same out of a folder, where the system has locks for that (not Windows)."""
    if fcntl is None:
        yield
        return
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
