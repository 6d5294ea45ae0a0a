"""What one outer step hands to the next: remembered steps, the way out of a saddle, and what was seen last."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.confirmation import Unconfirmed, rounding_of
from lightning_sfn.newton.krylov import KrylovSubspace
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.preconditioner import Preconditioner
from lightning_sfn.newton.reductions import norm

__all__ = ["Carried", "moved_to"]

_BENT = 0.1  # negative curvature, in largest positive ones, from which further Lanczos vectors pay


@dataclass
class Carried:
    """The state that steps leave behind, damping and preconditioner aside, which keep their own.

    Attributes:
        memory: Remembered steps, kept as the basis is.
        escape: The last most negative Ritz vector, in parameter coordinates.
        bend: Negative curvature of the last subspace, in its largest positive one.
        expected: The loss after the last step, and how far it may be off.
        unconfirmed: The last step, if trial data alone have judged it.
        checked: Whether the loss was found to be a fixed function. A new run checks anew.
    """

    memory: StepMemory
    escape: Tensor | None = None
    bend: float = math.inf
    expected: tuple[float, float] | None = None
    unconfirmed: Unconfirmed | None = None
    checked: bool = False

    @property
    def bent(self) -> bool:
        """Whether the last subspace showed much negative curvature; true before the first one."""
        return self.bend > _BENT

    def start_seed(self, gradient: Tensor, preconditioner: Preconditioner, generator: torch.Generator) -> Tensor:
        """A random direction and the last escape direction, each of length 1, for the start of a subspace.

        Args:
            gradient: The gradient, whose shape ``(n,)``, dtype and device the direction takes.
            preconditioner: Map from the subspace's coordinates to the parameters.
            generator: Source of random numbers, on that device.

        Returns:
            Shape ``(n,)``, in the subspace's coordinates.
        """
        noise = torch.randn(gradient.shape, dtype=gradient.dtype, device=gradient.device, generator=generator)
        seed = noise / norm(noise).to(noise.dtype)
        if self.escape is not None:
            escape = preconditioner.unscale(self.escape)
            seed = seed + escape / norm(escape).to(escape.dtype)
        return seed

    def complete_secant(self, loss: float, gradient: Tensor, same_function: bool | None, store: BasisStore) -> None:
        """Gives the last step its gradient difference, unless the function has changed since.

        Args:
            loss: The loss at the present parameters.
            gradient: The gradient there, shape ``(n,)``.
            same_function: Whether both are of the function of the last step; if ``None``, the losses tell.
            store: How remembered steps are kept.
        """
        if same_function is None and self.expected is not None:
            after, slack = self.expected
            same_function = abs(loss - after) <= max(slack, rounding_of(after))
        if not same_function:
            self.memory.abandon()
        self.memory.complete(store.local(gradient))

    def note_curvature(self, space: KrylovSubspace, lowest: Tensor) -> None:
        """Notes what a subspace showed.

        Args:
            space: The subspace.
            lowest: Its lowest Ritz vector in parameter coordinates, shape ``(n,)``.
        """
        self.escape = lowest.clone()  # no view that keeps more than it shows
        least, largest = space.eigenvalues[[0, -1]].tolist()
        self.bend = max(-least, 0.0) / largest if largest > 0 else (math.inf if least < 0 else 0.0)

    def forget(self) -> None:
        """Forgets what belongs to other parameters."""
        self.memory.clear()
        self.escape, self.bend, self.unconfirmed = None, math.inf, None

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors, lists and numbers."""
        return {
            "memory": self.memory.state_dict(),
            "escape": self.escape,
            "bent": self.bent,
            "bend": self.bend,
            "expected": self.expected,
            "unconfirmed": None if self.unconfirmed is None else self.unconfirmed.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], store: BasisStore) -> None:
        """Takes over what `state_dict` gave, remembered steps whole."""
        self.memory.load_state_dict(state["memory"])
        self.memory = self.memory.mapped(lambda vector: store.local(store.working(vector)))
        self.escape = None if state["escape"] is None else store.working(state["escape"])
        self.expected = state["expected"]
        self.bend = state.get("bend", math.inf if state["bent"] else 0.0)  # not saved by earlier versions
        waiting = state.get("unconfirmed")
        self.unconfirmed = None
        if waiting is not None:
            self.unconfirmed = Unconfirmed(store.working(waiting["origin"]), waiting["loss"], waiting["length"])


def moved_to(device: torch.device, dtype: torch.dtype, value: Any) -> Any:
    """Moves the tensors inside lists, tuples and dictionaries, and converts those of floating-point numbers.

    Args:
        device: Where to.
        dtype: The new dtype of floating-point numbers.
        value: What holds the tensors.

    Returns:
        The same with the tensors on the device.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved_to(device, dtype, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved_to(device, dtype, item) for item in value)
    return value
