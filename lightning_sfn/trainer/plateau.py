"""Seeing that training has stalled: `EarlyStopping`'s rules, with a plateau noted in place of a stop."""

import math
from functools import cached_property
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sfn.trainer.checks import require_choice, require_count, require_name, require_number
from lightning_sfn.trainer.metric_source import is_of_training, is_of_validation
from lightning_sfn.trainer.support import is_dry_run

__all__ = ["PlateauWatch"]


class PlateauWatch(EarlyStopping):
    """Checks a metric where `EarlyStopping` does and by its rules, and says so to `on_check` instead of stopping.

    It is an `EarlyStopping` because Lightning calls those alone after the module's own ``on_train_epoch_end``, so that
    a metric logged there is seen in the same epoch. As there, the check that brings the best value does not count:
    ``patience`` checks without improvement come after it (`ReduceLROnPlateau` would wait for one more).

    Its arguments are those of `SwitchToSFN`.

    Raises:
        MisconfigurationException: An argument is out of its range.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"],
        patience: int,
        min_delta: float,
        *,
        min_delta_mode: Literal["abs", "rel"],
        cooldown: int,
        check_finite: bool,
        strict: bool,
        check_on_train_epoch_end: bool | None,
        check_every_n_steps: int | None,
    ) -> None:
        require_name("monitor", monitor)
        require_count("patience", patience, of="checks")
        require_number("min_delta", min_delta)
        require_choice("min_delta_mode", min_delta_mode, ("abs", "rel"))
        require_count("cooldown", cooldown, 0)
        require_count("check_every_n_steps", check_every_n_steps, otherwise=[None])
        super().__init__(
            monitor=monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            strict=strict,
            check_finite=check_finite,
            check_on_train_epoch_end=check_on_train_epoch_end,
        )
        self.cooldown, self.check_every_n_steps = cooldown, check_every_n_steps
        self._relative = min_delta_mode == "rel"
        self._left_open = check_on_train_epoch_end is None
        self._begin_fit()

    def _begin_fit(self) -> None:
        self._of_training = self._awaited = False  # whether training logs the metric; whether a validation missed it
        self._warned = False
        self._saw_batch = False
        self._checked_at = 0
        self._last_seen: Tensor | None = None
        self._since_check: tuple[Tensor | float, int] = (0.0, 0)  # sum and number of the values since the last check
        self.restart()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts afresh when the same object is used for another fit."""
        if stage == "fit":
            self._begin_fit()
            if self._left_open:
                self._check_on_train_epoch_end = None  # which `EarlyStopping` chooses by the Trainer
        super().setup(trainer, pl_module, stage)

    @cached_property
    def state_key(self) -> str:
        """As `EarlyStopping` has it, made once: Lightning asks for it around each hook of each batch."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def on_check(self, trainer: Trainer, value: float | None, plateau: bool) -> None:
        """Called after each check, on all processes with the same ``plateau``.

        Args:
            trainer: The Trainer.
            value: The metric; ``None`` if there was none, or none that counts.
            plateau: Whether there have been ``patience`` checks without improvement on some process.
        """

    def restart(self, cooldown: int = 0) -> None:
        """Forgets the best value and the count; the next ``cooldown`` checks do not count."""
        self.wait_count = 0
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self._cooling = cooldown

    # ------------------------------------------------------------------------------------------------ when

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the metric of each step, and checks after every n-th, where that is wanted."""
        self._saw_batch = True
        if self.check_every_n_steps is None:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and value is not self._last_seen:  # Lightning keeps the value of the last epoch there
            self._last_seen = value
            total, count = self._since_check
            self._since_check = (total + value.detach().squeeze(), count + 1)
        step = trainer.global_step
        if step % self.check_every_n_steps == 0 and step != self._checked_at:
            self._checked_at = step
            (total, count), self._since_check = self._since_check, (0.0, 0)
            self._check(trainer, torch.as_tensor(total) / count if count else None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks where `EarlyStopping` does, unless the metric is one of training, whose mean is not known yet."""
        if self._left_open and not self._should_skip_check(trainer):
            self._see_source(trainer)
            absent = self.monitor not in trainer.callback_metrics  # on some ranks, perhaps; all check at one place
            self._awaited = trainer.strategy.reduce_boolean_decision(absent, all=False)
            if self._of_training or self._awaited:
                return
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks where `EarlyStopping` does, and what training logs in any case."""
        if self._left_open and not self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._see_source(trainer)
            if self._of_training or self._awaited:
                self._run_early_stopping_check(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _see_source(self, trainer: Trainer) -> None:
        if not self._of_training:
            name = self.monitor
            found = is_of_training(trainer, name) and not is_of_validation(trainer, name)
            self._of_training = trainer.strategy.reduce_boolean_decision(found, all=False)

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        """Checks in the place where `EarlyStopping` does, which sees metrics of the same epoch."""
        if self.check_every_n_steps is None:
            value = trainer.callback_metrics.get(self.monitor)
            self._check(trainer, None if value is None else value.detach().squeeze())

    # ------------------------------------------------------------------------------------------------ what

    def _check(self, trainer: Trainer, value: Tensor | None) -> None:
        if is_dry_run(trainer):
            return
        if value is None:
            self._require_metric(trainer)
        elif self.check_finite and not bool(torch.isfinite(value)):
            if not self._warned:
                rank_zero_warn(f"{self.monitor} is {float(value)}: SwitchToSFN passes over such checks.")
                self._warned = True
            value = None
        plateau = value is not None and self._is_plateau(value)
        # Every rank takes part, whatever it saw, or the others would wait for it.
        plateau = trainer.strategy.reduce_boolean_decision(plateau, all=False)
        self.on_check(trainer, None if value is None else float(value), plateau)

    def _is_plateau(self, value: Tensor) -> bool:
        best = self.best_score.to(value.device)
        delta = self.min_delta * (best.abs().nan_to_num(posinf=0.0) if self._relative else 1.0)  # signed
        improved = bool(self.monitor_op(value - delta, best))
        if improved:
            self.best_score = value
        if self._cooling > 0:
            self._cooling -= 1
            return False
        self.wait_count = 0 if improved else self.wait_count + 1
        return self.wait_count >= self.patience

    def _require_metric(self, trainer: Trainer) -> None:
        # A run that resumes at the end of an epoch begins with the rest of that, in which nothing is logged.
        if self.strict and self._saw_batch and self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            how = "on_epoch=True" if self.check_every_n_steps is None else "on_step=True"
            raise MisconfigurationException(
                f"SwitchToSFN monitors {self.monitor!r}, but what is logged is {logged}: log it in training_step with "
                f"{how}, monitor another metric, or pass strict=False."
            )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The best value and the counters."""
        total, count = self._since_check
        return super().state_dict() | {
            "cooling": self._cooling,
            "checked_at": self._checked_at,
            "since_check": (float(total), count),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; options are those of this object."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience  # which `EarlyStopping` counts as state
        self._cooling, self._checked_at = state_dict["cooling"], state_dict["checked_at"]
        total, count = state_dict["since_check"]
        self._since_check = (total, count)
