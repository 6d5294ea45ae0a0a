"""What every results file starts with: versions, hardware and date."""

import json
from pathlib import Path
from typing import Any

from lightning_sfn.experiments.conditions import conditions, rounded

RESULTS = Path(__file__).parent / "results"


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes ``results/<name>.json``, numbers rounded to six digits, and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"conditions": conditions(), **rounded(content)}, indent=1) + "\n")
    return path
