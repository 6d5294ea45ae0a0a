"""Random search (Bergstra and Bengio 2012): one seeded draw for each trial."""

from __future__ import annotations

import math

import torch

__all__ = ["draw_number"]


def draw_number(generator: torch.Generator, low: float, high: float, *, logarithmic: bool = False) -> float:
    """Draw a number.

    Args:
        generator: Where the randomness comes from.
        low: Lower end.
        high: Upper end.
        logarithmic: Whether its logarithm is uniform, rather than the number.

    Returns:
        The number.
    """
    share = float(torch.rand((), generator=generator, dtype=torch.float64))
    if logarithmic:
        return math.exp(math.log(low) + share * math.log(high / low))
    return low + share * (high - low)
