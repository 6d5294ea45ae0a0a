"""Recording: every `training_step` that Lightning runs, as it was called, so that it can be replayed."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning_utilities.core.apply_func import is_dataclass_instance
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.trainer.own_writes import noting_writes

__all__ = [
    "RecordedStep",
    "StepRecorder",
    "loss_of",
    "own_containers",
    "own_copies",
    "step_arguments",
    "training_batch",
]


@dataclass(frozen=True)
class RecordedStep:
    """One call of `training_step` as Lightning made it.

    Attributes:
        args: Its positional arguments (batch, batch index, ...), as copies of their own (`own_copies`).
        kwargs: Its keyword arguments.
        random_state: State of the random number generators just before the call.
        loss: The loss that it returned, detached; ``None`` if it returned none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    loss: Tensor | None


def training_batch(trainer: Trainer, module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """What Lightning makes of a loader's batch before training sees it: its dtype and device, and what hooks change."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def step_arguments(trainer: Trainer, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning would call `training_step` with: the batch, and its index if the step takes one."""
    return tuple(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values())


class StepRecorder:
    """Notes every `training_step` that Lightning runs, at the one place where its arguments and random state are exact.

    Args:
        trainer: The Trainer whose strategy calls `training_step`.
        device: The module's device, whose generator is part of the random state.
    """

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self._trainer, self._strategy = trainer, trainer.strategy
        self._device = device
        self._recorded: list[RecordedStep] = []
        self._active = True
        self._original: Callable[..., Any] = self._strategy.training_step
        # An attribute of the instance, in front of the class' method.
        self._strategy.__dict__["training_step"] = self._record

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._original(*args, **kwargs)
        state = RandomState.capture(self._device)
        kept_args, kept_kwargs = own_copies((args, kwargs))
        with noting_writes(self._trainer):
            output = self._original(*args, **kwargs)
        loss = loss_of(output)
        self._recorded.append(RecordedStep(kept_args, kept_kwargs, state, None if loss is None else loss.detach()))
        return output

    def take(self) -> list[RecordedStep]:
        """The steps recorded since the last call."""
        taken, self._recorded = self._recorded, []
        return taken

    def detach(self) -> None:
        """Stops recording."""
        self._active = False
        self._recorded = []
        if self._strategy.__dict__.get("training_step") != self._record:
            return  # somebody has put a wrapper around ours, which now only passes on
        if getattr(self._original, "__func__", None) is type(self._strategy).training_step:
            del self._strategy.__dict__["training_step"]
        else:
            self._strategy.__dict__["training_step"] = self._original


def own_containers(value: Any) -> Any:
    """The value with its lists, tuples and dictionaries copied: a step may take its batch apart."""
    return tree_map(lambda leaf: leaf, value)


def own_copies(value: Any) -> Any:
    """The value with its tensors copied too, each once: a loader may fill the memory of one batch with the next.

    Packed sequences and dataclasses are copied with what they hold; objects of other classes are kept as they are.
    """
    copies: dict[int, Tensor] = {}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in copies:
                copies[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            return copies[id(leaf)]
        if isinstance(leaf, PackedSequence):
            return type(leaf)(*map(own, leaf))
        if is_dataclass_instance(leaf) and not isinstance(leaf, Mapping):
            twin = copy(leaf)
            for field in fields(leaf):
                if hasattr(leaf, field.name):
                    object.__setattr__(twin, field.name, tree_map(own, getattr(leaf, field.name)))  # also if frozen
            return twin
        return leaf

    return tree_map(own, value)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned: a tensor, a mapping with ``"loss"``, or nothing."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    return output if isinstance(output, Tensor) else None
