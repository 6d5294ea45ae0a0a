"""What a window holds: batches to be replayed, their weights, and the gradient that Lightning made of them."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sfn.trainer.kept_steps import pack_steps, unpack_steps
from lightning_sfn.trainer.recording import RecordedStep

__all__ = ["BatchWeights", "Batches", "cases_of"]


class BatchWeights(NamedTuple):
    """Weights of a few batches.

    Attributes:
        own: Of each batch, in cases.
        totals: Sum of each over all processes.
        mean: Mean number of cases in a batch, over all processes; NaN if one of them saw a number that is not finite.
        even: Whether the plain mean of the batches is the mean over their cases.
    """

    own: list[float]
    totals: list[float]
    mean: float
    even: bool


@dataclass
class Batches:
    """The batches of one window, collected since the last step.

    Attributes:
        steps: The batches, each as a step that can be replayed.
        weights: Weight of each, in cases.
        totals: Sum of each of these weights over all processes.
        gradient: Sum over the batches of weight times gradient, shape ``(n,)``; ``None`` before the first.
        loss: Likewise of the losses.
        even: Whether this gradient, of Lightning's making, is that of the objective.
    """

    steps: list[RecordedStep] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    gradient: Tensor | None = None
    loss: float = 0.0
    even: bool = True

    def collect(self, steps: Sequence[RecordedStep], weights: BatchWeights) -> None:
        """Adds batches."""
        self.steps.extend(steps)
        self.weights.extend(weights.own)
        self.totals.extend(weights.totals)
        self.even &= weights.even

    def add(self, steps: Sequence[RecordedStep], weights: BatchWeights, loss: float, gradient: Tensor) -> None:
        """Adds batches with their mean loss and gradient.

        Args:
            steps: The batches.
            weights: Their weights.
            loss: Mean of their losses.
            gradient: Mean of their gradients, shape ``(n,)``.
        """
        self.collect(steps, weights)
        cases = weights.mean * len(steps)
        self.gradient = gradient * cases if self.gradient is None else self.gradient.add_(gradient, alpha=cases)
        self.loss += loss * cases

    def state_dict(self) -> dict[str, Any] | None:
        """The window with its batches, for checkpoints; ``None`` if they are not plain data."""
        steps = pack_steps(self.steps)
        if steps is None:
            return None
        kept = {name: getattr(self, name) for name in ("weights", "totals", "gradient", "loss", "even")}
        return {"steps": steps, **kept}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Batches":
        """The window that `state_dict` gave.

        Args:
            state: What it gave.
            device: Where the batches and the gradient go.
        """
        gradient = state["gradient"]
        return cls(
            unpack_steps(state["steps"], device),
            list(state["weights"]),
            list(state["totals"]),
            None if gradient is None else gradient.to(device).clone(),
            state["loss"],
            state["even"],
        )


def cases_of(step: RecordedStep) -> float:
    """Number of cases in a recorded batch; 1 where Lightning cannot tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            size = extract_batch_size(step.args[0] if step.args else next(iter(step.kwargs.values())))
        except (MisconfigurationException, StopIteration):
            return 1.0
    return float(size) if math.isfinite(size) and size > 0 else 1.0
