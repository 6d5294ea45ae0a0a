"""Dot products, norms and projections that stay accurate for vectors of many millions of float32 numbers.

A plain float32 reduction of a flat parameter vector loses three to four digits at ten million entries, and that loss,
not Lanczos itself, is what limits the orthogonality of a Krylov basis. Here products are formed in the vector's own
dtype over short chunks, and the chunks are added in float64. The cost is that of the plain reduction.
"""

import torch
from torch import Tensor

__all__ = ["SAFE_NORMS", "combine", "dot", "norm", "plain_norm", "project", "project_rows", "subtract", "subtract_rows"]

_CHUNK = 4096  # float32 rounding inside one chunk stays below 1e-6; float64 takes over between chunks
SAFE_NORMS = (1e-15, 1e18)  # norms whose squares float32 holds with room to spare
_DOT = 65_536  # BLAS adds up in many lanes and blocks, so that chunks may be longer than those of one running sum
_ROWS = 4096  # chunks at a time, since a device converts whole tensors to another dtype before it adds up
_SLAB = 16_384  # columns of one matrix-vector product: large enough for BLAS, short enough for float32


def _chunk_sums(values: Tensor) -> Tensor:
    """Adds up chunks of a 1-D tensor in its own dtype and returns the float64 sum of those partial sums."""
    whole = values.numel() // _CHUNK * _CHUNK
    total = values[whole:].double().sum()
    if whole:
        total = total + values[:whole].view(-1, _CHUNK).sum(dim=1).double().sum()
    return total


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two flat vectors, accumulated in float64.

    Args:
        x: Vector of shape ``(n,)``.
        y: Vector of shape ``(n,)``, same dtype and device.

    Returns:
        A float64 scalar tensor on the vectors' device.
    """
    if x.device.type == "cpu":  # no vector of products to write: a third of the time
        return (
            torch.stack([torch.dot(*parts) for parts in zip(torch.split(x, _DOT), torch.split(y, _DOT), strict=True)])
            .double()
            .sum()
        )
    return _chunk_sums(x * y)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of a flat vector, accumulated in float64.

    Entries whose squares leave the range of float32 still count.

    Args:
        x: Vector of shape ``(n,)``.

    Returns:
        A float64 scalar tensor on the vector's device.
    """
    if x.device.type != "cpu":
        return plain_norm(x, torch.float64)  # to look at the result, the host would have to wait for it
    total = plain_norm(x)
    if SAFE_NORMS[0] < float(total) < SAFE_NORMS[1]:
        return total
    return plain_norm(x, torch.float64)  # squares of single precision left its range: rare, and ten times slower


def plain_norm(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norm of a flat vector, accumulated in float64, without a look at the result (which takes a wait).

    Right if the result lies within `SAFE_NORMS`.

    Args:
        x: Vector of shape ``(n,)``.
        dtype: In which squares are taken; the vector's own if left out.

    Returns:
        A float64 scalar tensor on the vector's device.
    """
    whole = x.numel() // _CHUNK * _CHUNK
    rest: Tensor = torch.linalg.vector_norm(x[whole:].double())
    if not whole:
        return rest
    some = torch.split(x[:whole].view(-1, _CHUNK), _ROWS)
    chunks = [torch.linalg.vector_norm(rows, dim=1, dtype=dtype or x.dtype).double() for rows in some]
    total: Tensor = torch.linalg.vector_norm(torch.cat([*chunks, rest.reshape(1)]))
    return total


def project(basis: Tensor, vector: Tensor) -> Tensor:
    """Coordinates ``V w`` of a vector in a basis whose rows are the basis vectors, accumulated in float64.

    Args:
        basis: Matrix ``V`` of shape ``(k, n)``.
        vector: Vector ``w`` of shape ``(n,)``.

    Returns:
        A float64 tensor of shape ``(k,)`` on the basis' device.
    """
    size = vector.numel()
    if basis.dtype == torch.float64 or size <= _SLAB:
        return torch.mv(basis, vector).double()
    total = torch.zeros(basis.shape[0], dtype=torch.float64, device=basis.device)
    for start in range(0, size, _SLAB):
        total += torch.mv(basis[:, start : start + _SLAB], vector[start : start + _SLAB])
    return total


def combine(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Linear combinations ``C V`` of basis vectors.

    The sum runs over the k basis vectors only, so the basis' own dtype is accurate enough.

    Args:
        coefficients: Tensor of shape ``(k,)`` or ``(c, k)``, any floating dtype.
        basis: Matrix of shape ``(k, n)``.

    Returns:
        Tensor of shape ``(n,)`` or ``(c, n)`` in the basis' dtype.
    """
    return coefficients.to(device=basis.device, dtype=basis.dtype) @ basis


def subtract(vector: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """Subtracts a linear combination of basis vectors from a vector, in place.

    Args:
        vector: Shape ``(n,)``.
        coefficients: Shape ``(k,)``, any floating dtype.
        basis: Matrix of shape ``(k, n)``, dtype and device of the vector.
    """
    weights = coefficients.to(device=basis.device, dtype=basis.dtype)
    vector.addmv_(basis.t(), weights, alpha=-1)


def project_rows(basis: Tensor, vectors: Tensor) -> Tensor:
    """Coordinates of several vectors in a basis, accumulated in float64; the basis is read once.

    Args:
        basis: Matrix of shape ``(k, n)``.
        vectors: Shape ``(c, n)``, a few.

    Returns:
        A float64 tensor of shape ``(c, k)`` on the basis' device.
    """
    size = vectors.shape[1]
    if basis.dtype == torch.float64 or size <= _SLAB:
        return (vectors @ basis.t()).double()
    total = torch.zeros(len(vectors), len(basis), dtype=torch.float64, device=basis.device)
    for start in range(0, size, _SLAB):
        columns = slice(start, start + _SLAB)
        total += vectors[:, columns] @ basis[:, columns].t()
    return total


def subtract_rows(vectors: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """Subtracts linear combinations of basis vectors from several vectors, in place; the basis is read once.

    Args:
        vectors: Shape ``(c, n)``, a few.
        coefficients: Shape ``(c, k)``, any floating dtype.
        basis: Matrix of shape ``(k, n)``, dtype and device of the vectors.
    """
    weights = coefficients.to(device=basis.device, dtype=basis.dtype)
    for start in range(0, vectors.shape[1], _SLAB):
        columns = slice(start, start + _SLAB)
        vectors[:, columns].addmm_(weights, basis[:, columns], alpha=-1)
