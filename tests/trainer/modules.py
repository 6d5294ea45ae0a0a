"""Small modules, data sets and Trainers that the tests of the trainer package share."""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanAbsoluteError

from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.trainer.callbacks import SwitchToSFN

OptimizerFactory = Callable[[Iterable[Tensor]], Any]


def sgd(lr: float = 0.05, **options: Any) -> OptimizerFactory:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def make_trainer(max_epochs: int = 3, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(max_epochs=max_epochs, **(quiet | options))


def regression_data(cases: int = 16, inputs: int = 3, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cases, inputs, generator=generator)
    return TensorDataset(x, (x * x).sum(1, keepdim=True).tanh() + 0.1 * torch.randn(cases, 1, generator=generator))


def regression_loader(cases: int = 16, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(regression_data(cases), batch_size=batch_size, **options)


def small_net(inputs: int = 3, hidden: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def flat_gradient(module: nn.Module) -> Tensor:
    return FlatParameters(module.parameters()).gradients().clone()


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors as bytes, so that equality is equality of bits."""
    return {k: v.detach().cpu().numpy().tobytes() if isinstance(v, Tensor) else v for k, v in state.items()}


def random_streams() -> tuple[Any, ...]:
    """The state of torch's, NumPy's and Python's generators, comparable with ``==``."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), name, np.asarray(keys).tobytes(), tuple(rest), random.getstate()


class Fitting(LightningModule):
    """Mean squared error of a network; the least that a module can be."""

    def __init__(self, net: nn.Module | None = None, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__()
        self.net = small_net() if net is None else net
        self.make_optimizer = optimizer or sgd()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Backboned(Fitting):
    """The first layer is a backbone, which a finetuning callback freezes and frees."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)


class Scripted(Fitting):
    """Logs the values of a script as ``metric``, one for each epoch."""

    def __init__(self, script: list[float], **options: Any) -> None:
        super().__init__(**options)
        self.script = script

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("metric", self.script[self.current_epoch], on_step=False, on_epoch=True, batch_size=1)
        return loss


class Untidy(LightningModule):
    """Batch norm, dropout, own random draws, metrics, loggers, counters: all that a replay could leave a trace in."""

    threshold = 10**9

    def __init__(self, lr: float = 0.1, dropout: float = 0.5) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(dropout)
        self.last = Counting()
        self.error, self.seen = MeanAbsoluteError(), CatMetric()
        self.lr = lr
        self.count, self.total = 0, 0.0
        self.losses: list[Tensor] = []
        self.by_index: dict[int, float] = {}
        self.names: set[str] = set()
        self.recent: deque[int] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.count += 1
        noise = 0.01 * (torch.randn(()) + np.random.randn() + random.random())
        prediction = self(x)
        loss = F.mse_loss(prediction, y) * (1 + noise.abs())
        value = float(loss.detach())
        self.total += value
        self.losses.append(loss.detach())
        self.by_index[self.count] = value
        self.names.add(f"call {self.count}")
        self.recent.append(self.count)
        self.error(prediction, y)
        self.seen.update(loss.detach())
        self.fresh = self.count  # an attribute that exists from the first step on
        if self.logger is not None:
            self.logger.experiment.append(value)
        if self.count >= self.threshold:
            raise ArithmeticError("half way")
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"error": self.error, "calls": float(self.count)}, on_step=True, on_epoch=True)
        return {"loss": loss, "prediction": prediction.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def traces(self) -> dict[str, Any]:
        """Everything that a step changes, apart from the random streams."""
        return {
            **bits(self.state_dict()),
            **{f"error.{k}": v.item() for k, v in self.error.metric_state.items() if isinstance(v, Tensor)},
            "error updates": self.error.update_count,
            "seen": [float(v) for v in self.seen.metric_state["value"]],
            "plain": (self.count, self.total, [float(v) for v in self.losses], dict(self.by_index), set(self.names)),
            "recent": list(self.recent),
            "attributes": sorted(self.__dict__),
            "submodule": (self.last.calls, list(self.last.sizes)),
            "modes": [m.training for m in self.modules()],
            "requires_grad": [p.requires_grad for p in self.parameters()],
            "gradients": [None if p.grad is None else p.grad.numpy().tobytes() for p in self.parameters()],
        }


class Counting(nn.Linear):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__(8, 1)
        self.calls = 0
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        return super().forward(x)


class Factorised(LightningModule):
    """``y = B A x`` close to the saddle at the origin, where stochastic gradient descent stays for long."""

    def __init__(self, lr: float = 1e-3, scale: float = 1e-3, size: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(scale * torch.randn(size, size, generator=generator))
        self.b = nn.Parameter(scale * torch.randn(size, size, generator=generator))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (x @ self.a.T @ self.b.T - y).square().sum(1).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def factorised_loader(batch_size: int = 8, cases: int = 64, size: int = 4, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(cases, size, generator=generator)
    target = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.25][:size]))
    draw = torch.Generator().manual_seed(6)
    return DataLoader(TensorDataset(x, x @ target), batch_size=batch_size, shuffle=shuffle, generator=draw)


class MemoryLogger(Logger):
    """Keeps what it is given; its experiment is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.written: list[float] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> list[float]:
        return self.written

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {k: float(v) for k, v in metrics.items()}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, name: str) -> list[tuple[int | None, float]]:
        return [(step, row[name]) for step, row in self.rows if name in row]


@dataclass
class NewtonCall:
    """What one Newton step was given, and the parameters at which."""

    gradient: Tensor
    loss: float
    known: bool
    of_objective: tuple[float, Tensor]
    sizes: tuple[int, int, int]
    parameters: Tensor
    values: dict[str, float]
    same_function: bool | None
    record: StepRecord | None = None


class Noting(SaddleFreeNewton):
    """A `SaddleFreeNewton` that notes what it is asked to do."""

    def __init__(self, params: Any, calls: list[NewtonCall], **options: Any) -> None:
        super().__init__(params, **options)
        self.calls = calls

    def step_on(
        self,
        objective: Objective,
        *,
        curvature: Objective | None = None,
        trial: Objective | None = None,
        loss_and_gradient: tuple[float, Tensor] | None = None,
        same_function: bool | None = None,
    ) -> StepRecord:
        assert curvature is not None
        assert trial is not None
        parameters = FlatParameters(p for group in self.param_groups for p in group["params"])
        own = gradient_of(objective, parameters)
        loss, gradient = loss_and_gradient or own
        call = NewtonCall(
            gradient.clone(),
            loss,
            loss_and_gradient is not None,
            own,
            (len(objective), len(curvature), len(trial)),
            parameters.read(),
            {"all": objective.value(), "curvature": curvature.value(), "trial": trial.value()},
            same_function,
        )
        self.calls.append(call)
        call.record = super().step_on(
            objective,
            curvature=curvature,
            trial=trial,
            loss_and_gradient=loss_and_gradient,
            same_function=same_function,
        )
        return call.record


def forced(calls: list[NewtonCall] | None = None, newton: dict[str, Any] | None = None, **options: Any) -> SwitchToSFN:
    """A callback that switches after two epochs, whatever the metric does."""
    optimizer: Any = partial(SaddleFreeNewton, **(newton or {}))
    if calls is not None:
        optimizer = partial(Noting, calls=calls, **(newton or {}))
    return SwitchToSFN(**({"patience": 1, "min_delta": 1e9, "optimizer": optimizer, "probe_dim": 0} | options))
