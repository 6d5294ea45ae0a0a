"""Kronecker-factored coordinates where a Trainer drives: no module has to be handed over."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn import SaddleFreeNewton, SaddleFreeNewtonMixin, SFNStrategy, SwitchToSFN

from .modules import make_trainer, regression_loader

KRONECKER = partial(SaddleFreeNewton, krylov_dim=4, preconditioner="kronecker")


class Fitting(LightningModule):
    """A small regression with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = next(iter(regression_loader()))[0].shape[1]
        self.net = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 1))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y.reshape(len(x), -1)[:, :1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Own(SaddleFreeNewtonMixin, Fitting):
    newton = staticmethod(KRONECKER)

    def objective(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y.reshape(len(x), -1)[:, :1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.newton(self.parameters())


def test_the_switch_uses_them_on_an_unchanged_module() -> None:
    callback = SwitchToSFN(switch_at_epoch=1, optimizer=KRONECKER)
    trainer = make_trainer(4, callbacks=[callback])
    trainer.fit(Fitting(), regression_loader())
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, SaddleFreeNewton)
    record = optimizer.last_step
    assert record is not None
    assert record.accepted
    assert (record.coordinates, record.unfactored) == ("kronecker", ())


@pytest.mark.parametrize("strategy", ["sfn", "auto"])
def test_strategy_and_mixin_use_them(strategy: str) -> None:
    module = Own() if strategy == "auto" else Fitting()
    trainer = make_trainer(3, strategy=SFNStrategy(optimizer=KRONECKER) if strategy == "sfn" else "auto")
    trainer.fit(module, regression_loader())
    optimizer = trainer.optimizers[0]
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(optimizer, SaddleFreeNewton)
    assert optimizer.last_step is not None
    assert (optimizer.last_step.coordinates, optimizer.last_step.unfactored) == ("kronecker", ())


HEAVY = partial(KRONECKER, heavy_ball=0.9)


class Numbers(Callback):
    """Keeps what was logged in each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("sfn/")}
        self.seen.append(found)


@pytest.mark.parametrize("way", ["switch", "strategy", "mixin"])
def test_momentum_steps_take_turns_under_every_driver_and_log_what_they_know(way: str) -> None:
    numbers = Numbers()
    callbacks: list[Callback] = [numbers]
    module: LightningModule = Fitting()
    if way == "switch":
        callbacks.append(SwitchToSFN(switch_at_epoch=1, optimizer=HEAVY))
    elif way == "mixin":
        module = Own()
        module.newton = HEAVY  # type: ignore[method-assign]
    strategy = SFNStrategy(optimizer=HEAVY) if way == "strategy" else "auto"
    trainer = make_trainer(8, callbacks=callbacks, strategy=strategy)
    trainer.fit(module, regression_loader())
    optimizer = getattr(trainer.optimizers[0], "optimizer", trainer.optimizers[0])
    assert isinstance(optimizer, SaddleFreeNewton)
    assert optimizer._glide is not None
    # A turn of momentum steps is under way, has just ended, or has been compared.
    glide = optimizer._glide
    assert glide.velocity is not None or glide.pace.sown is not None or "momentum" in glide.pace.rates
    values = [value for found in numbers.seen for value in found.values()]
    assert values
    assert all(math.isfinite(value) for value in values)
