"""Hooks that change gradients are told of, once; other hooks, and what replays see as well, are not."""

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from .modules import Fitting, forced, make_trainer, regression_loader


def fit(module: LightningModule, *callbacks: Callback, strategy: str = "auto", **options: Any) -> None:
    switch = [] if strategy == "sfn" else [forced()]
    trainer = make_trainer(4, callbacks=[*switch, *callbacks], strategy=strategy, **options)
    trainer.fit(module, regression_loader())


def mask(module: Fitting) -> None:
    module.net[0].weight.grad[0] = 0


class AfterBackward(Fitting):
    def on_after_backward(self) -> None:
        mask(self)


class BeforeStep(Fitting):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        mask(self)


class Clipping(Fitting):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=1e-3)


class Masking(Callback):
    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        mask(pl_module)


@pytest.mark.parametrize("strategy", ["auto", "sfn"])
@pytest.mark.parametrize(
    ("module", "callbacks", "options"),
    [
        (AfterBackward, [], {}),
        (AfterBackward, [], {"accumulate_grad_batches": 2}),
        (AfterBackward, [], {"gradient_clip_val": 0.1}),
        (BeforeStep, [], {}),
        (Clipping, [], {}),
        (Fitting, [Masking], {}),
    ],
)
def test_edits_of_gradients_are_told_once(
    strategy: str, module: Any, callbacks: list[Any], options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    fit(module(), *[make() for make in callbacks], strategy=strategy, **options)
    told = [warning for warning in recwarn if str(warning.message).startswith("A hook (on_after_backward")]
    assert len(told) == 1


class Looking(Fitting):
    """Reads gradients, as for a log of their norm."""

    def on_after_backward(self) -> None:
        self.norm = self.net[0].weight.grad.norm()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norm = self.norm + self.net[0].weight.grad.norm()


class Held(Fitting):
    """Holds a row in a way that derivatives of replays see."""

    def __init__(self) -> None:
        super().__init__()

        def masked(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[0] = 0
            return gradient

        self.net[0].weight.register_hook(masked)


@pytest.mark.parametrize("module", [Looking, Held])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_other_hooks_are_not(module: Any, options: dict[str, Any]) -> None:
    made = module()
    before = made.net[0].weight.detach().clone()
    fit(made, **options)  # warnings are errors here
    after = made.net[0].weight.detach()
    assert torch.equal(before[0], after[0]) == (module is Held)
    assert not torch.equal(before[1], after[1])


def test_a_gradient_scaler_is_none() -> None:
    from pytorch_lightning.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    fit(Fitting(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
