"""Both ends of a spectrum to a tolerance: Lanczos with thick restarts.

Wu and Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems". When the basis is full, the
Ritz vectors nearest to both ends are kept and Lanczos goes on from them, so that memory is bounded and the eigenvalues
asked for converge as long as there is a budget. As long as the basis has room this is `lanczos`, vector for vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfn.newton.krylov import Counted, KrylovSubspace, append, fill_basis, lanczos_step, random_unit
from lightning_sfn.newton.reductions import norm

__all__ = ["Ends", "RitzValues", "extreme_ritz_values"]

_SLAB = 65_536  # columns of the basis that are rotated at a time
_TOGETHER = 2  # steps between two looks at whether everything has converged; they share an orthogonalisation


@dataclass(frozen=True)
class Ends:
    """Which eigenvalues are asked for, and how well.

    Attributes:
        smallest: How many at the lower end.
        largest: How many at the upper end.
        tol: Bound on the residual of each, relative to the eigenvalue itself. An eigenvalue whose residual is down to
            rounding counts as converged as well.
    """

    smallest: int
    largest: int
    tol: float

    def converged(self, space: KrylovSubspace) -> bool:
        """Whether every eigenvalue that is asked for has met the tolerance."""
        count = len(space)
        if self.smallest + self.largest > count:
            return space.coupling == 0.0
        bounds = (self.tol * space.eigenvalues.abs()).clamp_min(1.5 * space.rounding)
        met = space.residuals <= bounds
        return bool(met[: self.smallest].all() and met[count - self.largest :].all())


@dataclass(frozen=True)
class RitzValues:
    """Ritz values with their error bounds.

    Attributes:
        values: In ascending order, float64, shape ``(k,)``.
        residuals: Within ``residuals[i]`` of ``values[i]`` there is an eigenvalue; float64, shape ``(k,)``.
        products: Products spent.
        converged: Whether every eigenvalue that was asked for has met its tolerance.
        rounding: By how much rounding may have moved a value.
    """

    values: Tensor
    residuals: Tensor
    products: int
    converged: bool
    rounding: float = 0.0

    @classmethod
    def none(cls, products: int = 0) -> "RitzValues":
        """No values, because there was nothing finite to compute them from."""
        nothing = torch.empty(0, dtype=torch.float64, device="cpu")
        return cls(nothing, nothing, products, converged=False)


def extreme_ritz_values(
    matvec: Callable[[Tensor], Tensor],
    start: Tensor,
    krylov_dim: int,
    ends: Ends,
    *,
    max_products: int,
    generator: torch.Generator,
) -> RitzValues:
    """Ritz values of a basis of ``krylov_dim`` vectors, of which both ends are refined by restarts until they converge.

    Restarts never raise one of the smallest nor lower one of the largest Ritz values, so the refined ends take the
    places of those of the first full basis, and the values between them stay what they were.

    Args:
        matvec: The symmetric operator, ``(n,) -> (n,)``.
        start: Start vector of shape ``(n,)``; a zero vector is replaced by a random one.
        krylov_dim: Most vectors that the basis may hold; at most n are used. A basis with no room for one vector more
            than the eigenvalues asked for is not restarted.
        ends: The eigenvalues asked for, and their tolerance.
        max_products: Most products that may be spent; those of the first basis count, and are spent in any case.
        generator: Source of random vectors, on the start vector's device.

    Returns:
        As many Ritz values as the first full basis has vectors; fewer, or those known before, where the operator
        returned numbers that are not finite.
    """
    capacity = min(krylov_dim, start.numel())
    basis = torch.empty(capacity, start.numel(), dtype=start.dtype, device=start.device)
    projected = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
    length = float(norm(start))
    basis[0] = start / length if length > 0 else random_unit(basis[:0], generator)
    counted = Counted(matvec)
    j, leftover, coupling = fill_basis(counted, basis, projected, capacity, [basis[0]], generator)
    first = space = KrylovSubspace(basis[:j], projected[:j, :j].clone(), coupling, j, counted.calls)
    finite = j == capacity
    while True:
        converged = finite and ends.converged(space)
        full = j == capacity
        stuck = full and capacity <= ends.smallest + ends.largest
        if converged or stuck or not finite or counted.calls >= max_products:
            return _combined(first, space, ends, counted.calls, converged)
        if full:
            j = _restart(space, projected, ends)
            basis[j] = leftover / coupling
            leftover, coupling = lanczos_step(counted, basis, projected, j)
            finite = math.isfinite(float(projected[j, j]) + coupling)
            rows = j + finite
        else:
            wanted = min(j + _TOGETHER, capacity, j + max_products - counted.calls)
            recent = [append(basis, projected, j, leftover, coupling, generator), basis[j - 1]]
            rows, leftover, coupling = fill_basis(counted, basis, projected, wanted, recent, generator, first=j)
            finite = rows == wanted
        if rows > j:  # else the last space stays: right after a restart the kept vectors alone are none
            j = rows
            space = KrylovSubspace(basis[:j], projected[:j, :j].clone(), coupling, j, counted.calls)


def _combined(first: KrylovSubspace, last: KrylovSubspace, ends: Ends, products: int, converged: bool) -> RitzValues:
    """The Ritz values of the first full basis with the ends of the last one."""
    if len(first) == 0:
        return RitzValues.none(products)
    refined = len(last) >= ends.smallest + ends.largest
    low, high = (ends.smallest, ends.largest) if refined else (0, 0)

    def merged(inner: Tensor, outer: Tensor) -> Tensor:
        return torch.cat([outer[:low], inner[low : len(inner) - high], outer[len(outer) - high :]])

    values = merged(first.eigenvalues, last.eigenvalues)
    return RitzValues(values, merged(first.residuals, last.residuals), products, converged, first.rounding)


def _restart(space: KrylovSubspace, projected: Tensor, ends: Ends) -> int:
    """Replaces a full basis by its Ritz vectors near both ends, in place; returns how many there are."""
    count = len(space)
    spare = count - ends.smallest - ends.largest
    low, high = ends.smallest + spare // 4, ends.largest + spare // 4
    kept = torch.cat([torch.arange(low, device="cpu"), torch.arange(count - high, count, device="cpu")])
    rotation = space.eigenvectors[:, kept].T.to(space.basis)
    for start in range(0, space.basis.shape[1], _SLAB):
        slab = space.basis[:, start : start + _SLAB]
        slab[: len(kept)] = rotation @ slab
    projected.zero_()
    projected.diagonal()[: len(kept)] = space.eigenvalues[kept]
    arrow = space.coupling * space.eigenvectors[-1, kept]  # H y = theta y + s v, with v the next basis vector
    projected[: len(kept), len(kept)] = projected[len(kept), : len(kept)] = arrow
    return len(kept)
