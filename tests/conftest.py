"""Every test starts from the same seed, on one thread, in an empty folder of its own, and asks no network."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs write logs and checkpoints into the current folder: make that a temporary one."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started commands inherit this; in this process the `datasets` package has read the variable already."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def new_tensors() -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Gives a function that lists the live tensors that the test itself made.

    What earlier tests of the same process left behind is held until the test ends: the collector takes it at a moment
    of its own, and a count would then fall by tensors that have nothing to do with the test.
    """

    def live() -> list[torch.Tensor]:
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    earlier = {id(tensor): tensor for tensor in live()}
    yield lambda: [tensor for tensor in live() if id(tensor) not in earlier]
    earlier.clear()
