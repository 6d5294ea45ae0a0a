"""Seconds, taken in turns: what other programs do to the machine meets every measured thing alike."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Processor seconds of a call; on a CUDA device seconds of the clock, with the device waited for on both sides."""
    begun = now(device)
    work()
    return now(device) - begun


def now(device: torch.device) -> float:
    """The present time for `seconds_of`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def medians(ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of several calls, taken in turns after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            spent = seconds_of(way, device)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


class Clock:
    """Exclusive seconds of named parts: what a part calls counts for the inner one."""

    def __init__(self, read: Callable[[], float]) -> None:
        """Starts with nothing; ``read`` tells the time."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._read = read
        self._stack: list[str] = []
        self._since = read()
        self._undo: list[Callable[[], None]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the body for a part."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        instant = self._read()
        if self._stack:
            self.seconds[self._stack[-1]] += instant - self._since
        self._since = instant

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Counts the calls of a function for a part, until `unwrap`."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        self._undo.append(lambda: setattr(owner, method, original))

    def unwrap(self) -> None:
        """Gives all functions back."""
        while self._undo:
            self._undo.pop()()
