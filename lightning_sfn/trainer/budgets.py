"""Data budgets: how much of a window's data each ingredient of a Newton step sees, and what each batch counts."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_sfn.trainer.checks import require_choice, require_count, require_share

__all__ = ["DataBudgets", "Reduction"]

Reduction = Literal["mean", "samples"]
"""How batches of several processes are averaged: each process counts alike (as in DDP), or each case."""

_FEWEST = 4  # batches of a part: with fewer, one odd batch decides about a step


@dataclass(frozen=True)
class DataBudgets:
    """How much data each ingredient of a step sees.

    Attributes:
        gradient_batches: Loader batches that the gradient is accumulated over before an update at most, or ``"epoch"``.
            A window never crosses the end of an epoch: an epoch is shared out evenly over as few windows as that takes.
        curvature_fraction: Share of the window's batches that Hessian-vector products see, at least four batches.
        trial_fraction: Share of the window's batches that trial losses see, at least four; others than those of the
            curvature as far as possible.
        adaptive: Whether both shares double after a step that was rejected, misjudged, or lowered the loss by less than
            a ten-thousandth, and halve (down to the values above) after any other.
        hold: Whether the first whole window is kept, and every later loader batch brings one step on it ("everything,
            held": for data that fits into memory several times over).
        reduction: ``"mean"`` is the mean over processes and accumulated batches of their means, as in Lightning;
            ``"samples"`` the mean over all cases. The two differ where batches do in size; then ``"samples"`` costs one
            more gradient, since Lightning's is that of the other objective.

    Raises:
        MisconfigurationException: A value is out of range.
    """

    gradient_batches: int | Literal["epoch"] = "epoch"
    curvature_fraction: float = 0.1
    trial_fraction: float = 0.1
    adaptive: bool = True
    hold: bool = False
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        require_count("gradient_batches", self.gradient_batches, otherwise=["epoch"])
        require_share("curvature_fraction", self.curvature_fraction)
        require_share("trial_fraction", self.trial_fraction)
        require_choice("reduction", self.reduction, get_args(Reduction))

    @property
    def largest_growth(self) -> float:
        """Growth at which both parts are the whole window."""
        return 1 / min(self.curvature_fraction, self.trial_fraction)

    def windows(self, batches: int, accumulated: int = 1) -> int:
        """Over how many windows so many batches of an epoch are shared out evenly.

        Args:
            batches: Batches, one at least.
            accumulated: Batches that Lightning accumulates for a gradient, which stay together.
        """
        if self.gradient_batches == "epoch":
            return 1
        return math.ceil(batches / self._most(accumulated))

    def target(self, rest: float, accumulated: int = 1) -> float:
        """How many batches a window takes.

        Args:
            rest: Batches of the epoch from its first one on; infinite where nobody knows.
            accumulated: As for `windows`.
        """
        if math.isinf(rest):
            return math.inf if self.gradient_batches == "epoch" else self._most(accumulated)
        return math.ceil(rest / self.windows(max(int(rest), 1), accumulated))

    def is_enough(self, count: int, epoch: float, accumulated: int = 1) -> bool:
        """Whether so many batches are half of a window of a whole epoch, as far as its length is known.

        The last accumulation of an epoch may be short, and counts as a full one.

        Args:
            count: Batches.
            epoch: Batches of the epoch; infinite where nobody knows.
            accumulated: As for `windows`.
        """
        if math.isinf(epoch):
            return self.gradient_batches == "epoch" or 2 * count >= self._most(accumulated)
        return 2 * (count + accumulated - 1) * self.windows(int(epoch), accumulated) >= epoch

    def is_whole(self, count: int, epoch: float, accumulated: int = 1) -> bool:
        """Whether so many batches are a window of a whole epoch; arguments as in `is_enough`."""
        if math.isinf(epoch):
            return self.gradient_batches != "epoch" and count >= self._most(accumulated)
        return count > epoch // self.windows(int(epoch), accumulated) - accumulated

    def shared(self, batches: int, accumulated: int = 1) -> int:
        """Of an epoch whose length nobody knew, so many batches at most count as shared out; they filled windows."""
        return batches if self.gradient_batches == "epoch" else min(batches, self._most(accumulated))

    def _most(self, accumulated: int) -> int:
        """Batches of a window at most: as many whole accumulations as fit, but one at least."""
        assert self.gradient_batches != "epoch"
        return max(self.gradient_batches - self.gradient_batches % accumulated, accumulated)

    def choose(self, count: int, growth: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Draws the batches of the curvature and of the trial losses.

        Args:
            count: Number of batches in the window.
            growth: Factor on both shares.
            generator: Source of the draw.

        Returns:
            Indices for the curvature, and indices for the trial losses.
        """
        order = torch.randperm(count, generator=generator).tolist()
        sizes = (
            min(count, max(_FEWEST, round(share * growth * count)))
            for share in (self.curvature_fraction, self.trial_fraction)
        )
        return sorted(order[: next(sizes)]), sorted(order[::-1][: next(sizes)])
