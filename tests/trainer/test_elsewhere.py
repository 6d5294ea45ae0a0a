"""Whole fits on another device than the CPU (a simulated one): nothing mixes devices, and the results are the CPU's."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SaddleFreeNewtonMixin, SFNStrategy, SwitchToSFN

from ..newton.elsewhere import DEVICE, Elsewhere, elsewhere, move
from .modules import Fitting, make_trainer, regression_loader


class Anywhere(CPUAccelerator):
    """Takes a device that is not its own."""

    def setup_device(self, device: torch.device) -> None:
        pass


class There(SingleDeviceStrategy):
    """Moves the model as `elsewhere` can, and leaves it there."""

    def __init__(self) -> None:
        super().__init__(device=DEVICE)

    @property
    def root_device(self) -> torch.device:
        """What Lightning would take from the accelerator."""
        return DEVICE

    def model_to_device(self) -> None:
        assert self.model is not None
        move(self.model)
        self.lightning_module._device = DEVICE  # type: ignore[union-attr]

    def teardown(self) -> None:
        pass


class NewtonThere(There, SFNStrategy):
    pass


class Normed(Fitting):
    """With batch norm, and a buffer of its own that each step changes."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)))
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += len(batch[0])
        return super().training_step(batch, batch_idx)


class ByHand(SaddleFreeNewtonMixin, LightningModule):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__(gradient_batches=4)
        self.net = Fitting().net

    def objective(self, batch: Any) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return SaddleFreeNewton(self.parameters())


Callbacks = Callable[[], Sequence[Any]]


def fitted(there: bool, module: Callable[[], LightningModule], callbacks: Callbacks, **options: Any) -> list[float]:
    """Parameters, buffers and the last epoch's loss after a fit here or there."""
    with elsewhere() if there else nullcontext():
        torch.manual_seed(0)
        made = module()
        if there:
            kind = NewtonThere if options.get("strategy") == "sfn" else There
            options |= {"accelerator": Anywhere(), "strategy": kind()}
        trainer = make_trainer(**{"max_epochs": 2, "precision": "64-true", "callbacks": list(callbacks()), **options})
        trainer.fit(made, regression_loader(16))
        tensors = [*made.parameters(), *made.buffers()]
        assert all(isinstance(t, Elsewhere) == there for t in tensors)
        numbers = [number for t in tensors for number in t.detach().cpu().reshape(-1).tolist()]
        return [*numbers, float(trainer.callback_metrics["train_loss"])]


def switch(**options: Any) -> Callbacks:
    return lambda: [SwitchToSFN(switch_at_epoch=1, **options)]


@pytest.mark.parametrize(
    ("module", "callbacks", "options"),
    [
        (Normed, switch(), {}),
        (Fitting, switch(hold=True, gradient_batches=2), {"gradient_clip_val": 0.5}),
        (Fitting, switch(return_when=1), {"accumulate_grad_batches": 2, "max_epochs": 3}),
        (Fitting, list, {"strategy": "sfn"}),
        (ByHand, list, {}),
    ],
    ids=["switch", "hold", "return", "strategy", "mixin"],
)
def test_a_fit_on_another_device_is_that_on_the_cpu(module: Any, callbacks: Callbacks, options: dict[str, Any]) -> None:
    here, there = (fitted(where, module, callbacks, **options) for where in (False, True))
    assert there == pytest.approx(here, rel=1e-5, abs=1e-7)


def test_a_spectrum_on_another_device_is_that_on_the_cpu() -> None:
    found = []
    for there in (False, True):
        spectrum = HessianSpectrum(every_n_epochs=1, log=False, density=True)
        fitted(there, Fitting, lambda spectrum=spectrum: [spectrum], max_epochs=1)
        assert spectrum.last is not None
        found.append((spectrum.last.lambda_min, spectrum.last.lambda_max, spectrum.last.gradient_norm))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
