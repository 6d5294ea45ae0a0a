"""What loggers and ``trainer.callback_metrics`` are told about Newton steps."""

import math

from pytorch_lightning import LightningModule, Trainer

from lightning_sfn.newton.step import StepRecord

__all__ = ["StepLog", "log_metrics", "log_step"]

_LOGGED = ("loss_before", "loss_after", "damping", "step_norm", "lambda_min", "lambda_max", "accepted", "products")


class StepLog:
    """Keeps the record of a step, which is taken where nothing may be logged, until a hook that may comes along."""

    def __init__(self) -> None:
        self._waiting: StepRecord | None = None

    def note(self, record: StepRecord) -> None:
        """Keeps a record."""
        self._waiting = record

    def flush(self, trainer: Trainer, module: LightningModule) -> None:
        """Logs the record that waits, if one does; the module must be in a hook that may."""
        record, self._waiting = self._waiting, None
        if record is not None:
            log_step(trainer, module, record)


def log_step(trainer: Trainer, module: LightningModule, record: StepRecord, prefix: str = "sfn") -> None:
    """Logs a Newton step as ``sfn/loss_before`` and so on: at its step to loggers, as the epoch's mean to callbacks.

    Args:
        trainer: The Trainer.
        module: The module that logs; it must be in a hook that may.
        record: The step.
        prefix: What the names begin with.
    """
    if trainer.barebones:
        return
    known = {f"{prefix}/{name}": float(getattr(record, name)) for name in _LOGGED}
    metrics = {name: value for name, value in known.items() if not math.isnan(value)}  # momentum knows no curvature
    log_metrics(trainer, metrics)
    module.log_dict(metrics, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=True)


def log_metrics(trainer: Trainer, metrics: dict[str, float], step: int | None = None) -> None:
    """Writes numbers to all loggers, with the epoch beside them, as Lightning does.

    Args:
        trainer: The Trainer.
        metrics: The numbers.
        step: Where they stand on the loggers' time axis; the present step if left out.
    """
    loop = trainer.fit_loop
    # Not `current_epoch`, which has gone past the last epoch when training ends.
    row = metrics | {"epoch": loop.epoch_progress.current.ready - 1}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=loop.epoch_loop._batches_that_stepped if step is None else step)
