"""Spectra are those of the dense Hessian, they are taken when they should be, and the run does not notice."""

import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_sfn import HessianSpectrum, SwitchToSFN

from .modules import (
    Factorised,
    Fitting,
    MemoryLogger,
    Untidy,
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

NAMES = ("lambda_min", "lambda_max", "negative_fraction", "gradient_norm", "residual_max", "loss")
OURS = ("hessian", "gauss_newton")  # what the names of everything logged begin with
SIZE = sum(p.numel() for p in small_net().parameters())


def dense_hessian(parameters: Tensor, rows: slice) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and Hessian of the mean squared error, in float64, entry by entry."""
    x, y = (t[rows].double() for t in regression_data().tensors)

    def loss(vector: Tensor) -> Tensor:
        return F.mse_loss(network(vector, x), y)

    point = parameters.double()
    hessian = torch.autograd.functional.hessian(loss, point)
    gradient = torch.autograd.functional.jacobian(loss, point)
    return loss(point).item(), gradient, hessian


def network(vector: Tensor, x: Tensor) -> Tensor:
    """What the small network makes of inputs at given parameters."""
    net = small_net().double()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    pieces = vector.split([shape.numel() for shape in shapes.values()])
    values = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    return torch.func.functional_call(net, values, (x,))


def dense_eigenvalues(parameters: Tensor, rows: slice) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and eigenvalues of the Hessian."""
    loss, gradient, hessian = dense_hessian(parameters, rows)
    return loss, gradient, torch.linalg.eigvalsh(hessian)


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
        ({"every_n_epochs": 2}, 5, [8, 16, 20]),  # the last one is what the verdict is about
        ({"every_n_steps": 1}, 1, [1, 2, 3, 4]),
        ({"every_n_steps": 3}, 3, [3, 6, 9, 12]),
        ({"every_n_steps": 100}, 2, [8]),
    ],
)
def test_spectra_are_taken_when_they_should_be(options: dict[str, Any], epochs: int, steps: list[int]) -> None:
    assert taken_at(epochs, **options) == steps


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])])
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


class InPlace(Fitting):
    """Changes its batch in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(1.5)
        return super().training_step(batch, batch_idx)


def test_batches_that_the_step_changes_in_place() -> None:
    """Every replay sees the batch as the loader gave it, and the data set is left as training leaves it."""
    module, data = InPlace(small_net()), regression_data()
    spectrum = HessianSpectrum(krylov_dim=SIZE, precision=64, log=False)
    make_trainer(3, callbacks=[spectrum]).fit(module, DataLoader(data, batch_size=4))
    assert torch.equal(data.tensors[0], regression_data().tensors[0])  # collating copies
    x, y = (t[:4].double() for t in data.tensors)
    assert spectrum.last is not None
    assert spectrum.last.loss == pytest.approx(F.mse_loss(network(flat(module).double(), 1.5 * x), y).item(), rel=1e-12)
    assert spectrum.last.converged


class WithoutIndex(LightningModule):
    """A step that takes the batch alone, as Lightning allows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def training_step(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", [Fitting, WithoutIndex])
def test_own_probe_batches(kind: Any) -> None:
    """They are taken instead of the loader's, and weigh as many cases as they have."""
    own = [[t[rows] for t in regression_data(seed=8).tensors] for rows in (slice(2), slice(2, 9))]
    module, spectrum = kind(), HessianSpectrum(krylov_dim=SIZE, precision=64, log=False, batches=own)
    make_trainer(2, callbacks=[spectrum]).fit(module, regression_loader())
    x, y = (t[:9].double() for t in regression_data(seed=8).tensors)
    expected = F.mse_loss(network(flat(module).double(), x), y).item()
    assert spectrum.last is not None
    assert spectrum.last.loss == pytest.approx(expected, rel=1e-12)
    assert spectrum.state_dict()["batches"] is None


# ------------------------------------------------------------------------------------------------ neutrality


class Scheduled(Untidy):
    """Adam with momentum of both kinds, and a learning rate that changes at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plain(state: Any) -> Any:
    """Nested state, comparable with ``==`` to the last bit."""
    if isinstance(state, Tensor):
        return str(state.dtype), state.detach().contiguous().view(torch.uint8).tolist() if state.ndim else state.item()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, (list, tuple)) else state


def run(callbacks: list[Callback], kind: type[LightningModule] = Untidy, **options: Any) -> dict[str, Any]:
    """Everything that a run leaves behind, apart from what is logged about the spectrum."""
    seed_everything(0)
    module, logger = kind(), MemoryLogger()
    trainer = make_trainer(3, callbacks=callbacks, logger=logger, **({"accumulate_grad_batches": 2} | options))
    trainer.fit(module, regression_loader(20, 4, shuffle=True))
    rows = [(step, row) for step, row in logger.rows if not any(name.startswith(OURS) for name in row)]
    metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith(OURS)}
    parameters, gradients = plain(module.state_dict()), plain([p.grad for p in module.parameters()])
    return {
        "parameters": parameters,
        "rows": rows,
        "written": logger.written,
        "traces": module.float().traces() if isinstance(module, Untidy) else None,
        "gradients": gradients,
        "metrics": plain(metrics),
        "streams": random_streams(),
        "optimizer": plain(trainer.optimizers[0].state_dict()),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "logged": plain({k: v for k, v in trainer.logged_metrics.items() if not k.startswith(OURS)}),
        "step": (trainer.global_step, trainer.current_epoch, torch.get_default_dtype()),
    }


@pytest.fixture(scope="module")
def runs_without() -> dict[str, Any]:
    """Runs without the callback, by what is special about them: made once."""
    return {}


EVERYTHING = {"density": True, "density_probes": 2, "groups": {"first": "first.*", "rest": ["norm.*", "last.*"]}}


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"every_n_epochs": 1}, {}),
        ({"every_n_steps": 1, "num_batches": 2}, {}),
        ({"precision": 64, "every_n_steps": 2, **EVERYTHING}, {}),
        ({"hvp": "finite_difference", "precision": 64}, {}),
        ({"hvp": "recompute", "curvature": "gauss_newton"}, {}),
        ({"precision": 64, **EVERYTHING}, {"kind": Scheduled, "gradient_clip_val": 0.5, "accumulate_grad_batches": 1}),
        ({}, {"precision": "bf16-mixed"}),
        ({"precision": 64, **EVERYTHING}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "64-true"}),
        ({"every_n_steps": 1}, {"precision": "bf16-true"}),
        ({"precision": 64}, {"precision": "bf16-true", "kind": Scheduled}),
    ],
)
def test_a_run_with_spectra_is_the_run_without_them(
    options: dict[str, Any], training: dict[str, Any], runs_without: dict[str, Any]
) -> None:
    key = str(training)
    if key not in runs_without:
        runs_without[key] = run([], **training)
    without = runs_without[key]
    assert len(without["rows"]) > 6
    spectrum = HessianSpectrum(krylov_dim=6, **options)
    beside = run([spectrum], **training)
    assert len(spectrum.history) >= 3
    assert spectrum.verdict
    for name, left in without.items():
        assert beside[name] == left, name


@pytest.mark.parametrize("precision", [32, 64])
@pytest.mark.parametrize("training", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_neither_is_less_than_the_wanted_precision(training: Any, precision: Any) -> None:
    """Rounding of the training precision would show in the loss at equal parameters."""
    spectrum, noted = HessianSpectrum(krylov_dim=4, precision=precision, log=False), Parameters()
    make_trainer(1, callbacks=[noted, spectrum], precision=training).fit(Fitting(), regression_loader())
    rows = regression_data().tensors
    x, y = ((t[:4].bfloat16() if training == "bf16-true" else t[:4]).double() for t in rows)
    expected = F.mse_loss(network(noted.at_epoch[0].double(), x), y).item()
    assert spectrum.last is not None
    double = precision == 64 or training == "64-true"
    assert spectrum.last.loss == pytest.approx(expected, rel=1e-12 if double else 1e-6)


# ------------------------------------------------------------------------------------------------ values


def logged_row(logger: MemoryLogger, prefix: str = "hessian") -> dict[str, float]:
    """What was logged with the last spectrum."""
    row = next(row for _, row in reversed(logger.rows) if f"{prefix}/lambda_min" in row)
    return {name.removeprefix(f"{prefix}/"): value for name, value in row.items()}


def test_float64_spectra_of_float32_training_are_those_of_the_dense_hessian() -> None:
    groups: dict[str, Any] = {"first": "net.0.*", "last": ["net.2.weight", "net.2.bias"], "biases": "*.bias"}
    spectrum = HessianSpectrum(krylov_dim=SIZE, num_batches=2, precision=64, groups=groups, smallest=2, largest=2)
    noted, logger = Parameters(), MemoryLogger()
    make_trainer(1, callbacks=[noted, spectrum], logger=logger).fit(Fitting(), regression_loader())
    loss, gradient, hessian = dense_hessian(noted.at_epoch[0], slice(8))
    where = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(small_net().parameters())])
    for prefix, kept in (
        ("hessian", (0, 1, 2, 3)),
        ("hessian_first", (0, 1)),
        ("hessian_last", (2, 3)),
        ("hessian_biases", (1, 3)),
    ):
        of_group = torch.isin(where, torch.tensor(kept)).nonzero().view(-1)
        values = torch.linalg.eigvalsh(hessian[of_group][:, of_group])
        row = logged_row(logger, prefix)
        close: dict[str, Any] = {"rel": 1e-7, "abs": 1e-9}
        assert [row[f"eigenvalue/smallest_{i:02d}"] for i in (0, 1)] == pytest.approx(values[:2].tolist(), **close)
        assert [row[f"eigenvalue/largest_{i:02d}"] for i in (0, 1)] == pytest.approx(values[[-1, -2]].tolist(), **close)
        assert row["lambda_min"] == row["eigenvalue/smallest_00"]
        assert row["lambda_max"] == row["eigenvalue/largest_00"]
        assert row["loss"] == pytest.approx(loss, rel=1e-12)
        assert row["gradient_norm"] == pytest.approx(gradient[of_group].norm().item(), rel=1e-9)
        assert row["residual_max"] == max(row["residual/smallest_00"], row["residual/largest_00"]) < 1e-9
        assert row["converged"] == 1.0
        assert "nonfinite" not in row


def test_extreme_scalars_and_their_bounds() -> None:
    """Twelve at each end, numbered so that names sort; every bound holds an eigenvalue."""
    spectrum = HessianSpectrum(krylov_dim=SIZE, smallest=12, largest=2, precision=64, tol=None)
    noted, logger = Parameters(), MemoryLogger()
    make_trainer(1, callbacks=[noted, spectrum], logger=logger).fit(Fitting(), regression_loader())
    row = logged_row(logger)
    half = SIZE // 2
    names = [name for name in row if name.startswith("eigenvalue/")]
    smallest, largest = min(12, half), 2
    expected = [f"eigenvalue/smallest_{i:02d}" for i in range(smallest)]
    assert names == expected + [f"eigenvalue/largest_{i:02d}" for i in range(largest)]
    assert "converged" not in row
    ascending = [row[name] for name in names[:smallest]]
    assert ascending == sorted(ascending)
    _, _, values = dense_eigenvalues(noted.at_epoch[0], slice(4))
    for name in names:
        away = (values - row[name]).abs().min().item()
        assert away <= row[name.replace("eigenvalue", "residual")] + 1e-12


@pytest.mark.parametrize(("max_products", "converged"), [(200, 1.0), (6, 0.0)])
def test_converged_says_whether_the_tolerance_was_met(max_products: int, converged: float) -> None:
    logger = MemoryLogger()
    spectrum = HessianSpectrum(krylov_dim=6, smallest=1, largest=1, tol=1e-6, max_products=max_products, precision=64)
    make_trainer(1, callbacks=[spectrum], logger=logger).fit(Fitting(), regression_loader())
    row = logged_row(logger)
    assert row["converged"] == converged
    assert row["products"] <= max_products
    met = row["residual/largest_00"] <= 1e-6 * abs(row["lambda_max"]) and row["residual/smallest_00"] <= 1e-6 * abs(
        row["lambda_min"]
    )
    assert met == bool(converged)


class WithOutput(Fitting):
    """Hands out the model output beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        return {"loss": F.mse_loss(output, batch[1]), "output": output}


class ByForward(Fitting):
    """Calls itself once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [WithOutput, ByForward])
def test_gauss_newton_is_that_of_the_jacobian(kind: type[Fitting]) -> None:
    spectrum = HessianSpectrum(krylov_dim=SIZE, curvature="gauss_newton", precision=64, log=False)
    noted = Parameters()
    make_trainer(1, callbacks=[noted, spectrum]).fit(kind(), regression_loader())
    x = regression_data().tensors[0][:4].double()
    jacobian = torch.autograd.functional.jacobian(lambda v: network(v, x).view(-1), noted.at_epoch[0].double())
    values = torch.linalg.eigvalsh(2 / 4 * jacobian.T @ jacobian)
    assert spectrum.last is not None
    assert spectrum.last.lambda_max == pytest.approx(values[-1].item(), rel=1e-7)
    assert spectrum.last.lambda_min == pytest.approx(0.0, abs=1e-9)
    assert spectrum.last.negative_fraction == 0.0
    assert spectrum.verdict == ("curvature='gauss_newton' cannot tell a saddle from a minimum: use 'hessian' for that.")


def test_gauss_newton_without_an_output_is_refused_in_one_sentence() -> None:
    spectrum = HessianSpectrum(krylov_dim=3, curvature="gauss_newton", log=False)
    with pytest.warns(
        UserWarning, match=r"training_step of Fitting gives none: let it return \{'loss': loss, 'output'"
    ):
        make_trainer(2, callbacks=[spectrum]).fit(Fitting(), regression_loader())
    assert spectrum.last is None


def test_points_lie_where_lightning_puts_its_own() -> None:
    """Epoch ends beside the epoch's metrics, steps beside the step's, also where gradients are accumulated."""
    for options, own in (({"every_n_epochs": 1}, "train_loss_epoch"), ({"every_n_steps": 1}, "train_loss_step")):
        logger = MemoryLogger()
        trainer = make_trainer(
            3, callbacks=[HessianSpectrum(krylov_dim=2, tol=None, **options)], logger=logger, accumulate_grad_batches=2
        )
        trainer.fit(Untidy(), regression_loader(20, 4))
        places = [step for step, _ in logger.values("hessian/loss")]
        assert places == sorted(set(places))
        assert len(places) == (3 if "every_n_epochs" in options else trainer.global_step)
        assert set(places) <= {step for step, _ in logger.values(own)}
        if "every_n_epochs" in options:
            assert places == [step for step, _ in logger.values(own)]


# ------------------------------------------------------------------------------------------------ failing probes


class Replayed(Fitting):
    """Does in replays what it never does in training; a replay is known by its silenced `log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return self.in_replay(loss) if "log" in self.__dict__ else loss

    def in_replay(self, loss: Tensor) -> Any:
        raise NotImplementedError


class Raising(Replayed):
    def in_replay(self, loss: Tensor) -> Any:
        raise ArithmeticError("not now")


class WithoutGraph(Replayed):
    def in_replay(self, loss: Tensor) -> Any:
        return loss.detach()


class WithoutLoss(Replayed):
    def in_replay(self, loss: Tensor) -> Any:
        return None


class Vector(Replayed):
    def in_replay(self, loss: Tensor) -> Any:
        return loss.expand(3)


class Once(torch.autograd.Function):
    """The identity, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class WithoutSecondDerivative(Fitting):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(Once.apply(torch.tanh(self.net(batch[0]))), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss


class Drifting(Replayed):
    """Remembers, where no replay can put it back."""

    calls: ClassVar[list[int]] = [0]

    def in_replay(self, loss: Tensor) -> Any:
        self.calls[0] += 1
        return loss * self.calls[0]


FAILING = [
    (Raising, "not now"),
    (WithoutGraph, "a loss without a graph"),
    (WithoutLoss, "training_step returned no loss in a replay"),
    (Vector, "a real scalar loss is expected"),
    (WithoutSecondDerivative, "second"),
    (Drifting, "must be a fixed function"),
]


@pytest.mark.parametrize(("kind", "said"), FAILING)
def test_failing_spectra_warn_once_and_training_goes_on(kind: type[Fitting], said: str) -> None:
    spectrum = HessianSpectrum(krylov_dim=3, every_n_steps=1)
    with pytest.warns(UserWarning, match="could not take a spectrum") as warned:
        beside = run([spectrum], kind)
    (message,) = [str(w.message) for w in warned if "HessianSpectrum" in str(w.message)]
    assert said in message
    assert "training goes on without it" in message
    assert spectrum.history == []
    assert spectrum.verdict == ""
    for name, left in run([], kind).items():
        assert beside[name] == left, name


@pytest.mark.parametrize(("kind", "said"), FAILING)
def test_strict_ends_the_run_at_a_failing_spectrum(kind: type[Fitting], said: str) -> None:
    trainer = make_trainer(1, callbacks=[HessianSpectrum(krylov_dim=3, strict=True)], logger=MemoryLogger())
    with pytest.raises(Exception, match=said):  # each its own type
        trainer.fit(kind(), regression_loader())


class Skipping(Fitting):
    """Returns no loss for some batches, which Lightning allows."""

    def __init__(self, first_epoch: int = 0) -> None:
        super().__init__()
        self.first_epoch, self.kept = first_epoch, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 3 == 0 or self.trainer.current_epoch < self.first_epoch:
            return None
        self.kept.append(batch)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("first_epoch", [0, 1])
def test_batches_without_a_loss_are_not_probed(first_epoch: int) -> None:
    """Nor is an epoch of which no batch has one."""
    module = Skipping(first_epoch)
    spectrum = HessianSpectrum(krylov_dim=3, num_batches=2, strict=True, log=False)
    make_trainer(3, callbacks=[spectrum]).fit(module, regression_loader())
    assert len(spectrum.history) == 3 - first_epoch
    held = [arguments[0] for arguments in spectrum._batches._own]
    assert len(held) == 2
    for batch, (x, y) in zip(held, module.kept, strict=False):
        assert torch.equal(batch[0], x)
        assert torch.equal(batch[1], y)


class NotANumber(Replayed):
    def in_replay(self, loss: Tensor) -> Any:
        return loss * float("nan")


class NoCurvature(Replayed):
    """Gradient finite, Hessian not."""

    def in_replay(self, loss: Tensor) -> Any:
        weight = self.net[0].weight
        return loss + (weight - weight.detach()).abs().pow(1.5).sum()


class Ruined(Fitting):
    """Its weights are no numbers from the second batch on."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.net[0].weight.data.fill_(float("nan"))


def test_parameters_that_are_no_numbers_have_not_moved() -> None:
    spectrum = HessianSpectrum(krylov_dim=4, log=False)
    make_trainer(2, callbacks=[spectrum]).fit(Ruined(), regression_loader())
    assert [found.nonfinite > 0 for _, found in spectrum.history] == [True, True]


@pytest.mark.parametrize("kind", [NotANumber, NoCurvature])
@pytest.mark.parametrize("density", [False, True])
def test_numbers_that_are_not_finite_are_counted_and_never_written(kind: type[Fitting], density: bool) -> None:
    memory, board = MemoryLogger(), TensorBoardLogger(".", name="", version="")
    spectrum = HessianSpectrum(krylov_dim=4, density=density, pictures_every=1)
    make_trainer(2, callbacks=[spectrum], logger=[memory, board]).fit(kind(), regression_loader())
    assert len(spectrum.history) == 2
    row = next(row for _, row in memory.rows if "hessian/nonfinite" in row)
    assert row["hessian/nonfinite"] >= 1
    assert row["hessian/converged"] == 0.0
    assert all(np.isfinite(value) for _, r in memory.rows for value in r.values())
    assert not [name for name in row if name.startswith("hessian/eigenvalue/")]
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert events.Tags()["histograms"] == events.Tags()["images"] == []
    assert spectrum.verdict.startswith("unknown: ")
    assert "are not finite" in spectrum.verdict


def test_one_density_probe_has_no_error_to_log() -> None:
    logger = MemoryLogger()
    spectrum = HessianSpectrum(krylov_dim=4, density=True, density_probes=1, pictures_every=0)
    make_trainer(1, callbacks=[spectrum], logger=logger).fit(Fitting(), regression_loader())
    row = logged_row(logger)
    assert 0.0 <= row["density_negative_fraction"] <= 1.0
    assert "density_negative_fraction_error" not in row
    assert spectrum.last is not None
    assert spectrum.last.products == row["products"] >= 8


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


@pytest.mark.parametrize(("every", "epochs"), [({"every_n_steps": 5}, [1, 2, 2]), ({"every_n_epochs": 2}, [1, 2])])
def test_each_row_has_its_epoch(every: dict[str, int], epochs: list[int]) -> None:
    """The last spectrum is taken after the last epoch, which Lightning has counted by then."""
    spectrum, logger = HessianSpectrum(krylov_dim=2, groups={"first": "net.0.*"}, **every), MemoryLogger()
    make_trainer(3, callbacks=[spectrum], logger=logger).fit(Fitting(), regression_loader())
    for prefix in ("hessian", "hessian_first"):
        assert [row["epoch"] for _, row in logger.rows if f"{prefix}/loss" in row] == epochs


def test_every_logger_is_served() -> None:
    loggers = [MemoryLogger(), MemoryLogger()]
    make_trainer(1, callbacks=[HessianSpectrum(krylov_dim=2)], logger=loggers).fit(Fitting(), regression_loader())
    first, second = (logger.values("hessian/lambda_max") for logger in loggers)
    assert first == second
    assert len(first) == 1


def test_no_logger_is_refused_unless_spectra_stay_in_memory() -> None:
    module = Fitting()
    before = flat(module)
    with pytest.raises(MisconfigurationException, match=r"HessianSpectrum\(log=False\) to keep the spectra"):
        make_trainer(1, callbacks=[HessianSpectrum()]).fit(module, regression_loader())
    assert torch.equal(flat(module), before)
    spectrum, logger = HessianSpectrum(krylov_dim=3, log=False), MemoryLogger()
    make_trainer(2, callbacks=[spectrum]).fit(module, regression_loader())
    assert [step for step, _ in spectrum.history] == [4, 8]
    assert spectrum.history[-1][1] is spectrum.last
    make_trainer(2, callbacks=[spectrum], logger=logger).fit(module, regression_loader())
    assert not logger.values("hessian/loss")


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


class Validated(Fitting):
    """With a validation step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))


def test_sanity_checks_and_validation_are_left_alone() -> None:
    spectrum = HessianSpectrum(krylov_dim=2, log=False)
    trainer = make_trainer(2, callbacks=[spectrum], num_sanity_val_steps=2, val_check_interval=0.5)
    trainer.fit(Validated(), regression_loader(), regression_loader(8, 2))
    assert [step for step, _ in spectrum.history] == [4, 8]
    unused = HessianSpectrum(krylov_dim=2)
    make_trainer(callbacks=[unused]).validate(Validated(), regression_loader(), verbose=False)
    assert unused.history == []
    assert unused.verdict == ""


def test_overfitting_on_one_batch() -> None:
    spectrum = HessianSpectrum(krylov_dim=3, num_batches=5, log=False, precision=64)
    noted = Parameters()
    make_trainer(2, callbacks=[noted, spectrum], overfit_batches=1).fit(Fitting(), regression_loader())
    assert [step for step, _ in spectrum.history] == [1, 2]
    assert spectrum.history[0][1].loss == pytest.approx(dense_hessian(noted.at_epoch[0], slice(4))[0], rel=1e-12)


def test_barebones() -> None:
    spectrum = HessianSpectrum(krylov_dim=3, log=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_epochs=1, accelerator="cpu", barebones=True, callbacks=[spectrum]).fit(
            Fitting(), regression_loader()
        )
        refused = Trainer(max_epochs=1, accelerator="cpu", barebones=True, callbacks=[HessianSpectrum()])
        with pytest.raises(MisconfigurationException, match="needs a logger, but the Trainer has none"):
            refused.fit(Fitting(), regression_loader())
    assert len(spectrum.history) == 1


def test_one_callback_in_two_trainers_at_once() -> None:
    """The second fit starts afresh, and knows nothing of the first one's batches and verdict."""
    spectrum = HessianSpectrum(krylov_dim=SIZE, precision=64, log=False)
    first, second = (make_trainer(n, callbacks=[spectrum]) for n in (3, 1))
    first.fit(Fitting(), regression_loader())
    assert len(spectrum.history) == 3
    said = spectrum.verdict
    module = Fitting()
    second.fit(module, DataLoader(regression_data(8, seed=9), batch_size=8))
    assert [step for step, _ in spectrum.history] == [1]
    assert spectrum.verdict != said
    x, y = (t.double() for t in regression_data(8, seed=9).tensors)
    assert spectrum.last is not None
    assert spectrum.last.loss == pytest.approx(F.mse_loss(network(flat(module).double(), x), y).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------ verdict


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was said above the progress bar."""
    sentences: list[str] = []
    monkeypatch.setattr(
        "lightning_sfn.trainer.callbacks.spectrum.say", lambda trainer, sentence: sentences.append(sentence)
    )
    return sentences


@pytest.mark.parametrize("options", [{}, {"every_n_epochs": 2}, {"every_n_steps": 7}, {"every_n_steps": 1000}])
def test_the_verdict_is_said_once_about_the_final_parameters(options: dict[str, Any], said: list[str]) -> None:
    """Also where the last spectrum is older than the last step, or there is none."""
    module, spectrum = Fitting(), HessianSpectrum(krylov_dim=SIZE, precision=64, log=False, **options)
    make_trainer(3, callbacks=[spectrum]).fit(module, regression_loader())
    assert said == [f"HessianSpectrum at step 12: {spectrum.verdict}"]
    loss, gradient, values = dense_eigenvalues(flat(module), slice(4))
    assert f"the smallest eigenvalue is {values[0].item():.3g} " in spectrum.verdict
    assert f"the largest {values[-1].item():.3g}, the gradient norm {gradient.norm().item():.3g}" in spectrum.verdict
    assert f"({loss:.3g}" not in spectrum.verdict
    kind = spectrum.verdict.partition(":")[0]
    critical = gradient.norm().item() ** 2 / (2 * values.abs().max().item()) <= 1e-2 * loss
    negative = values[0].item() < 0
    expected = {
        (True, True): "saddle",
        (True, False): "minimum to tolerance",
        (False, True): "slope, with negative curvature",
        (False, False): "slope",
    }
    assert kind == expected[critical, negative]


def test_a_saddle_is_called_one(said: list[str]) -> None:
    """At the origin the gradient of ``|BAx - y|^2`` is zero, and directions of negative curvature leave it."""
    spectrum = HessianSpectrum(krylov_dim=32, log=False)
    make_trainer(1, callbacks=[spectrum]).fit(Factorised(lr=0.0, scale=1e-4), factorised_loader(shuffle=False))
    assert said[0].startswith("HessianSpectrum at step 8: saddle: the smallest eigenvalue is -")
    assert "SFN predicts a decrease of" in spectrum.verdict


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_epochs": 0}])
def test_nothing_is_said_where_nothing_was_trained(options: dict[str, Any], said: list[str]) -> None:
    spectrum = HessianSpectrum(krylov_dim=3)
    make_trainer(**({"max_epochs": 1, "callbacks": [spectrum], "logger": MemoryLogger()} | options)).fit(
        Fitting(), regression_loader()
    )
    assert said == []
    assert spectrum.verdict == ""


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 1}, "only one of them can be given"),
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
        ({"every_n_epochs": -2}, "every_n_epochs is -2"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"num_batches": 0}, "num_batches is 0"),
        ({"num_batches": -1}, "num_batches is -1"),
        ({"krylov_dim": 0}, "krylov_dim is 0"),
        ({"krylov_dim": 2.5}, "krylov_dim is 2.5"),
        ({"smallest": -1}, "smallest is -1"),
        ({"largest": -1}, "largest is -1"),
        ({"tol": 0.0}, "tol is 0.0"),
        ({"tol": 1.5}, "tol is 1.5"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"max_products": 3}, "max_products is 3"),
        ({"density": True, "density_probes": 0}, "density_probes is 0"),
        ({"pictures_every": -1}, "pictures_every is -1"),
        ({"precision": 16}, "precision is 16"),
        ({"batches": []}, "batches is empty"),
        ({"curvature": "fisher"}, "curvature='fisher', which needs more"),
        ({"hvp": "magic"}, "hvp is 'magic'"),
        ({"curvature": "gauss_newton", "hvp": "finite_difference"}, "gives the Hessian"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException) as info:
        HessianSpectrum(**options)
    message = str(info.value)
    assert said in message
    assert "expected" in message or ":" in message
    assert "\n" not in message
    assert message.endswith(".")


def test_neither_period_is_every_epoch() -> None:
    assert HessianSpectrum().every_n_epochs == 1
    assert HessianSpectrum(every_n_steps=3).every_n_epochs is None


@pytest.mark.parametrize("patterns", ["encoder.*", ["encoder.*", "decoder.*"], "frozen.*", []])
def test_groups_that_match_nothing_are_refused_before_the_first_step(patterns: Any) -> None:
    module = Fitting()
    module.frozen = nn.Linear(2, 2).requires_grad_(False)
    before = flat(module)
    spectrum = HessianSpectrum(groups={"all": "*", "mine": patterns})
    with pytest.raises(MisconfigurationException, match=r"group 'mine' .* the names are net\.0\.weight, net\.0\.bias"):
        make_trainer(1, callbacks=[spectrum], logger=MemoryLogger()).fit(module, regression_loader())
    assert torch.equal(flat(module), before)


class Manual(Fitting):
    """Optimizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_modules_that_cannot_be_looked_at() -> None:
    for module, message in (
        (Manual(), "needs automatic optimization"),
        (Fitting(nn.Linear(3, 1).to(torch.complex64)), "HessianSpectrum: "),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(1, callbacks=[HessianSpectrum()], logger=MemoryLogger()).fit(module, regression_loader())


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


def started(module: LightningModule) -> int:
    """The largest tensor that is made before training for parameters to be looked at."""
    callback, trainer = HessianSpectrum(log=False), make_trainer(1)
    with Allocations() as allocations:
        callback.on_train_start(trainer, module)
    return allocations.largest


def test_the_look_at_parameters_before_training_copies_none() -> None:
    module = Fitting()
    module.half = nn.Linear(2, 2).bfloat16()
    module.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert started(module) == 1  # an element, since empty parameters do not count


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: module.requires_grad_(False), "No parameter requires a gradient "),
        (lambda module: setattr(module, "far", nn.Linear(1, 1, device="meta")), r"The .* devices \(cpu, meta\), "),
        (
            lambda module: setattr(module, "wave", nn.Linear(1, 1, dtype=torch.complex64)),
            r"A parameter is complex \(torch.complex64, torch.float64\), ",
        ),
        (
            lambda module: setattr(module, "net", nn.Linear(1, 1, dtype=torch.complex64)),
            r"A parameter is complex \(torch.complex64\), ",
        ),
        *(
            (
                lambda module, sparse=sparse: setattr(module, "thin", nn.Parameter(sparse(torch.eye(2)))),
                "A parameter is sparse, ",
            )
            for sparse in (Tensor.to_sparse, Tensor.to_sparse_csr, lambda dense: dense.to_sparse_bsr((1, 1)))
        ),
    ],
)
def test_parameters_without_curvature_are_refused_before_training(change: Any, message: str) -> None:
    module = Fitting()
    change(module)
    with pytest.raises(MisconfigurationException, match=f"^HessianSpectrum: {message}"):
        started(module)


@pytest.mark.filterwarnings("ignore:.*[Ll]azy.*", "ignore:The total number of parameters")
def test_layers_that_the_first_batch_initializes_have_a_spectrum() -> None:
    module, callback = Fitting(), HessianSpectrum(krylov_dim=4, log=False)
    module.net = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(1))
    make_trainer(1, callbacks=[callback]).fit(module, regression_loader())
    assert len(callback.history) == 1


def test_hessian_and_gauss_newton_side_by_side() -> None:
    """Each has names and a place in the checkpoint of its own."""
    logger = MemoryLogger()
    callbacks = [HessianSpectrum(krylov_dim=4, curvature=curvature) for curvature in ("hessian", "gauss_newton")]
    make_trainer(1, callbacks=callbacks, logger=logger).fit(WithOutput(), regression_loader())
    assert len(logger.values("hessian/lambda_min")) == len(logger.values("gauss_newton/lambda_min")) == 1
    assert logger.values("gauss_newton/lambda_min")[0][1] >= -1e-6
    assert callbacks[0].state_key != callbacks[1].state_key


@pytest.mark.parametrize("behind", [False, True])
def test_the_last_spectrum_is_of_the_final_parameters_where_a_run_ends_inside_an_epoch(behind: bool) -> None:
    """A Newton step on the window that the end cut short comes after the hooks of the epoch's end."""
    spectrum, module = HessianSpectrum(num_batches=4, log=False), Fitting()
    switch = SwitchToSFN(switch_at_step=0, strict=False, probe_dim=0)
    callbacks = [switch, spectrum] if behind else [spectrum, switch]
    make_trainer(-1, max_steps=6, callbacks=callbacks).fit(module, regression_loader())
    x, y = regression_data().tensors
    assert spectrum.last is not None
    assert spectrum.last.loss == pytest.approx(float(F.mse_loss(module.net(x), y).detach()), rel=1e-6)
    assert spectrum.history[-1][0] == 6
    assert spectrum.history[-1][1] is spectrum.last


class Partly(Fitting):
    """The optimizer has the last layer alone; a group of learning rate zero is not trained either."""

    def __init__(self, resting: bool) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        self.resting = resting

    def configure_optimizers(self) -> Any:
        first = [{"params": self.net[0].parameters(), "lr": 0.0}] if self.resting else []
        return torch.optim.SGD([*first, {"params": self.net[2].parameters()}], lr=0.05)


@pytest.mark.parametrize("resting", [False, True])
@pytest.mark.parametrize("precision", [32, 64])
def test_only_what_the_optimizer_trains_is_looked_at(resting: bool, precision: Any) -> None:
    callback = HessianSpectrum(num_batches=4, log=False, strict=True, precision=precision, groups={"last": "net.2.*"})
    module = Partly(resting)
    make_trainer(1, callbacks=[callback]).fit(module, regression_loader())
    assert callback.last is not None
    assert callback.last.size == 5
    inputs = torch.cat([module.net[:2](regression_data().tensors[0]), torch.ones(16, 1)], dim=1).detach()
    expected = torch.linalg.eigvalsh(2 * inputs.T @ inputs / 16)  # of least squares
    assert callback.last.lambda_max == pytest.approx(float(expected[-1]), rel=1e-3)
    with pytest.raises(MisconfigurationException, match=r"group 'first' is 'net.0.\*', which no trainable parameter"):
        make_trainer(1, callbacks=[HessianSpectrum(log=False, groups={"first": "net.0.*"})]).fit(
            Partly(resting), regression_loader()
        )


def test_a_loader_as_the_probe_leaves_the_run_alone() -> None:
    ends, losses = [], []
    for seed in (None, 1, 2):  # of the draws before the fit, none with the callback in the first run
        callback = HessianSpectrum(batches=regression_loader(8, shuffle=True), log=False, krylov_dim=3)
        seed_everything(seed or 1, verbose=False)
        module = Untidy()
        make_trainer(1, callbacks=[callback] if seed else []).fit(module, regression_loader(shuffle=True))
        ends.append(flat(module))
        losses += [float(callback._batches._own[0][0][0].sum())] if seed else []
    assert torch.equal(ends[0], ends[1])
    assert losses[0] == losses[1]  # the same batches, whatever the seed of the run


class Listed(Fitting):
    """Its criterion has a parameter that is trained, in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.criteria = [nn.Linear(1, 1)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criteria[0](super().training_step(batch, batch_idx).view(1, 1)).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.criteria[0].parameters()], lr=0.01)


def test_trained_parameters_that_the_module_does_not_know_are_told_of() -> None:
    with pytest.warns(UserWarning, match="takes 2 parameter.s. for constants .* because Listed has not") as caught:
        make_trainer(2, callbacks=[HessianSpectrum(log=False, strict=True)]).fit(Listed(), regression_loader())
    assert sum("has not registered" in str(warning.message) for warning in caught) == 1


class Prepared(Fitting):
    """Its hooks make of batches what the step takes, draw, and count; the second one changes what it is given."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(optimizer=sgd(0.05))
        self.seen = 0
        self.register_buffer("total", torch.zeros(()))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen += 1
        return batch[0].squeeze(1), batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.total.add_(1.0)
        batch[0].div_(100.0).add_(torch.randn(()), alpha=0.0)
        return batch


@pytest.mark.parametrize("loaded", [False, True])
def test_batches_of_ones_own_go_through_the_hooks_that_make_batches(loaded: bool) -> None:
    x, y = regression_data().tensors
    data = [(case, target) for case, target in zip(100.0 * x.unsqueeze(1), y, strict=True)]
    batches = [(100.0 * x[:8].unsqueeze(1), y[:8]), (100.0 * x[8:].unsqueeze(1), y[8:])]
    spectra, ends = [], []
    for own in (None, DataLoader(data, batch_size=8) if loaded else batches, []):
        callback = HessianSpectrum(num_batches=2, batches=own or None, log=False, strict=True)
        module = Prepared()
        make_trainer(2, callbacks=[callback] if own != [] else []).fit(module, DataLoader(data, batch_size=8))
        spectra += [callback.last]
        ends += [(flat(module).tolist(), module.seen, float(module.total), torch.rand(()).item())]
    assert ends[0] == ends[1] == ends[2]
    assert spectra[0] is not None
    assert spectra[1] is not None
    assert spectra[0].lambda_max == pytest.approx(spectra[1].lambda_max, rel=1e-5)
    assert spectra[0].loss == pytest.approx(spectra[1].loss, rel=1e-6)
    assert torch.equal(batches[0][0], 100.0 * x[:8].unsqueeze(1))


class Faltering(Fitting):
    """Its step fails in the replays of given epochs."""

    def __init__(self, epochs: set[int]) -> None:
        super().__init__()
        self.epochs, self.over = epochs, False

    def on_train_epoch_start(self) -> None:
        self.over = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.over and self.current_epoch in self.epochs:
            raise ArithmeticError("out of order")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.over = batch_idx == 3


def test_a_logger_that_fails_costs_no_spectrum() -> None:
    class Broken(MemoryLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("hessian/") for name in metrics):
                raise OSError("the disk is full")

    callback = HessianSpectrum()
    with pytest.warns(UserWarning, match="could not log a spectrum at step .*OSError: the disk is full"):
        make_trainer(3, callbacks=[callback], logger=Broken()).fit(Fitting(), regression_loader())
    assert [step for step, _ in callback.history] == [4, 8, 12]
    assert callback.verdict


@pytest.mark.parametrize(("epochs", "steps"), [({0}, [8, 12]), ({2}, [4, 8]), ({0, 1, 2}, [])])
def test_a_failure_costs_the_verdict_only_where_it_is_the_last(epochs: set[int], steps: list[int]) -> None:
    callback = HessianSpectrum(log=False)
    with pytest.warns(UserWarning, match="could not take a spectrum at step") as caught:
        make_trainer(3, callbacks=[callback]).fit(Faltering(epochs), regression_loader())
    assert sum("could not take" in str(warning.message) for warning in caught) == 1
    assert [step for step, _ in callback.history] == steps
    assert bool(callback.verdict) == (2 not in epochs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: torch.optim.SGD(p, 0.05), None),
        (lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.25), "the optimizer adds weight decay (0.25)."),
        (lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.25), None),  # beside the gradient, not in it
    ],
)
def test_a_verdict_says_what_it_leaves_out(make: Any, said: str | None) -> None:
    spectrum = HessianSpectrum(num_batches=2, log=False)
    make_trainer(1, callbacks=[spectrum]).fit(Fitting(optimizer=make), regression_loader(16, 4))
    assert ("weight decay" in spectrum.verdict) == (said is not None)
    assert said is None or spectrum.verdict.endswith(said)
