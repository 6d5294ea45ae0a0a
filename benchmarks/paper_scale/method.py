"""What all methods have in common."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lightning_sfn.experiments.plateau import Problem

__all__ = ["Counts", "Method"]


@dataclass
class Counts:
    """What a method has spent.

    Attributes:
        updates: Changes of the parameters that were computed; for L-BFGS iterations, for SFN outer steps.
        products: Hessian-vector products.
        gradients: Gradients in units of the whole training set.
        trials: Trial losses.
        accepted: Outer steps of SFN that were taken.
    """

    updates: int = 0
    products: int = 0
    gradients: float = 0.0
    trials: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


class Method(Protocol):
    """A training method that can be put away after any `advance` and taken up again, bit for bit."""

    problem: Problem
    counts: Counts

    @property
    def finished(self) -> bool:
        """Whether it has done all that it planned, whatever time is left."""

    def advance(self) -> None:
        """Does the least amount of work after which it can be put away."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `advance` depends on, as tensors, numbers, lists and dictionaries."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
