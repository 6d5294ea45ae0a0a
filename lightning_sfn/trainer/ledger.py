"""Keeps the books of a run: who trained how long, at what price, and how fast the metric improved."""

import math
import time
from typing import Any

from pytorch_lightning import Trainer

from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.metric_source import is_of_training
from lightning_sfn.trainer.newton_phase import NewtonPhase
from lightning_sfn.trainer.progress import Progress
from lightning_sfn.trainer.report import Phase, SwitchReport

__all__ = ["Ledger"]


class Ledger:
    """The report while it grows.

    Args:
        monitor: Name of the monitored metric.
        sign: 1 where it is to rise, -1 where it is to fall.
        checks: Over how many checks speed is measured.

    Attributes:
        report: What each optimizer gained and spent.
        progress: The last checks of the optimizer that trains now.
        first_speed: Improvement ``"second"`` and ``"epoch"`` that the first optimizer made before the last switch.
    """

    def __init__(self, monitor: str, sign: int, checks: int) -> None:
        self.report = SwitchReport(monitor, sign)
        self.progress = Progress(sign, checks)
        self.first_speed = {"second": 0.0, "epoch": 0.0}
        self._clock = time.monotonic()
        self._step_seen = 0

    @property
    def phase(self) -> Phase:
        """The phase that is going on."""
        return self.report.phases[-1]

    def start(self, trainer: Trainer, optimizer: str) -> None:
        """Starts the clock, and the first phase unless a resumed run has one already.

        Args:
            trainer: The Trainer.
            optimizer: Class name of the first optimizer.
        """
        self._clock, self._step_seen = time.monotonic(), trainer.global_step
        if not self.report.phases:
            self.report.phases.append(Phase(optimizer))

    def begin(self, trainer: Trainer, optimizer: str, *, newton: bool) -> None:
        """Closes the present phase and begins another.

        Args:
            trainer: The Trainer.
            optimizer: Class name of the optimizer that trains from now on.
            newton: Whether it is SFN.
        """
        self.close(trainer)
        if newton:
            self.first_speed = {"second": self.progress.speed("second"), "epoch": self.progress.speed("epoch")}
            self.report.last_speed = self.first_speed["second"]
            self.report.checks = max(len(self.progress.points) - 1, 0)
        value = self.phase.after
        self.report.phases.append(Phase(optimizer, newton, before=value))
        self.progress.points = []
        if math.isfinite(value):
            self.note(trainer, value)
        self._step_seen = trainer.global_step

    def close(self, trainer: Trainer) -> None:
        """Notes time and metric at the end of a phase."""
        self._tick()
        self.phase.after = float(trainer.callback_metrics.get(self.report.monitor, math.nan))
        self._see(self.phase.after)

    def note(self, trainer: Trainer, value: float) -> None:
        """Notes a check."""
        self._tick()
        self._see(value)
        if self.phase.newton and self._is_older(trainer):
            # The metric at the switch was collected while the first optimizer moved: this is what it had come to.
            self.report.phases[-2].after = self.phase.before = value
            if self.phase.taken:
                self.progress.points = []  # SFN's pace begins here; as long as it takes no step, it makes none
            self.progress.restart_at(value)
        else:
            self.phase.unseen = False
        if math.isnan(self.phase.before):
            self.phase.before = value
        per_epoch = trainer.num_training_batches  # where an epoch has no known length, a batch is the unit
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        epochs = batches / (per_epoch if math.isfinite(per_epoch) else 1)
        self.progress.note(sum(phase.seconds for phase in self.report.phases), epochs, value)

    def count_batch(self, trainer: Trainer) -> None:
        """Counts the steps of the first optimizer."""
        step = trainer.global_step
        self.phase.steps += step - self._step_seen
        self._step_seen = step

    def count_gradient(self) -> None:
        """Counts a gradient of the first optimizer."""
        self.phase.gradients += 1

    def count_step(self, trainer: Trainer, record: StepRecord, newton: NewtonPhase) -> None:
        """Counts a Newton step.

        Args:
            trainer: The Trainer.
            record: Its record.
            newton: What took it.
        """
        driver, limit = newton.driver, newton.newton.max_grad_norm
        self.phase.steps += 1
        if record.accepted and not self.phase.taken:
            self.phase.first_taken_at, self.phase.unseen = trainer.fit_loop.epoch_loop.total_batch_idx, True
        self.phase.taken += record.accepted - record.taken_back
        self.phase.products += record.products
        self.phase.gradients = driver.batch_gradients
        self.phase.clipped += limit is not None and record.gradient_norm > limit
        self.report.last_step = (record.loss_before, record.loss_after)
        self.report.estimated_from = _estimated_from(record, whole_trials=driver.whole_trials)
        self.report.has_penalty = driver.has_penalty

    def _is_older(self, trainer: Trainer) -> bool:
        """Whether a metric that is seen now was collected before SFN's first step."""
        now = trainer.fit_loop.epoch_loop.total_batch_idx
        if not self.phase.taken:
            return True
        return self.phase.first_taken_at == now and is_of_training(trainer, self.report.monitor)

    def _see(self, value: float) -> None:
        self.report.lowest = min(self.report.lowest, value)  # NaN is not less

    def _tick(self) -> None:
        now = time.monotonic()
        self.phase.seconds += now - self._clock
        self._clock = now

    def state_dict(self) -> dict[str, Any]:
        """The books as plain numbers, lists and tensors."""
        if self.report.phases:
            self._tick()
        return {
            "report": self.report.state_dict(),
            "progress": self.progress.state_dict(),
            "first_speed": self.first_speed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.report = SwitchReport.from_state(state["report"])
        self.progress.load_state_dict(state["progress"])
        self.first_speed = state["first_speed"]


def _estimated_from(record: StepRecord, *, whole_trials: bool) -> str:
    """What the loss after a step may be an estimate from; empty where it was surely measured on the whole window."""
    # Quasi-Newton steps evaluate the window after each of them; the first such gradient is the subspace step's test.
    if not record.accepted or record.secant_gradients > 1:
        return ""
    if record.kind == "momentum":
        return "the slope"
    return "" if whole_trials else "its trial batches"
