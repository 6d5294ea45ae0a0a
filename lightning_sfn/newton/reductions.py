"""Dot products, norms and projections that stay accurate for vectors of many millions of float32 numbers.

A plain float32 reduction of a flat parameter vector loses three to four digits at ten million entries, and that loss,
not Lanczos itself, is what limits the orthogonality of a Krylov basis. Here products are formed in the vector's own
dtype over short chunks, and the chunks are added in float64. The cost is that of the plain reduction.
"""

import torch
from torch import Tensor

__all__ = ["combine", "dot", "norm", "project"]

_CHUNK = 4096  # float32 rounding inside one chunk stays below 1e-6; float64 takes over between chunks
_SAFE = (1e-15, 1e18)  # norms whose squares float32 holds with room to spare
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
    return _chunk_sums(x * y)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of a flat vector, accumulated in float64.

    Entries whose squares leave the range of float32 still count.

    Args:
        x: Vector of shape ``(n,)``.

    Returns:
        A float64 scalar tensor on the vector's device.
    """
    whole = x.numel() // _CHUNK * _CHUNK
    rest: Tensor = torch.linalg.vector_norm(x[whole:].double())
    if not whole:
        return rest
    for dtype in (
        x.dtype,
        torch.float64,
    ):  # squares of single precision may leave its range: rare, and ten times slower
        chunks = torch.linalg.vector_norm(x[:whole].view(-1, _CHUNK), dim=1, dtype=dtype).double()
        total: Tensor = torch.linalg.vector_norm(torch.cat([chunks, rest.reshape(1)]))
        if _SAFE[0] < float(total) < _SAFE[1]:
            break
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
