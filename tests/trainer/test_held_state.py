"""What a module holds, wherever it holds it, is put back after a replay."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError

from lightning_sfn import HessianSpectrum
from lightning_sfn.trainer.isolation import Isolation

from .modules import Fitting, bits, forced, make_trainer, regression_loader, small_net


class Meter:
    """A meter as users write it, with another one inside."""

    def __init__(self, inner: Any = None) -> None:
        self.count, self.total, self.values, self.inner = 0, torch.zeros(()), [], inner

    def update(self, value: Tensor) -> None:
        self.count += 1
        self.total += value
        self.values.append(float(value))
        if self.inner is not None:
            self.inner.update(value)

    def traces(self) -> tuple[Any, ...]:
        inner = None if self.inner is None else self.inner.traces()
        return self.count, float(self.total), list(self.values), inner


class Output(OrderedDict[str, Any]):
    """A dictionary that forbids to be changed, as model outputs of Hugging Face do."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use update on an Output instance.")

    clear = pop = copy = __delitem__ = update

    def __getitem__(self, key: Any) -> Any:
        return "not what was put in"


class Holding(Fitting):
    """Changes what it holds at each step."""

    def __init__(self, held: Any, change: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.held, self.change = held, change

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.change(self.held, loss.detach())
        return loss


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], None], Callable[[Any], Any]]] = {
    "meter": (lambda: Meter(Meter()), lambda held, loss: held.update(loss), lambda held: held.traces()),
    "meter in a dictionary": (
        lambda: {"a": [Meter()]},
        lambda held, loss: held["a"][0].update(loss),
        lambda held: held["a"][0].traces(),
    ),
    "metric in a list": (
        lambda: [MeanSquaredError()],
        lambda held, loss: held[0].update(loss, loss + 1),
        lambda held: (held[0].update_count, float(held[0].total)),
    ),
    "metric in a tuple": (
        lambda: (MeanSquaredError(),),
        lambda held, loss: held[0].update(loss, loss + 1),
        lambda held: (held[0].update_count, float(held[0].total)),
    ),
    "batch norm in a list": (
        lambda: [nn.BatchNorm1d(1)],
        lambda held, loss: held[0](loss.reshape(1, 1).expand(3, 1)),
        lambda held: held[0].running_mean.tolist(),
    ),
    "defaultdict": (
        lambda: defaultdict(list),
        lambda held, loss: held["losses"].append(float(loss)),
        lambda held: dict(held),
    ),
    "output": (
        lambda: Output(x=1),
        lambda held, loss: OrderedDict.__setitem__(held, f"{len(held)}", float(loss)),
        lambda held: list(OrderedDict.items(held)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_replays_leaves_what_the_module_holds_as_the_run_without(case: str) -> None:
    make, change, read = CASES[case]
    found = []
    for callbacks in ([], [HessianSpectrum(log=False, krylov_dim=4)], [forced(patience=99)]):
        torch.manual_seed(0)
        module = Holding(make(), change)
        make_trainer(2, callbacks=callbacks).fit(module, regression_loader())
        found.append(read(module.held))
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_flags_that_the_step_sets_are_put_back() -> None:
    class Freezing(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net[0].requires_grad_(batch_idx < 2)
            return super().training_step(batch, batch_idx)

    seen = []
    for callbacks in ([], [HessianSpectrum(log=False, krylov_dim=4, strict=True)]):
        torch.manual_seed(0)
        module = Freezing()
        make_trainer(1, callbacks=callbacks).fit(module, regression_loader())
        seen.append([p.requires_grad for p in module.parameters()])
    assert seen[0] == seen[1] == [False, False, True, True]


def test_objects_that_are_not_simple_are_left_alone() -> None:
    """What holds a Trainer, a generator or a file of its own may not be put back by its attributes alone."""

    class Own(DummyLogger):
        pass

    trainer, module = make_trainer(1), Fitting()
    held = [Meter(), Meter(), Own()]
    held[1].trainer = trainer
    module.held = held
    with Isolation(trainer, module) as isolation:
        isolation.rewind()
        for thing in held:
            thing.count = 7
    assert [held[0].count, held[1].count, held[2].__dict__["count"]] == [0, 7, 7]


class Traced(Fitting):
    def __init__(self, compile_: Callable[[nn.Module], Any]) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(3), small_net())
        super().__init__(compile_(net))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize(
    "compile_", [lambda net: torch.jit.trace(net, torch.ones(4, 3)), torch.jit.script], ids=["trace", "script"]
)
def test_compiled_by_jit(compile_: Callable[[nn.Module], Any]) -> None:
    """Their buffers stand where Python cannot put others."""
    states = []
    for callbacks in ([], [HessianSpectrum(log=False, krylov_dim=4)]):
        module = Traced(compile_)
        make_trainer(2, callbacks=callbacks).fit(module, regression_loader())
        states.append(bits(module.state_dict()))
    assert states[1] == states[0]
    module = Traced(compile_)
    switch = forced(switch_at_epoch=1)
    make_trainer(2, callbacks=[switch]).fit(module, regression_loader())
    assert switch.report is not None
    assert switch.report.newton_steps == 1


class Criterion(nn.Module):
    """Logs by a method that it was given."""

    def __init__(self, write: Callable[..., None]) -> None:
        super().__init__()
        self.write = write

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(prediction, target)
        self.write("inner", loss, on_step=False, on_epoch=True)
        return loss


class Delegating(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.criterion = small_net(), Criterion(self.log)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_bound_log_that_another_object_keeps_is_silent() -> None:
    def logged(callbacks: list[Any]) -> tuple[Trainer, float]:
        trainer = make_trainer(2, callbacks=callbacks)
        trainer.fit(Delegating(), regression_loader())
        return trainer, float(trainer.callback_metrics["inner"])

    spectrum = HessianSpectrum(log=False, krylov_dim=4, every_n_steps=3)
    assert logged([spectrum])[1] == logged([])[1]
    assert spectrum.verdict
