"""`SaddleFreeNewtonMixin`: manual optimization with saddle-free Newton, for modules written for it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.options import require_positive_or_none
from lightning_sfn.newton.precision import full_precision
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.budgets import DataBudgets, Reduction
from lightning_sfn.trainer.checks import misconfigured, require_name
from lightning_sfn.trainer.recording import RecordedStep, own_copies
from lightning_sfn.trainer.step_log import log_step
from lightning_sfn.trainer.support import require_differentiable, require_steady_weights
from lightning_sfn.trainer.window import WindowedNewton

__all__ = ["SaddleFreeNewtonMixin"]

BatchLoss = Callable[[Any], Tensor]


class SaddleFreeNewtonMixin(LightningModule):
    """Manual optimization with saddle-free Newton: define a loss and an optimizer.

    `training_step` collects loader batches and steps the optimizers when there are enough. Each batch is evaluated once
    as any training step would, so that logs, metrics and batch norm see it once; gradients, Hessian-vector products and
    trial losses come from isolated replays, in the parameters' own precision also where the Trainer's is mixed. A
    module with several optimizers (a GAN) overrides `objectives`; the optimizers step one after the other on the same
    batches.

    ``configure_optimizers`` returns `SaddleFreeNewton` optimizers, with Lightning's learning rate schedulers if wanted:
    those with ``interval="step"`` are stepped after every ``frequency``-th Newton step, the others at the end of
    epochs. Hooks of this class that a module overrides (``on_fit_start``, ``on_train_epoch_end``, ``teardown``,
    ``on_save_checkpoint``, ``on_load_checkpoint``) call ``super()``.

    Args:
        args: Arguments of the next class.
        gradient_batches: Loader batches (of each process) that the gradient is accumulated over before an update at
            most, over which an epoch is shared out evenly; or ``"epoch"``. They are kept on the device until then.
        curvature_fraction: Share of those batches that Hessian-vector products see.
        trial_fraction: Share of those batches that trial losses see.
        adaptive: Whether both shares double where steps achieve little (up to everything) and halve where they do well.
        hold: Keep the first whole window and take a step on it for each later loader batch (small data).
        reduction: ``"mean"`` weights all batches alike, as Lightning and DDP do; ``"samples"`` by their cases.
        max_grad_norm: Clips gradients to this norm, in place of the optimizers' own bound.
        max_step_norm: Clips steps to this norm, in place of the optimizers' own bound.
        scheduler_monitor: The metric that `ReduceLROnPlateau` schedulers watch; Lightning drops a scheduler's own
            ``monitor`` under manual optimization.
        kwargs: Keyword arguments of the next class.

    Raises:
        MisconfigurationException: An argument is out of its range.

    Example:
        >>> class Net(SaddleFreeNewtonMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__(gradient_batches=8, max_step_norm=1.0)
        ...         self.layer = torch.nn.Linear(3, 1)
        ...
        ...     def objective(self, batch):
        ...         x, y = batch
        ...         return (self.layer(x) - y).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return SaddleFreeNewton(self.parameters(), krylov_dim=4)
        >>> Net().automatic_optimization
        False
    """

    def __init__(
        self,
        *args: Any,
        gradient_batches: int | Literal["epoch"] = "epoch",
        curvature_fraction: float = 0.1,
        trial_fraction: float = 0.1,
        adaptive: bool = True,
        hold: bool = False,
        reduction: Reduction = "mean",
        max_grad_norm: float | None = None,
        max_step_norm: float | None = None,
        scheduler_monitor: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        with misconfigured():
            self._bounds = {
                "max_grad_norm": require_positive_or_none("max_grad_norm", max_grad_norm),
                "max_step_norm": require_positive_or_none("max_step_norm", max_step_norm),
            }
        if scheduler_monitor is not None:
            require_name("scheduler_monitor", scheduler_monitor)
        self._budgets = DataBudgets(gradient_batches, curvature_fraction, trial_fraction, adaptive, hold, reduction)
        self._scheduler_monitor = scheduler_monitor
        self._drivers: list[_ManualNewton] = []
        self._ended: list[dict[str, Any]] = []  # their states when the last fit was over
        self._restored: dict[str, Any] = {}
        self._newton_steps = 0

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses modules of the other namespace, which no Trainer of either would take."""
        super().__init_subclass__(**options)
        if any(base.__module__.startswith("lightning.pytorch") for base in cls.__mro__):
            raise MisconfigurationException(
                f"{cls.__name__} mixes SaddleFreeNewtonMixin with a module of lightning.pytorch, but the mixin belongs "
                "to pytorch_lightning: import LightningModule and Trainer from there (the code is the same)."
            )

    def objective(self, batch: Any) -> Tensor:
        """The loss of a batch, with its graph; no ``backward``, no optimizer steps.

        Args:
            batch: The batch.

        Returns:
            A scalar tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no objective(batch) that returns the loss.")

    def objectives(self) -> Sequence[BatchLoss]:
        """The losses, one for each optimizer, in the order of ``configure_optimizers``; `objective` alone by default.

        Each optimizer lowers its own loss by its own parameters, all others held.
        """
        return [self.objective]

    # ------------------------------------------------------------------------------------------------ stepping

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Evaluates the losses of a batch, and steps the optimizers when the window is complete.

        Args:
            batch: The batch.
            batch_idx: Its index.

        Returns:
            The first loss.
        """
        if not self._drivers:
            self._prepare()
        with full_precision():  # without Lightning's autocast around this method: Lanczos amplifies rounding noise
            pairs = zip(self._drivers, self.objectives(), strict=True)
            losses = [driver.record(batch, batch_idx, loss) for driver, loss in pairs]
            if self._drivers[0].ready:
                self._step_all(losses)
        return losses[0]

    def _replay_step(self, batch: Any, batch_idx: int, replayed: int) -> Tensor:
        """What a replay evaluates in place of `training_step`: one of the losses."""
        return self.objectives()[replayed](batch)

    def _step_all(self, losses: Sequence[Tensor | None]) -> None:
        """Steps every optimizer through Lightning, so that ``global_step``, checkpoints and progress bars count."""
        optimizers = self.optimizers()
        for index, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            optimizer.step(partial(losses.__getitem__, index))
            record, prefix = self._drivers[index].last_record, "sfn" if len(losses) == 1 else f"sfn/{index}"
            if record is not None:
                log_step(self.trainer, self, record, prefix)
        if any(driver.last_record is not None for driver in self._drivers):
            self._newton_steps += 1
            self._step_schedulers("step", self._newton_steps)

    def _step_schedulers(self, interval: str, count: int) -> None:
        for config in self.trainer.strategy.lr_scheduler_configs:
            if config.interval != interval or count % config.frequency:
                continue
            if not isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                config.scheduler.step()
                continue
            known = self.trainer.callback_metrics
            if self._scheduler_monitor not in known:
                raise MisconfigurationException(
                    f"scheduler_monitor is {self._scheduler_monitor!r}, but a ReduceLROnPlateau scheduler needs one of "
                    f"the logged metrics: {', '.join(sorted(known)) or 'none so far'}."
                )
            config.scheduler.step(float(known[self._scheduler_monitor]))

    # ------------------------------------------------------------------------------------------------ Lightning hooks

    def on_fit_start(self) -> None:
        """Checks what the module was given, and readies its optimizers."""
        super().on_fit_start()
        self._prepare()

    def on_train_epoch_end(self) -> None:
        """Ends the window with the epoch, where a hook cut that short, and steps the schedulers of epochs."""
        super().on_train_epoch_end()
        for driver in self._drivers:
            driver.note_epoch_end()
        if not all(driver.idle for driver in self._drivers):
            with full_precision():
                self._step_all([None] * len(self._drivers))
        self._step_schedulers("epoch", self.trainer.current_epoch + 1)

    def teardown(self, stage: str) -> None:
        """Gives back the memory that held the window; what else decides stays, for checkpoints saved afterwards."""
        super().teardown(stage)
        for driver in self._drivers:
            driver.detach()
        self._ended, self._drivers = self._states(), []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores what decides about later windows, and on one process the batches that wait."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["sfn_windows"] = {"windows": self._states(), "newton_steps": self._newton_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over what was stored, where a fit resumes; `load_from_checkpoint` calls this too, for the weights."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._restored = checkpoint.get("sfn_windows", {})

    def _states(self) -> list[dict[str, Any]]:
        return [driver.state_dict() for driver in self._drivers] or self._ended

    def _prepare(self) -> None:
        trainer, who = self.trainer, type(self).__name__
        own = type(self)
        if (own.objective, own.objectives) == (SaddleFreeNewtonMixin.objective, SaddleFreeNewtonMixin.objectives):
            replaced = own.training_step is not SaddleFreeNewtonMixin.training_step
            raise MisconfigurationException(
                f"{who} defines no objective(batch) that returns the loss: "
                + ("rename its training_step, which takes the place of the mixin's." if replaced else "define it.")
            )
        require_differentiable(trainer, self, who)
        require_steady_weights(self, who)
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"{who} steps without backward(), so there is nothing for the gradient scaler of precision='16-mixed' "
                "to scale: use precision='bf16-mixed' or '32-true'; both compute in float32 here."
            )
        optimizers = trainer.optimizers
        for optimizer in optimizers:
            if not isinstance(optimizer, SaddleFreeNewton):
                raise MisconfigurationException(
                    f"{who} steps SaddleFreeNewton optimizers, but configure_optimizers returned one of class "
                    f"{type(optimizer).__name__}: return SaddleFreeNewton(self.parameters(), ...)."
                )
            if optimizer.curvature != "hessian":
                raise MisconfigurationException(
                    f"{who} got curvature={optimizer.curvature!r}, but objective() hands over a loss without the model "
                    "output: use curvature='hessian', or SaddleFreeNewton in plain torch."
                )
        if len(self.objectives()) != len(optimizers) or not optimizers:
            raise MisconfigurationException(
                f"{who} has {len(self.objectives())} objective(s) for {len(optimizers)} optimizer(s): let objectives() "
                "return one loss for each optimizer."
            )
        self._drivers = [self._driver(trainer, index, optimizer) for index, optimizer in enumerate(optimizers)]  # type: ignore[arg-type]
        restored, self._restored = self._restored, {}
        self._newton_steps = restored.get("newton_steps", 0)
        for driver, state in zip(self._drivers, restored.get("windows", []), strict=False):
            driver.load_state_dict(state)

    def _driver(self, trainer: Trainer, index: int, optimizer: SaddleFreeNewton) -> "_ManualNewton":
        for name, bound in self._bounds.items():
            if bound is not None:
                setattr(optimizer, name, bound)
        driver = _ManualNewton(trainer, self, optimizer, self._budgets, index)
        optimizer.attach(driver)
        return driver


class _ManualNewton(WindowedNewton):
    """The window of one optimizer under manual optimization: its batches come from the module, not from Lightning."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: SaddleFreeNewton,
        budgets: DataBudgets,
        index: int,
    ) -> None:
        super().__init__(
            trainer,
            module,
            optimizer,
            budgets,
            on_step=lambda record: setattr(self, "last_record", record),
        )
        self._recorder.detach()
        self._index = index
        self.last_record: StepRecord | None = None

    @property
    def ready(self) -> bool:
        """Whether it is time for a step."""
        return self._held is not None or self._extent.is_complete

    def record(self, batch: Any, batch_idx: int, loss: BatchLoss) -> Tensor:
        """Evaluates a batch for the first time, and adds it to the window."""
        kept, state = own_copies((batch, batch_idx)), RandomState.capture(self._module.device)
        value = _require_loss(loss(batch), type(self._module).__name__).detach()
        self._offer(1)
        if self._held is None:
            self._collect([RecordedStep(kept, {"replayed": self._index}, state, value)])
        return value

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Takes the step that is due."""
        self.last_record = None
        result = closure() if closure is not None else None
        if self._held is not None:
            self._newton_step(self._held, None)
        else:
            self.end_window()
        return result

    def _loss_and_gradient(self, window: Any) -> None:
        """Nobody has taken the gradient yet."""


def _require_loss(returned: Any, who: str) -> Tensor:
    if isinstance(returned, Tensor) and returned.numel() == 1:
        return returned
    what = f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else type(returned).__name__
    raise MisconfigurationException(
        f"objective(batch) of {who} returned {what}, but the loss as a scalar tensor with its graph is expected, for "
        "every batch: reduce it, for instance by .mean()."
    )
