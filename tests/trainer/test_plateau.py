"""Plateau detection: each option on scripted metrics, where the answer can be counted by hand."""

import logging
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn import SwitchToSFN

from .modules import Fitting, Scripted, make_trainer, regression_loader

NAN = float("nan")


def switched_at(script: list[float], **options: Any) -> int | None:
    """The epoch (of four steps each) before which training switches."""
    callback = SwitchToSFN(monitor="metric", probe_dim=0, **options)
    make_trainer(len(script), callbacks=[callback]).fit(Scripted(script), regression_loader())
    return None if callback.switched_at_step is None else callback.switched_at_step // 4


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        # a relative delta of a half: 8 -> 3 improves, 3 -> 2 does not
        ([8.0, 3, 2, 1.8, 1.7], {"patience": 2, "min_delta": 0.5, "min_delta_mode": "rel"}, 4),
        ([8.0, 3, 1.4, 0.6, 0.2], {"patience": 1, "min_delta": 0.5, "min_delta_mode": "rel"}, None),
        # of a negative best value: -2 -> -2.5 is a quarter
        ([-2.0, -2.5, -3.5, -4.0, -4.2], {"patience": 1, "min_delta": 0.3, "min_delta_mode": "rel"}, 2),
        ([1.0, 1.2, 1.5, 1.6, 1.7], {"patience": 1, "mode": "max", "min_delta": 0.15, "min_delta_mode": "rel"}, 4),
        # the plateau is there after the third epoch; the switch waits
        ([3.0, 3, 3, 3, 3, 3], {"patience": 2, "min_epochs": 5}, 5),
        ([3.0, 3, 3, 3, 3, 3], {"patience": 2, "min_steps": 13}, 4),
        ([3.0, 3, 3, 3, 3, 3], {"patience": 2, "min_steps": 12}, 3),
        # by force, and no plateau before
        ([3.0, 3, 3, 3, 3], {"patience": 1, "switch_at_epoch": 3}, 3),
        ([3.0, 2, 1, 0.5, 0.2], {"patience": 1, "switch_at_epoch": 0}, 0),
    ],
)
def test_epoch_of_the_switch(script: list[float], options: dict[str, Any], expected: int | None) -> None:
    assert switched_at(script, **options) == expected


@pytest.mark.filterwarnings("ignore:metric is")
@pytest.mark.parametrize(("check_finite", "expected"), [(True, None), (False, 3)])
def test_checks_that_are_not_finite(check_finite: bool, expected: int | None) -> None:
    assert switched_at([3.0, NAN, math.inf, NAN], patience=2, check_finite=check_finite) == expected


def test_forced_at_a_step_in_the_middle_of_an_epoch_without_the_metric() -> None:
    callback = SwitchToSFN(monitor="nothing of the kind", switch_at_step=6, gradient_batches=2, probe_dim=0)
    make_trainer(3, callbacks=[callback]).fit(Fitting(), regression_loader())
    assert callback.switched_at_step == 6
    assert callback.report is not None
    assert callback.report.newton_steps == 3
    assert math.isnan(callback.report.final)


def test_forced_without_logging() -> None:
    callback, module = SwitchToSFN(switch_at_epoch=1, probe_dim=0), Fitting()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(options)
    make_trainer(3, callbacks=[callback], barebones=True, log_every_n_steps=None, **quiet).fit(
        module, regression_loader()
    )
    assert callback.switched_at_step == 4


class BySteps(Fitting):
    """Logs a script, one value for each step, and an epoch metric that stands still between epochs."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script = script

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("metric", self.script[self.global_step], on_step=True, on_epoch=False)
        self.log("by_epoch", 3.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_checks_by_steps_see_the_mean_since_the_last_check() -> None:
    """Means of two: 4, 3, 3, 3.5, ...; single values would fool a check at every second step."""
    script = [5.0, 3, 1, 5, 4, 2, 6, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    callback = SwitchToSFN(
        monitor="metric", patience=2, check_every_n_steps=2, gradient_batches=2, probe_dim=0, mode="min"
    )
    make_trainer(2, callbacks=[callback]).fit(BySteps(script), regression_loader(32))
    assert callback.switched_at_step == 8


def test_checks_by_steps_with_accumulation() -> None:
    script = [3.0] * 16
    callback = SwitchToSFN(monitor="metric", patience=1, check_every_n_steps=2, gradient_batches=2, probe_dim=0)
    make_trainer(2, callbacks=[callback], accumulate_grad_batches=2).fit(BySteps(script), regression_loader(32))
    assert callback.switched_at_step == 4


def test_checks_by_steps_pass_over_a_value_that_has_been_seen() -> None:
    """A metric of epochs brings one value in each epoch, whatever the number of checks."""
    callback = SwitchToSFN(monitor="by_epoch", patience=2, check_every_n_steps=1, strict=False, probe_dim=0)
    make_trainer(5, callbacks=[callback]).fit(BySteps([1.0] * 99), regression_loader())
    assert callback.switched_at_step == 4 * 3 + 1


def test_checks_by_steps_of_a_metric_that_is_never_logged() -> None:
    trainer = make_trainer(1, callbacks=[SwitchToSFN(monitor="val_loss", check_every_n_steps=2)])
    with pytest.raises(MisconfigurationException, match=r"monitors 'val_loss', .* with on_step=True"):
        trainer.fit(Fitting(), regression_loader())


def test_a_run_without_a_switch_says_how_far_it_was(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert switched_at([3.0, 2.0, 2.5, 2.5], patience=5) is None
    assert "did not switch: 2 of 5 checks without improvement at the end, best metric 2.\n" in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"switch_at_epoch": 9}, "training ended before the moment that switch_at_epoch or switch_at_step names"),
        ({"min_epochs": 9, "patience": 1}, "3 of 1 checks .*, but min_epochs or min_steps had not been reached"),
    ],
)
def test_a_run_without_a_switch_says_what_held_it_back(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert switched_at([3.0] * 4, **options) is None
    assert re.search(f"did not switch: {reason}\\.\n", caplog.text)


def test_parameters_that_are_not_finite_are_why_there_is_no_switch(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Scripted):
        def on_train_batch_end(self, *_: Any) -> None:
            self.net[0].bias.data[0] = torch.inf

    switch = SwitchToSFN(patience=1, check_finite=False, probe_dim=0, monitor="metric")
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="the parameters are not finite any more"):
        make_trainer(4, callbacks=[switch]).fit(Broken([3.0] * 4), regression_loader())
    assert "did not switch: the parameters were not finite any more.\n" in caplog.text


def test_patience_is_that_of_this_object() -> None:
    """`EarlyStopping` takes it for state, so that a resumed run had that of the first."""
    first, second = SwitchToSFN(patience=3), SwitchToSFN(patience=7)
    second.load_state_dict(first.state_dict())
    assert second.patience == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience is 0, "),
        ({"min_delta": -0.1}, "min_delta is -0.1, "),
        ({"min_delta_mode": "relative"}, "min_delta_mode is 'relative', but 'abs' or 'rel'"),
        ({"cooldown": -1}, "cooldown is -1, "),
        ({"check_every_n_steps": 0}, "check_every_n_steps is 0, "),
        ({"min_epochs": -1}, "min_epochs is -1, "),
        ({"min_steps": -2}, "min_steps is -2, "),
        ({"switch_at_step": -2}, "switch_at_step is -2, "),
        ({"return_when": "slow"}, "return_when is 'slow', but a positive number of Newton steps or "),
        ({"return_when": 0}, "return_when is 0, "),
        ({"return_when": True}, "return_when is True, "),
        ({"momentum": "drop"}, "momentum is 'drop', "),
        ({"schedulers": "stop"}, "schedulers is 'stop', "),
        ({"min_predicted_decrease": -1.0}, "min_predicted_decrease is -1.0, "),
        ({"optimizer": 3}, "optimizer is an object of class int"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        SwitchToSFN(**options)
    assert str(caught.value).startswith(message)


def test_barebones_is_refused_with_the_reason() -> None:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps")
    )
    trainer = make_trainer(1, callbacks=[SwitchToSFN()], barebones=True, **quiet)
    with pytest.raises(MisconfigurationException, match=r"barebones=True\) logs nothing: .*switch_at_epoch"):
        trainer.fit(Fitting(), regression_loader())


def test_state_of_the_watch_survives_a_checkpoint() -> None:
    watch = SwitchToSFN(monitor="metric", check_every_n_steps=3)
    watch._since_check = (torch.tensor(2.5), 2)
    watch._cooling, watch.wait_count = 3, 1
    torch.save(watch.state_dict(), "watch.pt")
    other = SwitchToSFN(monitor="metric", check_every_n_steps=3)
    other.load_state_dict(torch.load("watch.pt", weights_only=True))
    assert (other._since_check, other._cooling, other.wait_count) == ((2.5, 2), 3, 1)


# ------------------------------------------------------------------------------------------------ validation


class Validated(Fitting):
    """Logs metrics in every way that has a mean over the epoch; the loss of training depends on the batch alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("epoch_alone", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)
        self.log("both", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]), batch_size=1)

    def on_train_epoch_end(self) -> None:
        self.log("at_the_end", 1.5)


def checks_of(monitor: str, *, epochs: int = 2, **options: Any) -> list[tuple[int, float | None]]:
    """Step and value of each check."""
    checks: list[tuple[int, float | None]] = []

    class Noting(SwitchToSFN):
        def on_check(self, trainer: Trainer, value: float | None, plateau: bool) -> None:
            checks.append((trainer.global_step, value))

    trainer = make_trainer(epochs, callbacks=[Noting(monitor, patience=99)], **options)
    trainer.fit(Validated(), regression_loader(), regression_loader())
    return checks


@pytest.mark.parametrize("monitor", ["epoch_alone", "both", "at_the_end"])
@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}, {}])
def test_what_training_logs_is_checked_at_the_end_of_its_epochs(monitor: str, options: dict[str, Any]) -> None:
    assert checks_of(monitor, **options) == [(4, 1.5), (8, 1.5)]  # the mean of the batches 0 to 3


def test_what_validation_logs_is_checked_after_each_validation() -> None:
    assert [step for step, _ in checks_of("val_loss", val_check_interval=0.5)] == [2, 4, 6, 8]
    assert [step for step, _ in checks_of("val_loss", check_val_every_n_epoch=2, epochs=4)] == [8, 16]


class OtherRank(Validated):
    """Logs nothing."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("monitor", ["val_loss", "both"])
def test_a_rank_that_logs_nothing_takes_part_where_the_others_do(monitor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decision is a collective: a rank that made one more, or one elsewhere, would leave the others waiting."""
    calls: list[int] = []
    answers: list[bool] = []

    def decide(strategy: SingleDeviceStrategy, decision: bool, all: bool = True) -> bool:
        calls.append(trainer.global_step)
        if len(calls) > len(answers):
            answers.append(decision)
        return answers[len(calls) - 1]

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", decide)
    seen = []
    for module in (Validated(), OtherRank()):
        callback = SwitchToSFN(monitor, patience=99, strict=False)
        trainer = make_trainer(2, callbacks=[callback], val_check_interval=0.5)
        trainer.fit(module, regression_loader(), regression_loader())
        seen.append(list(calls))
        calls.clear()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 4


@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {}])
def test_a_metric_that_nobody_logs_is_an_error_in_the_first_epoch(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="SwitchToSFN monitors 'typo'"):
        checks_of("typo", **options)


# ------------------------------------------------------------------------------------------------ used twice


class Checked(SwitchToSFN):
    """Notes at which step it checks what."""

    def on_check(self, trainer: Trainer, value: float | None, plateau: bool) -> None:
        self.checks = [*getattr(self, "checks", []), (trainer.global_step, value)]
        super().on_check(trainer, value, plateau)


def test_checks_by_steps_begin_anew_with_each_fit() -> None:
    callback = Checked("both", check_every_n_steps=3, patience=9)
    for steps in (3, 5, 6):
        callback.checks = []
        trainer = make_trainer(-1, max_steps=steps, callbacks=[callback], limit_val_batches=0)
        trainer.fit(Validated(), regression_loader(), regression_loader())
        assert [step for step, _ in callback.checks] == [3, 6][: steps // 3]
        means = [1.0, 4 / 3][: steps // 3]  # of the batches 0 to 2, and 3, 0, 1
        assert [value for _, value in callback.checks] == pytest.approx(means)


def test_where_to_check_is_chosen_anew_for_each_trainer() -> None:
    callback = Checked("val_loss", patience=9)
    for interval, expected in ((1.0, [4]), (0.5, [2, 4])):
        callback.checks = []
        trainer = make_trainer(1, callbacks=[callback], val_check_interval=interval)
        trainer.fit(Validated(), regression_loader(), regression_loader())
        assert [step for step, _ in callback.checks] == expected
