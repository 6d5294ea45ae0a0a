"""Which optimizer trains, the module's own or Newton's in its place, and what becomes of learning rate schedulers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.trainer.messages import say
from lightning_sfn.trainer.support import require_curvature

__all__ = [
    "Handover",
    "OptimizerFactory",
    "SchedulerRule",
    "coupled_decay",
    "make_newton",
    "note_rates",
    "resting_groups",
    "take_clipping",
]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimizer from parameter groups: `SaddleFreeNewton` itself, or a `functools.partial` of it."""

SchedulerRule = Literal["rest", "step"]
"""What schedulers of the first optimizer do while Newton's trains: rest, or go on stepping the resting optimizer."""

_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))

_FIRST_RATES: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()
"""Of each optimizer, the learning rates of its groups when the fit started."""


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
            What became of parameter groups, weight decay and schedulers, as sentences to append; empty if there is
            nothing to say.
        """
        strategy = self._trainer.strategy
        resting = sum(resting_groups(self.base))
        groups = f" {resting} parameter group(s) with learning rate 0 stay as they are." if resting else ""
        groups += _about_decay(self.base)
        self._configs = list(strategy.lr_scheduler_configs)
        # The setter rebuilds Lightning's wrappers; changing the list in place would leave the old optimizer stepping.
        strategy.optimizers = [newton]
        if not self._configs:
            return groups
        if self._rule == "step":
            return f"{groups} {len(self._configs)} learning rate scheduler(s) go on stepping the resting optimizer."
        # An interval that never comes, so that Lightning steps none of them; `self.lr_schedulers()` reads its list.
        self._resting = [replace(config, interval="rest") for config in self._configs]
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
        self._take_over_groups()
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
        """Writes the first optimizer and its schedulers into Lightning's places, where any Trainer finds them."""
        if "optimizer_states" in checkpoint:
            self._take_over_groups()
            checkpoint["optimizer_states"] = [self.base.state_dict()]
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in self._configs]

    def _take_over_groups(self) -> None:
        """Gives the first optimizer the layers that a finetuning callback has freed meanwhile."""
        known = {id(p) for group in self.base.param_groups for p in group["params"]}
        for group in self._trainer.strategy.optimizers[0].param_groups:
            added = [p for p in group["params"] if id(p) not in known]
            if added:
                self.base.add_param_group({"params": added})


def make_newton(make: OptimizerFactory, base: Optimizer, who: str) -> SaddleFreeNewton:
    """Makes the Newton optimizer over another one's parameters, with as many groups.

    Groups that are not meant to train (`resting_groups`) are empty. The other entries of the groups (momentum, names)
    come along for code that reads them.

    Args:
        make: Makes it.
        base: The optimizer whose place it takes.
        who: Name of what asks, for the message.

    Returns:
        The Newton optimizer.

    Raises:
        MisconfigurationException: It cannot be made, or it is no `SaddleFreeNewton` that can work here; or the other
            optimizer maximizes.
    """
    if any(group.get("maximize") for group in base.param_groups):
        raise MisconfigurationException(
            f"{who} got an optimizer with maximize=True, but saddle-free Newton minimizes what training_step returns: "
            "return the negated loss, and leave maximize out."
        )
    try:
        newton = make(
            [
                {"params": [] if rests else group["params"]}
                for group, rests in zip(base.param_groups, resting_groups(base), strict=True)
            ]
        )
    except (TypeError, ValueError) as error:  # Python's word for an option that there is not
        raise MisconfigurationException(f"{who} cannot make its optimizer: {str(error).rstrip('.')}.") from error
    if not isinstance(newton, SaddleFreeNewton):
        raise MisconfigurationException(
            f"{who} got an optimizer of class {type(newton).__name__}, but a SaddleFreeNewton is expected: "
            "pass functools.partial(SaddleFreeNewton, ...)."
        )
    require_curvature(newton.curvature, who)
    if newton.curvature != "hessian" and any(decay for _, decay in coupled_decay(base)):
        raise MisconfigurationException(
            f"{who} got curvature={newton.curvature!r} and an optimizer with weight decay, which is part of the "
            "objective but not a function of the model output: use curvature='hessian', or no weight decay."
        )
    _keep_entries(newton, base)
    return newton


def _keep_entries(newton: SaddleFreeNewton, base: Optimizer) -> None:
    """Copies what Newton's groups lack from the other optimizer's; it means nothing to a Newton step."""
    for name, value in base.defaults.items():  # for groups that are added later
        newton.defaults.setdefault(name, value)
    for group, other in zip(newton.param_groups, base.param_groups, strict=False):
        for name, value in other.items():
            group.setdefault(name, value)
        if _is_decoupled(base, group):
            group.setdefault("decoupled_weight_decay", True)  # which the class of Newton's does not tell
        if "param_names" in other:  # one for each parameter
            group["param_names"] = list(other["param_names"]) if group["params"] else []


def take_clipping(trainer: Trainer, newton: SaddleFreeNewton, who: str) -> None:
    """Lets an optimizer that has no bound of its own clip gradients as the Trainer does, or says that it cannot."""
    if not trainer.gradient_clip_val or newton.max_grad_norm is not None:
        return
    if trainer.gradient_clip_algorithm == "value":
        say(trainer, f"{who}: clipping by value does not apply to Newton steps; max_grad_norm would.")
    else:
        newton.max_grad_norm = float(trainer.gradient_clip_val)


def note_rates(trainer: Trainer) -> None:
    """Notes the learning rates of all parameter groups where a fit starts, for `resting_groups`."""
    for optimizer in trainer.optimizers:
        _FIRST_RATES[optimizer] = [_rate_of(group) for group in optimizer.param_groups]


def resting_groups(optimizer: Optimizer) -> list[bool]:
    """Whether each parameter group has had a learning rate of zero from the beginning, as one that shall not train.

    A rate that something has led to zero says nothing about what shall train, and nor does a zero for all groups,
    which a warm-up may begin with.
    """
    groups = optimizer.param_groups
    now = [_rate_of(group) for group in groups]
    first = _FIRST_RATES.get(optimizer, [])
    first = first[: len(now)] + now[len(first) :]  # groups come and go
    resting = [
        rate == 0.0 == begun == float(group.get("initial_lr", 0.0))  # which schedulers keep in the group
        for group, rate, begun in zip(groups, now, first, strict=True)
    ]
    alone = all(rest or not group["params"] for rest, group in zip(resting, groups, strict=True))
    return [False] * len(resting) if alone else resting


def _rate_of(group: dict[str, Any]) -> float:
    return float(group.get("lr", 1.0))


def coupled_decay(optimizer: Optimizer) -> list[tuple[Sequence[Tensor], float]]:
    """Pairs of parameters and weight decay that is part of the objective, by parameter group.

    That of AdamW, Adafactor and Muon is not: it shrinks weights beside the gradient step. Of other classes that do so,
    groups with ``decoupled_weight_decay`` are known.
    """
    return [
        (group["params"], 0.0 if _is_decoupled(optimizer, group) else _decay_of(group))
        for group in optimizer.param_groups
    ]


def _about_decay(optimizer: Optimizer) -> str:
    """That weight decay beside the gradient step is left out, as a sentence to append; empty if there is none."""
    trained = [
        group
        for group, rests in zip(optimizer.param_groups, resting_groups(optimizer), strict=True)
        if group["params"] and not rests
    ]
    decays = {_decay_of(group) for group in trained if _is_decoupled(optimizer, group)} - {0.0}
    if not decays:
        return ""
    values = ", ".join(f"{decay:g}" for decay in sorted(decays))
    return f" The weight decay of {type(optimizer).__name__} ({values}) rests: it is no part of the loss."


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or isinstance(optimizer, _DECOUPLED)


def _decay_of(group: dict[str, Any]) -> float:
    return float(group.get("weight_decay", 0.0))
