"""Intervals for a handful of seeds: Student's t for means, the bootstrap for rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

__all__ = ["Interval", "mean_interval", "rank_correlation"]

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the leading term of the expansion around the
# normal quantile is good to three digits.
_T: tuple[float, ...] = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Attributes:
        value: The estimate.
        low: Lower end; minus infinity where one number says nothing about its spread.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As ``value [low, high]``."""
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of a few numbers, with Student's 95% interval.

    Args:
        values: At least one number.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: There are no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("A mean needs at least one value, but none was given.")
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    freedom = count - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else 1.95996 + 2.3722 / freedom
    return Interval(mean, mean - quantile * spread, mean + quantile * spread)


def rank_correlation(x: Sequence[float], y: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Spearman's rank correlation, with the percentile bootstrap's 95% interval over pairs.

    Args:
        x: At least three numbers.
        y: As many.
        resamples: Bootstrap resamples.
        seed: Their seed.

    Returns:
        The correlation and its interval.

    Raises:
        ValueError: There are fewer than three pairs, or one side does not vary.
    """
    if len(x) != len(y) or len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError(
            f"A rank correlation needs three pairs that vary, but {len(x)} and {len(y)} values were given."
        )
    first, second = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (resamples, len(x)), generator=generator)
    draws = [_spearman(first[rows], second[rows]) for rows in chosen if _vary(first[rows]) and _vary(second[rows])]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(_spearman(first, second), float(low), float(high))


def _spearman(x: Tensor, y: Tensor) -> float:
    return float(spearman_corrcoef(x, y))


def _vary(values: Tensor) -> bool:
    return bool((values != values[0]).any())
