"""Which loop of the Trainer logs a metric."""

from typing import Any

from pytorch_lightning import Trainer

__all__ = ["is_of_training", "is_of_validation"]


def is_of_training(trainer: Trainer, name: str) -> bool:
    """Whether training has logged a metric in this epoch: it sees the parameters as they were at each batch."""
    return _holds(trainer.fit_loop.epoch_loop._results, name)


def is_of_validation(trainer: Trainer, name: str) -> bool:
    """Whether the last validation has logged a metric."""
    return _holds(trainer.fit_loop.epoch_loop.val_loop._results, name.partition("/dataloader_idx_")[0])


def _holds(results: Any, name: str) -> bool:
    logged = {metric.meta.name for metric in results.values()}
    return name in logged or name.removesuffix("_epoch") in logged or name.removesuffix("_step") in logged
