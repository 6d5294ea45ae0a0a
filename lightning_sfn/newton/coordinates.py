"""Which preconditioner: by name, or by what the model allows."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.kronecker import KroneckerFactors
from lightning_sfn.newton.kronecker_estimate import FactorsError, NoRoomForFactors
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.preconditioner import DiagonalPreconditioner, IdentityPreconditioner, Preconditioner

__all__ = ["AutoPreconditioner", "make_preconditioner"]


class AutoPreconditioner(Preconditioner):
    """Kronecker factors where they can be had and pay, else equilibration.

    They are not had as long as they are zero, as where the outputs of a layer do not depend on its weights yet; where
    the loss cannot be evaluated while it is watched; and where more than half of the parameters that the loss depends
    on belong to no layer with a rule. They do not pay where they are wide and estimated from few rows of data: those
    are diagonal.

    Args:
        factors: The factors.
        diagonal: The equilibration.
    """

    def __init__(self, factors: KroneckerFactors | None = None, diagonal: DiagonalPreconditioner | None = None) -> None:
        self.factors = factors or KroneckerFactors(min_rows=1.0, min_coverage=0.5)
        self.diagonal = diagonal or DiagonalPreconditioner()
        self._has_room = True

    @property
    def in_use(self) -> Preconditioner:
        """The coordinates of the present step."""
        return self.factors if self.factors.is_known else self.diagonal

    @property
    def name(self) -> str:
        """The name of the coordinates that are in use."""
        return self.in_use.name

    def refresh(
        self,
        operator: CurvatureOperator,
        generator: torch.Generator,
        bent: bool = True,
        whole: Objective | None = None,
    ) -> None:
        """Estimates the factors anew, every few steps; where there are none, equilibrates."""
        if self._has_room:
            try:
                self.factors.renew(operator, generator, bent, whole)
            except NoRoomForFactors as error:
                self.factors.reset()
                self._has_room = False
                warnings.warn(f"{error}. Equilibration is used from now on.", stacklevel=2)
            except FactorsError:
                pass  # those of an earlier step stay in use, or the diagonal is
        if self.in_use is self.diagonal:
            self.diagonal.refresh(operator, generator, bent, whole)

    def reset(self) -> None:
        """Forgets everything: the parameters are others now."""
        self.factors.reset()
        self.diagonal.reset()
        self._has_room = True

    @property
    def unfactored(self) -> tuple[str, ...]:
        """Names of parameters that are scaled by one number, for want of a rule."""
        return self.in_use.unfactored

    def default_krylov_dim(self, bent: bool) -> int:
        """As the coordinates that are in use have it."""
        return self.in_use.default_krylov_dim(bent)

    def scale(self, vectors: Tensor) -> Tensor:
        """``D v``."""
        return self.in_use.scale(vectors)

    def unscale(self, vectors: Tensor) -> Tensor:
        """``D^-1 v``."""
        return self.in_use.unscale(vectors)

    def precondition(self, vectors: Tensor) -> Tensor:
        """``D^2 v``."""
        return self.in_use.precondition(vectors)

    def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
        """How much of each step may be taken."""
        return self.in_use.shares(steps, straight=straight)

    def feedback(self, *, accepted: bool, store: BasisStore) -> None:
        """Tells the coordinates that are in use whether their step was taken."""
        self.in_use.feedback(accepted=accepted, store=store)

    def on_parts(self, store: BasisStore, size: int) -> Preconditioner:
        """The map that is in use for vectors of which each process keeps a part."""
        return self.in_use.on_parts(store, size)

    def state_dict(self) -> dict[str, Any]:
        """The state of both, and whether there is room for factors."""
        own = {"factors": self.factors.state_dict(), "diagonal": self.diagonal.state_dict()}
        return own | {"has_room": self._has_room}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.factors.load_state_dict(state["factors"])
        self.diagonal.load_state_dict(state["diagonal"])
        self._has_room = state["has_room"]


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
    if not isinstance(preconditioner, str) or preconditioner not in _NAMED:
        names = ", ".join(repr(name) for name in _NAMED)
        raise ValueError(f"preconditioner is {preconditioner!r}, but None, {names} or a Preconditioner is expected.")
    return _NAMED[preconditioner]()


_NAMED: dict[str, type[Preconditioner]] = {
    "auto": AutoPreconditioner,
    "diagonal": DiagonalPreconditioner,
    "kronecker": KroneckerFactors,
}
