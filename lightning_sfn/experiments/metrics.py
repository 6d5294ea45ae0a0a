"""What the paper reports, as torchmetrics: sums and counts that add up over batches and processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["BitsPerCharacter", "SquaredError"]


class _Mean(Metric):
    """A sum over a count, both added up over batches and processes; NaN where nothing was counted."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean, float32."""
        return (self.total / self.count).float()


class SquaredError(_Mean):
    """Squared error of reconstructions, summed over pixels and averaged over images: what the paper calls MSE."""

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Add a batch.

        Args:
            reconstructions: Shape (batch, pixels).
            images: The same shape.
        """
        self.total += (reconstructions - images).detach().square().sum(dtype=torch.float64)
        self.count += len(images)


class BitsPerCharacter(_Mean):
    """Cross-entropy of predicted characters in bits, averaged over characters."""

    def update(self, nats: Tensor, characters: int) -> None:
        """Add a batch.

        Args:
            nats: The batch's cross-entropy summed over its predicted characters, a scalar.
            characters: Their number.
        """
        self.total += nats.detach().double() / math.log(2)
        self.count += characters
