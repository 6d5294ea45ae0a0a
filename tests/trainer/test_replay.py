"""A replayed step is the step that Lightning made, bit for bit, and nothing tells that it was replayed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_sfn.newton.curvature import HessianOperator, gradient_of
from lightning_sfn.newton.objective import Objective, ObjectiveError
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.trainer.recording import RecordedStep, StepRecorder
from lightning_sfn.trainer.replay import replay_closure

from .modules import (
    Fitting,
    MemoryLogger,
    Untidy,
    bits,
    flat_gradient,
    make_trainer,
    random_streams,
    regression_loader,
    sgd,
    small_net,
)


class Replaying(Callback):
    """Replays each step just after Lightning's own backward pass, and notes what differs.

    Args:
        products: Hessian-vector products to compute as well.
        failing: Let each replay raise.
    """

    def __init__(self, products: int = 0, failing: bool = False) -> None:
        self.products, self.failing = products, failing
        self.losses: list[tuple[float, float]] = []
        self.gradients: list[tuple[bytes, bytes]] = []
        self.images: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder = StepRecorder(trainer, pl_module.device)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        (step,) = self.recorder.take()
        assert step.loss is not None
        objective = Objective([replay_closure(trainer, pl_module, step)], random_states=[step.random_state])
        parameters = FlatParameters(pl_module.parameters())
        if self.failing:
            for _ in range(2):
                with pytest.raises(ArithmeticError, match="half way"):
                    objective.value()
            return
        loss, gradient = gradient_of(objective, parameters)
        self.losses.append((loss, float(step.loss)))
        self.gradients.append((gradient.numpy().tobytes(), flat_gradient(pl_module).numpy().tobytes()))
        operator = HessianOperator(objective, parameters)
        self.images += [operator.matvec(torch.ones(parameters.size)) for _ in range(self.products)]
        operator.close()

    def assert_faithful(self, steps: int) -> None:
        assert len(self.losses) == steps
        for replayed, own in [*self.losses, *self.gradients]:
            assert replayed == own
        assert all(bool(torch.isfinite(image).all()) for image in self.images)


# ------------------------------------------------------------------------------------------------ the same function


def test_loss_and_gradient_are_lightnings_own_bit_for_bit() -> None:
    replaying = Replaying()
    make_trainer(3, callbacks=[replaying], logger=MemoryLogger()).fit(Untidy(), regression_loader(shuffle=True))
    replaying.assert_faithful(steps=12)
    assert len(set(replaying.losses)) == 12


class OfThatName(Fitting):
    """Has a method of the name that the mixin gives its replays."""

    def _replay_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("this is the module's own")


def test_a_replay_is_the_training_step_whatever_else_a_module_has() -> None:
    replaying = Replaying()
    make_trainer(1, callbacks=[replaying]).fit(OfThatName(), regression_loader())
    replaying.assert_faithful(steps=4)


def test_replay_without_the_recorded_random_state_is_another_function() -> None:
    """The control of the test above: dropout and noise do change the loss."""
    seen: list[tuple[float, float]] = []

    class Fresh(Replaying):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            (step,) = self.recorder.take()
            assert step.loss is not None
            seen.append((Objective([replay_closure(trainer, pl_module, step)]).value(), float(step.loss)))

    make_trainer(1, callbacks=[Fresh()]).fit(Untidy(), regression_loader())
    assert all(fresh != own for fresh, own in seen)


class Step(Fitting):
    """Fits with a step that is given."""

    def __init__(self, net: nn.Module, step: Callable[["Step", Any], Any]) -> None:
        super().__init__(net, sgd(0.01))
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)


def physics(module: Step, batch: Any) -> Tensor:
    """The residual of u'' = -u, with derivatives by autograd inside the step."""
    x = batch[0][:, :1].detach().requires_grad_(True)
    u = module.net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend + u).square().mean() + (u - 1).square().mean()


def sequence(module: Step, batch: Any) -> Tensor:
    x, y = batch
    hidden = module.net[0](x.reshape(len(x), 3, 1).expand(-1, -1, 4))
    if isinstance(hidden, tuple):
        hidden = hidden[0]
    return F.mse_loss(module.net[1](hidden.mean(1)), y)


def attention(dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=dropout, batch_first=True)
    return nn.ModuleList([layer, nn.Linear(4, 1)])


@pytest.mark.parametrize(
    ("net", "step"),
    [
        pytest.param(lambda: small_net(1), physics, id="physics-informed"),
        pytest.param(lambda: nn.ModuleList([nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 1)]), sequence, id="lstm"),
    ],
)
def test_other_architectures_are_replayed_and_differentiated_twice(
    net: Callable[[], nn.Module], step: Callable[[Step, Any], Any]
) -> None:
    replaying = Replaying(products=2)
    make_trainer(2, callbacks=[replaying]).fit(Step(net(), step), regression_loader())
    replaying.assert_faithful(steps=8)
    assert len(replaying.images) == 16
    assert all(bool(image.any()) for image in replaying.images)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_has_second_derivatives(dropout: float) -> None:
    """Without dropout, the replay's math kernel adds in another order than Lightning's fused one, and that is all."""
    replaying = Replaying(products=1)
    make_trainer(2, callbacks=[replaying]).fit(Step(attention(dropout), sequence), regression_loader())
    for replayed, own in replaying.losses:
        assert replayed == pytest.approx(own, rel=1e-5)
    for replayed, own in replaying.gradients:
        a, b = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (replayed, own))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(replaying.images) == 8
    assert all(bool(image.any()) for image in replaying.images)


def test_second_derivative_of_attention_fails_without_isolation() -> None:
    """The control of the test above."""
    module = Step(attention(0.0), sequence)
    loss = module.training_step(next(iter(regression_loader())), 0)
    parameters = tuple(module.parameters())
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="backward is not implemented"):
        torch.autograd.grad(torch.stack([g.sum() for g in gradient]).sum(), parameters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_submodule_has_second_derivatives(backend: str) -> None:
    net = small_net()
    module = Step(torch.compile(net, backend=backend), lambda module, batch: F.mse_loss(module.net(batch[0]), batch[1]))
    replaying = Replaying(products=1)
    make_trainer(1, callbacks=[replaying], limit_train_batches=2).fit(module, regression_loader())
    for replayed, own in replaying.losses:
        assert replayed == pytest.approx(own, rel=1e-6)
    assert len(replaying.images) == 2
    assert all(bool(image.any()) for image in replaying.images)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precision_plugins(precision: str) -> None:
    """Double precision is replayed as it is; under autocast the replay is the same loss in full precision."""
    replaying = Replaying()

    class Plain(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            fresh = torch.ones(1)  # float64 under 64-true: Lightning sets the default dtype
            return F.mse_loss(self.net(x), y) * fresh

    make_trainer(1, callbacks=[replaying], precision=precision).fit(Plain(), regression_loader())
    if precision == "64-true":
        replaying.assert_faithful(steps=4)
    else:
        for replayed, own in replaying.losses:
            assert replayed == pytest.approx(own, rel=2e-2)
            assert replayed != own


# ------------------------------------------------------------------------------------------------ no trace


def run(callbacks: list[Callback]) -> tuple[Untidy, MemoryLogger, Trainer, tuple[Any, ...]]:
    seed_everything(0)
    module, logger = Untidy(), MemoryLogger()
    trainer = make_trainer(2, callbacks=callbacks, logger=logger)
    trainer.fit(module, regression_loader())
    return module, logger, trainer, random_streams()


def test_a_run_with_replays_is_the_run_without_them() -> None:
    module, logger, trainer, streams = run([])
    other, other_logger, other_trainer, other_streams = run([Replaying(products=3)])
    assert other.traces() == module.traces()
    assert other_logger.rows == logger.rows
    assert other_logger.written == logger.written
    assert bits(dict(other_trainer.callback_metrics)) == bits(dict(trainer.callback_metrics))
    assert other_streams == streams
    names = {name for _, row in logger.rows for name in row}
    assert {"train_loss_step", "train_loss_epoch", "error_step", "error_epoch", "calls_step"} <= names
    assert module.count == len(module.losses) == module.last.calls == len(logger.written) == 8


class Watching(Replaying):
    """Compares everything around each replay, the identity of buffers and containers included."""

    def __init__(self, failing: bool) -> None:
        super().__init__(failing=failing)
        self.replays = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, Untidy)
        if self.failing:
            pl_module.threshold = 0  # every step raises after it has changed what it changes
        before, streams, objects = pl_module.traces(), random_streams(), self.objects(pl_module)
        loggers = list(trainer.loggers)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        assert pl_module.traces() == before
        assert random_streams() == streams
        assert all(a is b for a, b in zip(self.objects(pl_module), objects, strict=True))
        assert [id(logger) for logger in trainer.loggers] == [id(logger) for logger in loggers]
        assert "log" not in pl_module.__dict__
        if self.failing:
            del pl_module.threshold
        self.replays += 1

    @staticmethod
    def objects(module: Untidy) -> list[Any]:
        plain = [module.losses, module.by_index, module.names, module.recent, module.last.sizes]
        return [*module.buffers(), *module.parameters(), module.error.sum_abs_error, module.seen.value, *plain]


@pytest.mark.parametrize("failing", [False, True])
def test_each_replay_leaves_everything_as_it_was(failing: bool) -> None:
    watching = Watching(failing)
    logger = MemoryLogger()
    make_trainer(2, callbacks=[watching], logger=logger).fit(Untidy(), regression_loader())
    assert watching.replays == 8
    assert len(logger.written) == 8


def test_a_step_changes_all_that_the_replay_puts_back() -> None:
    """The control: without isolation each of these traces is there."""
    module, _, trainer, _ = run([])
    before = module.traces()
    module.trainer = trainer
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    module.training_step(next(iter(regression_loader())), 0)
    after = module.traces()
    unchanged = {name for name in before if after[name] == before[name]}
    weights = {name for name in unchanged if name.endswith(("weight", "bias"))}
    assert unchanged - weights == {"modes", "requires_grad", "gradients"}


class Remembering(Fitting):
    """Keeps state where modules of users keep it."""

    def __init__(self, remember: Callable[[Any, Tensor], None], **state: Any) -> None:
        super().__init__()
        self.remember = remember
        for name, value in state.items():
            setattr(self, name, value)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.remember(self, loss.detach())
        return loss


def remember_in_nested_list(module: Any, loss: Tensor) -> None:
    module.state["losses"].append(float(loss))


def remember_in_buffer(module: Any, loss: Tensor) -> None:
    module.state.mul_(0.9).add_(loss)


def remember_in_tensor(module: Any, loss: Tensor) -> None:
    module.state.mul_(0.9).add_(loss)
    module.net.also.add_(1.0)


def remember_in_cycle(module: Any, loss: Tensor) -> None:
    module.state["root"].setdefault("losses", []).append(float(loss))


def cycle() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["root"] = state
    return state


@pytest.mark.parametrize(
    ("remember", "state", "read"),
    [
        pytest.param(remember_in_nested_list, lambda: {"losses": []}, lambda s: list(s["losses"]), id="nested list"),
        pytest.param(remember_in_buffer, lambda: nn.Buffer(torch.zeros(())), float, id="buffer"),
        pytest.param(remember_in_tensor, lambda: torch.zeros(()), float, id="plain tensor"),
        pytest.param(remember_in_cycle, cycle, lambda s: list(s["losses"]), id="container that holds itself"),
    ],
)
def test_state_below_the_surface_of_attributes(
    remember: Callable[[Any, Tensor], None], state: Callable[[], Any], read: Callable[[Any], Any]
) -> None:
    found = []
    for callbacks in ([], [Replaying()]):
        seed_everything(0)
        module = Remembering(remember, state=state())
        module.net.also = torch.zeros(2)
        make_trainer(1, callbacks=list(callbacks)).fit(module, regression_loader())
        found.append((read(module.state), module.net.also.tolist()))
    assert found[1] == found[0]


# ------------------------------------------------------------------------------------------------ batches


class Consuming(Fitting):
    """Takes its batch apart, as steps do that move labels out of a dictionary."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            y = batch.pop("y")
            batch["x"] = batch["x"] * 2
            x = batch.pop("x")
        elif isinstance(batch, list):
            y = batch.pop()
            x = batch.pop()
        else:
            inner, y = batch
            x = inner.pop("x")
        assert not isinstance(batch, (dict, list)) or not batch
        return F.mse_loss(self.net(x), y)


def as_dict(rows: list[Any]) -> Any:
    return {"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])}


def as_list(rows: list[Any]) -> Any:
    return [torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])]


def as_tuple(rows: list[Any]) -> Any:
    return {"x": torch.stack([r[0] for r in rows])}, torch.stack([r[1] for r in rows])


@pytest.mark.parametrize("collate", [as_dict, as_list, as_tuple])
def test_batches_that_the_step_takes_apart(collate: Callable[[list[Any]], Any]) -> None:
    replaying = Replaying(products=1)
    make_trainer(1, callbacks=[replaying]).fit(Consuming(), regression_loader(collate_fn=collate))
    replaying.assert_faithful(steps=4)


def test_step_without_a_batch_index() -> None:
    class Short(Fitting):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return F.mse_loss(self.net(batch[0]), batch[1])

    replaying = Replaying()
    make_trainer(1, callbacks=[replaying]).fit(Short(), regression_loader())
    replaying.assert_faithful(steps=4)


def test_step_that_returns_no_loss_when_replayed() -> None:
    class Once(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    trainer, module = make_trainer(1), Once()
    recorded = RecordedStep((next(iter(regression_loader())), 0), {}, RandomState.capture(), None)
    with pytest.raises(ObjectiveError, match="returned no loss in a replay"):
        replay_closure(trainer, module, recorded)()


def test_module_that_switches_its_mode_in_the_step() -> None:
    class Switching(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net.eval()
            return super().training_step(batch, batch_idx)

    module = Switching(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    recorded = RecordedStep((next(iter(regression_loader())), 0), {}, RandomState.capture(), None)
    replay_closure(make_trainer(1), module, recorded)()
    assert all(m.training for m in module.modules())


def test_value_needs_no_grad_mode_of_the_caller() -> None:
    x = torch.linspace(0, 1, 8).reshape(-1, 1)
    module = Step(small_net(1), physics)
    recorded = RecordedStep(((x, x), 0), {}, RandomState.capture(), None)
    objective = Objective([replay_closure(make_trainer(1), module, recorded)])
    with torch.no_grad():
        value = objective.value()
    assert math.isfinite(value)
    assert value == pytest.approx(physics(module, (x, x)).item(), rel=1e-6)
    assert not any(p.grad is not None for p in module.parameters())
