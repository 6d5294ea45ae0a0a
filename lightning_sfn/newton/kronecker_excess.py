"""What Kronecker factors do not tell: curvature measured along their eigenvectors.

Factors come from a Fisher matrix, which knows nothing of negative curvature and of what residuals add to the Hessian H.
Where these are all there is, as on a plateau, ``D H D`` has entries of a hundred thousand instead of one. A probe shows
it: for standard normal v the squares of ``z = D H D v`` are, in the mean, the squared norms of the rows of ``D H D``.
Dividing D by the roots of these norms, again and again, makes them all one (Knight, Ruiz and Ucar 2014, "A symmetry
preserving algorithm for matrix scaling"); with one division it is the equilibration of Dauphin, de Vries and Bengio
(2015), here in the eigenbasis of the factors. One probe is too noisy for single rows, so a layer's norms are taken as a
product of means over rows and columns, like the second moments of Shazeer and Stern (2018, "Adafactor").
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Excess"]

_ENOUGH = 8  # numbers of which a mean says something
_MOST = 1e4  # largest excess: a layer that is scaled down further stays behind on the way out, and is missed later


@dataclass(frozen=True)
class Excess:
    """How many times more curvature there is along a block's eigenvectors than its factors say: a product, 1 to 10,000.

    Attributes:
        rows: Shape ``(r, 1)``.
        columns: Shape ``(1, s)``.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def none(cls, scale: Tensor) -> "Excess":
        """No excess over a block whose root has eigenvalues of this shape ``(r, s)``."""
        return cls(scale.new_ones(len(scale), 1), scale.new_ones(1, scale.shape[1]))

    @property
    def shape(self) -> torch.Size:
        """Shape ``(r, s)`` of what it is about."""
        return torch.Size((len(self.rows), self.columns.shape[1]))

    @property
    def product(self) -> Tensor:
        """The excess along each eigenvector, shape ``(r, s)``."""
        return self.rows * self.columns

    def after(self, image: Tensor) -> "Excess":
        """The excess after a probe, found with the map that allows for the excess so far.

        It goes down as well as up, but not below one: less curvature than the factors say is not worth a longer step.
        Rows and columns are each bounded by the root of the largest excess.

        Args:
            image: ``D H D v`` along the eigenvectors, shape ``(r, s)``.
        """
        squares = image.square()
        mean = squares.mean().clamp_min(torch.finfo(squares.dtype).tiny)
        rows, columns = squares.shape
        by_row = squares.mean(1, keepdim=True) if columns >= _ENOUGH else mean.expand_as(self.rows)
        by_column = squares.mean(0, keepdim=True) if rows >= _ENOUGH else mean.expand_as(self.columns)
        # Squared norms are about by_row * by_column / mean: each side takes its half, and the root of the norm.
        most = math.sqrt(_MOST)
        return Excess(
            (self.rows * (by_row / mean.sqrt()).sqrt()).clamp(1, most),
            (self.columns * (by_column / mean.sqrt()).sqrt()).clamp(1, most),
        )
