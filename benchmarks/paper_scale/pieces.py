"""Arms run one after the other in pieces: each piece ends by the clock, and the next one goes on bit for bit."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paper_scale.method import Method
from paper_scale.results import Results, Row
from paper_scale.task import Task

__all__ = ["Arm", "Piece"]

_LOG = logging.getLogger("paper_scale")
_FIRST_NOTE = 0.5  # seconds of training before the first measurement after the start
_SAVE_EVERY = 60.0  # seconds between checkpoints within a piece


@dataclass(frozen=True)
class Arm:
    """One method's run.

    Attributes:
        name: Its name, also that of its checkpoint.
        make: Builds the method at its start.
        seconds: Training time; the arm ends before if the method has finished.
        after: The arm from whose end it starts, and whose time counts as spent; None for the initialization.
        spectra: Whether to measure spectra.
    """

    name: str
    make: Callable[[], Method]
    seconds: float
    after: str | None = None
    spectra: bool = True


class Piece:
    """What one call of the script does before its time is up.

    Args:
        task: The task.
        results: The results file.
        folder: Where checkpoints go.
        seconds: Wall-clock time of the piece. An arm is put away before a step that would end later, if the steps
            before it took as long; the first step is taken in any case.
        clock: Tells wall-clock time in seconds.
        steps: Steps of arms to do at most; all if None.
    """

    def __init__(
        self,
        task: Task,
        results: Results,
        folder: Path,
        *,
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
        steps: int | None = None,
    ) -> None:
        self._task, self._results, self._folder = task, results, folder
        self._clock, self._deadline = clock, clock() + seconds
        self._steps = math.inf if steps is None else steps
        self._writer = _tensorboard(folder / "tensorboard")

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return self._steps <= 0 or self._clock() >= self._deadline

    def run(self, arm: Arm) -> bool:
        """Goes on with an arm.

        Args:
            arm: The arm.

        Returns:
            Whether it has come to its end.
        """
        saved = self._load(arm.name)
        if saved is not None and saved["done"]:
            return True
        if self.is_over:
            return False
        run = _Run(arm, arm.make(), self._task, self._clock)
        if saved is not None:
            run.restore(saved)
            self._results.forget(arm.name, run.method.counts.updates)
            _LOG.info("%s: goes on after %d updates, %.1f s", arm.name, run.method.counts.updates, run.spent)
        else:
            self._begin(run)
        last_save = now = self._clock()
        longest = 0.0
        while not run.over and not self.is_over and now + longest < self._deadline:
            run.advance()
            self._steps -= 1
            if run.over or run.spent >= run.next_note:
                self._note(run)
            before, now = now, self._clock()
            longest = max(longest, now - before)
            if now - last_save > _SAVE_EVERY:
                self._save(run)
                last_save = now
        self._save(run)
        return run.over

    def state_of(self, name: str) -> dict[str, Any]:
        """The checkpoint of an arm that has come to its end."""
        saved = self._load(name)
        assert saved is not None, f"{name} has not run"
        return saved

    def _begin(self, run: "_Run") -> None:
        self._results.forget(run.arm.name, -1)
        if run.arm.after is not None:
            before = self.state_of(run.arm.after)
            run.method.problem.model.load_state_dict(before["model"])
            run.spent = before["spent"]
        _LOG.info("%s: begins at %.1f s", run.arm.name, run.spent)
        self._note(run)

    def _note(self, run: "_Run") -> None:
        """Measures, outside of the time that counts."""
        arm, counts = run.arm, run.method.counts
        spectrum = arm.spectra and (run.notes % self._task.settings.spectrum_every == 0 or run.over)
        row: Row = {"arm": arm.name, "seconds": run.spent, **counts.to_dict()}
        row |= self._task.measure(run.method.problem, spectrum=spectrum)
        run.diverged = not math.isfinite(row["cross_entropy"])
        row["last"] = run.over
        self._results.append(row)
        run.notes += 1
        run.next_note = max(run.spent + _FIRST_NOTE, run.spent * self._task.settings.note_ratio)
        self._log(row)

    def _log(self, row: Row) -> None:
        _LOG.info(
            "%s: %.1f s, %d updates, %d products, train %.4f, test %.4f",
            *(row[name] for name in ("arm", "seconds", "updates", "products", "train_error", "test_error")),
        )
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, float) and name != "seconds":
                    self._writer.add_scalar(f"{row['arm']}/{name}", value, round(1000 * row["seconds"]))
            self._writer.flush()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, run: "_Run") -> None:
        path = self._folder / f"{_file_name(run.arm.name)}.pt"
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(run.state_dict(), unfinished)
        unfinished.replace(path)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self._folder / f"{_file_name(name)}.pt"
        if not path.exists():
            return None
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location=self._task.device)
        return saved


class _Run:
    """An arm on its way: the method, and the time that it has spent."""

    def __init__(self, arm: Arm, method: Method, task: Task, clock: Callable[[], float]) -> None:
        self.arm, self.method = arm, method
        self.spent, self.next_note, self.notes, self.diverged = 0.0, 0.0, 0, False
        self._device, self._clock = task.device, clock

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self.method.finished or self.diverged or self.spent >= self.arm.seconds

    def advance(self) -> None:
        """One step, on the clock: processor time on a CPU, where others may be at work; else wall-clock time."""
        on_cuda = self._device.type == "cuda"
        clock = self._clock if on_cuda or self._clock is not time.perf_counter else time.process_time
        since = clock()
        self.method.advance()
        if on_cuda:
            torch.cuda.synchronize()
        self.spent += clock() - since

    def state_dict(self) -> dict[str, Any]:
        """Everything that the arm goes on from."""
        return {
            "model": self.method.problem.model.state_dict(),
            "method": self.method.state_dict(),
            "spent": self.spent,
            "next_note": self.next_note,
            "notes": self.notes,
            "diverged": self.diverged,
            "done": self.over,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; parameters are copied in place."""
        self.method.problem.model.load_state_dict(saved["model"])
        self.method.load_state_dict(saved["method"])
        self.spent, self.next_note = saved["spent"], saved["next_note"]
        self.notes, self.diverged = saved["notes"], saved["diverged"]


def _file_name(arm: str) -> str:
    return arm.replace("/", "-")


def _tensorboard(folder: Path) -> Any:
    """A writer, where TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _LOG.info("tensorboard is not installed: no log is written for it, the results file has all numbers.")
        return None
    return SummaryWriter(str(folder))
