"""The compatibility table: each row trains, switches to SFN and improves."""

import importlib.util
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from lightning_sfn import HessianSpectrum, SaddleFreeNewton, SwitchToSFN
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.namespaces import join_namespace

from .modules import (
    Backboned,
    Fitting,
    MemoryLogger,
    flat,
    make_trainer,
    regression_data,
    regression_loader,
    sgd,
    small_net,
)

SWITCH, EPOCHS = 2, 5


class Recording(SaddleFreeNewton):
    """Notes the records of its steps."""

    def __init__(self, params: Any, records: list[StepRecord], **options: Any) -> None:
        super().__init__(params, krylov_dim=4, **options)
        self.records = records

    def step_on(self, *args: Any, **kwargs: Any) -> StepRecord:
        self.records.append(super().step_on(*args, **kwargs))
        return self.records[-1]


def run(
    module: Any, loader: Any = None, *companions: Any, epochs: int = EPOCHS, newton: Any = None, **options: Any
) -> tuple[SwitchToSFN, Trainer, list[StepRecord]]:
    """Trains, and checks what every row must show."""
    records: list[StepRecord] = []
    callback = SwitchToSFN(
        switch_at_epoch=SWITCH, probe_dim=0, optimizer=partial(Recording, records=records, **(newton or {}))
    )
    trainer = make_trainer(epochs, callbacks=[callback, *companions], **options)
    before = flat(module)
    trainer.fit(module, regression_loader() if loader is None else loader)
    assert callback.switched
    assert callback.report is not None
    assert callback.report.phases[0].steps > 0
    assert callback.report.newton_steps == len(records) > 0
    assert any(record.accepted for record in records)
    assert records[-1].loss_after < records[0].loss_before
    assert not torch.equal(flat(module), before)
    return callback, trainer, records


# ------------------------------------------------------------------------------------------------ modules


class Stepping(Fitting):
    """Fits by a step that is given."""

    def __init__(self, net: nn.Module, step: Callable[["Stepping", Any], Any], optimizer: Any = None) -> None:
        super().__init__(net, optimizer or sgd(0.02))
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(self, batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=4)
        return loss


def plain(module: Stepping, batch: Any) -> Tensor:
    return F.mse_loss(module.net(batch[0]), batch[1])


def sequence(module: Stepping, batch: Any) -> Tensor:
    out = module.net[0](batch[0].reshape(len(batch[0]), 3, 1).expand(-1, -1, 4))
    return F.mse_loss(module.net[1]((out[0] if isinstance(out, tuple) else out).mean(1)), batch[1])


def tokens(module: Stepping, batch: Any) -> Tensor:
    return F.mse_loss(module.net((batch[0].abs() * 3).long().clamp_max(6)).mean(1), batch[1])


def physics(module: Stepping, batch: Any) -> Tensor:
    x = batch[0][:, :1].detach().requires_grad_(True)
    u = module.net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope + u).square().mean() + (u - 1).square().mean()


def attention(module: Stepping, batch: Any) -> Tensor:
    q, k, v = module.net[0](batch[0].unsqueeze(-1)).chunk(3, dim=-1)
    return F.mse_loss(module.net[1](F.scaled_dot_product_attention(q, k, v).mean(1)), batch[1])


class Checkpointed(nn.Sequential):
    """Recomputes its hidden layer in the backward pass; dropout must draw the same mask again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.1)), nn.Linear(6, 1))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self[2](checkpoint(self[1], self[0](x), use_reentrant=self.reentrant))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).sum(1, keepdim=True)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def recurrent(kind: type[nn.Module]) -> nn.Module:
    return nn.ModuleList([kind(4, 4, batch_first=True), nn.Linear(4, 1)])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.1, batch_first=True)
    return nn.ModuleList([nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 1)])


MODULES: dict[str, Callable[[], Fitting]] = {
    "plain": lambda: Stepping(small_net(), plain),
    "dropout": lambda: Stepping(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)), plain),
    "batch norm": lambda: Stepping(batch_norm(), plain),
    "tied weights": lambda: Stepping(Tied(), plain),
    "rnn": lambda: Stepping(recurrent(nn.RNN), sequence),
    "gru": lambda: Stepping(recurrent(nn.GRU), sequence),
    "lstm": lambda: Stepping(recurrent(nn.LSTM), sequence),
    "transformer encoder": lambda: Stepping(encoder(), sequence),
    "scaled dot product attention": lambda: Stepping(nn.ModuleList([nn.Linear(1, 6), nn.Linear(2, 1)]), attention),
    "embedding": lambda: Stepping(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1)), tokens),
    "checkpointing": lambda: Stepping(Checkpointed(False), plain),
    "reentrant checkpointing": lambda: Stepping(Checkpointed(True), plain),
    "physics-informed": lambda: Stepping(small_net(1), physics),
    "dictionary with output": lambda: WithOutput(),
    "Adam": lambda: Stepping(small_net(), plain, partial(torch.optim.Adam, lr=0.01)),
    "AdamW": lambda: Stepping(small_net(), plain, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
    "RMSprop": lambda: Stepping(small_net(), plain, partial(torch.optim.RMSprop, lr=0.01)),
    "L-BFGS": lambda: Stepping(small_net(), plain, partial(torch.optim.LBFGS, lr=0.01, max_iter=2)),
    "decay": lambda: Stepping(small_net(), plain, sgd(0.02, weight_decay=0.05)),
}


class WithOutput(Fitting):
    """Returns its output beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        return {"loss": F.mse_loss(output, batch[1]), "output": output}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    run(MODULES[name]())


def test_gauss_newton_products_of_a_module_that_returns_its_output() -> None:
    _, _, records = run(WithOutput(), newton={"curvature": "gauss_newton", "previous_directions": 0})
    assert all(record.lambda_min >= -1e-6 for record in records)  # semidefinite for a convex loss


def test_gauss_newton_without_output_or_with_decay_is_refused() -> None:
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    class Hiding(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])  # `forward` is passed by

    with pytest.raises(MisconfigurationException, match="needs the model output, but training_step of Hiding gives"):
        run(Hiding(), newton={"curvature": "gauss_newton"})
    module = WithOutput(optimizer=sgd(0.1, weight_decay=0.1))
    with pytest.raises(MisconfigurationException, match="weight decay, which is part of the objective"):
        run(module, newton={"curvature": "gauss_newton"})


def test_parameter_groups() -> None:
    class Groups(Fitting):
        def configure_optimizers(self) -> Any:
            first, last = self.net[0].parameters(), self.net[2].parameters()
            groups = [{"params": first, "lr": 0.02, "weight_decay": 0.1}, {"params": last, "lr": 0.05}]
            return torch.optim.SGD(groups, lr=0.01, momentum=0.5)

    _, trainer, _ = run(Groups())
    assert len(trainer.optimizers[0].param_groups) == 2


@pytest.mark.parametrize("epoch", [0, 3])
def test_layers_frozen_at_once_or_later(epoch: int) -> None:
    class Freezing(Fitting):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == epoch:
                self.net[0].requires_grad_(False)
                self.kept = self.net[0].weight.clone()

    module = Freezing()
    run(module, epochs=6)
    assert torch.equal(module.net[0].weight, module.kept)


def test_a_layer_frozen_in_the_middle_of_a_window() -> None:
    class Freezing(Fitting):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if (self.current_epoch, batch_idx) == (3, 2):
                self.net[0].requires_grad_(False)

    with pytest.warns(UserWarning, match="since other parameters are trained from batch 2 on"):
        run(Freezing(), epochs=6)


def test_metrics_logged_on_step_and_epoch() -> None:
    class Measured(Fitting):
        def __init__(self) -> None:
            super().__init__()
            self.error = MeanAbsoluteError()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.error(self.net(batch[0]), batch[1])
            self.log("error", self.error, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module, logger = Measured(), MemoryLogger()
    run(module, logger=logger)
    assert len(logger.values("error_step")) == 4 * EPOCHS
    assert len(logger.values("error_epoch")) == EPOCHS


@pytest.mark.parametrize("compiled", ["net", "module"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_compiled(compiled: str) -> None:
    class Silent(Fitting):  # Lightning itself breaks on self.log in a compiled LightningModule
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

    torch._dynamo.reset()
    module: Any = Silent()
    if compiled == "net":
        module.net = torch.compile(module.net, backend="aot_eager")
        run(module)
    else:
        run(torch.compile(module, backend="aot_eager"))


# ------------------------------------------------------------------------------------------------ data


class Keyed(Fitting):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Paired(Fitting):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x, y), second = batch["a"], batch["b"]
        if second is not None:
            x, y = torch.cat([x, second[0]]), torch.cat([y, second[1]])
        return super().training_step((x, y), batch_idx)


def keyed(rows: list[Any]) -> Any:
    return {"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])}


def combined(mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": regression_loader(16, 4), "b": regression_loader(8, 4)}, mode)


@pytest.mark.parametrize(
    ("module", "loader"),
    [
        pytest.param(Keyed, lambda: regression_loader(collate_fn=keyed), id="dictionary"),
        pytest.param(Paired, lambda: combined("min_size"), id="shortest of two"),
        pytest.param(Paired, lambda: combined("max_size_cycle"), id="longest of two, the other again"),
        pytest.param(Paired, lambda: combined("max_size"), id="longest of two, the other ends"),
        pytest.param(Fitting, lambda: regression_loader(18, 4), id="short last batch"),
        pytest.param(Fitting, lambda: regression_loader(18, 4, shuffle=True, drop_last=True), id="shuffled"),
    ],
)
def test_batches(module: Callable[[], Fitting], loader: Callable[[], Any]) -> None:
    run(module(), loader())


# ------------------------------------------------------------------------------------------------ the Trainer

FLAGS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation with a short last window": {"accumulate_grad_batches": 3},
    "clipping by norm": {"gradient_clip_val": 0.5},
    "clipping by value": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "16-mixed": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]},
    "limited batches": {"limit_train_batches": 3},
    "share of the batches": {"limit_train_batches": 0.5},
    "overfitting a batch": {"overfit_batches": 1},
    "steps": {"max_steps": 18, "max_epochs": -1},
    "time": {"max_time": {"minutes": 5}},
    "at least": {"min_epochs": 2, "min_steps": 6},
    "validation in the epoch": {"val_check_interval": 2},
    "validation every second epoch": {"check_val_every_n_epoch": 2},
    "sanity check": {"num_sanity_val_steps": 1},
    "reloading": {"reload_dataloaders_every_n_epochs": 1},
    "deterministic": {"deterministic": True},
    "anomaly detection": {"detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "progress bar": {"enable_progress_bar": True},
    "model summary": {"enable_model_summary": True},
    "no inference mode": {"inference_mode": False},
    "logs seldom": {"log_every_n_steps": 50, "logger": MemoryLogger},
}


class Validated(Fitting):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def train_dataloader(self) -> Any:
        return regression_loader()

    def val_dataloader(self) -> Any:
        return regression_loader(8)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    options = {key: value() if callable(value) else value for key, value in FLAGS[name].items()}
    epochs = options.pop("max_epochs", 8 if name == "overfitting a batch" else EPOCHS)
    deterministic = torch.are_deterministic_algorithms_enabled()
    records: list[StepRecord] = []
    callback = SwitchToSFN(switch_at_epoch=SWITCH, probe_dim=0, optimizer=partial(Recording, records=records))
    trainer = make_trainer(epochs, callbacks=[callback], **options)
    try:
        trainer.fit(Validated())
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.autograd.set_detect_anomaly(False)
    assert callback.switched
    assert records[-1].loss_after < records[0].loss_before


class Scheduled(Validated):
    def __init__(self, make: Callable[[Any], Any], **config: Any) -> None:
        super().__init__()
        self.make, self.config = make, config

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}


lr = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[], Scheduled]] = {
    "step": lambda: Scheduled(lambda o: lr.StepLR(o, 3), interval="step"),
    "every second epoch": lambda: Scheduled(lambda o: lr.ExponentialLR(o, 0.9), interval="epoch", frequency=2),
    "cosine": lambda: Scheduled(lambda o: lr.CosineAnnealingLR(o, 5)),
    "one cycle": lambda: Scheduled(lambda o: lr.OneCycleLR(o, 0.1, total_steps=99), interval="step"),
    "warm restarts": lambda: Scheduled(lambda o: lr.CosineAnnealingWarmRestarts(o, 2)),
    "lambda": lambda: Scheduled(lambda o: lr.LambdaLR(o, lambda epoch: 0.9**epoch)),
    "sequential": lambda: Scheduled(
        lambda o: lr.SequentialLR(o, [lr.LinearLR(o, total_iters=2), lr.ExponentialLR(o, 0.9)], [2])
    ),
    "plateau": lambda: Scheduled(lambda o: lr.ReduceLROnPlateau(o, patience=0), monitor="val_loss"),
    "plateau by steps": lambda: Scheduled(
        lambda o: lr.ReduceLROnPlateau(o, patience=0), monitor="val_loss", interval="step", strict=False
    ),
}


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
@pytest.mark.parametrize("rule", ["rest", "step"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, rule: Any) -> None:
    """There and back, with each kind of scheduler; what they are afterwards is tested with the return."""
    callback = SwitchToSFN(switch_at_epoch=1, return_when=2, schedulers=rule, probe_dim=0, patience=99)
    make_trainer(5, callbacks=[callback]).fit(SCHEDULERS[name]())
    assert callback.report is not None
    assert [phase.newton for phase in callback.report.phases] == [False, True, False]
    assert callback.report.phases[1].after < callback.report.phases[0].after


# ------------------------------------------------------------------------------------------------ other callbacks


class ValidatedBackbone(Backboned, Validated):
    pass


CALLBACKS: dict[str, tuple[Callable[[], Callback], dict[str, Any]]] = {
    "ModelCheckpoint": (lambda: ModelCheckpoint("kept", monitor="train_loss"), {"enable_checkpointing": True}),
    "EarlyStopping": (lambda: EarlyStopping("train_loss", patience=9), {}),
    "StochasticWeightAveraging": (lambda: StochasticWeightAveraging(0.5, swa_epoch_start=4), {}),
    "WeightAveraging": (WeightAveraging, {}),
    "LearningRateMonitor": (LearningRateMonitor, {"logger": MemoryLogger}),
    "RichProgressBar": (RichProgressBar, {"enable_progress_bar": True}),
    "TQDMProgressBar": (TQDMProgressBar, {"enable_progress_bar": True}),
    "DeviceStatsMonitor": (lambda: DeviceStatsMonitor(cpu_stats=False), {"logger": MemoryLogger}),
    "ModelSummary": (ModelSummary, {"enable_model_summary": True}),
    "LearningRateFinder": (lambda: LearningRateFinder(num_training_steps=5), {}),
    "Timer": (Timer, {}),
    "GradientAccumulationScheduler": (lambda: GradientAccumulationScheduler({1: 2, 3: 1, 4: 3}), {}),
    "HessianSpectrum": (lambda: HessianSpectrum(krylov_dim=3), {"logger": MemoryLogger}),
}


class Rated(Validated):
    """Has the attribute that the learning rate finder sets."""

    lr = 0.05

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.filterwarnings("ignore:SwitchToSFN ignores the learning rate")
@pytest.mark.parametrize("name", CALLBACKS)
def test_beside_other_callbacks(name: str) -> None:
    make, options = CALLBACKS[name]
    made = {key: value() if isinstance(value, type) else value for key, value in options.items()}
    run(Rated(), None, make(), **made)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.filterwarnings("ignore:SwitchToSFN ignores the learning rate")
def test_beside_backbone_finetuning() -> None:
    """It frees the backbone while SFN trains, and adds it to the optimizer in use."""
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=lambda epoch: 1.0, initial_denom_lr=1.0)
    module = ValidatedBackbone()
    before = module.backbone.weight.clone()
    run(module, None, finetuning)
    assert not torch.equal(module.backbone.weight, before)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.filterwarnings("ignore:SwitchToSFN ignores the learning rate")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:SwitchToSFN begins with a new optimizer")
@pytest.mark.parametrize("resumes_with_it", [True, False])
def test_a_checkpoint_beside_backbone_finetuning_resumes(resumes_with_it: bool) -> None:
    """Also in a Trainer without the switch: the first optimizer has the freed layers as well.

    Lightning (2.6) freezes the backbone again when a run resumes, so that Newton's optimizer has other parameters then.
    """
    free = {"unfreeze_backbone_at_epoch": 3, "lambda_func": lambda epoch: 1.0, "initial_denom_lr": 1.0}
    saving = ModelCheckpoint("kept", filename="last", save_on_train_epoch_end=True)
    run(ValidatedBackbone(), None, BackboneFinetuning(**free), saving, enable_checkpointing=True)
    switch = [SwitchToSFN(switch_at_epoch=SWITCH, probe_dim=0)] if resumes_with_it else []
    trainer = make_trainer(EPOCHS + 2, callbacks=[*switch, BackboneFinetuning(**free)])
    trainer.fit(ValidatedBackbone(), regression_loader(), ckpt_path="kept/last.ckpt")
    assert trainer.current_epoch == EPOCHS + 2
    assert [len(group["params"]) > 0 for group in trainer.optimizers[0].param_groups] == [True, True]


def test_two_trainers_in_one_process() -> None:
    """One inside the other's epoch end: nothing that either changes is the other's."""

    class Nesting(Callback):
        def __init__(self) -> None:
            self.inner: list[Tensor] = []

        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            torch.manual_seed(0)
            module = Fitting()
            run(module)
            self.inner.append(flat(module))

    nesting, outer = Nesting(), Fitting()
    run(outer, None, nesting)
    assert all(torch.equal(end, nesting.inner[0]) for end in nesting.inner)


# ------------------------------------------------------------------------------------------------ lightning.pytorch


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("late", [False, True])
def test_in_the_other_namespace(late: bool) -> None:
    """The Trainer and the module are those of `lightning.pytorch`; a metric logged late is seen in its epoch."""
    import lightning.pytorch as other

    class Module(other.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_end(self) -> None:
            self.log("late", [3.0, 2.0, 2.0, 2.0, 2.0][self.current_epoch])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02)

    records: list[StepRecord] = []
    callback = SwitchToSFN(
        monitor="late" if late else "train_loss",
        patience=1,
        min_delta=0.0 if late else 1e9,
        probe_dim=0,
        optimizer=partial(Recording, records=records),
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}

    def fit(epochs: int, callback: SwitchToSFN, resume: str | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module = Module()
        saving = other.callbacks.ModelCheckpoint("again" if resume else "kept", filename="{epoch}", save_top_k=-1)
        trainer = other.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback, saving], **quiet)
        trainer.fit(module, DataLoader(regression_data(16), batch_size=4), ckpt_path=resume, weights_only=True)
        return module, trainer

    module, trainer = fit(5, callback)
    assert isinstance(callback, other.callbacks.EarlyStopping)
    assert callback.switched_at_step == (3 if late else 2) * 4
    assert records[-1].loss_after < records[0].loss_before
    assert trainer.global_step == 20
    again = SwitchToSFN(
        monitor=callback.monitor,
        patience=1,
        min_delta=0.0 if late else 1e9,
        probe_dim=0,
        optimizer=partial(SaddleFreeNewton, krylov_dim=4),
    )
    resumed, _ = fit(5, again, "kept/epoch=3.ckpt")
    assert torch.equal(flat(resumed), flat(module))


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_spectrum_in_the_other_namespace() -> None:
    import lightning.pytorch as other

    class Module(other.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02)

    spectrum = HessianSpectrum(krylov_dim=4)
    trainer = other.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[spectrum],
        logger=other.loggers.CSVLogger("."),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), DataLoader(regression_data(16), batch_size=4))
    assert spectrum.last is not None
    assert len(spectrum.last.eigenvalues) == 4


class Waiting(SwitchToSFN):
    """A subclass of somebody's own."""


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.parametrize("kind", [SwitchToSFN, Waiting])
def test_a_callback_that_worked_in_the_other_namespace_can_be_pickled(kind: type[SwitchToSFN]) -> None:
    import lightning.pytorch as other

    callback = kind(patience=3)
    join_namespace(callback, other.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False))
    assert isinstance(callback, other.callbacks.EarlyStopping)
    again = pickle.loads(pickle.dumps(callback))
    assert isinstance(again, kind)
    assert again.patience == 3
    assert again.state_key == callback.state_key


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_callbacks_by_class_path_in_the_other_namespace() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    import lightning.pytorch as other

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(other.Trainer, "trainer", fail_untyped=False)
    switch = "{class_path: lightning_sfn.lightning.SwitchToSFN, init_args: {patience: 7}}"
    spectrum = "{class_path: lightning_sfn.lightning.HessianSpectrum, init_args: {num_batches: 2}}"
    given = parser.parse_args([f"--trainer.callbacks=[{switch}, {spectrum}]", "--trainer.accelerator=cpu"])
    made = parser.instantiate_classes(given).trainer.callbacks
    assert sum(isinstance(callback, HessianSpectrum) for callback in made) == 1
    (found,) = (callback for callback in made if isinstance(callback, SwitchToSFN))
    assert (found.patience, found.monitor) == (7, "train_loss")
    assert isinstance(found, other.callbacks.EarlyStopping)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    given = parser.parse_args(["--trainer.callbacks=[{class_path: SwitchToSFN}]", "--trainer.accelerator=cpu"])
    assert given.trainer.callbacks[0].class_path == "lightning_sfn.SwitchToSFN"  # which one is meant stays clear
