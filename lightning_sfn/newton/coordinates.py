"""Which preconditioner: by name, or by what the model allows."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.kronecker import KroneckerFactors
from lightning_sfn.newton.kronecker_estimate import FactorsError
from lightning_sfn.newton.preconditioner import DiagonalPreconditioner, IdentityPreconditioner, Preconditioner

__all__ = ["AutoPreconditioner", "make_preconditioner"]

_ENOUGH = 0.5  # share of the parameters that belong to layers with a rule, from which factors beat a diagonal


class AutoPreconditioner(Preconditioner):
    """Kronecker factors where they can be had, else equilibration.

    Equilibration steps in as long as the factors are zero or cannot be estimated (where the outputs of a layer do not
    depend on its weights yet, for instance), and for good where most of the parameters belong to no layer with a rule.

    Args:
        factors: The factors.
        diagonal: The equilibration.
    """

    def __init__(self, factors: KroneckerFactors | None = None, diagonal: DiagonalPreconditioner | None = None) -> None:
        """See the class."""
        self.factors = factors or KroneckerFactors()
        self.diagonal = diagonal or DiagonalPreconditioner()
        self._has_rules = True

    @property
    def present(self) -> Preconditioner:
        """The preconditioner that is in use."""
        return self.factors if self._has_rules and self.factors.is_known else self.diagonal

    def refresh(self, operator: CurvatureOperator, generator: torch.Generator) -> None:
        """Estimates the factors anew, every few steps; where there are none, equilibrates.

        Args:
            operator: The curvature of the coming step.
            generator: Source of random probes and of sampled targets.

        Raises:
            ProcessError: Another process failed.
        """
        if self._has_rules:
            with suppress(FactorsError):  # those of an earlier step stay in use, or the diagonal is
                self.factors.renew(operator, generator)
            self._has_rules = not self.factors.is_known or self.factors.coverage >= _ENOUGH
        if self.present is self.diagonal:
            self.diagonal.refresh(operator, generator)

    def reset(self) -> None:
        """Forgets everything: the parameters are others now."""
        self.factors.reset()
        self.diagonal.reset()
        self._has_rules = True

    @property
    def unfactored(self) -> tuple[str, ...]:
        """Names of parameters that are scaled by one number, for want of a rule."""
        return self.present.unfactored

    def default_krylov_dim(self, bent: bool) -> int:
        """As the present coordinates have it."""
        return self.present.default_krylov_dim(bent)

    def scale(self, vectors: Tensor) -> Tensor:
        """``D v``."""
        return self.present.scale(vectors)

    def unscale(self, vectors: Tensor) -> Tensor:
        """``D^-1 v``."""
        return self.present.unscale(vectors)

    def precondition(self, vectors: Tensor) -> Tensor:
        """``D^2 v``."""
        return self.present.precondition(vectors)

    def shares(self, steps: Tensor) -> Tensor:
        """How much of each step may be taken."""
        return self.present.shares(steps)

    def on_parts(self, store: BasisStore, size: int) -> Preconditioner:
        """The present map for vectors of which each process keeps a part."""
        return self.present.on_parts(store, size)

    def state_dict(self) -> dict[str, Any]:
        """The state of both, and whether the layers have rules."""
        own = {"factors": self.factors.state_dict(), "diagonal": self.diagonal.state_dict()}
        return own | {"has_rules": self._has_rules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.factors.load_state_dict(state["factors"])
        self.diagonal.load_state_dict(state["diagonal"])
        self._has_rules = state["has_rules"]


def make_preconditioner(preconditioner: str | Preconditioner | None) -> Preconditioner:
    """Makes a preconditioner from what users write.

    Args:
        preconditioner: ``None``, ``"auto"``, ``"diagonal"``, ``"kronecker"``, or a preconditioner.

    Returns:
        The preconditioner.

    Raises:
        ValueError: There is none of that name.
    """
    if preconditioner is None:
        return IdentityPreconditioner()
    if isinstance(preconditioner, Preconditioner):
        return preconditioner
    if preconditioner not in _NAMED:
        names = ", ".join(repr(name) for name in _NAMED)
        raise ValueError(f"preconditioner is {preconditioner!r}, but None, {names} or a Preconditioner is expected.")
    return _NAMED[preconditioner]()


_NAMED: dict[str, type[Preconditioner]] = {
    "auto": AutoPreconditioner,
    "diagonal": DiagonalPreconditioner,
    "kronecker": KroneckerFactors,
}
