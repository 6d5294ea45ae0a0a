from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_sfn.trainer.recording import StepRecorder, loss_of

from .modules import Fitting, make_trainer, regression_loader


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
