"""What code that was written for the first optimizer meets when Newton's has taken its place."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from torch import nn

from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SFNStrategy, SwitchToSFN
from lightning_sfn.trainer.handover import coupled_decay

from .modules import Backboned, Fitting, MemoryLogger, flat, make_trainer, regression_loader, sgd

IGNORED = "ignores the learning rate .* that a callback or hook wrote into the optimizer"


def switching(**options: Any) -> SwitchToSFN:
    return SwitchToSFN(**({"switch_at_epoch": 1, "probe_dim": 0} | options))


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 3, **options: Any) -> Trainer:
    trainer = make_trainer(epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, regression_loader())
    return trainer


def end(*callbacks: Callback, module: Callable[[], LightningModule] = Fitting, **options: Any) -> torch.Tensor:
    """The parameters after a run."""
    torch.manual_seed(0)
    made = module()
    fit(made, *callbacks, **options)
    return flat(made)


# ------------------------------------------------------------------------------------------------ learning rates


class Rated(SaddleFreeNewton):
    """Notes the learning rates of its steps."""

    def __init__(self, params: Any, rates: list[list[float]], **options: Any) -> None:
        super().__init__(params, **options)
        self.rates = rates

    def step_on(self, *args: Any, **kwargs: Any) -> Any:
        self.rates.append([group["lr"] for group in self.param_groups])
        return super().step_on(*args, **kwargs)


class Cosine(Callback):
    """A schedule of the user's own, as many write it; from some epoch on."""

    def __init__(self, start: int = 1) -> None:
        self.start = start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch >= self.start:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 1e-3 * (1 + math.cos(trainer.global_step / 40))


class Warming(Fitting):
    """Sets the learning rate where Lightning's documentation does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if epoch >= 1:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.99**self.trainer.global_step


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_rates_that_others_write_do_not_reach_newton_steps(lr: float) -> None:
    """The rate that the user gave to SFN counts; the run is that of one without the schedule, bit for bit."""
    newton = partial(SaddleFreeNewton, lr=lr)
    alone = end(switching(optimizer=newton))
    with pytest.warns(UserWarning, match=rf"^SwitchToSFN {IGNORED}.* go on with {lr:.3g}: pass optimizer="):
        beside = end(switching(optimizer=newton), Cosine())
    assert torch.equal(alone, beside)


def test_rates_that_the_modules_own_step_writes_do_not_reach_newton_steps() -> None:
    with pytest.warns(UserWarning, match=IGNORED):
        warming = end(switching(), module=Warming)
    assert torch.equal(warming, end(switching()))


def test_it_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    end(switching(gradient_batches=1), Cosine())
    assert len([w for w in recwarn if "ignores the learning rate" in str(w.message)]) == 1


def test_rates_of_weight_averaging_do_not_reach_newton_steps() -> None:
    rates: list[list[float]] = []
    with pytest.warns(UserWarning, match=IGNORED):
        fit(
            Fitting(),
            switching(optimizer=partial(Rated, rates=rates)),
            StochasticWeightAveraging(0.01, swa_epoch_start=3),
            epochs=6,
        )
    assert rates == [[1.0]] * 5


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_rates_of_finetuning_do_not_reach_newton_steps(epoch: int) -> None:
    """The backbone is freed before the switch or after it."""
    rates: list[list[float]] = []
    switch = switching(switch_at_epoch=2, optimizer=partial(Rated, rates=rates))
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=epoch, backbone_initial_lr=1e-3)
    with pytest.warns(UserWarning, match=IGNORED):
        fit(Backboned(), switch, tuning, epochs=6)
    assert {rate for step in rates for rate in step} == {1.0}
    assert len(rates[-1]) == 2


@pytest.mark.filterwarnings(f"ignore:.*{IGNORED}")
def test_the_first_optimizer_returns_with_its_own_rate() -> None:
    switch = switching(return_when=1)

    class Forgetting(Cosine):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if switch.switched:
                super().on_train_batch_start(trainer, *args)

    trainer = fit(Fitting(), switch, Forgetting(), epochs=4)
    assert not switch.switched
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


@pytest.mark.filterwarnings(f"ignore:.*{IGNORED}")
@pytest.mark.parametrize("strategy", [False, True])
def test_checkpoints_hold_newtons_own_rate(strategy: bool) -> None:
    def run(epochs: int, **options: Any) -> tuple[Trainer, SwitchToSFN | None]:
        switch = None if strategy else switching()
        trainer = make_trainer(
            epochs, callbacks=[Cosine(), *([] if switch is None else [switch])], strategy="sfn" if strategy else "auto"
        )
        trainer.fit(Fitting(), regression_loader(), **options)
        return trainer, switch

    trainer, _ = run(2)
    trainer.optimizers[0].param_groups[0]["lr"] = 0.25  # after the last step
    trainer.save_checkpoint("here.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    stored = torch.load("here.ckpt")
    (switched,) = [s["newton"]["param_groups"] for s in stored["callbacks"].values() if "newton" in s] or [None]
    groups = stored["optimizer_states"][0]["newton_groups"] if strategy else switched
    assert groups[0]["lr"] == 1.0
    trainer, _ = run(3, ckpt_path="here.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0


def test_a_strategy_ignores_them_as_well() -> None:
    alone = end(strategy="sfn")
    with pytest.warns(UserWarning, match=f"^SFNStrategy {IGNORED}"):
        beside = end(Cosine(), strategy=SFNStrategy())
    assert torch.equal(alone, beside)


def test_a_strategy_leaves_the_rates_of_a_modules_own_newton_optimizer_alone() -> None:
    class Own(Fitting):
        def configure_optimizers(self) -> Any:
            return SaddleFreeNewton(self.parameters(), lr=1.0)

    trainer = fit(Own(), Cosine(0), strategy="sfn")
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.01


# ------------------------------------------------------------------------------------------------ parameter groups


class Groups(Fitting):
    """The first layer has a learning rate of its own."""

    def __init__(self, first: float, last: float = 0.05, scheduler: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.rates, self.make_scheduler = (first, last), scheduler

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[i].parameters(), "lr": lr, "name": f"layer {i}"}
            for i, lr in zip((0, 2), self.rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.5, weight_decay=0.1)
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])


def moved(module: Groups, *callbacks: Callback, **options: Any) -> list[bool]:
    """Whether each layer was trained in the epochs after the first."""
    before: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                before.extend(module.net[i].weight.clone() for i in (0, 2))

    fit(module, *callbacks, Watch(), **options)
    return [not torch.equal(module.net[i].weight, w) for i, w in zip((0, 2), before, strict=True)]


@pytest.mark.parametrize("strategy", [False, True])
def test_a_group_with_learning_rate_zero_stays_as_it_is(strategy: bool, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"strategy": "sfn"} if strategy else {}
    assert moved(Groups(0.0), *([] if strategy else [switching()]), **options) == [False, True]
    assert "1 parameter group(s) with learning rate 0 stay as they are." in caplog.text


def test_a_rate_that_a_scheduler_led_to_zero_is_none_that_was_zero() -> None:
    def ended(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: float(epoch < 1), lambda epoch: 1.0])

    assert moved(Groups(0.02, scheduler=ended), switching()) == [True, True]


class Stopped(Groups):
    """Its first layer's learning rate is set to zero by hand in the first epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.before = self.net[0].weight.clone()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.0


@pytest.mark.parametrize("resumed", [False, True])
def test_a_rate_that_was_set_to_zero_later_is_none_that_was_zero(resumed: bool) -> None:
    options: dict[str, Any] = {}
    if resumed:
        fit(Stopped(0.02), switching(), epochs=1).save_checkpoint("here.ckpt")
        options = {"ckpt_path": "here.ckpt"}
    module, spectrum = Stopped(0.02), HessianSpectrum(log=False, krylov_dim=4, strict=True)
    trainer = make_trainer(3, callbacks=[switching(), spectrum])
    trainer.fit(module, regression_loader(), **options)
    assert not torch.equal(module.net[0].weight, module.before)
    assert {kept.size for _, kept in spectrum.history} == {sum(p.numel() for p in module.parameters())}
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2]


def test_zeros_for_all_groups_rest_none() -> None:
    assert moved(Groups(0.0, 0.0), switching()) == [True, True]


def test_a_resting_group_survives_a_checkpoint_and_a_return() -> None:
    module, switch = Groups(0.0), switching()
    trainer = fit(module, switch, epochs=2)
    trainer.save_checkpoint("here.ckpt")
    resumed = Groups(0.0)
    make_trainer(3, callbacks=[switching()]).fit(resumed, regression_loader(), ckpt_path="here.ckpt")
    assert torch.equal(resumed.net[0].weight, module.net[0].weight)
    back = switching(return_when=1)
    trainer = fit(Groups(0.0), back, epochs=4)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2]


# ------------------------------------------------------------------------------------------------ what others read


class Reading(Groups):
    """Asks in its step for what the first optimizer and its scheduler have."""

    def __init__(self) -> None:
        super().__init__(0.02, scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rate, momentum = self.lr_schedulers().get_last_lr()[1], self.optimizers().param_groups[1]["momentum"]
        if batch_idx == 0:
            self.seen.append((rate, momentum))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("rule", "factors"), [("rest", [1, 0.5, 0.5, 0.5]), ("step", [1, 0.5, 0.25, 0.125])])
def test_a_step_that_reads_schedulers_and_groups_goes_on(rule: Any, factors: list[float]) -> None:
    module = Reading()
    fit(module, switching(schedulers=rule), epochs=4)
    assert module.seen == [(0.05 * factor, 0.5) for factor in factors]


def test_schedulers_that_rested_go_on_after_a_return() -> None:
    module = Reading()
    trainer = fit(module, switching(return_when=1), epochs=4)
    assert [rate for rate, _ in module.seen] == [0.05, 0.025, 0.025, 0.0125]
    assert [config.interval for config in trainer.lr_scheduler_configs] == ["epoch"]


def test_they_rest_under_a_strategy_and_survive_its_checkpoints() -> None:
    module = Reading()
    trainer = fit(module, strategy="sfn")
    assert module.seen == [(0.05, 0.5)] * 3
    trainer.save_checkpoint("here.ckpt")
    resumed = Reading()
    make_trainer(4, strategy="sfn").fit(resumed, regression_loader(), ckpt_path="here.ckpt")
    assert resumed.seen == [(0.05, 0.5)]


def test_everything_that_the_monitor_of_learning_rates_logs() -> None:
    """Also of a layer that is freed while SFN trains, whose group has the defaults."""
    logger, monitor = MemoryLogger(), LearningRateMonitor(log_momentum=True, log_weight_decay=True)

    class Freeing(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})

    fit(Reading(), Freeing(), switching(), monitor, logger=logger)
    for group in ("layer 0", "layer 2", "pg3"):
        name = f"lr-SaddleFreeNewton/{group}"
        assert {value for _, value in logger.values(f"{name}-weight_decay")} == {0.1}
        assert {value for _, value in logger.values(f"{name}-momentum")} == {0.5}
        assert {value for _, value in logger.values(name)} == {1.0}


def test_a_group_that_is_added_while_sfn_trains_may_have_what_the_first_optimizer_has() -> None:
    class Freeing(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                added = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.2}
                trainer.optimizers[0].add_param_group(added)

    trainer = fit(Reading(), Freeing(), switching())
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.1, 0.2]


@pytest.mark.parametrize("first", [True, False])
def test_the_trainer_finds_its_own_early_stopping(first: bool) -> None:
    """`SwitchToSFN` is an `EarlyStopping` for Lightning; each callback is set up once, in whichever order they come."""
    stopping, switch = EarlyStopping("train_loss", patience=99), switching()
    set_up: list[Callback] = []

    class Noting(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            set_up.append(self)

    order = [Noting(), switch, Noting(), stopping, Noting()] if first else [stopping, Noting(), switch]
    trainer = fit(Fitting(), *order)
    assert trainer.early_stopping_callback is stopping
    assert len(set_up) == sum(isinstance(callback, Noting) for callback in order)
    assert sorted(map(id, order)) == sorted(id(callback) for callback in trainer.callbacks if callback in order)
    assert switch.switched


@pytest.mark.parametrize("patience", [2, 3])
def test_a_stop_that_comes_before_the_switch_is_told_of_at_the_start(patience: int) -> None:
    stopping, switch = EarlyStopping("train_loss", patience=patience), SwitchToSFN(patience=3)
    with pytest.warns(UserWarning, match=rf"^EarlyStopping\(monitor='train_loss', patience={patience}\) ends training"):
        make_trainer(8, callbacks=[stopping, switch]).fit(Fitting(optimizer=sgd(0.0)), regression_loader())
    assert not switch.switched


@pytest.mark.parametrize(
    ("stopping", "options"),
    [
        (EarlyStopping("train_loss", patience=4), {}),
        (EarlyStopping("train_loss", patience=3, mode="max"), {}),
        (EarlyStopping("train_loss", patience=3), {"min_delta": 0.1}),
        (EarlyStopping("train_loss", patience=3), {"switch_at_epoch": 1}),
        (EarlyStopping("val_loss", patience=3, strict=False), {}),
    ],
)
def test_a_stop_that_may_come_after_the_switch_is_not_told_of(stopping: EarlyStopping, options: dict[str, Any]) -> None:
    switch = SwitchToSFN(patience=3, probe_dim=0, **options)
    make_trainer(1, callbacks=[switch, stopping]).fit(Fitting(), regression_loader())  # warnings are errors


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon", "NAdam", "SGD"])
def test_decay_beside_the_gradient_step_is_no_penalty(name: str) -> None:
    """Known from one step under a gradient of zero: a penalty's gradient goes through the optimizer's own rule."""
    kind = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip(f"this torch has no {name}")
    weight = nn.Parameter(torch.ones(2, 2))
    options = {"decoupled_weight_decay": True} if name == "NAdam" else {}
    optimizer = kind([weight], lr=0.5, weight_decay=0.1, **options)
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    shrunk = torch.allclose(weight.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))
    assert shrunk
    assert coupled_decay(optimizer) == [([weight], 0.1 if name == "SGD" else 0.0)]


def decaying(kind: Any, *decays: float, **options: Any) -> Fitting:
    """A module whose layers have a weight decay each."""

    class Decaying(Fitting):
        def configure_optimizers(self) -> Any:
            layers = [self.net[0], self.net[2]]
            return kind(
                [{"params": layer.parameters(), "weight_decay": d} for layer, d in zip(layers, decays, strict=True)],
                lr=0.01,
                **options,
            )

    return Decaying()


@pytest.mark.parametrize("strategy", [False, True])
@pytest.mark.parametrize(
    ("kind", "decays", "options", "said"),
    [
        (torch.optim.AdamW, (0.5, 0.5), {}, "AdamW (0.5)"),
        (torch.optim.AdamW, (0.5, 0.0), {}, "AdamW (0.5)"),
        (torch.optim.AdamW, (0.5, 0.01), {}, "AdamW (0.01, 0.5)"),
        (torch.optim.AdamW, (0.0, 0.0), {}, None),
        (torch.optim.NAdam, (0.5, 0.5), {"decoupled_weight_decay": True}, "NAdam (0.5)"),
        (torch.optim.NAdam, (0.5, 0.5), {}, None),
        (torch.optim.SGD, (0.5, 0.5), {}, None),
    ],
)
def test_decay_that_is_left_out_is_told_of(
    kind: Any, decays: Any, options: Any, said: str | None, strategy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(
            decaying(kind, *decays, **options),
            *([] if strategy else [switching()]),
            epochs=2,
            **({"strategy": "sfn"} if strategy else {}),
        )
    if said is None:
        assert "weight decay of" not in caplog.text
    else:
        assert caplog.text.count(f" The weight decay of {said} rests: it is no part of the loss.") == 1


def test_decay_of_a_group_that_rests_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Resting(Fitting):
        def configure_optimizers(self) -> Any:
            first = {"params": self.net[0].parameters(), "lr": 0.0, "weight_decay": 0.5}
            return torch.optim.AdamW([first, {"params": self.net[2].parameters(), "weight_decay": 0.25}], lr=0.01)

    with caplog.at_level(logging.INFO):
        fit(Resting(), switching(), epochs=2)
    assert "The weight decay of AdamW (0.25) rests" in caplog.text
