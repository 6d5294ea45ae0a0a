"""Spectra are those of the dense Hessian, they are taken when they should be, and the run does not notice."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sfn import HessianSpectrum

from .modules import (
    Fitting,
    MemoryLogger,
    Untidy,
    bits,
    flat,
    forced,
    make_trainer,
    random_streams,
    regression_data,
    regression_loader,
    sgd,
    small_net,
)

NAMES = ("lambda_min", "lambda_max", "negative_fraction", "gradient_norm", "residual_max", "loss")
SIZE = sum(p.numel() for p in small_net().parameters())


def dense_eigenvalues(parameters: Tensor, rows: slice) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and eigenvalues of the Hessian of the mean squared error, in float64, entry by entry."""
    x, y = (t[rows].double() for t in regression_data().tensors)
    net = small_net().double()
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        values = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return F.mse_loss(torch.func.functional_call(net, values, (x,)), y)

    point = parameters.double()
    hessian = torch.autograd.functional.hessian(loss, point)
    gradient = torch.autograd.functional.jacobian(loss, point)
    return loss(point).item(), gradient, torch.linalg.eigvalsh(hessian)


class Parameters(Callback):
    """Notes the parameters at the end of each epoch; listed before the spectrum callback."""

    def __init__(self) -> None:
        self.at_epoch: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_epoch.append(flat(pl_module))


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("hvp", ["auto", "recompute", "finite_difference"])
def test_eigenvalues_are_those_of_the_dense_hessian_on_the_first_batches(num_batches: int, hvp: Any) -> None:
    """Several equal batches: the Hessian of their mean."""
    spectrum = HessianSpectrum(krylov_dim=SIZE, num_batches=num_batches, hvp=hvp)
    noted, logger = Parameters(), MemoryLogger()
    trainer = make_trainer(3, callbacks=[noted, spectrum], logger=logger, precision="64-true")
    trainer.fit(Fitting(optimizer=sgd(0.2)), regression_loader())
    for epoch, parameters in enumerate(noted.at_epoch):
        loss, gradient, values = dense_eigenvalues(parameters, slice(4 * num_batches))
        logged = {name: logger.values(f"hessian/{name}")[epoch][1] for name in NAMES}
        close: dict[str, Any] = {"rel": 1e-4 if hvp == "finite_difference" else 1e-7, "abs": 1e-8}
        assert logged["lambda_min"] == pytest.approx(values[0].item(), **close)
        assert logged["lambda_max"] == pytest.approx(values[-1].item(), **close)
        assert logged["loss"] == pytest.approx(loss, rel=1e-9)
        assert logged["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert spectrum.last is not None
    if hvp != "finite_difference":
        np.testing.assert_allclose(spectrum.last.eigenvalues.numpy(), values.numpy(), rtol=1e-6, atol=1e-8)
        assert spectrum.last.negative_fraction == pytest.approx(
            (values < -1e-7 * values.abs().max()).double().mean().item()
        )


def test_few_vectors_bound_the_ends_from_inside() -> None:
    spectrum, noted = HessianSpectrum(krylov_dim=5), Parameters()
    trainer = make_trainer(1, callbacks=[noted, spectrum], logger=MemoryLogger(), precision="64-true")
    trainer.fit(Fitting(), regression_loader())
    _, _, values = dense_eigenvalues(noted.at_epoch[0], slice(4))
    assert spectrum.last is not None
    assert len(spectrum.last.eigenvalues) == 5
    assert values[0] - 1e-9 <= spectrum.last.lambda_min
    assert spectrum.last.lambda_max <= values[-1] + 1e-9
    for ritz, residual in zip(spectrum.last.eigenvalues, spectrum.last.residuals, strict=True):
        assert (values - ritz).abs().min() <= residual + 1e-9


def taken_at(epochs: int, accumulate: int = 1, **options: Any) -> list[int]:
    """Optimizer steps after which spectra were taken, of four batches an epoch."""
    steps: list[int] = []

    class Noting(HessianSpectrum):
        def _take(self, trainer: Trainer, module: LightningModule, place: int) -> None:
            steps.append(trainer.global_step)
            super()._take(trainer, module, place)

    logger = MemoryLogger()
    callback = Noting(krylov_dim=2, **options)
    trainer = make_trainer(epochs, callbacks=[callback], logger=logger, accumulate_grad_batches=accumulate)
    trainer.fit(Fitting(), regression_loader())
    assert len(logger.values("hessian/lambda_max")) == len(steps)
    return steps


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({}, 3, [4, 8, 12]),
        ({"every_n_epochs": 2}, 5, [8, 16]),
        ({"every_n_steps": 1}, 1, [1, 2, 3, 4]),
        ({"every_n_steps": 3}, 3, [3, 6, 9, 12]),
        ({"every_n_steps": 100}, 2, []),
    ],
)
def test_spectra_are_taken_when_they_should_be(options: dict[str, Any], epochs: int, steps: list[int]) -> None:
    assert taken_at(epochs, **options) == steps


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_steps_are_optimizer_steps_where_gradients_are_accumulated(every: int, steps: list[int]) -> None:
    assert taken_at(2, accumulate=2, every_n_steps=every) == steps


def test_fixed_batches_even_though_the_loader_shuffles() -> None:
    """With a learning rate of zero and one probe, every spectrum is the same."""
    spectrum, logger = HessianSpectrum(krylov_dim=4), MemoryLogger()
    trainer = make_trainer(4, callbacks=[spectrum], logger=logger)
    trainer.fit(Untidy(lr=0.0), regression_loader(shuffle=True))
    # Batch norm's buffers move on, but a training step does not read them.
    for name in NAMES:
        values = [value for _, value in logger.values(f"hessian/{name}")]
        assert len(values) == 4
        assert len(set(values)) == 1


class Consuming(Fitting):
    """Takes its batch apart."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch.pop("x"), batch.pop("y")
        return super().training_step((x, y), batch_idx)


def test_batches_that_the_step_takes_apart() -> None:
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])}

    spectrum = HessianSpectrum(krylov_dim=3)
    trainer = make_trainer(1, callbacks=[spectrum], logger=MemoryLogger())
    trainer.fit(Consuming(), regression_loader(collate_fn=collate))
    assert spectrum.last is not None


# ------------------------------------------------------------------------------------------------ neutrality


def run(callbacks: list[Callback], **options: Any) -> tuple[Any, ...]:
    seed_everything(0)
    module, logger = Untidy(), MemoryLogger()
    trainer = make_trainer(3, callbacks=callbacks, logger=logger, accumulate_grad_batches=2, **options)
    trainer.fit(module, regression_loader(20, 4, shuffle=True))
    rows = [(step, {k: v for k, v in row.items() if not k.startswith("hessian/")}) for step, row in logger.rows]
    metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("hessian/")}
    state = bits(trainer.optimizers[0].state_dict())
    return [row for row in rows if row[1]], logger.written, module.traces(), bits(metrics), random_streams(), str(state)


@pytest.mark.parametrize("options", [{"every_n_epochs": 1}, {"every_n_steps": 1, "num_batches": 2}])
def test_a_run_with_spectra_is_the_run_without_them(options: dict[str, Any]) -> None:
    plain = run([])
    assert len(plain[0]) > 6
    probed = run([HessianSpectrum(krylov_dim=6, **options)])
    for without, beside in zip(plain, probed, strict=True):
        assert beside == without


# ------------------------------------------------------------------------------------------------ loggers


def test_tensorboard_gets_scalars_and_both_histograms() -> None:
    spectrum, logger = HessianSpectrum(krylov_dim=8), TensorBoardLogger(".", name="", version="")
    make_trainer(2, callbacks=[spectrum], logger=logger).fit(Fitting(), regression_loader())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    assert spectrum.last is not None
    for name in NAMES:
        points = events.Scalars(f"hessian/{name}")
        assert len(points) == 2
        assert points[-1].value == pytest.approx(float(getattr(spectrum.last, name)), rel=1e-5, abs=1e-12)
    values = spectrum.last.eigenvalues.numpy()
    signed_log = np.sign(values) * np.log10(1 + np.abs(values) / 1e-4)
    for tag, expected in (("eigenvalues", values), ("eigenvalues_signed_log", signed_log)):
        histogram = events.Histograms(f"hessian/{tag}")[-1].histogram_value
        assert histogram.num == 8
        assert histogram.min == pytest.approx(expected.min(), rel=1e-5)
        assert histogram.max == pytest.approx(expected.max(), rel=1e-5)
        assert histogram.sum == pytest.approx(expected.sum(), rel=1e-4)


def test_csv_logger_gets_the_scalars() -> None:
    spectrum, logger = HessianSpectrum(krylov_dim=4), CSVLogger(".", name="", version="")
    make_trainer(2, callbacks=[spectrum], logger=logger).fit(Fitting(), regression_loader())
    table = np.genfromtxt(logger.experiment.metrics_file_path, delimiter=",", names=True, deletechars="")
    assert spectrum.last is not None
    for name in NAMES:
        column = table[f"hessian/{name}"]
        values = column[np.isfinite(column)]
        assert len(values) == 2
        assert values[-1] == pytest.approx(float(getattr(spectrum.last, name)))


def test_every_logger_is_served() -> None:
    loggers = [MemoryLogger(), MemoryLogger()]
    make_trainer(1, callbacks=[HessianSpectrum(krylov_dim=2)], logger=loggers).fit(Fitting(), regression_loader())
    first, second = (logger.values("hessian/lambda_max") for logger in loggers)
    assert first == second
    assert len(first) == 1


# ------------------------------------------------------------------------------------------------ life cycle


def test_dry_run_needs_no_logger() -> None:
    trainer = make_trainer(1, callbacks=[HessianSpectrum(krylov_dim=2)], fast_dev_run=2)
    trainer.fit(Fitting(), regression_loader())
    assert trainer.global_step == 2


def test_second_fit_starts_afresh() -> None:
    spectrum = HessianSpectrum(krylov_dim=SIZE)
    fresh = HessianSpectrum(krylov_dim=SIZE)
    make_trainer(1, callbacks=[spectrum], logger=MemoryLogger()).fit(Fitting(), regression_loader(8, 4))
    for callback in (spectrum, fresh):
        torch.manual_seed(1)
        loader: DataLoader[Any] = regression_loader(16, 8)
        make_trainer(1, callbacks=[callback], logger=MemoryLogger()).fit(Fitting(), loader)
    assert spectrum.last is not None
    assert fresh.last is not None
    assert torch.equal(spectrum.last.eigenvalues, fresh.last.eigenvalues)


@pytest.mark.parametrize("spectrum_first", [False, True])
def test_beside_the_switch(spectrum_first: bool) -> None:
    """Before and after it, spectra are there, and the Newton run is what it is without them."""

    def fit(callbacks: list[Callback]) -> tuple[Tensor, MemoryLogger]:
        torch.manual_seed(0)
        module, logger = Fitting(nn.Sequential(small_net(), nn.Dropout(0.1))), MemoryLogger()
        make_trainer(5, callbacks=callbacks, logger=logger).fit(module, regression_loader())
        return flat(module), logger

    alone, _ = fit([forced()])
    pair = [HessianSpectrum(krylov_dim=4), forced()]
    together, logger = fit(pair if spectrum_first else pair[::-1])
    assert torch.equal(together, alone)
    assert len(logger.values("hessian/lambda_max")) == 5
    assert len(logger.values("sfn/loss_before")) == 3
