"""How far a window has come in its epoch, and whether that is a whole window, half of one, or too little for a step."""

import math

from pytorch_lightning import Trainer

from lightning_sfn.trainer.budgets import DataBudgets

__all__ = ["Extent"]


class Extent:
    """Counts the batches of a window, whatever becomes of them, and compares with what the epoch has.

    Args:
        trainer: The Trainer.
        budgets: How many batches a window shall have.

    Attributes:
        offered: Batches since the last window, those without a loss among them.
    """

    def __init__(self, trainer: Trainer, budgets: DataBudgets) -> None:
        self._trainer, self._budgets = trainer, budgets
        self.offered = 0
        self._epoch_is_over = False

    def begin(self) -> None:
        """A window begins."""
        self.offered, self._epoch_is_over = 0, False

    def note_epoch_end(self) -> None:
        """A hook has ended the epoch, perhaps unannounced: the window that waits gets no more batches."""
        self._epoch_is_over = True

    @property
    def accumulated(self) -> int:
        """Batches that Lightning accumulates for a gradient."""
        return int(self._trainer.accumulate_grad_batches)

    @property
    def is_complete(self) -> bool:
        """Whether the window has got its last batch."""
        loop = self._trainer.fit_loop.epoch_loop
        rest = self._trainer.num_training_batches - (loop.batch_idx + 1 - self.offered)
        return loop.batch_progress.is_last_batch or self.offered >= self._budgets.target(rest, self.accumulated)

    @property
    def is_whole(self) -> bool:
        """Whether a window that is complete holds what it shall: the first one may begin inside an epoch."""
        return self._budgets.is_whole(self.offered, self._epoch(), self.accumulated)

    def is_enough(self, count: int) -> bool:
        """Whether so many batches are half of a window."""
        return self._budgets.is_enough(count, self._epoch(), self.accumulated)

    def _epoch(self) -> float:
        """Batches of the epoch: as it ends what it had, else what is announced, which may be too many or infinite."""
        loop, announced = self._trainer.fit_loop.epoch_loop, self._trainer.num_training_batches
        seen, limit = loop.batch_idx + 1, self._trainer.max_steps
        is_cut = self._trainer.should_stop or (limit is not None and 0 <= limit <= self._trainer.global_step)
        if not (loop.batch_progress.is_last_batch or (self._epoch_is_over and not is_cut)):
            return announced
        return seen if math.isfinite(announced) else self._budgets.shared(seen, self.accumulated)
