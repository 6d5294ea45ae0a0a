"""Manual optimization: `SaddleFreeNewtonMixin` on one device."""

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sfn import SaddleFreeNewton, SaddleFreeNewtonMixin

from .modules import Factorised, MemoryLogger, factorised_loader, flat, make_trainer, regression_loader


class Net(SaddleFreeNewtonMixin, LightningModule):
    """``y = B A x`` beside its saddle."""

    def __init__(self, scheduler: Callable[[Any], Any] | None = None, newton: Any = None, **options: Any) -> None:
        super().__init__(**options)
        start = Factorised()
        self.a, self.b = start.a, start.b
        self.scheduler, self.newton, self.seen = scheduler, newton or {}, 0

    def objective(self, batch: Any) -> Tensor:
        self.seen += 1
        x, y = batch
        loss = (x @ self.a.T @ self.b.T - y).square().sum(1).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = SaddleFreeNewton(self.parameters(), **self.newton)
        return optimizer if self.scheduler is None else [[optimizer], [self.scheduler(optimizer)]]


def trained(module: LightningModule, epochs: int = 3, **options: Any) -> Trainer:
    trainer = make_trainer(epochs, **options)
    trainer.fit(module, factorised_loader(), ckpt_path=None)
    return trainer


@pytest.mark.parametrize(("budget", "steps"), [("epoch", 3), (2, 12), (3, 9), (1, 24)])
def test_windows_end_when_full_and_with_the_epoch(budget: Any, steps: int) -> None:
    module = Net(gradient_batches=budget)
    trainer = trained(module)
    assert trainer.global_step == steps
    assert module.seen == 3 * 8  # what the module counts is not what replays do


def test_it_escapes_as_the_strategy_does() -> None:
    by_hand, by_strategy = Net(), Factorised()
    trained(by_hand, 6)
    trained(by_strategy, 6, strategy="sfn")
    # One gradient is Lightning's and one a replay's: the same to rounding, which a saddle doubles.
    torch.testing.assert_close(flat(by_hand), flat(by_strategy), rtol=1e-3, atol=1e-3)


def test_bounds_are_handed_to_the_optimizers() -> None:
    module = Net(max_grad_norm=0.5, max_step_norm=0.01)
    before = flat(module)
    trainer = trained(module, 1)
    (newton,) = trainer.optimizers
    assert (newton.max_grad_norm, newton.max_step_norm) == (0.5, 0.01)
    assert 0 < float((flat(module) - before).norm()) <= 2 * 0.01 * (1 + 1e-5)  # two inner steps


def test_steps_are_logged() -> None:
    logger = MemoryLogger()
    trained(Net(gradient_batches=4), 2, logger=logger)
    assert len(logger.values("sfn/loss_before")) == len(logger.values("sfn/accepted")) == 4


def decaying(interval: str, frequency: int) -> Callable[[Any], Any]:
    def make(optimizer: Any) -> Any:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"scheduler": scheduler, "interval": interval, "frequency": frequency}

    return make


@pytest.mark.parametrize(
    ("interval", "frequency", "halvings"), [("step", 1, 12), ("step", 4, 3), ("epoch", 1, 3), ("epoch", 2, 1)]
)
def test_schedulers_count_newton_steps_or_epochs(interval: str, frequency: int, halvings: int) -> None:
    trainer = trained(Net(decaying(interval, frequency), gradient_batches=2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**halvings


class Overflowing(Net):
    """Has no finite loss in some epochs."""

    def __init__(self, epochs: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.epochs = epochs

    def objective(self, batch: Any) -> Tensor:
        loss = super().objective(batch)
        return loss * torch.nan if self.current_epoch in self.epochs else loss


@pytest.mark.parametrize(
    ("epochs", "frequency", "halvings"), [((0, 1, 2), 1, 0), ((0, 1, 2), 2, 0), ((1,), 1, 2), ((2,), 2, 1)]
)
def test_schedulers_of_steps_rest_where_no_step_is_taken(epochs: Any, frequency: int, halvings: int) -> None:
    module = Overflowing(epochs, scheduler=decaying("step", frequency))
    with pytest.warns(UserWarning, match=r"such batches are left out of Newton steps"):
        trainer = trained(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**halvings


def test_a_scheduler_of_plateaus_gets_its_metric() -> None:
    def make(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1e9)

    rate = trained(Net(make, scheduler_monitor="train_loss")).optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3)
    with pytest.raises(MisconfigurationException, match=r"^scheduler_monitor is 'accuracy', but .*: .*train_loss\.$"):
        trained(Net(make, scheduler_monitor="accuracy"))


def test_resuming_is_going_on(tmp_path: Any) -> None:
    class Saving(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    through, resumed = Net(), Net()
    make_trainer(4, callbacks=[Saving()]).fit(through, factorised_loader(shuffle=False))
    trainer = make_trainer(4)
    trainer.fit(resumed, factorised_loader(shuffle=False), ckpt_path=tmp_path / "1.ckpt")
    assert torch.equal(flat(through), flat(resumed))
    assert trainer.global_step == 4


def test_a_checkpoint_saved_after_the_fit_goes_on() -> None:
    through, resumed = Net(), Net()
    make_trainer(4).fit(through, factorised_loader(shuffle=False))
    ended, module = make_trainer(2), Net()
    ended.fit(module, factorised_loader(shuffle=False))
    ended.save_checkpoint("ended.ckpt")
    assert torch.equal(flat(pickle.loads(pickle.dumps(module))), flat(module))  # nothing of the fit hangs on it
    make_trainer(4).fit(resumed, factorised_loader(shuffle=False), ckpt_path="ended.ckpt")
    assert torch.equal(flat(through), flat(resumed))


@pytest.mark.parametrize("options", [{}, {"hold": True}])
@pytest.mark.parametrize("looks", [False, True])
def test_weights_of_a_checkpoint_alone_are_no_resume(options: dict[str, Any], looks: bool) -> None:
    """Neither a window of the run that wrote it, nor its counts: not by load_from_checkpoint, and not by a look."""

    class Saving(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == 6:
                trainer.save_checkpoint("window.ckpt")

    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    options = options | {"gradient_batches": 5}
    trained(Net(**options), 1, callbacks=[Saving()])
    stored = torch.load("window.ckpt")
    (window,) = stored["sfn_windows"]["windows"]
    assert window["holds"] or window["waiting"] == 3  # eight batches make two windows of four
    loaded = Tested.load_from_checkpoint("window.ckpt", **options)
    if looks:
        make_trainer().test(loaded, factorised_loader(shuffle=False), ckpt_path="window.ckpt")
    plain = Net(**options)
    plain.load_state_dict(stored["state_dict"])
    ends = []
    for module in (loaded, plain):
        trainer = make_trainer(1)
        trainer.fit(module, factorised_loader(shuffle=False))
        ends.append((flat(module).tolist(), trainer.global_step, module._newton_steps))
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_checkpoints_of_steps_are_written() -> None:
    trained(
        Net(gradient_batches=2),
        1,
        callbacks=[ModelCheckpoint("kept", every_n_train_steps=2, save_top_k=-1)],
        enable_checkpointing=True,
    )
    assert sorted(path.name for path in Path("kept").iterdir()) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]


class Game(SaddleFreeNewtonMixin, LightningModule):
    """Two players: one minimizes (x - y)^2 by x, the other (y - 3)^2 + 0.1 x y by y."""

    def __init__(self) -> None:
        super().__init__(gradient_batches=1)
        self.x, self.y = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def objectives(self) -> Sequence[Callable[[Any], Tensor]]:
        return [lambda batch: (self.x - self.y).square().sum(), self.second]

    def second(self, batch: Any) -> Tensor:
        return ((self.y - 3).square() + 0.1 * self.x * self.y).sum()

    def configure_optimizers(self) -> Any:
        return [SaddleFreeNewton([p], krylov_dim="full", damping=1e-6) for p in (self.x, self.y)]


def test_two_optimizers_find_the_equilibrium_of_their_game() -> None:
    game, logger = Game(), MemoryLogger()
    trainer = make_trainer(3, logger=logger)
    trainer.fit(game, regression_loader())
    assert trainer.global_step == 2 * 3 * 4
    equilibrium = 6 / 2.1  # x = y, 2 (y - 3) + 0.1 x = 0
    assert float(game.x.detach()) == pytest.approx(equilibrium, abs=1e-4)
    assert float(game.y.detach()) == pytest.approx(equilibrium, abs=1e-4)
    assert len(logger.values("sfn/0/loss_before")) == len(logger.values("sfn/1/loss_before")) == 12


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.0}, {"max_step_norm": -1.0}, {"reduction": "sum"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(MisconfigurationException, match=rf"^{name} is {value!r}, but "):
        Net(**options)


def test_other_optimizers_are_refused() -> None:
    class Wrong(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"^Wrong steps SaddleFreeNewton optimizers, but .* SGD"):
        trained(Wrong())


def test_a_number_of_losses_that_does_not_fit_is_refused() -> None:
    class Wrong(Net):
        def objectives(self) -> Sequence[Callable[[Any], Tensor]]:
            return [self.objective, self.objective]

    with pytest.raises(MisconfigurationException, match=r"^Wrong has 2 objective\(s\) for 1 optimizer\(s\)"):
        trained(Wrong())


def test_a_module_without_a_loss_says_so() -> None:
    class Wrong(SaddleFreeNewtonMixin, LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def configure_optimizers(self) -> Any:
            return SaddleFreeNewton(self.parameters())

    with pytest.raises(MisconfigurationException, match=r"^Wrong defines no objective\(batch\) .*: define it\.$"):
        trained(Wrong())


def test_gradient_scalers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(1)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    with pytest.raises(MisconfigurationException, match=r"nothing for the gradient scaler"):
        trainer.fit(Net(), factorised_loader())


def test_a_training_step_of_the_modules_own_may_call_the_mixins() -> None:
    class Own(Net):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            loss = super().training_step(batch, batch_idx)
            self.log("own", loss, on_epoch=True, batch_size=1)
            return loss

    plain, own = Net(gradient_batches=4), Own(gradient_batches=4)
    trained(plain)
    trained(own)
    assert torch.equal(flat(plain), flat(own))
    assert own.calls == 3 * 8  # no replay calls it


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda loss: None, "NoneType"),
        (lambda loss: {"loss": loss}, "dict"),
        (lambda loss: float(loss.detach()), "float"),
        (lambda loss: loss.repeat(3), "a tensor of shape (3,)"),
    ],
)
def test_an_objective_that_is_no_loss_is_refused(change: Callable[[Tensor], Any], what: str) -> None:
    class Changed(Net):
        def objective(self, batch: Any) -> Any:
            return change(super().objective(batch))

    expected = f"objective(batch) of Changed returned {what}, but the loss as a scalar tensor"
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(expected)}"):
        trained(Changed())
