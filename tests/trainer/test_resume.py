"""Resuming is going on: bit for bit, from any checkpoint, also one written in the middle of an epoch or a window."""

import os
import random
import signal
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sfn import SaddleFreeNewton, SwitchToSFN
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.trainer.kept_steps import pack_steps, unpack_steps
from lightning_sfn.trainer.recording import RecordedStep
from lightning_sfn.trainer.reshuffle import reshuffle

from .modules import Fitting, flat, forced, make_trainer, regression_data, regression_loader, sgd

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # ModelCheckpoint, on resuming

CASES, BATCH = 24, 4  # six batches in an epoch


class StatefulLoader:
    """Shuffles by the epoch, and knows where it is: what Lightning resumes in the middle of an epoch."""

    def __init__(self, as_batch: Any = tuple) -> None:
        self.x, self.y = regression_data(CASES).tensors
        self.epoch, self.at, self.as_batch = -1, 0, as_batch
        self.resuming = False

    def __len__(self) -> int:
        return CASES // BATCH

    def __iter__(self) -> Iterator[Any]:
        if self.resuming:
            self.resuming = False
        else:
            self.epoch, self.at = self.epoch + 1, 0
        order = torch.randperm(CASES, generator=torch.Generator().manual_seed(self.epoch))
        while self.at < len(self):
            rows = order[self.at * BATCH : (self.at + 1) * BATCH]
            self.at += 1
            yield self.as_batch((self.x[rows], self.y[rows]))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]
        self.resuming = self.at < len(self)  # at the end of an epoch the next one is due


class Random(Fitting):
    """Dropout and draws from all three generators, momentum and weight decay."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
        super().__init__(net, sgd(0.02, momentum=0.9, weight_decay=1e-3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        noise = 0.01 * (random.random() + np.random.rand())
        loss = F.mse_loss(self.net(x), y) * (1 + noise)
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss


def train(
    callback: SwitchToSFN, resume: str | None = None, loader: Any = None, module: Fitting | None = None, epochs: int = 4
) -> tuple[Tensor, Trainer]:
    saving = ModelCheckpoint(
        dirpath=f"after {Path(resume).stem}" if resume else "kept",
        filename="{step}",
        auto_insert_metric_name=False,
        save_top_k=-1,
        every_n_train_steps=1,
    )
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    module = Random() if module is None else module
    trainer = make_trainer(epochs, callbacks=[callback, saving], enable_checkpointing=True)
    trainer.fit(module, StatefulLoader() if loader is None else loader, ckpt_path=resume, weights_only=True)
    return flat(module), trainer


OPTIONS: dict[str, dict[str, Any]] = {
    "epoch": {},
    "four": {"gradient_batches": 4},
    "held": {"hold": True, "gradient_batches": 3},
    "there and back": {"gradient_batches": 2, "return_when": 2, "cooldown": 1},
    "gate": {"gradient_batches": 4, "require_negative_curvature": True, "min_predicted_decrease": 0.0},
}


def switch(**options: Any) -> SwitchToSFN:
    by_steps = {"monitor": "train_loss", "check_every_n_steps": 2, "patience": 2, "min_delta": 1e9, "probe_dim": 0}
    return SwitchToSFN(optimizer=partial(SaddleFreeNewton, krylov_dim=3), **(by_steps | options))


@pytest.mark.parametrize("name", OPTIONS)
def test_resuming_in_the_middle_of_an_epoch_is_going_on(name: str) -> None:
    """From checkpoints before the plateau, between its decision and the end of the run, in windows and between."""
    going_on = switch(**OPTIONS[name])
    end, trainer = train(going_on)
    assert going_on.report is not None
    assert going_on.report.newton_steps > 1
    for step in (3, 7, 9, 14, 18, 20):
        callback = switch(**OPTIONS[name])
        resumed, again = train(callback, f"kept/{step}.ckpt")
        assert again.global_step == trainer.global_step == 24
        assert torch.equal(resumed, end), step
        assert callback.switched_at_step == going_on.switched_at_step
        assert callback.report is not None
        counted = [(p.newton, p.steps, p.taken, p.gradients, p.products) for p in callback.report.phases]
        assert counted == [(p.newton, p.steps, p.taken, p.gradients, p.products) for p in going_on.report.phases]


class Estimating(Random):
    """Asks for the number of steps, as a one-cycle schedule does: the loader is iterated before the fit starts."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 24
        return super().configure_optimizers()


@pytest.mark.parametrize("make", [Random, Estimating])
def test_resuming_is_going_on_with_a_shuffling_loader_and_dropout(make: Any) -> None:
    """The global random numbers travel with the checkpoint: plain Lightning would shuffle and drop anew."""

    def run(resume: str | None = None) -> Tensor:
        torch.manual_seed(1)
        module = make()
        saving = ModelCheckpoint(
            dirpath=f"after {Path(resume).stem}" if resume else "e", filename="{epoch}", save_top_k=-1
        )
        callback = SwitchToSFN(switch_at_epoch=2, optimizer=partial(SaddleFreeNewton, krylov_dim=3), probe_dim=0)
        loader = DataLoader(regression_data(16), batch_size=4, shuffle=True)
        trainer = make_trainer(6, callbacks=[callback, saving], enable_checkpointing=True)
        torch.manual_seed(4 if resume else 5)
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
        return flat(module)

    end = run()
    for epoch in (0, 1, 3):
        assert torch.equal(run(f"e/epoch={epoch}.ckpt"), end)


@pytest.mark.parametrize("stateful", [False, True])
def test_a_loader_is_iterated_anew_unless_it_is_stateful(stateful: bool) -> None:
    """Its place comes from its own state, which a second iterator would not have."""
    loader = StatefulLoader() if stateful else DataLoader(regression_data(16), shuffle=True)
    fetched: list[int] = []

    class Fetcher:
        def __iter__(self) -> Iterator[int]:
            fetched.append(int(torch.randint(1000, ())))
            return iter(fetched)

    loop = SimpleNamespace(_combined_loader=SimpleNamespace(flattened=[loader]), _data_fetcher=Fetcher())
    state = RandomState.seeded(5)
    reshuffle(SimpleNamespace(fit_loop=loop), state)  # type: ignore[arg-type]
    state.restore()
    assert fetched == ([] if stateful else [int(torch.randint(1000, ()))])


class Box:
    """A batch of a class of somebody's own."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.x, self.y = pair

    def to(self, *args: Any, **kwargs: Any) -> "Box":
        return self


class Boxed(Random):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch.x, batch.y), batch_idx)


def test_batches_that_cannot_be_stored_are_collected_anew_with_a_warning() -> None:
    options = {"check_every_n_steps": None, "switch_at_step": 6}
    train(switch(**options), loader=StatefulLoader(Box), module=Boxed())
    callback = switch(**options)
    with pytest.warns(UserWarning, match="could not hold them .*collected anew"):
        train(callback, "kept/9.ckpt", StatefulLoader(Box), Boxed())
    assert callback.switched


def test_a_state_of_other_shapes_is_said_and_not_fatal() -> None:
    """A layer that was frozen when the checkpoint was written is free when it is loaded."""

    class Freezing(Fitting):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                self.net[0].requires_grad_(False)

    def module() -> Fitting:
        torch.manual_seed(0)
        return Freezing()

    options = {"check_every_n_steps": None, "switch_at_step": 6}
    train(switch(**options), module=module())
    callback = switch(**options)
    with pytest.warns(
        UserWarning, match="begins with a new optimizer: The state belongs to parameters of other shapes"
    ):
        train(callback, "kept/24.ckpt", module=module(), epochs=5)
    assert callback.switched


def test_steps_survive_a_checkpoint_with_their_structure() -> None:
    whole = torch.arange(1000.0)
    batch = {"x": [whole[:3], (torch.tensor(1), "name")], "n": 2.5, "none": None}
    step = RecordedStep((batch, 7), {"dataloader_idx": 0}, RandomState.capture(), torch.tensor(1.0))
    packed = pack_steps([step])
    assert packed is not None
    torch.save(packed, "steps.pt")
    (again,) = unpack_steps(torch.load("steps.pt", weights_only=True), torch.device("cpu"))
    assert str(again.args) == str(step.args)
    assert again.kwargs == step.kwargs
    again.random_state.restore()
    first = (random.random(), np.random.rand(), float(torch.rand(())))
    step.random_state.restore()
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == first
    assert all(leaf.untyped_storage().nbytes() < 100 for leaf in packed[0]["leaves"] if isinstance(leaf, Tensor))


@pytest.mark.parametrize(
    "batch",
    [
        {("a", "to", "b"): torch.ones(2), "y": [torch.zeros(1), (1.5, None)]},
        {(("a", 1), 2): torch.ones(2)},
        {7: torch.ones(2), None: 1, True: 2, 0.5: 3},
        OrderedDict(b=torch.ones(2), a=2),
    ],
)
def test_keys_of_any_plain_kind_survive_a_checkpoint(batch: Any) -> None:
    packed = pack_steps([RecordedStep((batch, 0), {"n": 1}, RandomState.capture(), None)])
    torch.save(packed, "steps.pt")
    (again,) = unpack_steps(torch.load("steps.pt", weights_only=True), torch.device("cpu"))
    assert str(again.args) == str((batch, 0))
    assert type(again.args[0]) is type(batch)
    assert again.kwargs == {"n": 1}


@pytest.mark.parametrize(
    "strange",
    [
        Box((torch.ones(1), torch.ones(1))),
        np.ones(3),
        np.float64(2),
        {1, 2},
        {b"x": 1},
        {frozenset("x"): 1},
        OrderedDict({("a", 1): 2}),
    ],
)
def test_batches_of_other_things_are_not_packed(strange: Any) -> None:
    assert pack_steps([RecordedStep((strange, 0), {}, RandomState.capture(), None)]) is None


class Killing(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def test_callback_object_of_an_interrupted_run_resumes_it() -> None:
    """In a notebook the same objects go on."""
    end, _ = train(switch())
    callback = switch()
    trainer = make_trainer(4, callbacks=[callback, Killing(15)])
    with pytest.raises(SystemExit):
        trainer.fit(Random(), StatefulLoader())
    resumed, _ = train(callback, "kept/14.ckpt")
    assert torch.equal(resumed, end)


class Terminating(Callback):
    """Sends the signal by which clusters preempt a job; Lightning raises it as an exception after the batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("options", [{}, {"hold": True, "gradient_batches": 3}])
def test_a_checkpoint_of_an_interrupted_run_holds_the_window(options: dict[str, Any]) -> None:
    """Written while the exception is handled, by a callback that comes after this one."""
    end, _ = train(switch(**options))
    interrupted = switch(**options)
    saving = ModelCheckpoint("exception", "last", save_on_exception=True, save_top_k=0, every_n_train_steps=1)
    trainer = make_trainer(4, callbacks=[interrupted, Terminating(15), saving], enable_checkpointing=True)
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    with pytest.raises(SIGTERMException):
        trainer.fit(Random(), StatefulLoader())
    resumed, _ = train(switch(**options), "exception/last.ckpt")
    assert torch.equal(resumed, end)


class Validated(Fitting):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))


def test_a_checkpoint_of_the_end_of_validation_goes_on() -> None:
    """Its first epoch has no batches any more, and so no metric of training, which is none that was forgotten."""
    ends, steps = [], []
    for resume in (None, "epoch=0", "epoch=3"):  # before and after the switch
        saving = ModelCheckpoint(f"from {resume}", "{epoch}", "val_loss", save_top_k=-1, save_on_train_epoch_end=False)
        callback, module = switch(check_every_n_steps=None), Validated()
        trainer = make_trainer(6, callbacks=[callback, saving], enable_checkpointing=True)
        path = f"from None/{resume}.ckpt" if resume else None
        trainer.fit(module, regression_loader(24), regression_loader(), ckpt_path=path, weights_only=True)
        ends.append(flat(module))
        steps.append(callback.switched_at_step)
    assert torch.equal(ends[0], ends[2])
    assert steps == [18, 24, 18]  # the second one misses the check of the first epoch


def test_forced_switches_are_not_repeated_after_a_resume() -> None:
    options = {"switch_at_step": 6, "gradient_batches": 2, "return_when": 1, "cooldown": 99}
    going_on = switch(**options)
    end, _ = train(going_on)
    callback = switch(**options)
    resumed, _ = train(callback, "kept/14.ckpt")
    assert torch.equal(resumed, end)
    assert callback.switched_at_step == 6
    assert not callback.switched


def test_the_first_optimizer_stays_in_the_checkpoint_of_a_window() -> None:
    train(forced(monitor="train_loss", check_every_n_steps=2, min_delta=1e9))
    stored = torch.load("kept/15.ckpt", weights_only=True)
    (state,) = (
        stored["callbacks"].values()
        if len(stored["callbacks"]) == 1
        else [value for key, value in stored["callbacks"].items() if key.startswith("SwitchToSFN")]
    )
    assert state["window"]["waiting"] == len(state["window"]["window"]["steps"]) == 3
    assert len(stored["optimizer_states"][0]["state"]) == 4
    assert "momentum_buffer" in stored["optimizer_states"][0]["state"][0]
