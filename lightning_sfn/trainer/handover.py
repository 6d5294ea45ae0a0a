"""Which optimizer trains: the module's own or Newton's, and what becomes of its learning rate schedulers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pytorch_lightning import Trainer
from torch.optim.optimizer import Optimizer

from lightning_sfn.trainer.takeover import resting_groups

__all__ = ["Handover", "SchedulerRule", "at_rest"]

SchedulerRule = Literal["rest", "step"]
"""What schedulers of the first optimizer do while Newton's trains: rest, or go on stepping the resting optimizer."""


def at_rest(configs: Sequence[Any]) -> list[Any]:
    """Copies of scheduler configurations whose interval never comes, so that Lightning steps none of them.

    They stay in its list for ``self.lr_schedulers()``, which reads that.
    """
    return [replace(config, interval="rest") for config in configs]


class Handover:
    """The first optimizer of a run, and the hand-over to Newton's and back.

    Args:
        trainer: The Trainer, with the first optimizer in place.
        schedulers: What the schedulers do meanwhile.

    Attributes:
        base: The first optimizer. Its state is left alone while Newton's trains.
    """

    def __init__(self, trainer: Trainer, schedulers: SchedulerRule) -> None:
        self._trainer, self._rule = trainer, schedulers
        self.base: Optimizer = trainer.optimizers[0]
        self._configs: list[Any] = []
        self._resting: list[Any] = []

    def to(self, newton: Optimizer) -> str:
        """Puts another optimizer in the first one's place.

        Args:
            newton: The other one, over the same parameters.

        Returns:
            What became of parameter groups and schedulers, as sentences to append; empty if there is nothing to say.
        """
        strategy = self._trainer.strategy
        resting = sum(resting_groups(self.base))
        groups = f" {resting} parameter group(s) with learning rate 0 stay as they are." if resting else ""
        self._configs = list(strategy.lr_scheduler_configs)
        # The setter rebuilds Lightning's wrappers; changing the list in place would leave the old optimizer stepping.
        strategy.optimizers = [newton]
        if not self._configs:
            return groups
        if self._rule == "step":
            return f"{groups} {len(self._configs)} learning rate scheduler(s) go on stepping the resting optimizer."
        self._resting = at_rest(self._configs)
        strategy.lr_scheduler_configs = list(self._resting)  # weight averaging puts its own in the place of the first
        return f"{groups} {len(self._configs)} learning rate scheduler(s) rest from now on."

    def back(self, *, reset: bool) -> str:
        """Puts the first optimizer back, with its learning rates and schedulers.

        Args:
            reset: Whether its state (momentum) is dropped.

        Returns:
            What became of the schedulers, as a sentence to append; empty if there are none.
        """
        strategy = self._trainer.strategy
        known = {id(p) for group in self.base.param_groups for p in group["params"]}
        for group in strategy.optimizers[0].param_groups:  # a finetuning callback may have freed layers meanwhile
            added = [p for p in group["params"] if id(p) not in known]
            if added:
                self.base.add_param_group({"params": added})
        if reset:
            self.base.state.clear()
        resting = {id(config) for config in self._resting}
        others = sum(id(config) not in resting for config in strategy.lr_scheduler_configs)
        strategy.optimizers = [self.base]
        if self._rule == "rest":
            strategy.lr_scheduler_configs = self._configs
        if not self._configs:
            return ""
        dropped = f" ({others} that were set up meanwhile are dropped)" if others and self._rule == "rest" else ""
        return f" {len(self._configs)} learning rate scheduler(s) go on where they are{dropped}."

    def store(self, checkpoint: dict[str, Any]) -> None:
        """Writes the first optimizer and its schedulers into Lightning's places, where any Trainer finds them.

        Args:
            checkpoint: The checkpoint, while Newton's optimizer trains.
        """
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [self.base.state_dict()]
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in self._configs]
