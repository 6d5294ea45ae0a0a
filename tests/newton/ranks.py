"""Runs a function on several ranks, each a fork of this process, and counts what they send each other."""

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.processes import Processes, ProcessMean


class HalfShare(ProcessMean):
    """The mean over two processes of which the other has nothing to add, without communication."""

    def __init__(self) -> None:
        self.processes, self.share = object.__new__(Processes), 0.5

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor * self.share


class Alike(Processes):
    """The first of two processes of which the other says the same and has nothing to add, without communication."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 2
        self._contributions, self._first_bad, self._failure = 0, None, None
        self.compared: list[tuple[str, str, str]] = []
        self.released = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        return tensor

    def collect(self, value: Any) -> list[Any]:
        return [value, value]

    def require_equal(self, value: str, what: str, remedy: str) -> None:
        self.compared.append((value, what, remedy))

    def release(self) -> None:
        self.released += 1


class Healthy(Alike):
    """The other process has computed what it should."""

    def collect(self, value: Any) -> list[Any]:
        return [value, (None, math.inf)]


class Reversing(BasisStore):
    """Keeps vectors back to front: a way to keep them in parts that needs no other process."""

    def local(self, vector: Tensor) -> Tensor:
        return vector.flip(-1)

    def whole(self, parts: Tensor, size: int) -> Tensor:
        assert parts.shape[-1] == size
        return parts.flip(-1)


class Padded(BasisStore):
    """Keeps vectors with a zero behind them, as processes do whose number does not divide the length."""

    def empty(self, capacity: int, like: Tensor) -> Tensor:
        return super().empty(capacity, self.local(like))

    def local(self, vector: Tensor) -> Tensor:
        return torch.nn.functional.pad(vector, (0, 1))

    def whole(self, parts: Tensor, size: int) -> Tensor:
        assert parts.shape[-1] == size + 1
        return parts[..., :size]


@dataclass(frozen=True)
class Failed:
    """How a rank ended that gave no result; no error where the process died or had to be ended."""

    error: str = ""
    message: str = ""


def on_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 30.0, limit: float = 60.0
) -> list[Any]:
    """What the function gives on each rank of a gloo group, or how the rank failed.

    Args:
        size: Number of ranks.
        function: Called on each rank, with the group initialised.
        args: Its arguments.
        timeout: Of the process group, in seconds.
        limit: Seconds after which ranks that hang are ended.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(rank, size, folder, timeout, function, args)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        results = [Path(folder, f"{rank}.pt") for rank in range(size)]
        return [torch.load(path, weights_only=False) if path.exists() else Failed() for path in results]


def _run(rank: int, size: int, folder: str, timeout: float, function: Callable[..., Any], args: Any) -> None:
    result: Any
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        result = function(*args)
    except Exception as error:
        result = Failed(type(error).__name__, str(error))
    torch.save(result, f"{folder}/{rank}.part")
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    os._exit(0)  # without the exit handlers of the test session


class Collectives(TorchDispatchMode):
    """Counts the collectives of `torch.distributed` below its Python interface, and the bytes of the whole tensors.

    Args:
        small: Up to how many bytes a collective counts as small, apart from the rest.
    """

    def __init__(self, small: int) -> None:
        super().__init__()
        self.limit = small
        self.large: Counter[str] = Counter()
        self.small: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_")
            size = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            (self.small if size <= self.limit else self.large)[name] += 1
            self.bytes[name] += size
        return func(*args, **(kwargs or {}))
