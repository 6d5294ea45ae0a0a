"""Preconditioners by name."""

from lightning_sfn.newton.kronecker import KroneckerFactors
from lightning_sfn.newton.preconditioner import DiagonalPreconditioner, IdentityPreconditioner, Preconditioner

__all__ = ["make_preconditioner"]


def make_preconditioner(preconditioner: str | Preconditioner | None) -> Preconditioner:
    """Makes a preconditioner from what users write.

    Args:
        preconditioner: ``None``, ``"diagonal"``, ``"kronecker"``, or a preconditioner.

    Returns:
        The preconditioner.

    Raises:
        ValueError: There is none of that name.
    """
    if preconditioner is None:
        return IdentityPreconditioner()
    if isinstance(preconditioner, Preconditioner):
        return preconditioner
    if preconditioner == "diagonal":
        return DiagonalPreconditioner()
    if preconditioner == "kronecker":
        return KroneckerFactors()
    raise ValueError(
        f"preconditioner is {preconditioner!r}, but None, 'diagonal', 'kronecker' or a Preconditioner is expected."
    )
