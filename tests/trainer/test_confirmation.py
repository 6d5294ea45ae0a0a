"""Steps that the parts of a window let through, and the next epoch refutes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from .modules import Fitting, NewtonCall, forced, make_trainer


class Uneven(Fitting):
    """A parabola in one number, whose curvature is almost all in one of twenty batches."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1, bias=False))
        torch.nn.init.ones_(self.net.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (batch * self.net.weight.square().sum() / 2).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss


@pytest.mark.parametrize("hold", [False, True])
def test_the_loss_of_an_epoch_takes_back_a_step_that_parts_let_through(hold: bool) -> None:
    """Wherever the steep batch is in neither part, the step is five times too long."""
    curvatures = torch.tensor([1.0] * 19 + [81.0])
    calls: list[NewtonCall] = []
    plain = {"damping": 1e-9, "inner_steps": 1, "preconditioner": None, "exploration": 0.0, "krylov_dim": 1}
    callback = forced(calls, plain, switch_at_epoch=1, hold=hold, adaptive=False)
    trainer = make_trainer(3 if hold else 9, callbacks=[callback])
    trainer.fit(Uneven(), DataLoader(curvatures, batch_size=1, shuffle=True))
    records = [call.record for call in calls if call.record is not None]
    refuted = sum(record.taken_back for record in records)
    assert refuted > 0
    assert all(after.loss_before <= before.loss_before * 1.0001 for before, after in pairwise(records))
    assert callback.report is not None
    assert callback.report.phases[-1].taken == sum(record.accepted for record in records) - refuted
