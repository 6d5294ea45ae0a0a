"""The Krylov subspace: Lanczos vectors, remembered directions, and the Hessian projected onto them.

Algorithm 2 of the paper with one addition: after the three-term recurrence each new vector is orthogonalised once more
against the whole basis. Without that the basis fills with copies of the dominant eigenvector long before 64 vectors.
With it the tridiagonal matrix of the recurrence equals ``V H V'`` to rounding, so the products ``H v`` are not stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_sfn.newton.reductions import combine, dot, norm, project

__all__ = ["Direction", "KrylovSubspace", "lanczos"]

_SECOND_PASS = 0.707  # Daniel et al. (1976): a pass that removes this much of a vector has to be repeated
_ROUNDING = 10  # units of rounding of the largest eigenvalue that products and projections are off by
_NEW_INFORMATION = 0.05  # an added direction with less than this outside the basis would be mostly rounding error


@dataclass(frozen=True)
class Direction:
    """A direction that joins a subspace.

    Attributes:
        vector: Shape ``(n,)``.
        product: Its product with the operator, shape ``(n,)``, if it is known already (a secant).
    """

    vector: Tensor
    product: Tensor | None = None


@dataclass(frozen=True)
class KrylovSubspace:
    """An orthonormal basis together with the operator projected onto it.

    Attributes:
        basis: Rows are the basis vectors, shape ``(k, n)``; the Lanczos vectors come first.
        projected: The operator in this basis, float64, shape ``(k, k)``, on the CPU.
        coupling: Norm of what the operator sends from the last Lanczos vector out of the Lanczos space; 0 if that space
            is invariant.
        lanczos_dim: How many of the basis vectors are Lanczos vectors.
        products: Operator products spent on the subspace.
    """

    basis: Tensor
    projected: Tensor
    coupling: float
    lanczos_dim: int
    products: int

    def __len__(self) -> int:
        """Dimension of the subspace."""
        return self.projected.shape[0]

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.projected)
        return values, vectors

    @property
    def eigenvalues(self) -> Tensor:
        """Ritz values in ascending order, float64, shape ``(k,)``."""
        return self._eigen[0]

    @property
    def eigenvectors(self) -> Tensor:
        """Eigenvectors of the projected operator as columns, float64, shape ``(k, k)``."""
        return self._eigen[1]

    @property
    def residuals(self) -> Tensor:
        """Residual norms ``|H y - theta y|`` of the Ritz pairs, float64, shape ``(k,)``.

        Each interval ``theta +- residual`` contains an eigenvalue; rounding in the basis' dtype is part of it.
        For a subspace of Lanczos vectors alone; with added directions their own residuals are not part of it.
        """
        leak = self.coupling * self.eigenvectors[self.lanczos_dim - 1].abs()
        return torch.hypot(leak, torch.tensor(self.rounding, dtype=torch.float64))

    @property
    def rounding(self) -> float:
        """The part of every residual that is rounding in the basis' dtype: no more vectors make it smaller."""
        return _ROUNDING * torch.finfo(self.basis.dtype).eps * float(self.eigenvalues.abs().max())

    def coordinates(self, vector: Tensor) -> Tensor:
        """Coordinates of a vector along the Ritz vectors, float64, shape ``(k,)``, on the CPU."""
        return self.eigenvectors.T @ project(self.basis, vector).cpu()

    def lift(self, coordinates: Tensor) -> Tensor:
        """Vectors with the given coordinates along the Ritz vectors.

        Args:
            coordinates: Shape ``(k,)`` or ``(c, k)``.

        Returns:
            Shape ``(n,)`` or ``(c, n)``: one matrix product whatever c is.
        """
        return combine(coordinates @ self.eigenvectors.T, self.basis)

    def ritz_vector(self, index: int) -> Tensor:
        """The unit Ritz vector that belongs to ``eigenvalues[index]``, shape ``(n,)``."""
        return combine(self.eigenvectors[:, index], self.basis)


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    start: Tensor,
    krylov_dim: int,
    *,
    generator: torch.Generator,
    directions: Sequence[Direction] = (),
) -> KrylovSubspace:
    """Builds a Krylov subspace from a start vector, and adds directions to it.

    Where the Krylov space of the start vector is exhausted early (an invariant subspace), Lanczos goes on from a random
    vector orthogonal to it, so that what the start vector cannot see is found nevertheless.

    Args:
        matvec: The symmetric operator, ``(n,) -> (n,)``.
        start: Start vector of shape ``(n,)``, usually the gradient; a zero vector is replaced by a random one.
        krylov_dim: Number of Lanczos vectors; at most n are built.
        generator: Source of random vectors, on the start vector's device.
        directions: Directions to add after the Lanczos vectors (Algorithm 2: the past update). One without a product
            costs an operator product. One that lies in the space already is left out.

    Returns:
        The subspace.
    """
    size = start.numel()
    steps = min(krylov_dim, size)
    capacity = min(steps + len(directions), size)
    basis = torch.empty(capacity, size, dtype=start.dtype, device=start.device)
    projected = torch.zeros(capacity, capacity, dtype=torch.float64)
    length = float(norm(start))
    basis[0] = start / length if length > 0 else random_unit(basis[:0], generator)
    coupling, leftover = 0.0, start
    for j in range(steps):
        leftover, coupling = lanczos_step(matvec, basis, projected, j)
        if j + 1 < steps:
            append(basis, projected, j + 1, leftover, coupling, generator)
    space = _Extension(basis, projected, steps, coupling, leftover)
    for direction in directions:
        space.add(direction, matvec)
    used = space.used
    products = steps + space.products
    return KrylovSubspace(basis[:used], projected[:used, :used].clone(), coupling, steps, products)


def lanczos_step(matvec: Callable[[Tensor], Tensor], basis: Tensor, projected: Tensor, j: int) -> tuple[Tensor, float]:
    """One Lanczos step from basis vector j; fills in its diagonal element of the projected operator.

    Args:
        matvec: The symmetric operator.
        basis: The basis, shape ``(capacity, n)``, of which rows 0 to j are in use.
        projected: The projected operator, in which column j above the diagonal is known already.
        j: The basis vector to go on from.

    Returns:
        What its product has outside the basis, shape ``(n,)``, and the norm of that; the norm is 0 where it is rounding
        error alone, because the basis spans an invariant subspace.
    """
    image = matvec(basis[j])
    diagonal = float(dot(image, basis[j]))
    leftover = torch.add(image, basis[j], alpha=-diagonal)
    above = projected[:j, j]
    coupled = above.nonzero().flatten()  # the vector before; after a restart all vectors that were kept
    if len(coupled) == 1:
        leftover.add_(basis[int(coupled)], alpha=-float(above[coupled]))
    elif len(coupled):
        leftover -= combine(above, basis[:j])
    leftover, coupling = _orthogonalise(leftover, basis[: j + 1])
    projected[j, j] = diagonal
    scale = max(float(projected[: j + 1, : j + 1].abs().max()), coupling)
    invariant = coupling <= 4 * torch.finfo(basis.dtype).eps * scale
    return leftover, 0.0 if invariant else coupling


def append(
    basis: Tensor, projected: Tensor, j: int, leftover: Tensor, coupling: float, generator: torch.Generator
) -> None:
    """Makes the outcome of a Lanczos step the next basis vector, in place.

    Args:
        basis: The basis, of which rows 0 to j - 1 are in use.
        projected: The projected operator.
        j: Place of the new vector.
        leftover: What the last product had outside the basis.
        coupling: Its norm; where it is 0 a random vector takes its place.
        generator: Source of random vectors.
    """
    basis[j] = leftover / coupling if coupling > 0 else random_unit(basis[:j], generator)
    projected[j - 1, j] = projected[j, j - 1] = coupling


class _Extension:
    """Adds directions to a Lanczos basis, in place.

    For the Lanczos vectors ``H V' = V' T + r e_k'`` with ``r`` the leftover of the last step, so a direction's
    component inside the basis needs no product of its own, and a secant can be orthogonalised along with its direction.
    """

    def __init__(self, basis: Tensor, projected: Tensor, steps: int, coupling: float, leftover: Tensor) -> None:
        self.basis, self.projected, self.steps = basis, projected, steps
        self.leftover = leftover if coupling > 0 else torch.zeros_like(leftover)
        self.used, self.products = steps, 0
        self.images: list[Tensor] = []  # H e of each added basis vector e

    def add(self, direction: Direction, matvec: Callable[[Tensor], Tensor]) -> None:
        """Orthogonalises one direction against the basis and appends it with its row of the projected operator."""
        length = float(norm(direction.vector))
        if length == 0.0 or self.used == self.basis.shape[0]:
            return
        inside = project(self.basis[: self.used], direction.vector)
        residue = direction.vector - combine(inside, self.basis[: self.used])
        correction = project(self.basis[: self.used], residue)
        residue, inside = residue - combine(correction, self.basis[: self.used]), inside + correction
        outside = float(norm(residue))
        if outside <= _NEW_INFORMATION * length:
            return
        new = self.used
        self.basis[new] = residue / outside
        if direction.product is None:
            image = matvec(self.basis[new])
            self.products += 1
        else:
            image = (direction.product - self._image_of(inside)) / outside
        column = project(self.basis[: new + 1], image).cpu()
        self.projected[: new + 1, new] = column
        self.projected[new, : new + 1] = column
        self.images.append(image)
        self.used += 1

    def _image_of(self, inside: Tensor) -> Tensor:
        """The operator's product with a vector given by its coordinates in the basis."""
        lanczos_part = inside[: self.steps]
        tridiagonal = self.projected[: self.steps, : self.steps].to(inside.device)
        image = combine(tridiagonal @ lanczos_part, self.basis[: self.steps])
        image += lanczos_part[-1].to(image.dtype) * self.leftover
        for coefficient, added in zip(inside[self.steps :], self.images, strict=True):
            image += coefficient.to(image.dtype) * added
        return image


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Classical Gram-Schmidt, repeated while a pass removes much of the vector; returns it with its norm."""
    before = float(norm(vector))
    for _ in range(3):
        vector = vector - combine(project(basis, vector), basis)
        after = float(norm(vector))
        if after > _SECOND_PASS * before:
            break
        before = after
    return vector, after


def random_unit(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of a basis."""
    vector = torch.randn(basis.shape[1], dtype=basis.dtype, device=basis.device, generator=generator)
    if len(basis):
        vector, _ = _orthogonalise(vector, basis)
    return vector / norm(vector).to(vector.dtype)
