"""Products with the Jacobian of a model's output, both ways, on one retained graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sfn.newton.diagnosis import differentiate
from lightning_sfn.newton.graphs import root_of, towards

__all__ = ["OutputJacobian"]


class OutputJacobian:
    """The Jacobian J of an output with respect to the parameters.

    ``J v`` is the derivative of ``J'u`` by u: double backward, with no need for forward-mode formulas.

    Args:
        output: The output, with its graph.
        tensors: The parameters.

    Raises:
        CurvatureError: An operation has no second derivative.
    """

    def __init__(self, output: Tensor, tensors: Sequence[Tensor]) -> None:
        self.output = output
        self._tensors = tensors
        self._cotangent = torch.zeros_like(output, requires_grad=True)
        pullback = differentiate(output, tensors, self._cotangent, create_graph=True, allow_unused=True)
        # The values are zeros, as many as there are parameters.
        self._roots = tuple(None if slope is None else root_of(slope) for slope in pullback)

    def forward(self, directions: Sequence[Tensor]) -> Tensor | None:
        """``J v``, shaped like the output; ``None`` where the output does not move.

        Args:
            directions: v, shaped like the parameters.
        """
        roots, along = towards(self._roots, directions)
        if not roots:
            return None
        (image,) = differentiate(roots, self._cotangent, along, retain_graph=True)
        return image

    def backward(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """``J'u``, shaped like the parameters.

        Args:
            cotangent: u, shaped like the output.
        """
        return differentiate(self.output, self._tensors, cotangent, retain_graph=True, allow_unused=True)
