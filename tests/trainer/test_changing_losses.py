"""Losses that depend on what changes from batch to batch: each replay of a window sees the state at its end."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sfn import HessianSpectrum, SwitchToSFN
from lightning_sfn.newton.objective import ObjectiveError

from .modules import Fitting, NewtonCall, flat, forced, make_trainer, regression_loader

BATCHES = 4  # in an epoch; the callback switches after two epochs
WHOLE = {"curvature_fraction": 1.0, "trial_fraction": 1.0}


class Annealed(Fitting):
    """A penalty whose weight follows the Trainer's step count."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return super().training_step(batch, batch_idx) + 1e-3 * self.global_step * penalty


class Hidden(Fitting):
    """Hands a state on from batch to batch."""

    state: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        before = torch.zeros_like(y) if self.state is None or batch_idx == 0 else self.state
        self.state = (0.5 * before + self.net(x)).detach()
        return super().training_step((x, y - before), batch_idx)


class Codebook(Fitting):
    """A buffer that follows the data, and changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prediction = self.net(batch[0])
        loss = super().training_step(batch, batch_idx) + 0.3 * (prediction - self.centre).square().mean()
        with torch.no_grad():
            self.centre.mul_(0.8).add_(prediction.mean(), alpha=0.2)
        return loss


class Later(Fitting):
    """Its loss rises with each step from the second Newton step on, by more than any step lowers it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 10.0 * max(self.global_step - 3 * BATCHES, 0)


class Restless(Fitting):
    """Its loss rises with each evaluation, replays included, from one Newton step on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start
        self.evaluations = count()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        unrest = 10.0 * next(self.evaluations) if self.global_step >= self.start else 0.0
        return super().training_step(batch, batch_idx) + unrest


def run(
    module: Fitting, epochs: int = 6, callbacks: Any = (), resume: str | None = None, **options: Any
) -> tuple[SwitchToSFN, list[NewtonCall]]:
    calls: list[NewtonCall] = []
    callback = forced(calls, **(WHOLE | options))
    trainer = make_trainer(epochs, callbacks=[callback, *callbacks], enable_checkpointing=bool(callbacks))
    trainer.fit(module, regression_loader(4 * BATCHES), ckpt_path=resume, weights_only=True if resume else None)
    assert callback.report is not None
    return callback, calls


@pytest.mark.parametrize("kind", [Annealed, Hidden, Codebook])
def test_such_a_loss_is_evaluated_again_as_one_function(kind: type[Fitting]) -> None:
    torch.manual_seed(0)
    callback, calls = run(kind())
    assert callback.report is not None
    assert callback.report.accepted_steps == callback.report.newton_steps == 4
    assert not any(call.known for call in calls)


@pytest.mark.parametrize("options", [{"gradient_batches": 2}, {"trial_fraction": 0.1, "curvature_fraction": 0.1}])
def test_so_it_is_in_smaller_windows_and_with_trials_on_a_part(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    callback, calls = run(Annealed(), **options)
    assert callback.report is not None
    assert callback.report.accepted_steps > 0
    assert not any(call.known for call in calls)


def test_a_loss_that_begins_to_change_later_costs_no_step() -> None:
    torch.manual_seed(0)
    callback, calls = run(Later())
    assert callback.report is not None
    assert callback.report.accepted_steps == callback.report.newton_steps == 4
    # The second step is tried with the recorded loss, fails, and is taken with a replayed one.
    assert [call.known for call in calls] == [True, True, False, False, False]
    # Gradients: of the batches that Lightning ran, and for each step its replays of the whole window.
    records = [call.record for call in calls if call.record is not None]
    own = [record.gradients - call.known for call, record in zip([calls[0], *calls[2:]], records, strict=True)]
    assert callback.report.phases[-1].gradients == BATCHES * (4 + sum(own))


def test_a_loss_that_does_not_change_is_not_evaluated_again() -> None:
    torch.manual_seed(0)
    _, calls = run(Fitting())
    assert all(call.known for call in calls)


@pytest.mark.parametrize("start", [2 * BATCHES, 3 * BATCHES])
def test_a_loss_that_changes_by_itself_is_refused(start: int) -> None:
    torch.manual_seed(0)
    with pytest.raises(ObjectiveError, match=r"^The loss was .* and then .* at the same parameters, but it must be"):
        run(Restless(start))


class Listed(Fitting):
    """Changes a tensor in a dictionary in place."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"count": torch.zeros(())}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.held["count"].add_(1.0)


@pytest.mark.parametrize("callback", [SwitchToSFN(), HessianSpectrum(log=False, strict=True)])
def test_the_usual_cause_is_named(callback: Callback) -> None:
    with pytest.raises(
        Exception, match=r"The loss was .* In a module, look first for a tensor in a list or dictionary"
    ):
        make_trainer(1, callbacks=[callback]).fit(Listed(), regression_loader())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_what_was_found_out_travels_with_the_checkpoint(empty_folder: Path) -> None:
    def saving(folder: str) -> list[ModelCheckpoint]:
        return [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]

    torch.manual_seed(0)
    module = Annealed()
    run(module, callbacks=saving("kept"))
    resumed = Annealed()
    _, calls = run(resumed, callbacks=saving("after"), resume="kept/epoch=3.ckpt")
    assert len(calls) == 2
    assert not any(call.known for call in calls)
    assert torch.equal(flat(resumed), flat(module))
