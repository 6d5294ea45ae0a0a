from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_sfn.trainer.recording import StepRecorder, loss_of, own_copies

from .modules import Fitting, NewtonCall, forced, make_trainer, regression_data, regression_loader


def test_recorder_takes_each_step_once_and_gives_the_method_back() -> None:
    class Taking(Callback):
        counts: list[int] = []  # noqa: RUF012

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.original = trainer.strategy.training_step
            self.recorder = StepRecorder(trainer, pl_module.device)

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.counts.append(len(self.recorder.take()))
            assert self.recorder.take() == []
            if len(self.counts) == 2:
                self.recorder.detach()
                assert trainer.strategy.training_step == self.original
                assert "training_step" not in trainer.strategy.__dict__

    taking = Taking()
    make_trainer(1, callbacks=[taking]).fit(Fitting(), regression_loader())
    assert taking.counts == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("output", "expected"),
    [(torch.tensor(2.0), 2.0), ({"loss": torch.tensor(3.0), "x": 1}, 3.0), ({"x": 1}, None), (None, None), (2.0, None)],
)
def test_loss_of_what_a_step_returns(output: Any, expected: float | None) -> None:
    loss = loss_of(output)
    assert (None if loss is None else loss.item()) == expected


@dataclass(frozen=True)
class Pair:
    x: Tensor
    name: str = "pair"


def test_copies_share_no_memory_and_each_tensor_is_copied_once() -> None:
    x = torch.arange(3.0)
    packed = pack_sequence([x, x[:2]])
    copies, known = own_copies(({"x": x, "again": x, "more": [1, "a", packed]}, Pair(x)))
    held, sequence = copies["more"][2], packed.data.clone()
    x.zero_()
    packed.data.zero_()
    assert copies["x"] is copies["again"] is known.x
    assert copies["x"].tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(held.data, sequence)
    assert copies["more"][:2] == [1, "a"]


class Ring:
    """A loader that fills the same memory with each batch."""

    def __init__(self) -> None:
        self.tensors = regression_data().tensors
        self.places = [torch.empty(4, tensor.shape[1]) for tensor in self.tensors]

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for batch in range(4):
            for place, tensor in zip(self.places, self.tensors, strict=True):
                place.copy_(tensor[4 * batch : 4 * batch + 4])
            yield tuple(self.places)


@pytest.mark.parametrize("hold", [False, True])
def test_batches_of_a_window_stay_when_the_loader_fills_their_memory_anew(hold: bool) -> None:
    losses = []
    for loader in (regression_loader(), Ring()):
        calls: list[NewtonCall] = []
        torch.manual_seed(0)
        make_trainer(4, callbacks=[forced(calls, hold=hold)]).fit(Fitting(), loader)
        losses.append([call.of_objective[0] for call in calls])
    assert losses[0] == losses[1] != []
