"""Versions, hardware and date of a measurement, and numbers short enough to keep."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch

from lightning_sfn.version import __version__

__all__ = ["conditions", "rounded"]


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


def rounded(value: Any) -> Any:
    """The same lists and dictionaries with their numbers rounded to six digits.

    Args:
        value: Numbers, strings, lists and dictionaries.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def _processor() -> str:
    """The processor's model name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
