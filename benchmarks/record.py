"""What every results file starts with: versions, hardware and date."""

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch

from lightning_sfn import __version__

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Versions, hardware and date of a measurement."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "lightning_sfn": __version__,
        "torch": torch.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes ``results/<name>.json``, numbers rounded to six digits, and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"conditions": conditions(), **_rounded(content)}, indent=1) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _processor() -> str:
    """The processor's model name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
