"""There and back: the first optimizer gets its training back as it was, again and again."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_sfn import SaddleFreeNewton, SwitchToSFN
from lightning_sfn.trainer.progress import Progress
from lightning_sfn.trainer.rules import SwitchRules

from .modules import (
    Factorised,
    Fitting,
    NewtonCall,
    Scripted,
    factorised_loader,
    flat,
    forced,
    make_trainer,
    regression_loader,
    sgd,
    small_net,
)


class Watching(Callback):
    """Notes the class of the optimizer, its rate and momentum in each epoch."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rates: list[float] = []
        self.momenta: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            optimizer = trainer.optimizers[0]
            self.names.append({"SaddleFreeNewton": "SFN"}.get(type(optimizer).__name__, type(optimizer).__name__))
            self.rates.append(optimizer.param_groups[0]["lr"])
            buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
            self.momenta.append(float(sum(buffer.abs().sum() for buffer in buffers)))


class Scheduled(Scripted):
    """Momentum, and a rate that a scheduler halves."""

    def __init__(self, script: list[float], kind: str = "epoch") -> None:
        super().__init__(script, optimizer=sgd(0.08, momentum=0.9))
        self.kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "metric"}}
        steps = torch.optim.lr_scheduler.StepLR(optimizer, 1 if self.kind == "epoch" else 4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": self.kind}}


def run(module: Fitting, epochs: int, *companions: Callback, **options: Any) -> tuple[SwitchToSFN, Watching]:
    callback, watching = SwitchToSFN(**({"monitor": "metric", "probe_dim": 0} | options)), Watching()
    make_trainer(epochs, callbacks=[callback, watching, *companions]).fit(module, regression_loader())
    return callback, watching


@pytest.mark.parametrize("kind", ["epoch", "step", "plateau"])
@pytest.mark.parametrize(
    ("schedulers", "rates"), [("rest", [0.08, 0.04, 1, 1, 0.02, 0.01]), ("step", [0.08, 0.04, 1, 1, 0.005, 0.0025])]
)
def test_the_first_optimizer_comes_back_as_it_was(
    kind: str, schedulers: Any, rates: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        callback, seen = run(
            Scheduled([1.0] * 6, kind), 6, patience=1, return_when=2, schedulers=schedulers, cooldown=9
        )
    assert seen.names == ["SGD", "SGD", "SFN", "SFN", "SGD", "SGD"]
    assert seen.rates == pytest.approx(rates)
    assert seen.momenta[2] == seen.momenta[3] == 0.0 < seen.momenta[4]
    assert not callback.switched
    assert callback.newton is None
    assert callback.switched_at_step == 8
    if schedulers == "rest":
        assert "1 learning rate scheduler(s) rest from now on." in caplog.text
        assert "1 learning rate scheduler(s) go on where they are." in caplog.text
    else:
        assert "1 learning rate scheduler(s) go on stepping the resting optimizer." in caplog.text
    assert "SGD goes on from step 16, because 2 Newton steps were asked for." in caplog.text


@pytest.mark.parametrize(("momentum", "kept"), [("keep", True), ("reset", False)])
def test_momentum_is_kept_or_reset(momentum: Any, kept: bool) -> None:
    _, seen = run(Scheduled([1.0] * 5), 5, patience=1, return_when=np.int64(2), momentum=momentum, cooldown=9)
    assert seen.names[4] == "SGD"
    assert (seen.momenta[4] > 0) == kept


def test_with_newton_steps_of_length_zero_the_detour_leaves_nothing_behind() -> None:
    """Two epochs of Newton steps in the middle, of length zero: the run is the one without these epochs."""
    ends = []
    for epochs in (4, 6):
        torch.manual_seed(0)
        module = Scheduled([1.0] * 6)
        detour = forced(monitor="metric", patience=1, return_when=2, cooldown=9, newton={"lr": 0.0})
        make_trainer(epochs, callbacks=[detour] if epochs == 6 else []).fit(module, regression_loader())
        ends.append(flat(module))
    assert detour.report is not None
    assert [phase.steps for phase in detour.report.phases] == [8, 2, 8]
    assert torch.equal(*ends)


def test_many_plateaus() -> None:
    script = [1.0] * 14
    callback, seen = run(Scripted(script), 14, patience=2, return_when=1, cooldown=2)
    # patience 2: three checks, of which the first sets the best value; on return one check more does not count
    assert "".join(name[1] for name in seen.names) == "GGGFGGGGFGGGGF"
    assert callback.report is not None
    assert [phase.newton for phase in callback.report.phases] == [False, True, False, True, False, True]
    assert callback.switched_at_step == 13 * 4
    assert sum(phase.gradients for phase in callback.report.phases if not phase.newton) == 11 * 4


@pytest.mark.parametrize(
    ("rule", "min_delta", "script", "back"),
    [
        # SGD made 0.1 per epoch over the last two checks; SFN one, then less than 0.1
        ("slower_per_epoch", 0.0, [3.0, 2.9, 2.8, 2.7, 1.7, 0.7, 0.65, 0.6, 0.6, 0.6], 8),
        # it goes on while it is faster
        ("slower_per_epoch", 0.15, [3.0, 2.9, 2.8, 2.7, 2.5, 2.3, 2.1, 1.9, 1.7, 1.5], None),
        # stalled like the first optimizer: no improvement by min_delta over the patience
        ("slower_per_second", 0.15, [3.0, 2.9, 2.8, 2.7, 2.7, 2.7, 2.7, 2.7, 2.7, 2.7], 7),
    ],
)
def test_return_when_slower(rule: Any, min_delta: float, script: list[float], back: int | None) -> None:
    _, seen = run(
        Scripted(script), 10, patience=2, min_delta=min_delta, switch_at_epoch=4, return_when=rule, cooldown=99
    )
    assert seen.names.index("SFN") == 4
    assert (seen.names.index("SGD", 4) if "SGD" in seen.names[4:] else None) == back


@pytest.mark.parametrize(("lr", "back"), [(0.0, 6), (1.0, None)])
def test_what_improves_before_the_first_newton_step_is_not_newtons(lr: float, back: int | None) -> None:
    """The metric falls on by as much as it did, as one does that was collected while the first optimizer moved."""
    script = [3.0, 2.75, 2.5, 2.25, 1.75, 1.25, 0.75, 0.25]
    callback, seen = run(
        Scripted(script),
        8,
        patience=2,
        switch_at_epoch=4,
        return_when="slower_per_epoch",
        cooldown=99,
        optimizer=partial(SaddleFreeNewton, lr=lr),
    )
    assert (seen.names.index("SGD", 4) if "SGD" in seen.names[4:] else None) == back
    assert callback.report is not None
    first, newton = callback.report.phases[:2]
    if lr == 0.0:
        assert (first.after, newton.before, newton.after) == (1.25, 1.25, 1.25)
        assert callback.report.verdict() == "SFN took no step: of 2 tried, none lowered the loss."


class Validated(Scripted):
    """Logs the script in validation, after the Newton step at the end of the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Fitting.training_step(self, batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("metric", self.script[self.current_epoch], batch_size=1)


@pytest.mark.parametrize(("kind", "before", "first_after"), [(Scripted, 2.0, 2.0), (Validated, 2.5, 2.5)])
def test_the_epoch_at_whose_end_the_first_step_is_taken(
    kind: type[Scripted], before: float, first_after: float
) -> None:
    """What training logs in it was collected before that step, what validation logs was not."""
    callback = SwitchToSFN(monitor="metric", probe_dim=0, switch_at_epoch=2)
    data = (regression_loader(), regression_loader())[: 1 + (kind is Validated)]
    make_trainer(4, callbacks=[callback], num_sanity_val_steps=0).fit(kind([3.0, 2.5, 2.0, 1.0]), *data)
    assert callback.report is not None
    first, newton = callback.report.phases
    assert newton.taken == 2
    assert (first.after, newton.before, newton.after) == (first_after, before, 1.0)


def test_one_step_at_the_very_end_is_no_verdict() -> None:
    callback, _ = run(Scripted([3.0, 2.5, 2.0]), 3, switch_at_epoch=2)
    assert callback.report is not None
    assert callback.report.accepted_steps == 1
    assert callback.report.verdict().startswith("Whether SFN paid is not known: metric was not seen both")


def test_speed_by_the_clock_and_by_data() -> None:
    progress = Progress(sign=-1, checks=2)
    assert progress.speed("second") == 0.0
    for seconds, epochs, value in ((0.0, 1.0, 9.0), (10.0, 2.0, 5.0), (14.0, 3.0, 4.0), (20.0, 5.0, 2.0)):
        progress.note(seconds, epochs, value)
    assert progress.complete
    assert progress.speed("second") == pytest.approx(3.0 / 10.0)
    assert progress.speed("epoch") == pytest.approx(3.0 / 3.0)
    rules = SwitchRules(return_when="slower_per_second")
    slow, fast = {"second": 0.2, "epoch": 9.0}, {"second": 0.4, "epoch": 0.0}
    assert rules.reason_to_return(progress, slow, plateau=False) is None
    assert "0.3 per second" in (rules.reason_to_return(progress, fast, plateau=False) or "")
    assert "stalled again" in (rules.reason_to_return(progress, slow, plateau=True) or "")
    assert SwitchRules().reason_to_return(progress, fast, plateau=True) is None


def test_a_window_is_used_up_before_the_return() -> None:
    """The third Newton step was asked for; its window is the first half of an epoch of four batches."""
    calls: list[NewtonCall] = []
    callback = forced(calls, gradient_batches=3, return_when=3)
    trainer = make_trainer(6, callbacks=[callback])
    trainer.fit(Fitting(), regression_loader(16, 4))
    assert [call.sizes[0] for call in calls[:3]] == [2, 2, 2]
    assert callback.report is not None
    assert callback.report.phases[1].gradients >= 6
    assert [phase.steps for phase in callback.report.phases][1] == 3


def test_layers_freed_meanwhile_are_trained_by_the_first_optimizer_too() -> None:
    """As finetuning callbacks do: a parameter group is added while SFN trains."""

    class Freeing(Fitting):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                self.net[0].requires_grad_(True)
                self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})

        def configure_optimizers(self) -> Any:
            self.net[0].requires_grad_(False)
            return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    module = Freeing(small_net())
    before = module.net[0].weight.clone()
    callback = SwitchToSFN(switch_at_epoch=1, return_when=3, probe_dim=0)
    trainer = make_trainer(6, callbacks=[callback])
    trainer.fit(module, regression_loader())
    assert not callback.switched
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2]
    assert not torch.equal(module.net[0].weight, before)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch. Found .*interval='rest'")
@pytest.mark.filterwarnings("ignore:SwitchToSFN ignores the learning rate")
def test_a_scheduler_set_up_meanwhile_is_dropped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=4, annealing_epochs=1)
    with caplog.at_level(logging.INFO):
        _, seen = run(Scheduled([1.0] * 7), 7, averaging, patience=1, return_when=3, cooldown=9)
    assert seen.names == ["SGD", "SGD", "SFN", "SFN", "SFN", "SGD", "SGD"]
    assert seen.rates[-1] < 0.08
    assert "(1 that were set up meanwhile are dropped)" in caplog.text


# ------------------------------------------------------------------------------------------------ the gate


class Bowl(Fitting):
    """A quadratic whose condition number is in its way, and no negative curvature anywhere."""

    def __init__(self, stiffness: float = 1.0) -> None:
        super().__init__(nn.Linear(3, 1))
        self.stiffness = stiffness

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("metric", 1.0, on_step=False, on_epoch=True)
        return self.stiffness * loss + 1.0


@pytest.mark.parametrize(
    ("module", "share", "switches"),
    [
        (lambda: Bowl(), 10.0, False),  # no negative curvature, and nothing to promise that much
        (lambda: Bowl(), 0.0, True),  # a promise is enough
    ],
)
def test_the_gate_is_open_for_a_promise(
    module: Callable[[], Fitting], share: float, switches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        callback, seen = run(
            module(), 8, patience=1, require_negative_curvature=True, min_predicted_decrease=share, gradient_batches=3
        )
    # a plateau after the second epoch; the next two of four batches are the window of the probe
    assert callback.switched == switches
    assert callback.switched_at_step == (10 if switches else None)
    if not switches:
        assert set(seen.names) == {"SGD"}
        assert caplog.text.count("no switch, the probe found neither a way out nor a good step") >= 2


def test_the_gate_is_open_for_negative_curvature() -> None:
    callback = SwitchToSFN(patience=2, min_delta=0.1, require_negative_curvature=True, min_predicted_decrease=1e9)
    module = Factorised()
    trainer = make_trainer(30, callbacks=[callback])
    trainer.fit(module, factorised_loader())
    assert callback.switched_at_step == 8 * 4  # three epochs to the plateau, one for the probe
    assert float(trainer.callback_metrics["train_loss"]) < 0.1


def test_the_gate_switches_between_accumulation_windows() -> None:
    """An epoch of four batches has two windows of the probe, as of a step that accumulates two."""
    calls: list[NewtonCall] = []
    options: dict[str, Any] = {"require_negative_curvature": True, "min_predicted_decrease": 0.0}
    callback = forced(calls, monitor="metric", patience=1, min_delta=0.0, gradient_batches=3, **options)
    make_trainer(6, callbacks=[callback], accumulate_grad_batches=2).fit(Bowl(), regression_loader())
    assert callback.switched_at_step == 5
    assert {call.sizes[0] for call in calls} == {2}


def test_a_probe_leaves_no_trace() -> None:
    ends = []
    for options in ({}, {"require_negative_curvature": True, "min_predicted_decrease": 1e9}):
        torch.manual_seed(0)
        module = Bowl()
        callbacks = [SwitchToSFN(monitor="metric", patience=1, **options)] if options else []
        make_trainer(6, callbacks=callbacks).fit(module, regression_loader())
        ends.append(flat(module))
    assert torch.equal(*ends)


def test_the_newton_optimizer_is_known_while_it_trains_alone() -> None:
    seen = set()

    class Looking(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            seen.add((type(trainer.optimizers[0]).__name__, callback.newton is None))

    callback = SwitchToSFN(monitor="metric", patience=1, require_negative_curvature=True, min_predicted_decrease=0.0)
    make_trainer(6, callbacks=[callback, Looking()]).fit(Bowl(), regression_loader())
    assert seen == {("SGD", True), ("SaddleFreeNewton", False)}
