"""What cannot work is refused in one sentence, before training starts, with the way out."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SwitchToSFN
from lightning_sfn.trainer.support import require_one_optimizer, require_replayable

from .modules import Fitting, MemoryLogger, forced, make_trainer, regression_loader


class Manual(Fitting):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Drawing(Fitting):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


class FSDPStrategy(SingleDeviceStrategy):
    """Has the name that is refused."""


CALLBACKS = [SwitchToSFN, HessianSpectrum]


def refusal(callback: Callback, module: LightningModule, **options: Any) -> str:
    before = [p.clone() for p in module.parameters()]
    trainer = make_trainer(3, callbacks=[callback], logger=MemoryLogger(), **options)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(module, regression_loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)), "training had begun"
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("callback", CALLBACKS)
def test_manual_optimization(callback: Callable[[], Callback]) -> None:
    message = refusal(callback(), Manual())
    assert f"{callback.__name__} needs automatic optimization, but Manual" in message
    instead = "SaddleFreeNewtonMixin" if callback is SwitchToSFN else "hessian_spectrum(closure, params)"
    assert f"use lightning_sfn.{instead}" in message


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("callback", CALLBACKS)
def test_module_that_draws_its_own_batches(callback: Callable[[], Callback]) -> None:
    message = refusal(callback(), Drawing())
    assert f"{callback.__name__} needs training_step(batch, batch_idx), but Drawing" in message


@pytest.mark.parametrize("callback", CALLBACKS)
def test_sharding_strategies(callback: Callable[[], Callback]) -> None:
    message = refusal(callback(), Fitting(), strategy=FSDPStrategy("cpu"), accelerator="auto")
    assert "FSDPStrategy" in message
    assert "use strategy='ddp'" in message


class Optimizers:
    """Stands for a Trainer after `configure_optimizers`."""

    def __init__(self, count: int) -> None:
        self.optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1)] * count


def test_one_optimizer_is_needed() -> None:
    require_one_optimizer(Optimizers(1), "We")  # type: ignore[arg-type]
    for count in (0, 2):
        with pytest.raises(MisconfigurationException, match=f"^We replaces one optimizer, but .* returned {count}: "):
            require_one_optimizer(Optimizers(count), "We")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_a_module_without_optimizer_is_refused() -> None:
    class Without(Fitting):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(MisconfigurationException, match="configure_optimizers returned 0"):
        make_trainer(1, callbacks=[SwitchToSFN()]).fit(Without(), regression_loader())


def test_two_optimizers() -> None:
    class Two(Fitting):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    trainer = make_trainer(1, callbacks=[SwitchToSFN()])
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual"):  # by Lightning itself
        trainer.fit(Two(), regression_loader())


def test_optimizer_factory_of_another_class() -> None:
    message = refusal(forced(optimizer=torch.optim.Adam), Fitting(optimizer=partial(torch.optim.SGD, lr=0.0)))
    assert "got an optimizer of class Adam, but a SaddleFreeNewton is expected" in message


@pytest.mark.parametrize("who", ["SwitchToSFN", "SFNStrategy"])
def test_an_optimizer_that_maximizes(who: str) -> None:
    """One group that does is enough."""

    def half_maximizing(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first]}, {"params": others, "maximize": True}], lr=0.1)

    module, callback = Fitting(optimizer=half_maximizing), SwitchToSFN()
    if who == "SwitchToSFN":
        message = refusal(callback, module)
    else:
        message = refusal(Callback(), module, strategy="sfn", accelerator="auto")
    assert message.startswith(f"{who} got an optimizer with maximize=True, but saddle-free Newton minimizes")


def test_plain_module_is_accepted() -> None:
    for callback in CALLBACKS:
        require_replayable(make_trainer(1), Fitting(), callback.__name__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience is 0, "),
        ({"min_delta": -0.1}, "min_delta is -0.1, "),
        ({"probe_dim": -1}, "probe_dim is -1, "),
        ({"gradient_batches": 0}, "gradient_batches is 0, "),
        ({"curvature_fraction": 0.0}, "curvature_fraction is 0.0, "),
        ({"trial_fraction": 2}, "trial_fraction is 2, "),
        ({"mode": "lowest"}, "`mode` can be "),
    ],
)
def test_options_of_the_switch_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        SwitchToSFN(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 5}, "every_n_epochs is 1 and every_n_steps is 5, but only one"),
        ({"every_n_epochs": 0}, "every_n_epochs is 0, but a positive number"),
        ({"every_n_steps": -3}, "every_n_steps is -3, but a positive number"),
        ({"krylov_dim": 0}, "krylov_dim is 0, but a whole number of at least 1"),
        ({"num_batches": 0}, "num_batches is 0, but a positive number"),
    ],
)
def test_options_of_the_spectrum_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        HessianSpectrum(**options)
    assert str(caught.value).startswith(message)


def test_spectrum_without_a_logger() -> None:
    trainer = make_trainer(1, callbacks=[HessianSpectrum()])
    with pytest.raises(MisconfigurationException, match="HessianSpectrum needs a logger, but the Trainer has none"):
        trainer.fit(Fitting(), regression_loader())


def test_newton_in_a_module_with_manual_optimization() -> None:
    """The alternative that the refusal names works."""

    class ByHand(Fitting):
        def __init__(self) -> None:
            super().__init__(optimizer=SaddleFreeNewton)
            self.automatic_optimization = False
            self.seen: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            loss = self.optimizers().step(lambda: (self.net(x) - y).square().mean())  # type: ignore[union-attr]
            self.seen.append(float(loss))

    module = ByHand()
    trainer = make_trainer(6)
    trainer.fit(module, regression_loader(16, 16))
    assert trainer.global_step == 6
    assert module.seen[-1] < 0.5 * module.seen[0]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_in_the_other_namespace(callback: Callable[[], Callback]) -> None:
    import lightning

    trainer = lightning.Trainer(callbacks=[callback()], logger=False, max_epochs=1, enable_checkpointing=False)
    assert type(trainer.callbacks[0]) is callback
