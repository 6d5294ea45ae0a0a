"""A memory of steps: past updates that join the subspace and bring their own Hessian products.

The difference of two gradients of the same function, ``g(x + d) - g(x)``, is the product of the averaged Hessian with
the step d (a secant). The gradients are computed anyway, so a remembered step costs no product. Section E of the paper
adds the last update alone and pays a product for it.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_sfn.newton.krylov import Direction

__all__ = ["StepMemory"]


class StepMemory:
    """The last steps, newest first; of those that were taken back, what they have shown.

    Args:
        capacity: How many steps are remembered; 0 remembers none.
        secants: Whether remembered steps bring gradient differences as products. Without, each costs a product.

    Attributes:
        has_secants: Whether the products of remembered steps are gradient differences.
    """

    def __init__(self, capacity: int, *, secants: bool) -> None:
        self._steps: deque[Direction] = deque(maxlen=capacity)
        self.has_secants = secants
        self._pending: Direction | None = None  # the last step, with the gradient before it

    def __len__(self) -> int:
        """Number of steps that would join a subspace now."""
        return len(self._steps)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The remembered steps, newest first."""
        return tuple(self._steps)

    @property
    def capacity(self) -> int:
        """How many steps are remembered at most."""
        return self._steps.maxlen or 0

    def record(self, step: Tensor, gradient: Tensor) -> None:
        """Notes an accepted step.

        Args:
            step: The change of the parameters, shape ``(n,)``.
            gradient: The gradient before it, shape ``(n,)``.
        """
        if self.capacity == 0:
            return
        self._pending = Direction(step, gradient if self.has_secants else None)

    def complete(self, gradient: Tensor) -> None:
        """Lets the last step join, with the gradient after it for its secant; older ones make room."""
        if self._pending is not None:
            step, before = self._pending.vector, self._pending.product
            self._steps.appendleft(Direction(step, None if before is None else gradient - before))
        self._pending = None

    def abandon(self) -> None:
        """Drops a waiting secant: the next gradient belongs to another function."""
        if self.has_secants:
            self._pending = None

    def refute(self, gradient: Tensor | None) -> None:
        """Lets the last step, which was taken back, join for its secant, with the gradient after it.

        Without secants, or where that gradient is not known or not finite (``None``), the step is dropped: it has
        shown nothing that would be worth a product.
        """
        if self.has_secants and gradient is not None:
            self.complete(gradient)
        self._pending = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "StepMemory":
        """A memory with every vector replaced by what a function makes of it.

        Args:
            function: Keeps the vectors in another way (see `BasisStore`).
        """

        def apply(d: Direction) -> Direction:
            return Direction(function(d.vector), None if d.product is None else function(d.product))

        other = StepMemory(self.capacity, secants=self.has_secants)
        other._steps.extend(map(apply, self._steps))
        other._pending = None if self._pending is None else apply(self._pending)
        return other

    def clear(self) -> None:
        """Forgets everything."""
        self._steps.clear()
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """The memory as lists of tensors."""
        state: dict[str, Any] = {"steps": [(d.vector, d.product) for d in self._steps]}
        if self._pending is not None:
            state["pending"] = (self._pending.vector, self._pending.product)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, without gradient differences where this memory has none."""
        self.clear()
        newest = state["steps"][: self._steps.maxlen]
        self._steps.extend(self._own(*each) for each in newest)
        if "pending" in state:
            self._pending = self._own(*state["pending"])

    def _own(self, vector: Tensor, product: Tensor | None) -> Direction:
        return Direction(vector, product if self.has_secants else None)
