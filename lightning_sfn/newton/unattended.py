"""Lanczos steps that leave their numbers on the device.

What a step decides on (a product that is not finite, a vector that vanishes because the space is invariant, one that
orthogonalisation leaves little of) is rare. So steps are taken as if nothing of that kind came up, and the host looks
at all of their numbers once, at the end; where it hears earlier of something (see `Watch`), it ends there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.reductions import SAFE_NORMS
from lightning_sfn.newton.watch import Watch

__all__ = ["SECOND_PASS", "Steps", "is_invariant", "unattended_steps"]

SECOND_PASS = 0.707  # Daniel et al. (1976): a pass that removes this much of a vector has to be repeated


@dataclass(frozen=True)
class Steps:
    """What steps have found.

    Attributes:
        first: The basis vector from which the first step went on.
        diagonal: Diagonal elements of the projected operator, float64, on the CPU.
        couplings: Norms of what each product has outside the basis, likewise.
        sound: How many steps, from the first one on, need no second look.
        leftover: What the last product has outside the basis, shape ``(n,)``, not normalised.
    """

    first: int
    diagonal: Tensor
    couplings: Tensor
    sound: int
    leftover: Tensor

    def __len__(self) -> int:
        """Number of steps taken."""
        return len(self.diagonal)

    def fill(self, projected: Tensor, count: int) -> None:
        """Writes the numbers of the first steps into a projected operator, in place."""
        for step in range(count):
            j = self.first + step
            projected[j, j] = self.diagonal[step]
            if step + 1 < count:
                projected[j, j + 1] = projected[j + 1, j] = self.couplings[step]


def is_invariant(coupling: float, scale: float, dtype: torch.dtype) -> bool:
    """Whether a norm is rounding error alone, next to the largest number of the projected operator."""
    return coupling <= 4 * torch.finfo(dtype).eps * scale


def unattended_steps(
    matvec: Callable[[Tensor], Tensor],
    basis: Tensor,
    first: int,
    last: int,
    scale: float,
    coupling: float,
    store: BasisStore,
    recent: list[Tensor],
) -> Steps:
    """Takes Lanczos steps from basis vectors ``first`` to ``last - 1``, each filling in the next row of the basis.

    Args:
        matvec: The symmetric operator on parts of vectors.
        basis: The basis, of which rows 0 to ``first`` are in use; row ``last`` is not written.
        first: The basis vector to go on from.
        last: The number of steps is ``last - first``, unless something comes up.
        scale: The largest number of the projected operator so far.
        coupling: The coupling of basis vector ``first`` with the one before it.
        store: How the basis is kept.
        recent: Basis vector ``first`` in full precision, then the one before it if there is one.

    Returns:
        What they have found.
    """
    device, dtype = recent[0].device, recent[0].dtype
    watch = Watch(last - first, device, deaf=store.processes is not None)
    leftover = torch.empty_like(recent[0])
    before = recent[1] if len(recent) > 1 else None
    vector, numbers = recent[0], []
    largest, weight = (torch.full((), value, dtype=torch.float64, device=device) for value in (scale, coupling))
    for j in range(first, last):
        image = matvec(vector)
        diagonal = store.inner(image, vector)
        torch.addcmul(image, vector, diagonal.neg().to(dtype), out=leftover)
        if before is not None:
            leftover.addcmul_(before, weight.neg().to(dtype))
        inside = store.project(basis[: j + 1], leftover)
        store.subtract(leftover, inside, basis[: j + 1])
        weight = store.length(leftover)
        # The rows are orthonormal, so what was removed and what is left make up the vector before the pass.
        share = weight.square() / (weight.square() + inside.square().sum())
        largest = torch.maximum(torch.maximum(largest, diagonal.abs()), weight)
        vanished = weight <= 4 * torch.finfo(dtype).eps * largest
        strange = vanished | ~(share > SECOND_PASS**2) | ~diagonal.isfinite()
        strange |= ~((weight > SAFE_NORMS[0]) & (weight < SAFE_NORMS[1]))
        numbers.append(torch.stack([diagonal, weight, strange.to(torch.float64)]))
        watch.post(strange)
        if j + 1 == last or watch.raised():
            break
        before, vector = vector, store.keep_divided(basis, j + 1, leftover, weight)
    diagonals, couplings, flags = torch.stack(numbers).cpu().unbind(1)
    found = [step for step, flag in enumerate(flags.tolist()) if flag or math.isnan(flag)]
    sound = store.agreed(found[0] if found else len(flags))
    return Steps(first, diagonals, couplings, int(sound), leftover)
