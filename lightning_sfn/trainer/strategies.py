"""Strategies that train an unchanged module with saddle-free Newton from the first step, on one device or on many."""

from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies.strategy import Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ProcessError, Processes
from lightning_sfn.trainer.budgets import DataBudgets, Reduction
from lightning_sfn.trainer.checks import require_factory
from lightning_sfn.trainer.handover import Handover, OptimizerFactory, coupled_decay, make_newton, take_clipping
from lightning_sfn.trainer.misplaced import NamesMisplacedOptions
from lightning_sfn.trainer.mixin import SaddleFreeNewtonMixin
from lightning_sfn.trainer.own_rates import OwnRates
from lightning_sfn.trainer.step_log import StepLog
from lightning_sfn.trainer.support import (
    require_curvature,
    require_one_optimizer,
    require_replayable,
    require_steady_weights,
)
from lightning_sfn.trainer.window import WindowedNewton

__all__ = ["SFNDDPStrategy", "SFNStrategy"]


class _NewtonStrategy(NamesMisplacedOptions, Strategy):
    """What both strategies add to Lightning's, with their options: a Newton optimizer in the place of the module's."""

    def __init__(
        self,
        optimizer: OptimizerFactory = SaddleFreeNewton,
        *,
        gradient_batches: int | Literal["epoch"] = "epoch",
        curvature_fraction: float = 0.1,
        trial_fraction: float = 0.1,
        adaptive: bool = True,
        hold: bool = False,
        reduction: Reduction = "mean",
        **options: Any,
    ) -> None:
        require_factory(optimizer)
        super().__init__(**options)
        self._make_optimizer = optimizer
        self._budgets = DataBudgets(gradient_batches, curvature_fraction, trial_fraction, adaptive, hold, reduction)
        self._driver: WindowedNewton | None = None
        self._hooks: _Hooks | None = None
        self._base: Optimizer | None = None  # the module's own, where Newton's took its place
        self._rates: OwnRates | None = None  # of the one that did

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Lets the module make its optimizer, and puts Newton's in its place (unless it is one already)."""
        super().setup_optimizers(trainer)
        self._driver = self._base = self._rates = None  # of another fit
        module, who = self.lightning_module, type(self).__name__
        assert isinstance(module, LightningModule)
        if isinstance(module, SaddleFreeNewtonMixin):
            return  # it steps its Newton optimizers itself
        require_replayable(trainer, module, who)
        require_steady_weights(module, who)
        require_one_optimizer(trainer, who)
        base = self.optimizers[0]
        if isinstance(base, SaddleFreeNewton):
            require_curvature(base.curvature, who)
            newton = base
        else:
            newton = make_newton(self._make_optimizer, base, who)
            self._base, self._rates = base, OwnRates(newton, who)
            if others := Handover(trainer, "rest").to(newton):
                rank_zero_info(f"{who}:{others}")
        take_clipping(trainer, newton, who)
        steps = StepLog()
        self._driver = WindowedNewton(
            trainer,
            module,
            newton,
            self._budgets,
            weight_decay=[] if newton is base else coupled_decay(base),
            before_step=self._restore_rates,
            on_step=steps.note,
        )
        self._hooks = _Hooks(self._driver, steps)
        newton.attach(self._driver)
        _callbacks(trainer).insert(0, self._hooks)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, and what the driver carries from window to window.

        Where Newton's took the place of another optimizer, that one's state stands in Lightning's places: a Trainer
        without the strategy goes on with its learning rates.
        """
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if self._rates is not None and self._base is not None:
            own = self._rates.put_into(state)
            state = self._base.state_dict() | {"newton": own["newton"], "newton_groups": own["param_groups"]}
        return state if self._driver is None else state | {"window": self._driver.state_dict()}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Takes over what `optimizer_state` gave."""
        if self._driver is not None:
            state = checkpoint["optimizer_states"][0]
            if "newton" not in state:
                raise MisconfigurationException(
                    f"The checkpoint was saved with another optimizer, which {type(self).__name__} cannot go on with: "
                    "load its weights alone (load_from_checkpoint), or train with the SwitchToSFN callback."
                )
            if "window" in state:
                self._driver.load_state_dict(state["window"])
            if "newton_groups" in state:  # older checkpoints have them in Lightning's place
                own = {"state": {}, "param_groups": state["newton_groups"], "newton": state["newton"]}
                checkpoint = checkpoint | {"optimizer_states": [own]}
        super().load_optimizer_state_dict(checkpoint)
        if self._rates is not None:
            self._rates.remember()

    def _restore_rates(self) -> None:
        if self._rates is not None:
            self._rates.restore()

    def teardown(self) -> None:
        """Takes our hands off the Trainer; the state stays, for checkpoints saved afterwards."""
        if self._driver is not None:
            self._driver.detach()
        module = self.lightning_module
        if self._hooks is not None and isinstance(module, LightningModule):
            _callbacks(module.trainer).remove(self._hooks)
        self._hooks = None
        super().teardown()


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set in a connector


class _Hooks(Callback):
    """The moments of a run that strategies do not see."""

    def __init__(self, driver: WindowedNewton, steps: StepLog) -> None:
        self._driver, self._steps = driver, steps

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._driver.note_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.gradient_clip_val:
            self._driver.note_gradient()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._steps.flush(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._driver.note_epoch_end()
        self._driver.end_window()
        self._steps.flush(trainer, pl_module)


class SFNStrategy(_NewtonStrategy, SingleDeviceStrategy):
    """Trains an unchanged module (automatic optimization) with saddle-free Newton on one device: ``strategy="sfn"``.

    The module's own optimizer is made, for its parameter groups and weight decay, and replaced. Its learning rate
    schedulers rest. A module that makes a `SaddleFreeNewton` itself keeps it, schedulers included; one with
    `SaddleFreeNewtonMixin` steps as it does anywhere.

    Args:
        optimizer: Makes the optimizer from parameter groups: `SaddleFreeNewton`, a `functools.partial` of it, or
            ``class_path`` and ``init_args`` in YAML.
        gradient_batches: Loader batches (of each process) that the gradient is accumulated over before an update at
            most, over which an epoch is shared out evenly; or ``"epoch"``. They are kept on the device until then.
        curvature_fraction: Share of those batches that Hessian-vector products see.
        trial_fraction: Share of those batches that trial losses see.
        adaptive: Whether both shares double where steps achieve little (up to everything) and halve where they do well.
        hold: Keep the first whole window and take a step on it for each later loader batch (small data).
        reduction: ``"mean"`` weights all batches alike, as Lightning and DDP do; ``"samples"`` by their cases.
        options: Options of Lightning's `SingleDeviceStrategy`.

    Raises:
        MisconfigurationException: An argument is out of its range, or the Trainer has several devices.
    """

    strategy_name = "sfn"

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The one device; Lightning sets it, where a strategy lets it."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise MisconfigurationException(
                f"SFNStrategy trains on one device, but the Trainer has {len(devices)}: use strategy='sfn_ddp'."
            )
        if devices:
            self._root_device = devices[0]


class SFNDDPStrategy(_NewtonStrategy, DDPStrategy):
    """Trains an unchanged module with saddle-free Newton on many devices: ``strategy="sfn_ddp"``.

    Each process computes losses, gradients and Hessian-vector products on its own batches; they are averaged by one
    collective each, and all processes take the same step. ``SaddleFreeNewton(basis="sharded")`` shares the Krylov basis
    out. ``sfn_ddp_spawn`` and ``sfn_ddp_fork`` start processes as Lightning's strategies of these names do.

    Args:
        optimizer: Makes the optimizer from parameter groups: `SaddleFreeNewton`, a `functools.partial` of it, or
            ``class_path`` and ``init_args`` in YAML.
        gradient_batches: Loader batches (of each process) that the gradient is accumulated over before an update at
            most, over which an epoch is shared out evenly; or ``"epoch"``. They are kept on the device until then.
        curvature_fraction: Share of those batches that Hessian-vector products see.
        trial_fraction: Share of those batches that trial losses see.
        adaptive: Whether both shares double where steps achieve little (up to everything) and halve where they do well.
        hold: Keep the first whole window and take a step on it for each later loader batch (small data).
        reduction: ``"mean"`` weights all batches alike, as Lightning and DDP do; ``"samples"`` by their cases.
        options: Options of Lightning's `DDPStrategy`: ``timeout``, ``find_unused_parameters``, ``static_graph``, ...

    Raises:
        MisconfigurationException: An argument is out of its range, or the ranks hold different models.
    """

    def configure_ddp(self) -> None:
        """Compares the ranks' models before DDP does, which waits for ranks that do not answer."""
        module = self.lightning_module
        assert isinstance(module, LightningModule)
        try:
            description = FlatParameters(module.parameters()).description
        except ValueError as error:
            description = f"none that can be trained ({str(error).rstrip('.')})"
        remedy = "build the same model on every rank, with the same dtype and the same frozen parameters."
        try:
            Processes().require_equal(description, "models", remedy)
        except ProcessError as error:
            raise MisconfigurationException(str(error)) from error
        FlatParameters(module.parameters())  # where no rank has anything to train, this says so
        super().configure_ddp()
