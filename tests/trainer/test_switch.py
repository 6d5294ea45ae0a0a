"""The switch: when it happens, what Lightning does after it, and that checkpoints and companions work."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lightning_sfn import SaddleFreeNewton, SwitchToSFN

from .modules import (
    Factorised,
    Fitting,
    MemoryLogger,
    NewtonCall,
    Scripted,
    Untidy,
    bits,
    factorised_loader,
    flat,
    forced,
    make_trainer,
    random_streams,
    regression_data,
    regression_loader,
    sgd,
    small_net,
)

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # ModelCheckpoint, on resuming

NAN = float("nan")

# ------------------------------------------------------------------------------------------------ when


def stopped_epoch(script: list[float], **options: Any) -> int | None:
    """Where Lightning's own `EarlyStopping` stops."""
    stopping = EarlyStopping(monitor="metric", **options)
    trainer = make_trainer(len(script), callbacks=[stopping])
    trainer.fit(Scripted(script), regression_loader())
    return stopping.stopped_epoch if trainer.current_epoch < len(script) else None


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ([5.0, 4, 3, 3, 3, 3, 2, 1], {"patience": 1}),
        ([5.0, 4, 3, 3, 3, 3, 2, 1], {"patience": 3}),
        ([5.0, 4, 4, 3, 3, 3, 2, 1], {"patience": 2}),
        ([5.0, 4, 3.5, 3.2, 3.1, 3, 2, 1], {"patience": 2, "min_delta": 0.4}),
        ([1.0, 2, 3, 3, 3, 4, 4, 4], {"patience": 2, "mode": "max"}),
        ([8.0, 7, 6, 5, 4, 3, 2, 1], {"patience": 1}),
    ],
)
def test_switches_where_early_stopping_would_stop(script: list[float], options: dict[str, Any]) -> None:
    expected = stopped_epoch(script, **options)
    callback = SwitchToSFN(monitor="metric", probe_dim=0, **options)
    trainer = make_trainer(len(script), callbacks=[callback])
    trainer.fit(Scripted(script), regression_loader())
    assert trainer.current_epoch == len(script)
    assert callback.switched == (expected is not None)
    assert callback.switched_at_step == (None if expected is None else 4 * (expected + 1))


def test_after_the_switch_lightning_steps_the_newton_optimizer() -> None:
    callback, module = forced(), Fitting()
    seen: list[tuple[str, int, bool]] = []

    class Watching(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.before = flat(pl_module)

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            moved = not torch.equal(self.before, flat(pl_module))
            seen.append((type(trainer.optimizers[0]).__name__, trainer.global_step, moved))
            optimizer: Any = pl_module.optimizers(use_pl_optimizer=False)
            assert optimizer is trainer.optimizers[0]

    trainer = make_trainer(4, callbacks=[callback, Watching()])
    trainer.fit(module, regression_loader())
    names = ["SGD", "SGD", "SaddleFreeNewton", "SaddleFreeNewton"]
    assert seen == [(name, 4 * epoch, True) for epoch, name in enumerate(names, start=1)]
    assert trainer.optimizers == [callback.newton]


def test_metric_that_is_not_a_number_never_switches_and_is_said_once() -> None:
    callback = SwitchToSFN(monitor="metric", patience=1, probe_dim=0)
    with pytest.warns(UserWarning, match="^metric is nan: SwitchToSFN passes over such checks.$") as caught:
        make_trainer(5, callbacks=[callback]).fit(Scripted([NAN, NAN, math.inf, NAN, NAN]), regression_loader())
    assert sum("passes over" in str(warning.message) for warning in caught) == 1
    assert not callback.switched
    assert callback.wait_count == 0


def test_metric_that_is_not_a_number_after_the_switch_is_not_said_to_prevent_one() -> None:
    callback = SwitchToSFN(monitor="metric", patience=1, probe_dim=0)
    with pytest.warns(UserWarning, match="metric is nan: ") as caught:
        make_trainer(3, callbacks=[callback]).fit(Scripted([3.0, 3.0, NAN]), regression_loader())
    assert callback.switched
    assert not any("does not switch" in str(warning.message) for warning in caught)


@pytest.mark.filterwarnings("ignore:metric is nan")
def test_checks_that_are_not_numbers_do_not_count() -> None:
    script = [3.0, NAN, 3.0, NAN, 3.0, 3.0]
    callback = SwitchToSFN(monitor="metric", patience=2, probe_dim=0)
    make_trainer(6, callbacks=[callback]).fit(Scripted(script), regression_loader())
    assert callback.switched_at_step == 4 * 5


@pytest.mark.filterwarnings("ignore:metric is nan")
def test_processes_decide_together_also_where_one_sees_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that skips the common decision leaves the others waiting for it for ever."""
    counts = []
    for script in ([3.0, 2.0, 1.0], [3.0, NAN, 1.0]):
        trainer = make_trainer(3, callbacks=[SwitchToSFN(monitor="metric", patience=2, probe_dim=0)])
        reduce, asked = trainer.strategy.reduce_boolean_decision, []

        def counting(decision: bool, all: bool = True, asked: list[bool] = asked, reduce: Any = reduce) -> bool:
            asked.append(decision)
            return bool(reduce(decision, all))

        monkeypatch.setattr(trainer.strategy, "reduce_boolean_decision", counting)
        trainer.fit(Scripted(script), regression_loader())
        counts.append(len(asked))
    assert counts[0] == counts[1] >= 3


def test_missing_metric_is_an_error_that_names_what_there_is() -> None:
    trainer = make_trainer(1, callbacks=[SwitchToSFN(monitor="val_acc")])
    with pytest.raises(MisconfigurationException, match=r"monitors 'val_acc', but .* is metric, train_loss:"):
        trainer.fit(Scripted([1.0]), regression_loader())


def test_missing_metric_is_passed_over_if_wanted() -> None:
    callback = SwitchToSFN(monitor="val_acc", strict=False, patience=1)
    trainer = make_trainer(3, callbacks=[callback])
    trainer.fit(Fitting(), regression_loader())
    assert trainer.current_epoch == 3
    assert not callback.switched


def test_metric_logged_at_the_end_of_the_epoch_is_seen_in_that_epoch() -> None:
    class Late(Fitting):
        def on_train_epoch_end(self) -> None:
            self.log("late", [3.0, 2.0, 2.0, 2.0][self.current_epoch])

    callback = SwitchToSFN(monitor="late", patience=1, probe_dim=0)
    make_trainer(4, callbacks=[callback]).fit(Late(), regression_loader())
    assert callback.switched_at_step == 4 * 3
    assert callback.best_score == 2.0


class Validated(Fitting):
    """Logs a script of validation losses, one for each validation."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script = iter(script)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.value = next(self.script)
        self.log("val_loss", self.value)


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_checks_after_validation_the_sanity_check_apart(sanity_steps: int) -> None:
    script = [0.0] * (sanity_steps > 0) + [3.0, 2.0, 2.0, 2.0, 2.0]
    callback = SwitchToSFN(monitor="val_loss", patience=2, check_on_train_epoch_end=False, probe_dim=0)
    trainer = make_trainer(5, callbacks=[callback], num_sanity_val_steps=sanity_steps)
    trainer.fit(Validated(script), regression_loader(), regression_loader(8))
    assert callback.switched_at_step == 4 * 4
    assert callback.best_score == 2.0


@pytest.mark.parametrize(("accumulate", "switched_at"), [(1, 6), (2, 3)])
def test_switch_in_the_middle_of_an_epoch(accumulate: int, switched_at: int) -> None:
    """Validation after every second batch; the third check stalls."""
    calls: list[NewtonCall] = []
    options: dict[str, Any] = {"monitor": "val_loss", "min_delta": 0.0, "patience": 1, "gradient_batches": 2}
    callback = forced(calls, **options)
    trainer = make_trainer(
        2, callbacks=[callback], val_check_interval=2, num_sanity_val_steps=0, accumulate_grad_batches=accumulate
    )
    trainer.fit(Validated([3.0, 2.0, 2.0, 2.0, 2.0]), regression_loader(), regression_loader(8))
    assert callback.switched_at_step == switched_at
    assert [call.sizes[0] for call in calls] == [2]
    assert trainer.global_step == 8 // accumulate


def test_dry_run_does_not_switch() -> None:
    callback = forced(min_delta=0.0)
    trainer = make_trainer(1, callbacks=[callback], fast_dev_run=3)
    trainer.fit(Fitting(), regression_loader())
    assert not callback.switched
    assert callback.wait_count == 0
    assert torch.isinf(callback.best_score)


# ------------------------------------------------------------------------------------------------ neutrality


def neutral_run(callbacks: list[Callback], accumulate: int) -> tuple[Any, ...]:
    seed_everything(0)
    module, logger = Untidy(lr=0.0), MemoryLogger()
    trainer = make_trainer(5, callbacks=callbacks, logger=logger, accumulate_grad_batches=accumulate)
    trainer.fit(module, regression_loader(20, 4, shuffle=True))
    rows = [(step, row) for step, row in logger.rows if not any(name.startswith("sfn/") for name in row)]
    metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("sfn/")}
    return rows, logger.written, module.traces(), bits(metrics), random_streams(), trainer.global_step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [{}, {"gradient_batches": 2}, {"hold": True}])
def test_newton_steps_of_length_zero_leave_no_trace(options: dict[str, Any], accumulate: int) -> None:
    plain = neutral_run([], accumulate)
    assert {"train_loss_step", "train_loss_epoch", "error_step", "error_epoch"} <= {k for _, r in plain[0] for k in r}
    callback = forced(newton={"lr": 0.0, "krylov_dim": 16}, probe_dim=4, **options)
    switched = neutral_run([callback], accumulate)
    assert callback.report is not None
    assert callback.report.newton_steps >= 3
    assert callback.report.products > 20
    for without, beside in zip(plain, switched, strict=True):
        assert beside == without


# ------------------------------------------------------------------------------------------------ what it is for


def full_loss(module: Factorised) -> float:
    x, y = factorised_loader().dataset.tensors  # type: ignore[attr-defined]
    return float((x @ (module.b @ module.a).detach().T - y).square().sum(1).mean())


@pytest.mark.parametrize(
    ("options", "epochs"), [({}, 30), ({"gradient_batches": 4}, 20), ({"hold": True}, 8)], ids=["epoch", "4", "held"]
)
def test_it_escapes_where_gradient_descent_stays(options: dict[str, Any], epochs: int) -> None:
    stays = Factorised()
    at_first = full_loss(stays)
    make_trainer(epochs).fit(stays, factorised_loader())
    plateau = full_loss(stays)
    assert plateau > 0.95 * at_first

    callback = SwitchToSFN(monitor="train_loss", patience=2, min_delta=0.1, probe_dim=8, **options)
    module = Factorised()
    make_trainer(epochs, callbacks=[callback]).fit(module, factorised_loader())
    assert callback.switched
    assert full_loss(module) < 1e-2 * plateau
    assert callback.report is not None
    assert callback.report.spectrum_at_switch is not None
    assert callback.report.spectrum_at_switch.lambda_min < -0.1


# ------------------------------------------------------------------------------------------------ Lightning's features


def test_gradient_clipping_bounds_the_step_not_the_objective() -> None:
    """Secants and trial losses need the gradient as it is; the bound becomes the optimizer's own."""
    calls: list[NewtonCall] = []
    callback = forced(calls)
    trainer = make_trainer(3, callbacks=[callback], gradient_clip_val=1e-2, precision="64-true")
    module = Fitting()
    trainer.fit(module, regression_loader(16, 16))
    (call,) = calls
    net = small_net().double()
    nn.utils.vector_to_parameters(call.parameters, net.parameters())
    x, y = (t.double() for t in regression_data(16).tensors)
    F.mse_loss(net(x), y).backward()
    full = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    assert full.norm() > 2e-2
    torch.testing.assert_close(call.gradient, full, rtol=1e-10, atol=1e-14)
    assert callback.newton is not None
    assert callback.newton.max_grad_norm == 1e-2


def scheduled(optimizer: torch.optim.Optimizer, kind: str) -> Any:
    if kind == "plateau":
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": kind}}


@pytest.mark.parametrize(("kind", "rate"), [("epoch", 0.08 / 4), ("step", 0.08 / 2**8), ("plateau", 0.08 / 4)])
def test_schedulers_rest_after_the_switch(kind: str, rate: float, caplog: pytest.LogCaptureFixture) -> None:
    class Scheduled(Fitting):
        def configure_optimizers(self) -> Any:
            configured = scheduled(torch.optim.SGD(self.parameters(), lr=0.08), kind)
            self.scheduler = configured["lr_scheduler"]["scheduler"]
            return configured

    module = Scheduled()
    with caplog.at_level(logging.INFO):
        make_trainer(6, callbacks=[forced()]).fit(module, regression_loader())
    assert module.scheduler.get_last_lr() == pytest.approx([rate])
    assert "1 learning rate scheduler(s) rest from now on" in caplog.text
    assert "train_loss has stalled at" in caplog.text


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precisions(precision: Any) -> None:
    calls: list[NewtonCall] = []
    trainer = make_trainer(6, callbacks=[forced(calls)], precision=precision)
    trainer.fit(Fitting(), regression_loader())
    assert len(calls) == 4
    assert calls[0].gradient.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert calls[-1].of_objective[0] < 0.7 * calls[0].of_objective[0]


def test_gradient_scaler_passes_no_closure() -> None:
    """A scaler runs the closure itself and unscales the gradient before the step."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    calls: list[NewtonCall] = []
    trainer = make_trainer(6, callbacks=[forced(calls)], plugins=[plugin])
    trainer.fit(Fitting(), regression_loader())
    assert len(calls) == 4
    assert trainer.global_step == 24
    own, exact = calls[0].gradient, calls[0].of_objective[1]
    assert (own - exact).norm() < 0.05 * exact.norm()
    assert calls[-1].of_objective[0] < 0.7 * calls[0].of_objective[0]


def test_gradients_accumulated_over_batches() -> None:
    """Same cases in the window, same steps: accumulation changes who adds up, not what is added."""
    ends = []
    for accumulate in (1, 2, 4):
        torch.manual_seed(0)
        module = Fitting(optimizer=sgd(0.0))
        trainer = make_trainer(5, callbacks=[forced()], precision="64-true", accumulate_grad_batches=accumulate)
        trainer.fit(module, regression_loader())
        ends.append(flat(module))
        assert trainer.global_step == 5 * 4 // accumulate
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------ companions


def test_beside_other_callbacks() -> None:
    class Scheduled(Scripted):
        def configure_optimizers(self) -> Any:
            return scheduled(torch.optim.SGD(self.parameters(), lr=0.08), "epoch")

    script = [4.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    switch = SwitchToSFN(monitor="metric", patience=1, probe_dim=0)
    stopping = EarlyStopping(monitor="metric", patience=3)
    checkpoint = ModelCheckpoint(dirpath="kept", monitor="metric", save_top_k=1, save_last=True)
    rates, logger = LearningRateMonitor(), MemoryLogger()
    trainer = make_trainer(9, callbacks=[switch, stopping, rates, checkpoint], logger=logger, enable_checkpointing=True)
    trainer.fit(Scheduled(script), regression_loader())
    assert switch.switched_at_step == 8
    assert stopping.stopped_epoch == 7
    assert trainer.current_epoch == 8
    assert checkpoint.best_model_score == 1.0
    assert Path(checkpoint.best_model_path).name == "epoch=4-step=20.ckpt"
    assert [value for _, value in logger.values("lr-SGD")] == pytest.approx([0.08, 0.04, 0.02])
    newton_rates = [value for _, value in logger.values("lr-SaddleFreeNewton")]
    assert newton_rates
    assert set(newton_rates) == {1.0}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_beside_stochastic_weight_averaging(batch_norm: bool) -> None:
    """The averaged weights are what the run ends with; the pass for batch norm's statistics moves no weight."""
    layers = [nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if batch_norm else []), nn.Tanh(), nn.Linear(4, 1)]
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=3, annealing_epochs=1)
    module = Fitting(nn.Sequential(*layers))
    callback = forced()
    make_trainer(6, callbacks=[callback, averaging]).fit(module, regression_loader())
    assert callback.switched
    assert averaging._average_model is not None
    assert torch.equal(flat(module), flat(averaging._average_model))


def test_beside_weight_averaging() -> None:
    averaging, callback, module = WeightAveraging(), forced(), Fitting()
    ends: list[Tensor] = []

    class Noting(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            ends.append(flat(pl_module))

    make_trainer(4, callbacks=[callback, Noting(), averaging]).fit(module, regression_loader())
    assert callback.switched
    torch.testing.assert_close(flat(module), torch.stack(ends).mean(0), rtol=1e-4, atol=1e-5)


def test_one_callback_object_for_two_fits() -> None:
    def fit(callback: SwitchToSFN) -> tuple[Tensor, SwitchToSFN]:
        torch.manual_seed(0)
        module = Fitting()
        make_trainer(4, callbacks=[callback]).fit(module, regression_loader())
        return flat(module), callback

    used = forced()
    first, _ = fit(used)
    assert used.switched
    seen: list[bool] = []

    class Beginning(Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            seen.append(used.switched)

    torch.manual_seed(0)
    module = Fitting()
    make_trainer(4, callbacks=[used, Beginning()]).fit(module, regression_loader())
    assert seen == [False, False, False, True]
    assert torch.equal(flat(module), first)
    assert used.report is not None
    assert used.report.newton_steps == 2


def test_one_trainer_for_two_fits_after_a_crash() -> None:
    """Nothing of a fit that broke off stays on the Trainer."""

    class Crashing(Fitting):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 14:
                raise ArithmeticError

    trainer = make_trainer(6, callbacks=[forced(min_delta=0.0, patience=99)])
    method = trainer.strategy.training_step.__func__  # type: ignore[attr-defined]
    switch = forced()
    trainer.callbacks[-1:] = [switch]
    with pytest.raises(ArithmeticError):
        trainer.fit(Crashing(), regression_loader())
    assert switch.switched
    trainer.fit(Fitting(), regression_loader())
    assert trainer.strategy.training_step.__func__ is method  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ what is logged


LOGGED = ("loss_before", "loss_after", "damping", "step_norm", "lambda_min", "lambda_max", "accepted")


def test_each_newton_step_is_logged() -> None:
    calls: list[NewtonCall] = []
    loggers = [CSVLogger(".", name="", version="csv"), TensorBoardLogger(".", name="", version="board")]
    trainer = make_trainer(4, callbacks=[forced(calls, gradient_batches=2)], logger=loggers)
    trainer.fit(Fitting(), regression_loader())
    records = [call.record for call in calls if call.record is not None]
    assert len(records) == 4
    table = np.genfromtxt(loggers[0].experiment.metrics_file_path, delimiter=",", names=True, deletechars="")
    events = EventAccumulator(str(loggers[1].log_dir), size_guidance={"scalars": 0})
    events.Reload()
    for name in LOGGED:
        expected = [float(getattr(record, name)) for record in records]
        rows = np.isfinite(table[f"sfn/{name}"])
        np.testing.assert_allclose(table[f"sfn/{name}"][rows], expected, rtol=1e-6)
        assert table["step"][rows].tolist() == [9, 11, 13, 15]  # as Lightning counts: the step before this one's end
        assert table["epoch"][rows].tolist() == [2, 2, 3, 3]
        points = events.Scalars(f"sfn/{name}")
        np.testing.assert_allclose([point.value for point in points], expected, rtol=1e-5)
        # Lightning's own epoch mean of the last epoch.
        assert float(trainer.callback_metrics[f"sfn/{name}"]) == pytest.approx(sum(expected[-2:]) / 2, rel=1e-5)
    assert table["epoch"][np.isfinite(table["sfn/total_products"])].tolist() == [3]  # the report, after the last epoch


def test_report_adds_up(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[NewtonCall] = []
    callback = forced(calls, probe_dim=6)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(7, callbacks=[callback])
        trainer.fit(Fitting(), regression_loader())
    report, records = callback.report, [call.record for call in calls if call.record is not None]
    assert report is not None
    assert len(records) == report.newton_steps == 5
    assert report.products == sum(record.products for record in records)
    assert report.accepted_steps == sum(record.accepted for record in records)
    assert report.first_steps == callback.switched_at_step == 8
    assert (report.monitor, report.first_optimizer) == ("train_loss", "SGD")
    assert report.final == float(trainer.callback_metrics["train_loss"])
    assert report.final < report.plateau
    assert report.spectrum_at_switch is not None
    assert report.spectrum_at_end is not None
    assert len(report.spectrum_at_switch.eigenvalues) == len(report.spectrum_at_end.eigenvalues) == 6
    assert report.spectrum_at_switch.loss == pytest.approx(calls[0].values["curvature"], rel=1e-6)
    assert report.table() in caplog.text


def test_the_report_counts_every_gradient_of_an_optimizer_that_takes_several() -> None:
    """L-BFGS calls its closure again and again in one step."""

    class Counting(Fitting):
        backwards = 0

        def on_after_backward(self) -> None:
            self.backwards += self.trainer.current_epoch < 2

    module = Counting(optimizer=partial(torch.optim.LBFGS, lr=0.1, max_iter=3))
    callback = forced()
    make_trainer(3, callbacks=[callback]).fit(module, regression_loader())
    assert callback.report is not None
    first = callback.report.phases[0]
    assert (first.steps, first.gradients) == (8, module.backwards)
    assert first.gradients > 8


def test_report_without_spectra() -> None:
    callback = forced(probe_dim=0)
    make_trainer(3, callbacks=[callback]).fit(Fitting(), regression_loader())
    assert callback.report is not None
    assert callback.report.spectrum_at_switch is None
    assert callback.report.spectrum_at_end is None


# ------------------------------------------------------------------------------------------------ checkpoints


class ByEpoch(Sampler[int]):
    """A shuffle that the epoch decides; Lightning tells it the epoch."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __len__(self) -> int:
        return self.size


def epoch_loader() -> DataLoader[Any]:
    return DataLoader(regression_data(18), batch_size=2, sampler=ByEpoch(18))


def momentum() -> Fitting:
    torch.manual_seed(0)
    return Fitting(optimizer=sgd(0.05, momentum=0.9, weight_decay=1e-3))


def saving() -> ModelCheckpoint:
    return ModelCheckpoint(dirpath="kept", filename="{epoch}", save_top_k=-1)


def train(
    epochs: int, callbacks: list[Callback], resume: str | Path | None = None, module: Fitting | None = None
) -> tuple[Fitting, Trainer]:
    module = module or momentum()
    trainer = make_trainer(epochs, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, epoch_loader(), ckpt_path=resume, weights_only=True)
    return module, trainer


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"gradient_batches": 3}, {"newton": {"damping": "levenberg_marquardt"}}])
def test_resuming_is_going_on(epoch: int, options: dict[str, Any]) -> None:
    """Before the plateau (epoch 0), when it is decided (epoch 1), and after the switch: bit for bit."""
    going_on, _ = train(7, [forced(**options), saving()])
    callback = forced(**options)
    resumed, trainer = train(7, [callback, ModelCheckpoint(dirpath="other")], f"kept/epoch={epoch}.ckpt")
    assert trainer.global_step == 7 * 9
    assert callback.switched
    assert callback.switched_at_step == 2 * 9
    assert torch.equal(flat(resumed), flat(going_on))


def test_resuming_on_held_data() -> None:
    """The held window is part of the checkpoint."""
    going_on, _ = train(6, [forced(hold=True), saving()])
    calls: list[NewtonCall] = []
    resumed, _ = train(6, [forced(calls, hold=True), ModelCheckpoint(dirpath="other")], "kept/epoch=3.ckpt")
    assert [call.sizes[0] for call in calls] == [9] * 18
    assert torch.equal(flat(resumed), flat(going_on))


def test_resuming_before_the_plateau_keeps_the_count() -> None:
    script = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1]

    def callback() -> SwitchToSFN:
        return SwitchToSFN(monitor="metric", patience=3, probe_dim=0)

    train(7, [callback(), saving()], module=Scripted(script))
    resumed = callback()
    seen: list[tuple[int, float]] = []

    class Beginning(Callback):
        def on_train_start(self, *args: Any) -> None:
            seen.append((resumed.wait_count, float(resumed.best_score)))

    train(7, [resumed, Beginning(), ModelCheckpoint(dirpath="o")], "kept/epoch=2.ckpt", Scripted(script))
    assert seen == [(1, 2.0)]
    assert resumed.switched_at_step == 5 * 9


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoint_of_a_switched_run_goes_on_without_the_callback() -> None:
    train(5, [forced(), saving()])
    stored = torch.load("kept/epoch=4.ckpt", weights_only=True)
    (state,) = stored["optimizer_states"]
    assert state["param_groups"][0]["momentum"] == 0.9
    assert len(state["state"]) == 4
    module = momentum()
    before, trainer = stored["state_dict"], make_trainer(6)
    trainer.fit(module, epoch_loader(), ckpt_path="kept/epoch=4.ckpt", weights_only=True)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert trainer.global_step == 6 * 9
    assert not torch.equal(module.state_dict()["net.0.weight"], before["net.0.weight"])


def test_first_optimizer_in_the_checkpoint_is_that_of_the_switch() -> None:
    train(5, [forced(), saving()])
    stored = [torch.load(f"kept/epoch={epoch}.ckpt", weights_only=True) for epoch in (1, 4)]
    buffers = [[v["momentum_buffer"] for v in c["optimizer_states"][0]["state"].values()] for c in stored]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_checkpoint_keeps_the_schedulers_state() -> None:
    class Scheduled(Fitting):
        def configure_optimizers(self) -> Any:
            return scheduled(torch.optim.SGD(self.parameters(), lr=0.08), "epoch")

    train(5, [forced(), saving()], module=Scheduled())
    (state,) = torch.load("kept/epoch=4.ckpt", weights_only=True)["lr_schedulers"]
    assert state["_last_lr"] == pytest.approx([0.02])
    callback = forced()
    _, trainer = train(7, [callback, ModelCheckpoint(dirpath="o")], "kept/epoch=4.ckpt", Scheduled())
    assert callback.switched
    (config,) = trainer.strategy.lr_scheduler_configs  # for those who read it; it has not been stepped
    assert config.scheduler.get_last_lr() == pytest.approx([0.02])


def test_checkpoint_saved_by_hand_after_training() -> None:
    """What `fit` left is as good as what it saved while it ran."""
    going_on, _ = train(7, [forced(), ModelCheckpoint(dirpath="a")])
    _, trainer = train(5, [forced(), ModelCheckpoint(dirpath="b")])
    trainer.save_checkpoint("by_hand.ckpt")
    callback = forced()
    resumed, _ = train(7, [callback, ModelCheckpoint(dirpath="c")], "by_hand.ckpt")
    assert callback.switched
    assert torch.equal(flat(resumed), flat(going_on))


# ------------------------------------------------------------------------------------------------ several processes


class Writing(Callback):
    """Each process writes its parameters down."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save((flat(pl_module), trainer.global_step), f"rank{trainer.global_rank}.pt")


class Shared(Factorised):
    """Logs the mean over the processes, so that all of them see one metric."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (x @ self.a.T @ self.b.T - y).square().sum(1).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return loss


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_stay_together() -> None:
    callback = SwitchToSFN(patience=2, min_delta=0.1, optimizer=partial(SaddleFreeNewton, krylov_dim=8), probe_dim=4)
    trainer = make_trainer(10, accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[callback, Writing()])
    trainer.fit(Shared(), factorised_loader())
    (first, steps), (second, other_steps) = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert steps == other_steps == 10 * 4
    assert torch.equal(first, second)
    module = Factorised()
    at_first = full_loss(module)
    nn.utils.vector_to_parameters(first, module.parameters())
    assert full_loss(module) < 0.5 * at_first


class Uneven(Shared):
    """Its second process drops rows, another number in each batch."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        rows = 3 + int(batch[0].abs().sum() * 10) % 5 if self.global_rank == 1 else len(batch[0])
        return [tensor[:rows] for tensor in batch]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_with_batches_of_other_sizes_stay_together() -> None:
    callback = SwitchToSFN(patience=2, min_delta=0.1, optimizer=partial(SaddleFreeNewton, krylov_dim=8), probe_dim=0)
    trainer = make_trainer(8, accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[callback, Writing()])
    trainer.fit(Uneven(), factorised_loader())
    (first, _), (second, _) = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)


class Masked(Fitting):
    """A frozen parameter hides a part of the output, as attention masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.tensor([0.0, float("-inf")]), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weights = torch.softmax(self.net(batch[0]) + self.mask, dim=1)
        return super().training_step(batch, batch_idx) * weights[:, 0].mean()


def test_a_frozen_parameter_need_not_be_finite() -> None:
    callback = forced()
    make_trainer(3, callbacks=[callback]).fit(Masked(), regression_loader())
    assert callback.switched
