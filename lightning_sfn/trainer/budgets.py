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

    def windows(self, of: float) -> int:
        """Over how many windows an epoch of so many batches is shared out; it must have an end."""
        return 1 if self.gradient_batches == "epoch" else math.ceil(of / self.gradient_batches)

    def ends(self, begin: int, end: int, of: float) -> bool:
        """Whether a window is complete.

        Args:
            begin: Batches of the epoch before it.
            end: Batches of the epoch so far.
            of: Batches of the epoch; infinite where nobody knows.
        """
        if math.isinf(of):
            return self.gradient_batches != "epoch" and end - begin >= self.gradient_batches
        return end * self.windows(of) // of > begin * self.windows(of) // of

    def is_whole(self, begin: int, end: int, of: float) -> bool:
        """Whether a window that has ended is one of those that an epoch is shared out over; arguments as in `ends`."""
        if math.isinf(of):
            return begin == 0 if self.gradient_batches == "epoch" else end - begin >= self.gradient_batches
        return (begin == 0 or self.ends(begin - 1, begin, of)) and self.ends(end - 1, end, of)

    def is_enough(self, begin: int, end: int, of: float) -> bool:
        """Whether a window has half of the batches of a whole one, as far as that is known; arguments as in `ends`."""
        if math.isinf(of):
            return self.gradient_batches == "epoch" or 2 * (end - begin) >= self.gradient_batches
        return 2 * (end - begin) * self.windows(of) >= of

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
