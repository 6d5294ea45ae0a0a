"""Preconditioners: a symmetric map D between the subspace's coordinates u and the parameters, ``theta = D u``.

Lanczos then works with ``D H D`` from the start vector ``D g``, and a step in the subspace is ``D u``. A good D makes
the spectrum of ``D H D`` flat, so that a few Krylov vectors see most of it. `kronecker` holds the strongest of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.objective import Objective

__all__ = ["DiagonalPreconditioner", "IdentityPreconditioner", "Preconditioner"]


class Preconditioner(ABC):
    """A symmetric positive definite map D."""

    @property
    def name(self) -> str:
        """What a record of a step calls these coordinates."""
        return type(self).__name__

    def refresh(  # noqa: B027
        self,
        operator: CurvatureOperator,
        generator: torch.Generator,
        bent: bool = True,
        whole: Objective | None = None,
    ) -> None:
        """Brings the map up to date before a step.

        Args:
            operator: The curvature of the coming step.
            generator: Source of random probes, on the parameters' device.
            bent: As in `default_krylov_dim`; true before the first subspace.
            whole: What is minimized, where the operator sees a part of it.

        Raises:
            ProcessError: Another process failed.
        """

    def reset(self) -> None:  # noqa: B027
        """Forgets everything: the parameters are others now."""

    @property
    def unfactored(self) -> tuple[str, ...]:
        """Names of parameters that a map by layers scales by one number, for want of a rule."""
        return ()

    def default_krylov_dim(self, bent: bool) -> int:
        """Lanczos vectors that pay in these coordinates, where no number is asked for.

        Args:
            bent: Whether the last subspace showed negative curvature of at least a tenth of its largest curvature.
        """
        return 16

    @abstractmethod
    def scale(self, vectors: Tensor) -> Tensor:
        """``D v`` for vectors of shape ``(n,)`` or ``(c, n)``."""

    @abstractmethod
    def unscale(self, vectors: Tensor) -> Tensor:
        """``D^-1 v`` for vectors of shape ``(n,)`` or ``(c, n)``."""

    def precondition(self, vectors: Tensor) -> Tensor:
        """``D^2 v``: a gradient turned into a step of the length that the curvature suggests."""
        return self.scale(self.scale(vectors))

    def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
        """How much of each step may be taken; all of it unless a map knows better.

        Args:
            steps: Shape ``(c, n)``, in parameter units.
            straight: Whether steps keep their direction.

        Returns:
            Numbers above 0 and at most 1, shape ``(c, 1)``, or ``(c, n)`` where they differ between parameters; dtype
            and device of the steps.
        """
        return steps.new_ones(len(steps), 1)

    def feedback(self, *, accepted: bool, store: BasisStore) -> None:  # noqa: B027
        """Learns whether the step was taken that `shares` allowed.

        Args:
            accepted: Whether it lowered the loss.
            store: By which processes agree on numbers.
        """

    def on_parts(self, store: BasisStore, size: int) -> "Preconditioner":
        """The same map for vectors of which each process keeps a part.

        Args:
            store: How vectors are kept.
            size: Length of a whole vector.
        """
        return _OnParts(self, store, size)

    def state_dict(self) -> dict[str, Any]:
        """What the map carries from step to step, as tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes over what `state_dict` gave."""


class _OnParts(Preconditioner):
    """A map that needs whole vectors, applied to parts: each time they are put together and taken apart again."""

    def __init__(self, whole: Preconditioner, store: BasisStore, size: int) -> None:
        self._whole, self._store, self._size = whole, store, size

    def scale(self, vectors: Tensor) -> Tensor:
        return self._each(self._whole.scale, vectors)

    def unscale(self, vectors: Tensor) -> Tensor:
        return self._each(self._whole.unscale, vectors)

    def _each(self, function: Callable[[Tensor], Tensor], parts: Tensor) -> Tensor:
        """One vector at a time where they are shared out, so that no process holds several whole ones."""
        if parts.dim() > 1 and self._store.is_shared_out:
            return torch.stack([self._each(function, part) for part in parts])
        return self._store.local(function(self._store.whole(parts, self._size)))


class IdentityPreconditioner(Preconditioner):
    """The parameters' own coordinates."""

    name = "identity"

    def on_parts(self, store: BasisStore, size: int) -> Preconditioner:
        """The identity."""
        return self

    def scale(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors

    def unscale(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors


class DiagonalPreconditioner(Preconditioner):
    """Equilibration: ``D = (e + floor)^(-1/2)`` with ``e_i`` the norm of row i of the Hessian.

    The row norms are estimated as ``e_i^2 = E[(H z)_i^2]`` over standard normal z, one product a step, averaged over
    steps (Dauphin, de Vries and Bengio 2015, "Equilibrated adaptive learning rates for non-convex optimization"). They
    are defined for an indefinite Hessian, where diagonal entries may cancel to zero.

    Args:
        decay: Weight that the running average keeps at each refresh.
        floor: Added to the row norms, relative to their largest value.
    """

    name = "diagonal"

    def __init__(self, decay: float = 0.9, floor: float = 1e-2) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, but a number in [0, 1) is expected.")
        if floor <= 0:
            raise ValueError(f"floor is {floor}, but a positive number is expected.")
        self.decay, self.floor = decay, floor
        self._mean: Tensor | None = None
        self._refreshes = 0
        self._diagonal: Tensor | None = None

    def refresh(
        self,
        operator: CurvatureOperator,
        generator: torch.Generator,
        bent: bool = True,
        whole: Objective | None = None,
    ) -> None:
        """Draws one probe and averages it in."""
        parameters = operator.parameters
        if self._mean is None or self._mean.numel() != parameters.size:
            self._mean = torch.zeros(parameters.size, dtype=parameters.dtype, device=parameters.device)
            self._refreshes = 0
        probe = parameters.random(generator)
        square = operator.matvec(probe).square()
        if bool(torch.isfinite(square).all()):
            self._mean.mul_(self.decay).add_(square, alpha=1 - self.decay)
            self._refreshes += 1
        self._update()

    def reset(self) -> None:
        """Forgets the running average."""
        self._mean, self._refreshes, self._diagonal = None, 0, None

    def _update(self) -> None:
        if self._mean is None or self._refreshes == 0 or not bool(self._mean.any()):
            self._diagonal = None  # nothing known, or no curvature at all: the identity
            return
        rows = (self._mean / (1 - self.decay**self._refreshes)).sqrt()
        self._diagonal = (rows + self.floor * rows.max()).rsqrt()

    def scale(self, vectors: Tensor) -> Tensor:
        """``D v``."""
        return vectors if self._diagonal is None else vectors * self._diagonal

    def unscale(self, vectors: Tensor) -> Tensor:
        """``D^-1 v``."""
        return vectors if self._diagonal is None else vectors / self._diagonal

    def on_parts(self, store: BasisStore, size: int) -> Preconditioner:
        """The part of the diagonal; where it ends with padding, ones."""
        own = DiagonalPreconditioner()
        if self._diagonal is not None:
            part = store.local(self._diagonal)
            own._diagonal = part.masked_fill(part == 0, 1.0)
        return own

    def state_dict(self) -> dict[str, Any]:
        """The running average."""
        return {} if self._mean is None else {"mean": self._mean.clone(), "refreshes": self._refreshes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a running average."""
        self._mean = state["mean"].clone() if "mean" in state else None
        self._refreshes = int(state.get("refreshes", 0))
        self._update()
