"""The rules of the switch and of the way back, apart from the plateau itself."""

from dataclasses import dataclass
from typing import Literal, get_args

from pytorch_lightning import Trainer

from lightning_sfn.newton.outlook import Outlook
from lightning_sfn.trainer.checks import require_choice, require_count, require_number
from lightning_sfn.trainer.handover import SchedulerRule
from lightning_sfn.trainer.progress import Progress

__all__ = ["MomentumRule", "ReturnRule", "SwitchRules"]

ReturnRule = Literal["slower_per_second", "slower_per_epoch"]
MomentumRule = Literal["keep", "reset"]


@dataclass(frozen=True)
class SwitchRules:
    """When a plateau may switch, what switches without one, when training goes back, and what comes back then.

    Attributes:
        min_epochs: Training epochs before the first switch.
        min_steps: Optimizer steps before the first switch.
        switch_at_epoch: Epoch (from 0) before which to switch for the first time, whatever the metric does.
        switch_at_step: Optimizer steps after which to do so.
        return_when: ``"slower_per_second"`` or ``"slower_per_epoch"``, a number of Newton steps, or ``None`` (never).
        require_negative_curvature: Whether a plateau switches only where a probe of the curvature speaks for it.
        min_predicted_decrease: Share of the loss that a step must promise for that, if no eigenvalue is negative.
        momentum: ``"keep"`` or ``"reset"``: what becomes of the first optimizer's state on return.
        schedulers: Whether its schedulers ``"rest"`` meanwhile or ``"step"`` on.

    Raises:
        MisconfigurationException: A value is out of range.
    """

    min_epochs: int = 0
    min_steps: int = 0
    switch_at_epoch: int | None = None
    switch_at_step: int | None = None
    return_when: ReturnRule | int | None = None
    require_negative_curvature: bool = False
    min_predicted_decrease: float = 0.05
    momentum: MomentumRule = "keep"
    schedulers: SchedulerRule = "rest"

    def __post_init__(self) -> None:
        require_count("min_epochs", self.min_epochs, 0)
        require_count("min_steps", self.min_steps, 0)
        require_count("switch_at_epoch", self.switch_at_epoch, 0, otherwise=[None])
        require_count("switch_at_step", self.switch_at_step, 0, otherwise=[None])
        require_number("min_predicted_decrease", self.min_predicted_decrease)
        require_choice("momentum", self.momentum, get_args(MomentumRule))
        require_choice("schedulers", self.schedulers, get_args(SchedulerRule))
        require_count("return_when", self.return_when, of="Newton steps", otherwise=[*get_args(ReturnRule), None])

    @property
    def forces(self) -> bool:
        """Whether the first switch comes without a plateau."""
        return self.switch_at_epoch is not None or self.switch_at_step is not None

    def is_forced(self, trainer: Trainer) -> bool:
        """Whether it is due, before a training batch."""
        at_epoch = self.switch_at_epoch is not None and trainer.current_epoch >= self.switch_at_epoch
        return at_epoch or (self.switch_at_step is not None and trainer.global_step >= self.switch_at_step)

    def allows_first(self, trainer: Trainer) -> bool:
        """Whether a plateau may make the first switch by now, after a training batch."""
        batches = trainer.fit_loop.epoch_loop.batch_progress
        epochs = trainer.current_epoch + batches.is_last_batch  # counted only after the hooks at its end
        return not self.forces and epochs >= self.min_epochs and trainer.global_step >= self.min_steps

    def approves(self, found: Outlook) -> bool:
        """Whether a probe of the curvature speaks for a switch."""
        return found.has_negative_curvature or found.predicted_decrease > self.min_predicted_decrease * abs(found.loss)

    def reason_to_return(self, newton: Progress, first_speed: dict[str, float], plateau: bool) -> str | None:
        """Why training should go back to the first optimizer after a check, if it should.

        Args:
            newton: The progress since the switch.
            first_speed: What the first optimizer last made, per ``"second"`` and per ``"epoch"``.
            plateau: Whether the metric has stalled again.
        """
        if not isinstance(self.return_when, str):
            return None
        if plateau:
            return "the metric has stalled again"
        unit: Literal["second", "epoch"] = "second" if self.return_when == "slower_per_second" else "epoch"
        speed, other = newton.speed(unit), max(first_speed[unit], 0.0)
        if newton.complete and speed <= other:
            return f"it makes {speed:.3g} per {unit}, and the first optimizer last made {other:.3g}"
        return None
