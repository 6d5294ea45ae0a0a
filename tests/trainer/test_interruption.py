"""What a real run meets: numbers that are not finite, no memory, exceptions, signals. Nothing is lost."""

import os
import signal
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any
from unittest import mock

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, nn

from lightning_sfn import SaddleFreeNewton, SwitchToSFN
from lightning_sfn.newton import KroneckerFactors
from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.outer_step import Search
from lightning_sfn.newton.preconditioner import IdentityPreconditioner
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.newton.weight_uses import WatchingWeights

from .modules import Fitting, MemoryLogger, Untidy, flat, forced, make_trainer, random_streams, regression_loader, sgd

SWITCH = 2  # epochs of four steps before the switch


def switch(optimizer: Any = None, **options: Any) -> SwitchToSFN:
    optimizer = optimizer or partial(SaddleFreeNewton, krylov_dim=3)
    return SwitchToSFN(switch_at_epoch=SWITCH, optimizer=optimizer, **({"probe_dim": 0} | options))


class Poisoned(Fitting):
    """Returns an odd loss in some batches.

    Args:
        poison: What to do with the loss; ``None`` skips the batch.
        batches: In which batches.
        epochs: In which epochs.
    """

    def __init__(self, poison: float | None, batches: tuple[int, ...] = (1,), epochs: tuple[int, ...] = (3,)) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.poison, self.batches, self.epochs = poison, batches, epochs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch in self.epochs and batch_idx in self.batches:
            return None if self.poison is None else loss * self.poison
        return loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_batches_that_are_not_finite_are_left_out(poison: float) -> None:
    """The run is the one in which the module skips these batches itself."""
    plain = Poisoned(None)
    make_trainer(6, callbacks=[switch()]).fit(plain, regression_loader())
    module, callback = Poisoned(poison), switch()
    with pytest.warns(UserWarning, match=r"Loss or gradient of batch 1 is not finite .* left out of Newton steps"):
        make_trainer(6, callbacks=[callback]).fit(module, regression_loader())
    assert torch.equal(flat(module), flat(plain))
    assert callback.report is not None
    assert callback.report.newton_steps == 4


class Unknown(Fitting):
    """Its loss is no number in one batch, though its gradient is one: the first optimizer goes on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + float("nan") if self.current_epoch == 2 and batch_idx == 1 else loss


def test_a_batch_that_is_not_finite_is_left_out_of_a_probe_too() -> None:
    callback = SwitchToSFN(
        patience=1, min_delta=10.0, require_negative_curvature=True, min_predicted_decrease=0.0, probe_dim=4
    )
    with pytest.warns(UserWarning, match="left out of Newton steps"):
        make_trainer(5, callbacks=[callback]).fit(Unknown(), regression_loader())
    assert callback.switched


def test_a_window_of_one_process_is_not_resumed_on_several() -> None:
    """Its weights would make the batches of one process count for all."""

    class Moving(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if callback._phase is None or callback._phase.driver.idle:
                return
            driver = callback._phase.driver
            state = driver.state_dict()
            assert state["window"] is not None
            driver._window = type(driver._window)()
            several = mock.patch.object(Trainer, "world_size", new_callable=mock.PropertyMock, return_value=2)
            with several, pytest.warns(UserWarning, match="it could not hold them"):
                driver.load_state_dict(state)
            assert driver.idle
            trainer.should_stop = True

    callback = switch()
    make_trainer(SWITCH + 1, callbacks=[callback, Moving()]).fit(Fitting(), regression_loader())
    assert callback.switched


@pytest.mark.filterwarnings("ignore:Loss or gradient of batch")
def test_an_epoch_without_a_finite_batch_changes_nothing() -> None:
    module, callback = Poisoned(float("nan"), batches=(0, 1, 2, 3)), switch()
    seen: list[Tensor] = []

    class Noting(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(flat(pl_module))

    make_trainer(6, callbacks=[callback, Noting()]).fit(module, regression_loader())
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3], seen[4])


def test_parameters_that_are_lost_already_do_not_switch() -> None:
    module = Fitting(optimizer=sgd(float("inf")))
    callback = switch()
    warning = pytest.warns(UserWarning, match="does not switch: the parameters are not finite any more")
    with pytest.warns(UserWarning, match="train_loss is nan"), warning:
        make_trainer(4, callbacks=[callback]).fit(module, regression_loader())
    assert not callback.switched


class Failing(SaddleFreeNewton):
    """Fails in some of its steps, after it has moved the parameters.

    Args:
        when: Numbers of the steps that fail.
        error: What is raised.
    """

    def __init__(self, params: Any, when: tuple[int, ...], error: type[Exception]) -> None:
        super().__init__(params, krylov_dim=3)
        self.when, self.error, self.count = when, error, 0

    def step_on(self, *args: Any, **options: Any) -> StepRecord:
        run = Search.run

        def failing(search: Search, *arguments: Any) -> StepRecord:
            record = run(search, *arguments)
            self.count += 1
            if self.count in self.when:
                raise self.error(f"step {self.count}")
            return record

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Search, "run", failing)
            return super().step_on(*args, **options)


def test_a_step_that_fails_is_left_out() -> None:
    callback, ends = switch(partial(Failing, when=(2,), error=FloatingPointError)), []

    class Noting(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            ends.append(flat(pl_module))

    with pytest.warns(UserWarning, match="Newton step was impossible, and the parameters are as they were: step 2"):
        make_trainer(6, callbacks=[callback, Noting()]).fit(Fitting(), regression_loader())
    moved = [not torch.equal(a, b) for a, b in pairwise(ends)]
    assert moved == [True, True, False, True, True]
    assert callback.switched
    assert callback.report is not None
    assert callback.report.newton_steps == 3


@pytest.mark.filterwarnings("ignore:A Newton step was impossible")
def test_steps_that_keep_failing_hand_training_back_for_good() -> None:
    callback = switch(partial(Failing, when=(2, 3, 4), error=FloatingPointError), patience=1, min_delta=1e9)
    trainer = make_trainer(10, callbacks=[callback])
    trainer.fit(Fitting(), regression_loader())
    assert callback.report is not None
    assert [(p.newton, p.steps) for p in callback.report.phases] == [(False, 8), (True, 1), (False, 16)]
    assert type(trainer.optimizers[0]) is torch.optim.SGD


class Small(SaddleFreeNewton):
    """Has room for so many Lanczos vectors, and for no graph."""

    room = 2

    def operator(self, objective: Any, parameters: Any) -> CurvatureOperator:
        operator = super().operator(objective, parameters)
        matvec = operator.local_matvec

        def limited(vector: Tensor) -> Tensor:
            if self._budget.limit > 0 or not isinstance(self.krylov_dim, int) or self.krylov_dim > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return matvec(vector)

        operator.local_matvec = limited  # type: ignore[method-assign]
        return operator


def test_a_step_that_needs_too_much_memory_is_taken_with_less() -> None:
    callback = switch(partial(Small, krylov_dim=8, graph_bytes=2**25))
    with pytest.warns(UserWarning, match="Memory ran out in a Newton step") as caught:
        make_trainer(5, callbacks=[callback]).fit(Fitting(), regression_loader())
    assert sum("Memory ran out" in str(warning.message) for warning in caught) == 4  # 2 for the budget, 2 for k
    assert callback.newton is not None
    assert callback.newton.krylov_dim == 2
    assert callback.report is not None
    assert callback.report.accepted_steps == 3


@pytest.mark.filterwarnings("ignore:Memory ran out")
def test_where_nothing_helps_the_first_optimizer_goes_on() -> None:
    class None_(Small):  # noqa: N801
        room = 0

    callback = switch(partial(None_, krylov_dim=2), patience=1, min_delta=1e9)
    trainer = make_trainer(7, callbacks=[callback])
    module = Fitting()
    with pytest.warns(UserWarning, match="Newton step was impossible"):
        trainer.fit(module, regression_loader())
    assert callback.report is not None
    assert [(p.newton, p.steps) for p in callback.report.phases] == [(False, 8), (True, 0), (False, 16)]
    assert type(trainer.optimizers[0]) is torch.optim.SGD


# ------------------------------------------------------------------------------------------------ exceptions, signals


class Interrupted(Untidy):
    """Does something in the middle of a replay, after it has changed what it changes.

    Args:
        action: What to do at that moment.
        call: At which call since the last step of Lightning's own.
    """

    def __init__(self, action: Any, call: int = 9) -> None:
        seed_everything(0)
        super().__init__()
        self.action, self.call = action, call

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        result = super().training_step(batch, batch_idx)
        counter = type(self).calls  # a class attribute: isolation does not put it back
        counter.append(self.current_epoch)
        if counter.count(SWITCH + 1) == 4 + self.call:
            self.action(self)
        return result

    calls: list[int] = []  # noqa: RUF012


def fail(module: Interrupted) -> None:
    raise ArithmeticError("half way")


def interrupt(module: Interrupted) -> None:
    raise KeyboardInterrupt


def terminate(module: Interrupted) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop(module: Interrupted) -> None:
    module.trainer.should_stop = True


def nothing(module: Interrupted) -> None:
    pass


class Keeping(Callback):
    """Notes the parameters, and everything else that a step changes, around the Newton steps."""

    def __init__(self) -> None:
        self.at_exception: tuple[Tensor, Any] | None = None
        self.ends: list[tuple[Tensor, Any]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Untidy)
        self.ends.append((flat(pl_module), pl_module.traces()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, Untidy)
        self.at_exception = (flat(pl_module), pl_module.traces())


def interrupted(action: Any) -> tuple[Keeping, Interrupted, SwitchToSFN, Trainer, BaseException | None]:
    Interrupted.calls.clear()
    module, keeping, callback = Interrupted(action), Keeping(), switch()
    trainer = make_trainer(SWITCH + 3, callbacks=[keeping, callback], logger=MemoryLogger())
    error: BaseException | None = None
    try:
        trainer.fit(module, regression_loader())
    except BaseException as caught:
        error = caught
    return keeping, module, callback, trainer, error


@pytest.mark.parametrize(("action", "raised"), [(fail, ArithmeticError), (interrupt, SystemExit)])
def test_exceptions_in_a_replay_leave_the_last_accepted_step(action: Any, raised: type[BaseException]) -> None:
    """Apart from the batch norm of the batches since, the module is what it was after the last step."""
    keeping, module, callback, trainer, error = interrupted(action)
    assert type(error) is raised
    assert keeping.at_exception is not None
    parameters, traces = keeping.at_exception
    assert torch.equal(parameters, keeping.ends[SWITCH][0])
    whole = interrupted(nothing)[0]
    expected = whole.ends[SWITCH + 1][1]
    # What four batches change in the whole run they have changed here, and no replay has added to it.
    for name in ("plain", "recent", "attributes", "submodule", "modes", "seen", "error updates", "norm.running_mean"):
        assert str(traces[name]) == str(expected[name]), name
    assert "log" not in module.__dict__
    assert not any(type(logger).__name__ == "DummyLogger" for logger in trainer.loggers)
    assert "training_step" not in trainer.strategy.__dict__
    assert callback.newton is not None
    assert callback.newton._driver is None


def test_sigterm_in_a_replay_ends_the_step_first() -> None:
    keeping, _, _, _, error = interrupted(terminate)
    assert type(error) is SIGTERMException
    whole = interrupted(nothing)[0]
    assert keeping.at_exception is not None
    assert torch.equal(keeping.at_exception[0], whole.ends[SWITCH + 1][0])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_of_an_interrupted_newton_step_says_what_it_lacks() -> None:
    class Interrupted(SaddleFreeNewton):
        def step_on(self, *given: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

    saving = ModelCheckpoint("kept", filename="last", save_on_exception=True)
    callback = switch(optimizer=Interrupted)
    trainer = make_trainer(9, callbacks=[callback, saving], enable_checkpointing=True)
    with pytest.raises(SystemExit):
        trainer.fit(Fitting(), regression_loader())
    (path,) = Path("kept").glob("*.ckpt")
    resumed = make_trainer(9, callbacks=[switch()])
    with pytest.warns(UserWarning, match="while batches waited for a Newton step, and it could not hold them"):
        resumed.fit(Fitting(), regression_loader(), ckpt_path=path)


def test_a_replay_cannot_stop_the_trainer() -> None:
    _, module, _, trainer, error = interrupted(stop)
    assert error is None
    assert trainer.current_epoch == SWITCH + 3
    whole = interrupted(nothing)
    assert torch.equal(flat(module), flat(whole[1]))


def test_a_stop_uses_the_window_up() -> None:
    class Stopping(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 4 * SWITCH + 2:
                trainer.should_stop = True

    callback = switch()
    trainer = make_trainer(9, callbacks=[callback, Stopping()])
    trainer.fit(Fitting(), regression_loader())
    assert trainer.global_step == 4 * SWITCH + 2
    assert callback.report is not None
    assert callback.report.newton_steps == 1


def test_what_cannot_be_replayed_is_found_out_on_the_first_batch() -> None:
    class Reading(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Reading.calls += 1  # outside of the module, so that isolation does not see it
            return super().training_step(batch, batch_idx) * Reading.calls

        calls = 0

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Once(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Rounded.apply(self.net(batch[0])).square().mean()

    for module, message in ((Reading(), "same parameters"), (Once(), "once_differentiable")):
        trainer = make_trainer(1, callbacks=[switch()])
        with pytest.raises(MisconfigurationException, match=f"SwitchToSFN cannot replay training_step. .*{message}"):
            trainer.fit(module, regression_loader())
        assert trainer.global_step == 1


class Coordinates(IdentityPreconditioner):
    """Counts and warns at each estimate, and draws; it knows one of the module's parameters by identity."""

    def __init__(self, module: nn.Module, error: Exception | None = None) -> None:
        self.weight, self.error, self.estimates = next(module.parameters()), error, 0

    def refresh(self, operator: CurvatureOperator, generator: torch.Generator, *told: Any) -> None:
        assert self.weight is operator.parameters.tensors[0]
        operator.objective.evaluate(0)
        torch.rand(3)
        operator.parameters.random(generator)
        self.estimates += 1
        if self.error is not None:
            raise self.error
        warnings.warn("These are said at the switch.", stacklevel=1)


def test_coordinates_that_cannot_be_estimated_are_found_out_on_the_first_batch() -> None:
    class Watchful(Fitting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if any(isinstance(mode, WatchingWeights) for mode in torch.overrides._get_current_function_mode_stack()):
                raise KeyError("mode")
            return super().training_step(batch, batch_idx)

    module = Fitting()
    own = Coordinates(module, ArithmeticError("broken"))
    for each, coordinates, message in (
        (Watchful(), "kronecker", r"KroneckerFactors, from replays of training_step \(KeyError: 'mode'\): pass "),
        (module, own, r"Coordinates, from replays of training_step \(ArithmeticError: broken\): pass "),
    ):
        trainer = make_trainer(1, callbacks=[switch(optimizer=partial(SaddleFreeNewton, preconditioner=coordinates))])
        with pytest.raises(MisconfigurationException, match=f"^SwitchToSFN cannot estimate the coord.*{message}"):
            trainer.fit(each, regression_loader())
        assert trainer.global_step == 1


def test_the_rehearsal_leaves_coordinates_and_random_numbers_alone() -> None:
    """An estimate is taken on a copy of the coordinates that the factory gives to each optimizer."""
    estimates = []

    class Noting(Coordinates):
        def refresh(self, operator: CurvatureOperator, generator: torch.Generator, *told: Any) -> None:
            estimates.append(id(self))
            super().refresh(operator, generator, *told)

    results = []
    for rehearsing in (False, True):
        seed_everything(0)
        module = Untidy()
        coordinates = Noting(module)
        never = SwitchToSFN(patience=99, optimizer=partial(SaddleFreeNewton, preconditioner=coordinates))
        make_trainer(1, callbacks=[never] if rehearsing else []).fit(module, regression_loader())
        assert coordinates.estimates == 0
        results.append((module.traces(), random_streams()))
    assert len(estimates) == 1
    assert estimates != [id(coordinates)]
    assert results[0] == results[1]


def test_memory_does_not_grow(new_tensors: Callable[[], list[Tensor]]) -> None:
    """Live tensors at every twelfth of 200 Newton steps, window by window; one that waits comes and goes."""
    counts: list[int] = []

    class Counting(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step % 12 == 4 and trainer.global_step > 30:
                counts.append(len(new_tensors()))

    # What is measured beside factors on a plateau is dropped on the way: that would hide what grows.
    newton = {"krylov_dim": 2, "previous_directions": 2, "preconditioner": KroneckerFactors(probes=0)}
    callback = forced(newton=newton, gradient_batches=1)
    trainer = make_trainer(53, callbacks=[callback, Counting()])
    trainer.fit(Fitting(), regression_loader())
    assert callback.report is not None
    assert callback.report.newton_steps > 200
    early, late = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    assert mode(early) == mode(late)


def test_a_return_gives_the_memory_back(new_tensors: Callable[[], list[Tensor]]) -> None:
    counts = []

    class Counting(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            counts.append(
                sum(thing.numel() > 1 for thing in new_tensors())
            )  # Lightning keeps a few numbers for each metric

    callback = switch(return_when=2, cooldown=99, hold=True)
    make_trainer(7, callbacks=[callback, Counting()]).fit(Fitting(), regression_loader())
    assert counts[SWITCH] > counts[SWITCH - 1] + 10
    assert counts[-1] <= counts[SWITCH - 1] + 2
