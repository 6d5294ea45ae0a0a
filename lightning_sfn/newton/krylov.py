"""The Krylov subspace: Lanczos vectors, remembered directions, and the Hessian projected onto them.

Algorithm 2 of the paper with one addition: after the three-term recurrence each new vector is orthogonalised once more
against the whole basis. Without that the basis fills with copies of the dominant eigenvector long before 64 vectors.
With it the tridiagonal matrix of the recurrence equals ``V H V'`` to rounding, so the products ``H v`` are not stored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_sfn.newton.basis import WHOLE, BasisStore
from lightning_sfn.newton.reductions import dot, norm
from lightning_sfn.newton.unattended import SECOND_PASS, Steps, is_invariant, unattended_steps

__all__ = ["Counted", "Direction", "KrylovSubspace", "append", "fill_basis", "lanczos", "lanczos_step", "random_unit"]

_ROUNDING = 10  # units of rounding of the largest eigenvalue that products and projections are off by
_NEW_INFORMATION = 0.05  # an added direction with less than this outside the basis would be mostly rounding error
_ORTHOGONAL = 1e-8  # cosine between a direction and its product below which rounding decides about the curvature


@dataclass(frozen=True)
class Direction:
    """A direction that joins a subspace.

    Attributes:
        vector: Shape ``(n,)``; this process' part of it where the basis is sharded.
        product: Its product with the operator, likewise, if it is known already (a secant).
    """

    vector: Tensor
    product: Tensor | None = None

    @cached_property
    def positive_curvature(self) -> float:
        """``d^T (H d)`` by the known product; 0 where there is none, or none that is positive beyond rounding."""
        if self.product is None:
            return 0.0
        curvature = float(dot(self.vector, self.product))
        return curvature if curvature > _ORTHOGONAL * float(norm(self.vector)) * float(norm(self.product)) else 0.0


@dataclass(frozen=True)
class KrylovSubspace:
    """An orthonormal basis together with the operator projected onto it.

    Attributes:
        basis: Rows are the basis vectors as ``store`` keeps them, shape ``(k, n)``; the Lanczos vectors come first.
        projected: The operator in this basis, float64, shape ``(k, k)``, on the CPU.
        coupling: Norm of what the operator sends from the last Lanczos vector out of the Lanczos space; 0 if that space
            is invariant.
        lanczos_dim: How many of the basis vectors are Lanczos vectors.
        products: Operator products spent on the subspace.
        store: How the basis is kept.
        size: Length n of a whole vector; that of the rows if ``None``.
        decomposition: Eigenvalues and eigenvectors of ``projected``, where they are known already.
        reached: Which parameters the gradient or a product has reached, shape ``(n,)``; ``None`` for all.
    """

    basis: Tensor
    projected: Tensor
    coupling: float
    lanczos_dim: int
    products: int
    store: BasisStore = WHOLE
    size: int | None = None
    decomposition: tuple[Tensor, Tensor] | None = None
    reached: Tensor | None = None

    def __len__(self) -> int:
        """Dimension of the subspace."""
        return self.projected.shape[0]

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        if self.decomposition is not None:
            return self.decomposition
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
        return torch.hypot(leak, torch.tensor(self.rounding, dtype=torch.float64, device="cpu"))

    @property
    def rounding(self) -> float:
        """The part of every residual that is rounding in the basis' dtype: no more vectors make it smaller."""
        return _ROUNDING * torch.finfo(self.basis.dtype).eps * float(self.eigenvalues.abs().max())

    def of_products(self) -> "KrylovSubspace":
        """The Lanczos vectors alone: products of added directions may be secants, which hold between two points."""
        if self.lanczos_dim == len(self):
            return self
        own = slice(self.lanczos_dim)
        eigen = torch.linalg.eigh(self.projected[own, own])
        agreed = self.store.agreed_eigen(*eigen) if self.store.is_shared_out else eigen  # parts must fit together
        return replace(self, basis=self.basis[own], projected=self.projected[own, own], decomposition=agreed)

    def coordinates(self, vector: Tensor) -> Tensor:
        """Coordinates of a whole vector along the Ritz vectors, float64, shape ``(k,)``, on the CPU."""
        return self.eigenvectors.T @ self.store.project(self.basis, self.store.local(vector)).cpu()

    def lift(self, coordinates: Tensor) -> Tensor:
        """Whole vectors with the given coordinates along the Ritz vectors.

        Args:
            coordinates: Shape ``(k,)`` or ``(c, k)``.

        Returns:
            Shape ``(n,)`` or ``(c, n)``: one matrix product whatever c is.
        """
        parts = self.store.combine(coordinates @ self.eigenvectors.T, self.basis)
        return self.store.whole(parts, self.size or self.basis.shape[1])

    def ritz_vector(self, index: int) -> Tensor:
        """The whole unit Ritz vector that belongs to ``eigenvalues[index]``, shape ``(n,)``."""
        return self.lift(torch.eye(len(self), dtype=torch.float64, device="cpu")[index])


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    start: Tensor,
    krylov_dim: int,
    *,
    generator: torch.Generator,
    directions: Sequence[Direction] = (),
    store: BasisStore = WHOLE,
) -> KrylovSubspace:
    """Builds a Krylov subspace from a start vector, and adds directions to it.

    Where the Krylov space of the start vector is exhausted early (an invariant subspace), Lanczos goes on from a random
    vector orthogonal to it, so that what the start vector cannot see is found nevertheless. A product that is not
    finite ends it with a projected operator of NaN.

    Args:
        matvec: The symmetric operator, ``(n,) -> (n,)``; where the basis is sharded it gives this process' part.
        start: Start vector of shape ``(n,)``, usually the gradient; a zero vector is replaced by a random one.
        krylov_dim: Number of Lanczos vectors; at most n are built.
        generator: Source of random vectors, on the start vector's device.
        directions: Directions to add after the Lanczos vectors (Algorithm 2: the past update). One without a product
            costs an operator product. One that lies in the space already is left out.
        store: How the basis is kept; whole, like the start vector, if left out.

    Returns:
        The subspace.
    """
    size = start.numel()
    steps = min(krylov_dim, size)
    basis = store.empty(min(steps + len(directions), size), start)
    projected = torch.zeros(len(basis), len(basis), dtype=torch.float64, device="cpu")
    length = float(norm(start))
    first = store.local(start / length) if length > 0 else random_unit(basis[:0], generator, store, start)
    counted = Counted(lambda part: matvec(store.whole(part, size)))
    recent = [store.keep(basis, 0, first)]
    finite, leftover, coupling = fill_basis(counted, basis, projected, steps, recent, generator, store, start)
    if finite < steps:
        nothing = torch.full((steps, steps), math.nan, dtype=torch.float64, device="cpu")
        return KrylovSubspace(basis[:steps], nothing, 0.0, steps, counted.calls, store, size)
    space = _Extension(basis, projected, steps, leftover, store)
    for direction in directions:
        space.add(direction, counted)
    space.fill()
    used = space.used
    return KrylovSubspace(basis[:used], projected[:used, :used].clone(), coupling, steps, counted.calls, store, size)


class Counted:
    """An operator that counts its products."""

    def __init__(self, matvec: Callable[[Tensor], Tensor]) -> None:
        self._matvec = matvec
        self.calls = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape ``(n,)``."""
        self.calls += 1
        return self._matvec(vector)


def fill_basis(
    matvec: Callable[[Tensor], Tensor],
    basis: Tensor,
    projected: Tensor,
    steps: int,
    recent: list[Tensor],
    generator: torch.Generator,
    store: BasisStore = WHOLE,
    like: Tensor | None = None,
    first: int = 0,
) -> tuple[int, Tensor, float]:
    """Takes Lanczos steps from a row of a basis until it has ``steps`` rows.

    The steps leave their numbers on the device; the host looks at them once, if nothing comes up at any step (see
    `unattended_steps`). After one at which something does, it looks again after 1, 2, 4, ... steps: what is taken
    beyond a step like that before the host hears of it is lost, and now that is no more than what was gained before.

    Args:
        matvec: The symmetric operator on parts of vectors.
        basis: The basis, of which rows 0 to ``first`` are in use; filled in place. Where ``first`` is not 0, row
            ``steps`` is scratch.
        projected: The projected operator; filled in place.
        steps: How many rows there will be, each with its diagonal element.
        recent: Row ``first`` in full precision, and the one before it if it has one.
        generator: Source of random vectors.
        store: How the basis is kept; whole if left out.
        like: A whole vector, where the basis holds parts.
        first: The row to go on from, coupled with the one before it alone.

    Returns:
        The number of rows, fewer than wanted where the next product was not finite; what the last product has outside
        the basis, shape ``(n,)``; and the norm of that (see `lanczos_step`).
    """
    j, leftover, calm, stretch = first, recent[0], True, steps - first
    coupling = float(projected[first - 1, first]) if first else 0.0
    while j < steps:
        scale = float(projected[: j + 1, : j + 1].abs().max())
        last = min(j + stretch, steps)
        found = unattended_steps(
            matvec, basis, j, last, scale, coupling, store, recent, by_twos=calm, scratch=first > 0
        )
        calm = False  # from where something has come up, step by step
        stretch = 2 * stretch if found.sound == len(found) else 1
        count = min(found.sound + 1, len(found))
        before, (leftover, coupling) = coupling, _settled(found, count, matvec, basis, projected, store)
        j += count
        if math.isnan(coupling):
            return j - 1, leftover, float(found.couplings[count - 2]) if count > 1 else before
        if j < steps:
            new = append(basis, projected, j, leftover, coupling, generator, store, like)
            recent = [new, basis[j - 1].to(new)]
    return steps, leftover, coupling


def _settled(
    found: Steps, count: int, matvec: Callable[[Tensor], Tensor], basis: Tensor, projected: Tensor, store: BasisStore
) -> tuple[Tensor, float]:
    """Takes over sound steps and the one after them, with a second look at that.

    Returns:
        The leftover of the last of these steps, and its norm; NaN where the product was not finite.
    """
    found.fill(projected, count)
    last = found.first + count - 1
    leftover, coupling = found.leftover, float(found.couplings[count - 1])
    if found.sound == len(found):
        return leftover, coupling
    if not math.isfinite(float(found.diagonal[count - 1])):
        if count < len(found):
            matvec(store.working(basis[last]))  # again, so that the first bad product is the last one
        return leftover, math.nan
    # Heard of too late, the steps since went on from a bad vector; in time by chance, it is done again all the same, so
    # that the outcome is the same bit for bit. What began at a vector that was mostly error is not mended by a pass.
    if count < len(found) or found.by_chance or found.from_impure:
        return lanczos_step(matvec, basis, projected, last, store)
    leftover, coupling = _orthogonalise(leftover, basis[: last + 1], store)
    return leftover, _unless_rounding(coupling, projected, last, leftover.dtype)


def _unless_rounding(coupling: float, projected: Tensor, j: int, dtype: torch.dtype) -> float:
    """The coupling behind basis vector j, or 0 where it is rounding error alone."""
    scale = max(float(projected[: j + 1, : j + 1].abs().max()), coupling)
    return 0.0 if is_invariant(coupling, scale, dtype) else coupling


def lanczos_step(
    matvec: Callable[[Tensor], Tensor],
    basis: Tensor,
    projected: Tensor,
    j: int,
    store: BasisStore = WHOLE,
) -> tuple[Tensor, float]:
    """One Lanczos step from basis vector j; fills in its diagonal element of the projected operator.

    Args:
        matvec: The symmetric operator.
        basis: The basis, shape ``(capacity, n)``, of which rows 0 to j are in use.
        projected: The projected operator, in which column j above the diagonal is known already.
        j: The basis vector to go on from.
        store: How the basis is kept; whole if left out.

    Returns:
        What its product has outside the basis, shape ``(n,)``, and the norm of that; the norm is 0 where it is rounding
        error alone, because the basis spans an invariant subspace.
    """
    vector = store.working(basis[j])
    image = matvec(vector)
    diagonal = store.dot(image, vector)
    leftover = torch.add(image, vector, alpha=-diagonal)
    above = projected[:j, j]
    coupled = above.nonzero().flatten()  # the vector before; after a restart all vectors that were kept
    if len(coupled) == 1:
        leftover.add_(store.working(basis[int(coupled)]), alpha=-float(above[coupled]))
    elif len(coupled):
        leftover -= store.combine(above, basis[:j])
    leftover, coupling = _orthogonalise(leftover, basis[: j + 1], store)
    projected[j, j] = diagonal
    return leftover, _unless_rounding(coupling, projected, j, vector.dtype)


def append(
    basis: Tensor,
    projected: Tensor,
    j: int,
    leftover: Tensor,
    coupling: float,
    generator: torch.Generator,
    store: BasisStore = WHOLE,
    like: Tensor | None = None,
) -> Tensor:
    """Makes the outcome of a Lanczos step the next basis vector, in place.

    Args:
        basis: The basis, of which rows 0 to j - 1 are in use.
        projected: The projected operator.
        j: Place of the new vector.
        leftover: What the last product had outside the basis.
        coupling: Its norm; where it is 0 a random vector takes its place.
        generator: Source of random vectors.
        store: How the basis is kept; whole if left out.
        like: A whole vector, where the basis holds parts.

    Returns:
        The new vector in full precision.
    """
    vector = leftover / coupling if coupling > 0 else random_unit(basis[:j], generator, store, like)
    projected[j - 1, j] = projected[j, j - 1] = coupling
    return store.keep(basis, j, vector)


class _Extension:
    """Adds directions to a Lanczos basis, in place; `fill` ends it.

    For the Lanczos vectors ``H V' = V' T + r e_k'`` with ``r`` the leftover of the last step, so a direction's
    component inside the basis needs no product of its own, and a secant can be orthogonalised along with its direction.
    """

    def __init__(self, basis: Tensor, projected: Tensor, steps: int, leftover: Tensor, store: BasisStore) -> None:
        self.basis, self.projected, self.steps, self.leftover, self.store = basis, projected, steps, leftover, store
        self.used = steps
        self.images: list[Tensor] = []  # H e of each added basis vector e
        self._columns: list[Tensor] = []  # of the projected operator, on the vectors' device
        self._tridiagonal = projected[:steps, :steps].to(leftover.device)

    def add(self, direction: Direction, matvec: Callable[[Tensor], Tensor]) -> None:
        """Orthogonalises one direction against the basis and appends it with its row of the projected operator."""
        store, basis = self.store, self.basis[: self.used]
        inside = store.project(basis, direction.vector)
        residue = direction.vector - store.combine(inside, basis)
        correction = store.project(basis, residue)
        residue, inside = residue - store.combine(correction, basis), inside + correction
        outside, length = store.agreed(*store.norms(residue, direction.vector), reduced=True)
        if not outside > _NEW_INFORMATION * length:  # NaN joins nothing
            return
        new = self.used
        vector = store.keep(self.basis, new, residue / outside)
        known = direction.product
        image = matvec(vector) if known is None else (known - self._image_of(inside)) / outside
        self._columns.append(store.project(self.basis[: new + 1], image))
        self.images.append(image)
        self.used += 1

    def fill(self) -> None:
        """Writes the added columns into the projected operator, all together: the host waits once for them."""
        if self._columns:
            lengths = range(self.steps + 1, self.used + 1)
            for column in torch.split(torch.cat(self._columns).cpu(), list(lengths)):
                last = len(column) - 1
                self.projected[: last + 1, last] = column
                self.projected[last, : last + 1] = column

    def _image_of(self, inside: Tensor) -> Tensor:
        """The operator's product with a vector given by its coordinates in the basis."""
        lanczos_part = inside[: self.steps]
        image = self.store.combine(self._tridiagonal @ lanczos_part, self.basis[: self.steps])
        image += lanczos_part[-1].to(image.dtype) * self.leftover
        for coefficient, added in zip(inside[self.steps :], self.images, strict=True):
            image += coefficient.to(image.dtype) * added
        return image


def _orthogonalise(vector: Tensor, basis: Tensor, store: BasisStore) -> tuple[Tensor, float]:
    """Classical Gram-Schmidt, repeated while a pass removes much of the vector; returns it with its norm."""
    before = store.norm(vector)
    for _ in range(3):
        vector = vector - store.combine(store.project(basis, vector), basis)
        after = store.norm(vector)
        if after > SECOND_PASS * before:
            break
        before = after
    return vector, after


def random_unit(
    basis: Tensor, generator: torch.Generator, store: BasisStore = WHOLE, like: Tensor | None = None
) -> Tensor:
    """A random unit vector orthogonal to the rows of a basis.

    Args:
        basis: The rows, shape ``(k, n)``.
        generator: Source of random numbers, on the device of whole vectors.
        store: How the basis is kept; whole if left out.
        like: A whole vector, where the basis holds parts.
    """
    like = basis.new_empty(basis.shape[1]) if like is None else like
    vector = store.local(torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator))
    if len(basis):
        vector, _ = _orthogonalise(vector, basis, store)
    return vector / store.norm(vector)
