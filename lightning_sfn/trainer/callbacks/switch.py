"""`SwitchToSFN`: sees that training has stalled, and goes on with saddle-free Newton."""

import math
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.options import is_whole
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.newton.spectrum import Spectrum
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.budgets import DataBudgets, Reduction
from lightning_sfn.trainer.checks import require_count, require_factory
from lightning_sfn.trainer.handover import (
    Handover,
    OptimizerFactory,
    SchedulerRule,
    coupled_decay,
    make_newton,
    note_rates,
)
from lightning_sfn.trainer.ledger import Ledger
from lightning_sfn.trainer.messages import say
from lightning_sfn.trainer.misplaced import NamesMisplacedOptions
from lightning_sfn.trainer.namespaces import join_namespace
from lightning_sfn.trainer.newton_phase import NewtonPhase
from lightning_sfn.trainer.plateau import PlateauWatch
from lightning_sfn.trainer.rehearsal import Rehearsal
from lightning_sfn.trainer.report import SwitchReport
from lightning_sfn.trainer.reshuffle import reshuffle
from lightning_sfn.trainer.rules import MomentumRule, ReturnRule, SwitchRules
from lightning_sfn.trainer.step_log import StepLog, log_metrics
from lightning_sfn.trainer.support import (
    is_dry_run,
    require_metrics,
    require_one_optimizer,
    require_replayable,
    require_steady_weights,
)
from lightning_sfn.trainer.window import WindowedNewton

__all__ = ["SwitchToSFN"]

_GATE_DIM = 32  # Lanczos vectors of the probe that decides, where probe_dim says nothing
_TOLERATED_FAILURES = 3  # Newton steps that may fail in a row


class SwitchToSFN(NamesMisplacedOptions, PlateauWatch):
    """Watches a metric as `EarlyStopping` does; where that would stop, training goes on with saddle-free Newton.

    The module stays as it is (automatic optimization). Lightning's own closure delivers the gradient of each loader
    batch, which is accumulated over a window; Hessian-vector products and trial losses come from isolated replays of
    `training_step`, which nothing sees. Checkpoints keep the first optimizer's state where Lightning expects it, so
    they open without this callback as well. Resuming from one goes on bit for bit: a half-filled window travels with
    it, and so do the global random numbers (one process). Not so a plateau that is decided by the mean over the epoch
    in which a run resumes: Lightning begins that mean anew.

    As with `EarlyStopping`, ``patience`` checks without improvement switch: the check that brought the best value does
    not count. The switch happens before the next training batch, on all processes alike.

    A Newton step that meets a number that is not finite, or for which memory does not suffice, is left out. Where that
    goes on, training returns to the first optimizer for good.

    Args:
        monitor: Metric to watch.
        mode: ``"min"`` or ``"max"``: which way the metric improves.
        patience: Checks without improvement after which to switch.
        min_delta: Smallest change that counts as an improvement.
        optimizer: Makes the optimizer from parameter groups: `SaddleFreeNewton`, a `functools.partial` of it, or
            ``class_path`` and ``init_args`` in YAML.
        min_delta_mode: ``"abs"`` for a ``min_delta`` in the metric's unit, ``"rel"`` for a share of its best value.
        cooldown: Checks after a return to the first optimizer that do not count.
        check_finite: Whether checks that see NaN or infinity are passed over. Otherwise they count as checks without
            improvement.
        strict: Whether a missing metric is an error.
        check_on_train_epoch_end: Whether to check at the end of training epochs or of validation. If left out, as in
            `EarlyStopping`, but what training logs is always checked at the end of its epochs.
        check_every_n_steps: Check after every n-th optimizer step instead, on the mean of the values logged since the
            last check (for long epochs; the metric needs ``on_step=True``).
        min_epochs: Training epochs before the first switch.
        min_steps: Optimizer steps before the first switch.
        switch_at_epoch: Epoch (counted from 0) before which to switch, whatever the metric does. Until then no plateau
            switches.
        switch_at_step: Number of optimizer steps after which to do so.
        require_negative_curvature: Whether a plateau switches only if a probe on the next window finds an eigenvalue
            that is negative for certain, or a Newton step that promises enough.
        min_predicted_decrease: What is enough: the share of the loss that a step is predicted to take off.
        return_when: When to go back to the first optimizer: ``"slower_per_second"`` or ``"slower_per_epoch"`` as soon
            as SFN improves the metric less over ``patience`` checks than the first optimizer last did, or stalls; or
            after a number of Newton steps. ``None``: never. The next plateau switches again.
        momentum: ``"keep"`` or ``"reset"``: what becomes of the first optimizer's state on return.
        schedulers: Whether its learning rate schedulers ``"rest"`` while SFN trains and go on where they were, or
            ``"step"`` on (schedules that end with the training).
        gradient_batches: Loader batches (of each process) that the gradient is accumulated over before an update at
            most, over which an epoch is shared out evenly; or ``"epoch"``. They are kept on the device until then.
        curvature_fraction: Share of those batches that Hessian-vector products see.
        trial_fraction: Share of those batches that trial losses see.
        adaptive: Whether both shares double where steps achieve little (up to everything) and halve where they do well.
        hold: Keep the first whole window and take a step on it for each later loader batch (small data).
        reduction: ``"mean"`` weights all batches alike, as Lightning and DDP do; ``"samples"`` by their cases.
        probe_dim: Lanczos vectors of the spectra at the switch and at the end, for the report; 0 for none.

    Attributes:
        switched: Whether SFN is training now.
        switched_at_step: `global_step` of the last switch; ``None`` before.

    Raises:
        MisconfigurationException: An argument is out of its range.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SwitchToSFN(monitor="train_loss", patience=5)], logger=False)
    """

    def __init__(
        self,
        monitor: str = "train_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 5,
        min_delta: float = 0.0,
        optimizer: OptimizerFactory = SaddleFreeNewton,
        *,
        min_delta_mode: Literal["abs", "rel"] = "abs",
        cooldown: int = 0,
        check_finite: bool = True,
        strict: bool = True,
        check_on_train_epoch_end: bool | None = None,
        check_every_n_steps: int | None = None,
        min_epochs: int = 0,
        min_steps: int = 0,
        switch_at_epoch: int | None = None,
        switch_at_step: int | None = None,
        require_negative_curvature: bool = False,
        min_predicted_decrease: float = 0.05,
        return_when: ReturnRule | int | None = None,
        momentum: MomentumRule = "keep",
        schedulers: SchedulerRule = "rest",
        gradient_batches: int | Literal["epoch"] = "epoch",
        curvature_fraction: float = 0.1,
        trial_fraction: float = 0.1,
        adaptive: bool = True,
        hold: bool = False,
        reduction: Reduction = "mean",
        probe_dim: int = 32,
    ) -> None:
        require_count("probe_dim", probe_dim, 0)
        require_factory(optimizer)
        super().__init__(
            monitor,
            mode,
            patience,
            min_delta,
            min_delta_mode=min_delta_mode,
            cooldown=cooldown,
            check_finite=check_finite,
            # A switch at a given moment needs no metric.
            strict=strict and switch_at_epoch is None and switch_at_step is None,
            check_on_train_epoch_end=check_on_train_epoch_end,
            check_every_n_steps=check_every_n_steps,
        )
        self.rules = SwitchRules(
            min_epochs,
            min_steps,
            switch_at_epoch,
            switch_at_step,
            return_when,
            require_negative_curvature,
            min_predicted_decrease,
            momentum,
            schedulers,
        )
        self.budgets = DataBudgets(gradient_batches, curvature_fraction, trial_fraction, adaptive, hold, reduction)
        self._make_optimizer = optimizer
        self._probe_dim = probe_dim
        self._reset()

    def _reset(self) -> None:
        self.switched = False
        self.switched_at_step: int | None = None
        self._trainer: Trainer | None = None
        self._handover: Handover | None = None
        self._phase: NewtonPhase | None = None  # collects batches for a probe while the first optimizer trains
        self._ledger = Ledger(self.monitor, 1 if self.mode == "max" else -1, self.patience)
        self._restored: dict[str, Any] | None = None
        self._steps = StepLog()
        self._rehearsal = Rehearsal()
        self._stalled = self._approved = self._given_up = False
        self._return_reason: str | None = None
        self._failures = 0

    @property
    def newton(self) -> SaddleFreeNewton | None:
        """The optimizer in use; ``None`` while the first one trains."""
        return self._phase.newton if self._phase is not None and self.switched else None

    @property
    def report(self) -> SwitchReport | None:
        """What each optimizer gained and spent; ``None`` before the first switch."""
        report = self._ledger.report
        return report if any(phase.newton for phase in report.phases) else None

    # ------------------------------------------------------------------------------------------------ Lightning hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, and starts afresh when the same object is used for another fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            join_namespace(self, trainer)
            self._reset()
            self._trainer = trainer
            require_replayable(trainer, pl_module, type(self).__name__)
            require_steady_weights(pl_module, type(self).__name__)
            _require_one_switch(trainer)
            _stand_behind_early_stopping(trainer, self)
            if not self.rules.forces:
                _warn_of_earlier_stops(trainer, self)
                require_metrics(trainer, type(self).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the random numbers of a resumed run up again, before the loader draws its first shuffle.

        Notes the learning rates, before those of a checkpoint take their place.
        """
        note_rates(trainer)
        if self._restored is not None and self._restored["random"] is not None and trainer.world_size == 1:
            reshuffle(trainer, RandomState.from_state(self._restored["random"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the optimizer that a switch would make; goes on where a resumed run was."""
        require_one_optimizer(trainer, type(self).__name__)
        self._handover = Handover(trainer, self.rules.schedulers)
        self._make_newton()
        self._ledger.start(trainer, type(trainer.optimizers[0]).__name__)
        restored, self._restored = self._restored, None
        if restored is not None and restored["window"] is not None:
            phase = self._begin(trainer, pl_module)
            phase.restore(restored)
            if restored["newton"] is not None:
                phase.take_over(trainer, self._handover)
                self.switched = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switches, or returns, before the first batch of an accumulation window."""
        self._rehearsal.note(trainer, pl_module, batch, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches or is_dry_run(trainer):
            return
        if self.switched:
            if self._return_reason is not None and self._phase is not None and self._phase.driver.idle:
                self._return(trainer)
        elif self._phase is None and not self._given_up:
            forced = self.switched_at_step is None and self.rules.is_forced(trainer)
            if forced or (self._stalled and (self._approved or not self.rules.require_negative_curvature)):
                self._switch(trainer, pl_module, "is" if forced else "has stalled")
            elif self._stalled:
                say(trainer, f"SwitchToSFN: {self.monitor} has stalled; the next window tells whether SFN would help.")
                self._begin(trainer, pl_module)
            self._stalled = self._approved = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts and logs; rehearses a replay after the first batch; decides where a probe's window is complete."""
        if outputs:
            self._rehearsal.hold(trainer, pl_module, self._make_newton, type(self).__name__)
        if not self.switched:
            self._ledger.count_batch(trainer)
            self._watch(trainer)
        self._steps.flush(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the first optimizer's gradients, some take several in a step; sees SFN's before hooks change them."""
        if not self.switched:
            self._ledger.count_gradient()
        elif self._phase is not None:
            self._phase.driver.note_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sees the gradient before Lightning clips it."""
        if trainer.gradient_clip_val and self.switched and self._phase is not None:
            self._phase.driver.note_gradient()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the window with the epoch, and checks where `EarlyStopping` would."""
        if self.switched and self._phase is not None:
            self._phase.driver.note_epoch_end()
            self._phase.driver.end_window()
            self._steps.flush(trainer, pl_module)
        elif self._phase is not None:
            self._phase.driver.drop()  # of a probe
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes the report and says it once; says why there is none where the switch never happened."""
        if self.report is not None:
            self._ledger.close(trainer)
            self.report.spectrum_at_end = self._probe()
            log_metrics(trainer, self.report.metrics())
            say(trainer, f"\n{self.report.table()}\n")
        elif not is_dry_run(trainer):
            say(trainer, f"SwitchToSFN did not switch: {self._why_not()}.")

    def _why_not(self) -> str:
        if self._given_up:
            return "the parameters were not finite any more"
        if self.rules.forces:
            return "training ended before the moment that switch_at_epoch or switch_at_step names"
        best = f"best {self.monitor} {float(self.best_score):.6g}"
        seen = f"{self.wait_count} of {self.patience} checks without improvement at the end, {best}"
        early = self.wait_count >= self.patience and not self.rules.require_negative_curvature
        return f"{seen}, but min_epochs or min_steps had not been reached" if early else seen

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes our hands off the Trainer; the state stays, for checkpoints saved afterwards."""
        if self._phase is not None:
            self._phase.driver.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes our hands off the Trainer, which calls no teardown after an exception.

        The window stays until the next fit: checkpoint callbacks come last, and save it only now.
        """
        if self._phase is not None:
            self._phase.driver.detach(keep=True)

    # ------------------------------------------------------------------------------------------------ the decisions

    def on_check(self, trainer: Trainer, value: float | None, plateau: bool) -> None:
        """Decides to switch, or to return; all processes alike."""
        if value is not None:
            self._ledger.note(trainer, value)
        if self.switched:
            reason = self.rules.reason_to_return(self._ledger.progress, self._ledger.first_speed, plateau)
            if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
                self._return_reason = reason or "another process found it too slow"
        elif plateau and self._phase is None:
            self._stalled = self.switched_at_step is not None or self.rules.allows_first(trainer)

    def _watch(self, trainer: Trainer) -> None:
        """Probes the curvature where a window has been collected for it; lets the switch happen if it promises much."""
        found = None if self._phase is None else self._phase.outlook(self._probe_dim or _GATE_DIM)
        if found is None:
            return
        approved = trainer.strategy.reduce_boolean_decision(self.rules.approves(found), all=False)
        text = (
            f"smallest Ritz value {found.lambda_min:.3g} (error {found.residual:.1g}), predicted decrease "
            f"{found.predicted_decrease:.3g} of {found.loss:.4g}"
        )
        self._release()
        if approved:
            say(trainer, f"SwitchToSFN: the probe speaks for SFN: {text}.")
            self._stalled = self._approved = True
        else:
            say(trainer, f"SwitchToSFN: no switch, the probe found neither a way out nor a good step: {text}.")
            self.restart(self.cooldown)

    # ------------------------------------------------------------------------------------------------ there and back

    def _switch(self, trainer: Trainer, module: LightningModule, state: str) -> None:
        """Lets the Newton optimizer train; ``state`` says how the metric stands."""
        assert self._handover is not None
        trained = (p for group in self._handover.base.param_groups for p in group["params"] if p.requires_grad)
        if not all(bool(torch.isfinite(p).all()) for p in trained):  # a frozen mask may well hold -inf
            self._given_up = True
            rank_zero_warn("SwitchToSFN does not switch: the parameters are not finite any more.")
            return
        others = self._begin(trainer, module).take_over(trainer, self._handover)
        self.switched = True
        self.switched_at_step = trainer.global_step
        self._ledger.begin(trainer, type(self.newton).__name__, newton=True)
        value = self._ledger.phase.before
        reached = "not known yet" if math.isnan(value) else f"at {value:.6g}"
        say(
            trainer,
            f"SwitchToSFN: {self.monitor} {state} {reached}; saddle-free Newton goes on from step "
            f"{trainer.global_step}.{others}",
        )
        self.restart()

    def _return(self, trainer: Trainer) -> None:
        """Lets the first optimizer train again."""
        assert self._handover is not None
        schedulers = self._handover.back(reset=self.rules.momentum == "reset")
        self._release()
        self.switched = False
        name = type(self._handover.base).__name__
        self._ledger.begin(trainer, name, newton=False)
        reason, self._return_reason = self._return_reason, None
        say(trainer, f"SwitchToSFN: {name} goes on from step {trainer.global_step}, because {reason}.{schedulers}")
        self.restart(self.cooldown)

    def _make_newton(self) -> SaddleFreeNewton:
        """The Newton optimizer over the first one's parameters."""
        assert self._handover is not None
        return make_newton(self._make_optimizer, self._handover.base, type(self).__name__)

    def _begin(self, trainer: Trainer, module: LightningModule) -> NewtonPhase:
        """Makes a Newton optimizer and what collects its data."""
        assert self._handover is not None
        newton = self._make_newton()
        driver = WindowedNewton(
            trainer,
            module,
            newton,
            self.budgets,
            weight_decay=coupled_decay(self._handover.base),
            before_step=self._before_newton_step,
            on_step=self._after_newton_step,
            on_failure=self._after_failure,
        )
        self._phase = NewtonPhase(newton, driver)
        return self._phase

    def _release(self) -> None:
        """Gives up the Newton optimizer with the memory that it and its window hold."""
        if self._phase is not None:
            self._phase.driver.detach()
        self._phase, self._failures = None, 0

    # ------------------------------------------------------------------------------------------------ Newton's steps

    def _before_newton_step(self) -> None:
        assert self._phase is not None
        self._phase.rates.restore()
        if self._ledger.report.spectrum_at_switch is None:
            self._ledger.report.spectrum_at_switch = self._probe()

    def _after_newton_step(self, record: StepRecord) -> None:
        assert self._phase is not None
        self._steps.note(record)
        self._failures = 0
        assert self._trainer is not None
        self._ledger.count_step(self._trainer, record, self._phase)
        steps = self._ledger.phase.steps
        if is_whole(self.rules.return_when) and steps >= self.rules.return_when:
            self._return_reason = f"{steps} Newton steps were asked for"

    def _after_failure(self, error: Exception) -> None:
        rank_zero_warn(f"A Newton step was impossible, and the parameters are as they were: {error}")
        self._failures += 1
        if is_out_of_memory(error) or self._failures >= _TOLERATED_FAILURES:
            self._given_up = True
            self._return_reason = "memory does not suffice" if is_out_of_memory(error) else "Newton steps keep failing"

    def _probe(self) -> Spectrum | None:
        return self._phase.spectrum(self._probe_dim) if self._phase is not None and self._probe_dim else None

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Phase, counters, the Newton optimizer's state, the batches that wait, and the random numbers."""
        alone = self._trainer is not None and self._trainer.world_size == 1
        device = self._trainer.strategy.root_device if self._trainer is not None else None
        return super().state_dict() | {
            "switched_at_step": self.switched_at_step,
            "stalled": self._stalled,
            "approved": self._approved,
            "given_up": self._given_up,
            "return_reason": self._return_reason,
            "failures": self._failures,
            "ledger": self._ledger.state_dict(),
            "newton": self._phase.newton_state() if self._phase is not None and self.switched else None,
            "window": None if self._phase is None else self._phase.driver.state_dict(),
            "random": RandomState.capture(device).state_dict() if alone else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; a switched run switches again when training starts."""
        super().load_state_dict(state_dict)
        self.switched_at_step = state_dict["switched_at_step"]
        self._stalled, self._approved = state_dict["stalled"], state_dict["approved"]
        self._given_up = state_dict["given_up"]
        self._return_reason, self._failures = state_dict["return_reason"], state_dict["failures"]
        self._ledger.load_state_dict(state_dict["ledger"])
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the first optimizer and its schedulers in Lightning's places, where any Trainer finds them."""
        if self.switched and self._handover is not None:
            self._handover.store(checkpoint)


def _require_one_switch(trainer: Trainer) -> None:
    """Checks that the Trainer has an optimizer to replace, and that nothing else replaces it."""
    if type(trainer.strategy).__name__ in ("SFNStrategy", "SFNDDPStrategy"):
        raise MisconfigurationException(
            "SwitchToSFN has nothing to switch to: the strategy trains with saddle-free Newton from the start. "
            "Use strategy='auto' or 'ddp' with the callback, or the strategy without it."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in a connector
    watching = [callback.monitor for callback in callbacks if isinstance(callback, SwitchToSFN)]
    if len(watching) > 1:
        raise MisconfigurationException(
            f"The Trainer has {len(watching)} SwitchToSFN callbacks (monitors {', '.join(watching)}), but "
            "there is one optimizer to replace: keep one of them."
        )


def _stand_behind_early_stopping(trainer: Trainer, switch: SwitchToSFN) -> None:
    """Moves behind the `EarlyStopping` callbacks, the first of which is ``trainer.early_stopping_callback``."""
    stopping = [callback for callback in trainer.early_stopping_callbacks if callback is not switch]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in a connector
    if not stopping or callbacks.index(stopping[-1]) < callbacks.index(switch):
        return
    others = [callback for callback in callbacks if callback is not switch]
    others.insert(others.index(stopping[-1]) + 1, switch)
    trainer.callbacks = others  # type: ignore[attr-defined]  # a new list: Lightning walks over the old one


def _warn_of_earlier_stops(trainer: Trainer, switch: SwitchToSFN) -> None:
    """Warns where an `EarlyStopping` ends training at the plateau at which the switch would come."""
    if switch.check_every_n_steps is not None:
        return  # its patience counts other checks
    for stopping in trainer.early_stopping_callbacks:
        same = stopping is not switch and (stopping.monitor, stopping.mode) == (switch.monitor, switch.mode)
        if same and stopping.patience <= switch.patience and abs(stopping.min_delta) >= abs(switch.min_delta):
            rank_zero_warn(
                f"EarlyStopping(monitor={stopping.monitor!r}, patience={stopping.patience}) ends training before "
                f"SwitchToSFN(patience={switch.patience}) can switch: give it a patience that is larger by the checks "
                "that saddle-free Newton shall have."
            )
