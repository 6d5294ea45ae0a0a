"""`SwitchToSFN`: sees that training has stalled, and goes on with saddle-free Newton."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.spectrum import Spectrum, spectrum_of
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.report import SwitchReport, say
from lightning_sfn.trainer.support import is_dry_run, require_one_optimizer, require_replayable
from lightning_sfn.trainer.window import DataBudgets, WindowedNewton

__all__ = ["SwitchToSFN"]

_LOGGED = ("loss_before", "loss_after", "damping", "step_norm", "lambda_min", "lambda_max", "accepted", "products")


class SwitchToSFN(EarlyStopping):
    """Watches a metric as `EarlyStopping` does; where that would stop, training goes on with saddle-free Newton.

    The module stays as it is (automatic optimization). Lightning's own closure delivers the gradient of each loader
    batch, which is accumulated over a window; Hessian-vector products and trial losses come from isolated replays of
    `training_step`, which nothing sees. Learning rate schedulers of the first optimizer rest after the switch.
    Checkpoints keep the first optimizer's state where Lightning expects it, so they open without this callback as well.

    As with `EarlyStopping`, ``patience`` checks without improvement switch: the check that brought the best value does
    not count. The switch happens before the next training batch. A metric that is not finite never switches.

    Args:
        monitor: Metric to watch.
        mode: ``"min"`` or ``"max"``: which way the metric improves.
        patience: Checks without improvement after which to switch.
        min_delta: Smallest change that counts as an improvement, absolute.
        optimizer: Makes the optimizer from parameter groups: `SaddleFreeNewton`, a `functools.partial` of it, or
            ``class_path`` and ``init_args`` in YAML.
        gradient_batches: Loader batches that the gradient is accumulated over before an update, or ``"epoch"``. The
            window's batches are kept on the device until then.
        curvature_fraction: Share of those batches that Hessian-vector products see.
        trial_fraction: Share of those batches that trial losses see.
        adaptive: Whether both shares double where steps achieve little (up to everything) and halve where they do well.
        hold: Keep the first whole window and take a step on it for each later loader batch (small data).
        probe_dim: Lanczos vectors of the spectra at the switch and at the end, for the report; 0 for none.
        strict: Whether a missing metric is an error.
        check_on_train_epoch_end: Whether to check at the end of training epochs or of validation, as in
            `EarlyStopping`.

    Attributes:
        switched: Whether SFN is training now.
        switched_at_step: `global_step` of the switch; ``None`` before.
        report: What was gained and spent; ``None`` before the switch.
        newton: The optimizer in use since the switch; ``None`` before.

    Raises:
        MisconfigurationException: An argument is out of its range.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SwitchToSFN(monitor="train_loss", patience=5)], logger=False, barebones=False)
    """

    def __init__(
        self,
        monitor: str = "train_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 5,
        min_delta: float = 0.0,
        optimizer: Callable[[Iterable[Any]], Optimizer] = SaddleFreeNewton,
        *,
        gradient_batches: int | Literal["epoch"] = "epoch",
        curvature_fraction: float = 0.1,
        trial_fraction: float = 0.1,
        adaptive: bool = True,
        hold: bool = False,
        probe_dim: int = 32,
        strict: bool = True,
        check_on_train_epoch_end: bool | None = None,
    ) -> None:
        """See the class."""
        if patience < 1:
            raise MisconfigurationException(f"patience is {patience}, but a positive number of checks is expected.")
        if min_delta < 0:
            raise MisconfigurationException(f"min_delta is {min_delta}, but a number of zero or more is expected.")
        if probe_dim < 0:
            raise MisconfigurationException(f"probe_dim is {probe_dim}, but a number of zero or more is expected.")
        if not callable(optimizer):
            raise MisconfigurationException(
                f"optimizer is an object of class {type(optimizer).__name__}, but something that makes one from "
                "parameters is expected: SaddleFreeNewton itself, or functools.partial(SaddleFreeNewton, ...)."
            )
        super().__init__(
            monitor=monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            strict=strict,
            check_finite=True,
            check_on_train_epoch_end=check_on_train_epoch_end,
        )
        self.budgets = DataBudgets(gradient_batches, curvature_fraction, trial_fraction, adaptive, hold)
        self._make_optimizer = optimizer
        self._probe_dim = probe_dim
        self._reset()

    def _reset(self) -> None:
        self.switched = False
        self.switched_at_step: int | None = None
        self.report: SwitchReport | None = None
        self.newton: SaddleFreeNewton | None = None
        self._stalled = False
        self._driver: WindowedNewton | None = None
        self._base: Optimizer | None = None
        self._base_schedulers: list[Any] = []
        self._restored: dict[str, Any] | None = None
        self._unlogged: StepRecord | None = None
        self._clock = time.monotonic()
        self._warned = False
        self.wait_count = 0
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)

    # ------------------------------------------------------------------------------------------------ Lightning hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, and starts afresh when the same object is used for another fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._reset()
            require_replayable(trainer, pl_module, type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the optimizer that a switch would make; switches again where a switched run is resumed."""
        require_one_optimizer(trainer, type(self).__name__)
        self._make_newton(trainer.optimizers[0])
        self._clock = time.monotonic()
        if self._restored is not None:
            self._switch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switches before the first batch of an accumulation window, once training has stalled."""
        if self._stalled and batch_idx % trainer.accumulate_grad_batches == 0:
            self._stalled = False
            self._switch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the Newton step that this batch completed."""
        self._log_step(trainer, pl_module)

    def _log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record, self._unlogged = self._unlogged, None
        if record is None:
            return
        metrics = {f"sfn/{name}": float(getattr(record, name)) for name in _LOGGED}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        pl_module.log_dict(metrics, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sees the gradient before Lightning clips it."""
        if trainer.gradient_clip_val and self._driver is not None:
            self._driver.note_gradient()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the window with the epoch, and checks where `EarlyStopping` would."""
        if self._driver is not None:
            self._driver.end_epoch()
            self._log_step(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes the report and says it once."""
        if self.report is not None and self._driver is not None:
            self.report.newton_seconds += time.monotonic() - self._clock
            self.report.final = self._monitored(trainer)
            self.report.spectrum_at_end = self._probe()
            say(trainer, f"\n{self.report.table()}\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes our hands off the Trainer; the state stays, for checkpoints saved afterwards."""
        if self._driver is not None:
            self._driver.detach()
        if self.newton is not None:
            self.newton.attach(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes our hands off the Trainer, which calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")

    # ------------------------------------------------------------------------------------------------ the decision

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        """Decides in the place where `EarlyStopping` does, which sees metrics of the same epoch; all ranks alike."""
        if self.switched or self._stalled or is_dry_run(trainer):
            return
        stalled = False
        if self._validate_condition_metric(trainer.callback_metrics):
            current = trainer.callback_metrics[self.monitor].squeeze()
            if bool(torch.isfinite(current)):
                stalled, _ = self._evaluate_stopping_criteria(current)
            elif not self._warned:
                rank_zero_warn(f"{self.monitor} is {float(current)}: SwitchToSFN does not switch on it.")
                self._warned = True
        # Every rank takes part, whatever it saw, or the others would wait for it.
        self._stalled = trainer.strategy.reduce_boolean_decision(stalled, all=False)

    def _validate_condition_metric(self, logs: dict[str, Tensor]) -> bool:
        if self.monitor in logs:
            return True
        if self.strict:
            raise MisconfigurationException(
                f"SwitchToSFN monitors {self.monitor!r}, but what is logged is {', '.join(sorted(logs)) or 'nothing'}: "
                "log it in training_step with on_epoch=True, monitor another metric, or pass strict=False."
            )
        return False

    def _monitored(self, trainer: Trainer) -> float:
        return float(trainer.callback_metrics.get(self.monitor, math.nan))

    # ------------------------------------------------------------------------------------------------ the switch

    def _switch(self, trainer: Trainer, module: LightningModule) -> None:
        """Puts the Newton optimizer in the first one's place."""
        base = trainer.optimizers[0]
        newton = self._make_newton(base)
        self._base, self.newton = base, newton
        self._base_schedulers = list(trainer.strategy.lr_scheduler_configs)
        if self._base_schedulers:
            say(trainer, f"SwitchToSFN: {len(self._base_schedulers)} learning rate scheduler(s) rest from now on.")
        self._driver = WindowedNewton(
            trainer,
            module,
            newton,
            self.budgets,
            weight_decay=[(group["params"], _coupled_decay(base, group)) for group in base.param_groups],
            before_step=self._before_newton_step,
            on_step=self._after_newton_step,
        )
        if self._restored is not None:
            newton.load_state_dict(self._restored["newton"])
            self._driver.load_state_dict(self._restored["window"])
        if trainer.gradient_clip_val and newton.max_grad_norm is None and trainer.gradient_clip_algorithm != "value":
            newton.max_grad_norm = float(trainer.gradient_clip_val)
        newton.attach(self._driver)
        # The setter rebuilds Lightning's wrappers; changing the list in place would leave the old optimizer stepping.
        trainer.strategy.optimizers = [newton]
        trainer.strategy.lr_scheduler_configs = []
        self.switched = True
        if self.switched_at_step is None:
            self.switched_at_step = trainer.global_step
        self._begin_report(trainer, base)

    def _make_newton(self, base: Optimizer) -> SaddleFreeNewton:
        """The Newton optimizer over the first one's parameters."""
        try:
            newton = self._make_optimizer([{"params": group["params"]} for group in base.param_groups])
        except ValueError as error:
            raise MisconfigurationException(f"SwitchToSFN cannot make its optimizer: {error}") from error
        if not isinstance(newton, SaddleFreeNewton):
            raise MisconfigurationException(
                f"SwitchToSFN got an optimizer of class {type(newton).__name__}, but a SaddleFreeNewton is expected: "
                "pass functools.partial(SaddleFreeNewton, ...)."
            )
        if newton.curvature != "hessian":
            raise MisconfigurationException(
                f"SwitchToSFN got curvature={newton.curvature!r}, but training_step hands over a loss without the "
                "model output: use curvature='hessian', or SaddleFreeNewton in plain torch."
            )
        return newton

    def _begin_report(self, trainer: Trainer, base: Optimizer) -> None:
        now = time.monotonic()
        if self._restored is not None:
            self.report = SwitchReport.from_state(self._restored["report"])
        else:
            plateau = self._monitored(trainer)
            self.report = SwitchReport(self.monitor, type(base).__name__, plateau, first_steps=trainer.global_step)
            self.report.first_seconds = now - self._clock
            say(
                trainer,
                f"SwitchToSFN: {self.monitor} has stalled at {plateau:.6g}; "
                f"saddle-free Newton goes on from step {trainer.global_step}.",
            )
        self._clock, self._restored = now, None

    def _before_newton_step(self) -> None:
        if self.report is not None and self.report.spectrum_at_switch is None:
            self.report.spectrum_at_switch = self._probe()

    def _after_newton_step(self, record: StepRecord) -> None:
        self._unlogged = record
        if self.report is not None:
            self.report.newton_steps += 1
            self.report.accepted_steps += record.accepted
            self.report.products += record.products

    def _probe(self) -> Spectrum | None:
        """The spectrum on the curvature batches of the last Newton step, at the present parameters."""
        if self._probe_dim == 0 or self._driver is None or self._driver.last_curvature is None or self.newton is None:
            return None
        parameters = FlatParameters.of_groups(self.newton.param_groups)
        return spectrum_of(self.newton.operator(self._driver.last_curvature, parameters), self._probe_dim)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters, phase, and the Newton optimizer's state."""
        state = super().state_dict()
        state["switched_at_step"] = self.switched_at_step
        state["stalled"] = self._stalled
        state["newton"] = state["window"] = state["report"] = None
        if self.newton is not None and self._driver is not None and self.report is not None:
            state["newton"], state["window"] = self.newton.state_dict(), self._driver.state_dict()
            state["report"] = self.report.state_dict(self.report.newton_seconds + time.monotonic() - self._clock)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; a switched run switches again when training starts."""
        super().load_state_dict(state_dict)
        self.switched_at_step = state_dict["switched_at_step"]
        self._stalled = state_dict["stalled"]
        self._restored = state_dict if state_dict["newton"] is not None else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the first optimizer and its schedulers in Lightning's places, where any Trainer finds them."""
        if self.switched and self._base is not None and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [self._base.state_dict()]
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in self._base_schedulers]


def _coupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Weight decay that is part of the objective; AdamW's is not, it shrinks weights beside the gradient step."""
    decoupled = group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW)
    return 0.0 if decoupled else float(group.get("weight_decay", 0.0))
