"""Spectral density by stochastic Lanczos quadrature: how many eigenvalues lie where, without computing them.

Golub and Welsch (1969) for the quadrature, Lin, Saad and Yang (2016), "Approximating spectral densities of large
matrices", for the method. Each random probe v gives a Gauss quadrature of the measure that puts ``(u_i'v)^2`` on each
eigenvalue; the mean over the probes is the density of the eigenvalues, and the scatter over them its statistical error.
How much of a probe's measure lies below a number is known but for the two nodes beside it: the inequalities of
Chebyshev, Markov and Stieltjes (Szego 1939, Section 3.41), which no number of probes makes any tighter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.krylov import lanczos

__all__ = ["SpectralDensity", "spectral_density"]


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of a symmetric matrix' eigenvalues, from random probes.

    Every quantity is a mean over the probes and comes with an error; with one probe its statistical part is NaN.

    Attributes:
        nodes: Quadrature nodes of each probe in ascending order, float64, shape ``(probes, k)``; 0 where rounding
            leaves the sign open.
        weights: Their weights, float64, shape ``(probes, k)``, adding up to 1 for each probe.
        size: Number of eigenvalues, n.
        products: Matrix-vector products spent.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def on(self, points: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The density, each node spread to a Gaussian.

        Args:
            points: Where to evaluate it, shape ``(p,)``.
            width: Standard deviation of the Gaussians, in units of the eigenvalues.

        Returns:
            Density and its standard error, float64, shape ``(p,)``; the density integrates to 1.
        """
        away = (points.double().view(1, -1, 1) - self.nodes.unsqueeze(1)) / width
        bells = torch.exp(-away.square() / 2) / (width * math.sqrt(2 * math.pi))
        return _mean_and_error((bells * self.weights.unsqueeze(1)).sum(-1))

    def below(self, bound: float) -> tuple[float, float]:
        """The share of the eigenvalues below a bound, and how far it may be off.

        That is by the standard error over probes, and for each probe by the weight of the larger one of the nodes next
        to the bound: of its part of the eigenvalues it is only known how many lie below the next node and above the one
        before. More Lanczos vectors make these weights smaller. Nodes at the bound itself count as found there.
        """
        is_below = self.nodes < bound
        share, scatter = _mean_and_error(torch.where(is_below, self.weights, 0.0).sum(1))
        count = is_below.sum(1, keepdim=True)
        last, following = (self._weight_at(count - 1), self._weight_at(count))
        at_bound = self._node_at(count) == bound
        open_weight = torch.maximum(last, torch.where(at_bound, 0.0, following)).mean()
        return float(share), float(scatter + open_weight)

    def _weight_at(self, index: Tensor) -> Tensor:
        """Weights of one node of each probe, 0 beyond the first and the last; shape ``(probes, 1)``."""
        inside = (index >= 0) & (index < self.nodes.shape[1])
        return torch.where(inside, self.weights.gather(1, index.clamp(0, self.nodes.shape[1] - 1)), 0.0)

    def _node_at(self, index: Tensor) -> Tensor:
        return self.nodes.gather(1, index.clamp_max(self.nodes.shape[1] - 1))

    @property
    def trace(self) -> tuple[float, float]:
        """The sum of the eigenvalues (Hutchinson's estimate), and its standard error."""
        trace, error = _mean_and_error(self.size * (self.nodes * self.weights).sum(1))
        return float(trace), float(error)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "size": self.size,
            "products": self.products,
        }

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> SpectralDensity:
        """The density that `to_dict` gave."""
        values = (entries[name] for name in ("nodes", "weights"))
        nodes, weights = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in values)
        return cls(nodes, weights, entries["size"], entries["products"])


def spectral_density(
    matvec: Callable[[Tensor], Tensor], like: Tensor, krylov_dim: int, probes: int, *, generator: torch.Generator
) -> SpectralDensity | None:
    """Estimates the spectral density of a symmetric operator.

    Args:
        matvec: The operator, ``(n,) -> (n,)``.
        like: A vector of shape ``(n,)`` whose dtype and device the probes take.
        krylov_dim: Quadrature nodes for each probe, each one product; at most n.
        probes: Number of random vectors (Rademacher).
        generator: Source of random vectors, on that device.

    Returns:
        The density; ``None`` where the operator returned numbers that are not finite.
    """
    nodes, weights, products = [], [], 0
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        space = lanczos(matvec, (2 * signs - 1).to(like.dtype), krylov_dim, generator=generator)
        if not bool(space.projected.isfinite().all()):
            return None
        exact_zeros = space.eigenvalues.abs() <= space.rounding  # of a rank-deficient matrix; their signs mean nothing
        nodes.append(space.eigenvalues.masked_fill(exact_zeros, 0.0))
        weights.append(space.eigenvectors[0].square())
        products += space.products
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), like.numel(), products)


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and its standard error (NaN for one sample)."""
    scatter = samples.std(0) if len(samples) > 1 else torch.full_like(samples[0], math.nan)
    return samples.mean(0), scatter / math.sqrt(len(samples))
