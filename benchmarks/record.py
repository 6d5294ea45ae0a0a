"""What every results file starts with: versions, hardware and date."""

import json
from pathlib import Path
from typing import Any

from lightning_sfn.experiments.conditions import conditions, rounded

RESULTS = Path(__file__).parent / "results"


def write(name: str, content: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Writes ``<folder>/<name>.json``, numbers rounded to six digits, and returns its path.

    An interruption leaves the old file or the new one, never half of one.
    """
    folder.mkdir(exist_ok=True)
    path, unfinished = folder / f"{name}.json", folder / f"{name}.json.new"
    unfinished.write_text(json.dumps({"conditions": conditions(), **rounded(content)}, indent=1) + "\n")
    unfinished.replace(path)
    return path
