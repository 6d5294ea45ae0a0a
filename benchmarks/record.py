"""What every results file starts with: versions, hardware and date."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_sfn.experiments.conditions import conditions, rounded

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

RESULTS = Path(__file__).parent / "results"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``: CUDA where there is any, if left out; what is not there is refused."""
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")


def _device(name: str) -> torch.device:
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is no device of these benchmarks: give cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA device here: give cpu, or leave it out")
    return torch.device(name)


def named(name: str, device: torch.device) -> str:
    """What results of a device are called: those of the CPU by their plain name, others beside them."""
    return name if device.type == "cpu" else f"{name}_{device.type}"


def processor_of(device: torch.device) -> str | None:
    """The name of a CUDA device; ``None`` for the CPU, whose name is among the conditions."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


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
