"""Exact curvature of small networks: the whole matrix and all of its eigenvectors (Section 7.1 of the paper)."""

import torch
from torch import Tensor

from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.krylov import KrylovSubspace
from lightning_sfn.newton.preconditioner import IdentityPreconditioner, Preconditioner

__all__ = ["dense_matrix", "full_space"]


def dense_matrix(operator: CurvatureOperator, preconditioner: Preconditioner | None = None) -> Tensor:
    """The operator as a matrix, many columns at a time where the operator can do that.

    Args:
        operator: The curvature.
        preconditioner: A map D; the matrix is then ``D H D``.

    Returns:
        A symmetric float64 matrix of shape ``(n, n)`` on the CPU.
    """
    d = preconditioner or IdentityPreconditioner()
    size = operator.parameters.size
    matrix = torch.empty(size, size, dtype=torch.float64, device="cpu")
    batch, processes = operator.batch, operator.objective.processes
    if processes is not None:  # other graphs would ask for another number of collectives
        batch = min(processes.collect(batch))
    for start in range(0, size, batch):
        rows = torch.arange(start, min(start + batch, size), device="cpu")
        units = torch.zeros(len(rows), size, dtype=operator.parameters.dtype, device=operator.parameters.device)
        units[torch.arange(len(rows), device="cpu"), rows] = 1.0
        products = operator.matmat(torch.stack([d.scale(unit) for unit in units]))
        matrix[rows] = torch.stack([d.scale(product) for product in products]).double().cpu()
    return matrix.add_(matrix.T.clone()).div_(2)


def full_space(operator: CurvatureOperator, preconditioner: Preconditioner | None = None) -> KrylovSubspace:
    """The whole parameter space as a subspace, in the basis of the parameters themselves.

    Args:
        operator: The curvature.
        preconditioner: A map D between the space's coordinates and the parameters.

    Returns:
        A subspace of dimension n: every step that it gives is exact. It takes ``O(n^2)`` memory and ``O(n^3)`` time.
    """
    parameters = operator.parameters
    identity = torch.eye(parameters.size, dtype=parameters.dtype, device=parameters.device)
    matrix = dense_matrix(operator, preconditioner)
    return KrylovSubspace(identity, matrix, coupling=0.0, lanczos_dim=parameters.size, products=parameters.size)
