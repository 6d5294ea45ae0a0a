"""Blocks of a Kronecker-factored matrix, and their inverse square roots as maps on parameters.

A block says of the parameters of one layer that their Fisher or Gauss-Newton matrix is about ``A x S``: A the second
moment of the layer's inputs, S the sum of the outer products of its output gradients (Martens and Grosse 2015). Where A
or S is diagonal, its diagonal is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Block", "BlockRoot", "Signature"]

Signature = tuple[str, int, int]
"""Kind of a block, index of its weight and index of its bias (-1 for none) among the parameters."""


@dataclass
class Block:
    """The factors of one layer.

    Attributes:
        signature: Which parameters it is about, and how they act.
        inputs: A: ``(i, i)`` for a matrix (the bias is its last input), ``(i,)`` for a table of i rows and where only
            the diagonal is kept, ``(1,)`` for what acts element by element.
        outputs: S: ``(o, o)``; ``(o,)`` where only the diagonal is kept; ``(b, o)`` for what acts element by element
            (weight, then bias).
        hidden: Whether other layers see the layer's outputs.
    """

    signature: Signature
    inputs: Tensor
    outputs: Tensor
    hidden: bool = True

    @classmethod
    def zeros(
        cls, signature: Signature, shapes: Sequence[torch.Size], like: Tensor, max_width: float = math.inf
    ) -> "Block":
        """A block of zeros for parameters of the given shapes, in the dtype and on the device of ``like``.

        Factors that are wider than ``max_width`` are diagonal.
        """
        kind, weight, bias = signature
        shape = shapes[weight]

        def factor(width: int) -> Tensor:
            return like.new_zeros(width) if width > max_width else like.new_zeros(width, width)

        if kind == "dense":
            return cls(signature, factor(math.prod(shape[1:]) + (bias >= 0)), factor(shape[0]))
        if kind == "embedding":
            return cls(signature, like.new_zeros(shape[0]), factor(shape[1]))
        if kind == "norm":
            return cls(signature, like.new_ones(1), like.new_zeros(1 + (bias >= 0), shape[0]))
        return cls(signature, like.new_ones(1), like.new_zeros(1, 1))  # "number": one for the whole tensor

    def narrowed(self, max_width: float) -> "Block":
        """The block with the diagonals alone of factors that are wider than this."""
        if not self.is_product:
            return self
        inputs, outputs = (
            factor.diagonal().clone() if factor.dim() == 2 and len(factor) > max_width else factor
            for factor in (self.inputs, self.outputs)
        )
        return Block(self.signature, inputs, outputs, self.hidden)

    @staticmethod
    def cost(signature: Signature, shapes: Sequence[torch.Size], itemsize: int, max_width: float = math.inf) -> int:
        """Bytes of a block: its factors, their eigenvectors, and a scale for each parameter."""
        block = Block.zeros(signature, shapes, torch.empty(0, device="meta"), max_width)
        scales = sum(shapes[index].numel() for index in signature[1:] if index >= 0) if signature[0] != "number" else 1
        return (2 * (block.inputs.numel() + block.outputs.numel()) + scales) * itemsize

    def observe(self, inputs: Tensor, gradients: Tensor, weight: float) -> None:
        """Adds one use of the layer.

        Args:
            inputs: Shape ``(u, i)``, or indices ``(u,)`` for a table.
            gradients: By the outputs, shape ``(u, o)``.
            weight: Share of this use in A.
        """
        kind, _, bias = self.signature
        if kind == "norm":
            self.outputs[0] += (gradients * inputs).square().sum(0)
            if bias >= 0:
                self.outputs[1] += gradients.square().sum(0)
            return
        self.outputs += _second_moment(gradients, self.outputs)
        if kind == "embedding":
            counts = torch.bincount(inputs, minlength=len(self.inputs)).to(self.inputs)
            self.inputs += counts * (weight / len(inputs))
            return
        if bias >= 0:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        self.inputs += _second_moment(inputs, self.inputs) * (weight / len(inputs))

    def shift(self, steps: list[Tensor]) -> Tensor:
        """By how much steps change the layer's outputs, in the quadratic mean over units and cases.

        A diagonal A takes inputs as uncorrelated.

        Args:
            steps: One tensor for each parameter, shape ``(c, *shape)``.

        Returns:
            Shape ``(c,)``.
        """
        kind, weight, bias = self.signature
        change = steps[weight]
        if kind == "embedding":
            return (self.inputs[:, None] * change.square()).sum((1, 2)).div(change.shape[-1]).sqrt()
        change = change.flatten(2)
        if bias >= 0:
            change = torch.cat([change, steps[bias].unsqueeze(-1)], -1)
        response = change * self.inputs if self.inputs.dim() == 1 else change @ self.inputs
        return (response * change).sum((1, 2)).clamp_min(0).div(change.shape[1]).sqrt()

    @property
    def is_product(self) -> bool:
        """Whether the block is a product of two factors: elsewhere A is one."""
        return self.signature[0] in ("dense", "embedding")

    @property
    def magnitude(self) -> Tensor:
        """Product of the mean diagonals, float64: how large the block's entries are."""
        return _mean_diagonal(self.inputs) * _mean_diagonal(self._square)

    @property
    def _square(self) -> Tensor:
        """S as `_eigen` and `_mean_diagonal` expect it: a matrix or a vector."""
        return self.outputs if self.is_product else self.outputs.reshape(-1)

    def root(self, damping: float) -> "BlockRoot":
        """``(A x S + damping)^(-1/2)``, by the eigenvectors of both factors.

        The damping of the product itself, which K-FAC approximates by damping each factor, costs no more in their
        eigenbasis (George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis").

        Args:
            damping: A positive number.
        """
        if not self.is_product:  # A is one
            return BlockRoot(self.signature, None, None, (self.outputs + damping).rsqrt())
        is_table = self.signature[0] == "embedding"
        rows, left = _eigen(self.inputs if is_table else self.outputs)
        columns, right = _eigen(self.outputs if is_table else self.inputs)
        return BlockRoot(self.signature, left, right, (rows[:, None] * columns + damping).rsqrt().to(self.outputs))


@dataclass(frozen=True)
class BlockRoot:
    """A block's inverse square root ``(A x S + damping)^(-1/2)``, as rotations and a scale between them.

    Attributes:
        signature: Which parameters it is about.
        left: Eigenvectors, in columns, of the factor of a weight's rows: of S for a matrix, of A for a table; ``None``
            where it is diagonal.
        right: Eigenvectors of the factor of its columns, likewise.
        scale: The root's eigenvalues: ``(o, i)`` for a matrix, ``(i, o)`` for a table, ``(b, o)`` for what acts element
            by element, ``(1, 1)`` for a number.
    """

    signature: Signature
    left: Tensor | None
    right: Tensor | None
    scale: Tensor

    def lessened(self, excess: Tensor) -> "BlockRoot":
        """The root of a block with so many times the curvature along each eigenvector, shape of ``scale``."""
        return replace(self, scale=self.scale * excess.rsqrt())

    def along(self, pieces: list[Tensor]) -> Tensor:
        """Vectors along the eigenvectors.

        Args:
            pieces: One tensor for each parameter, shape ``(c, *shape)``.

        Returns:
            Shape ``(c, *scale.shape)``; ``(c, 1, e)`` for the e elements of a parameter that is scaled by one number.
        """
        kind, weight, bias = self.signature
        rows = pieces[weight]
        matrices = rows.reshape(len(rows), 1, -1) if kind in ("number", "norm") else rows.flatten(2)
        if bias >= 0:
            matrices = torch.cat([matrices, pieces[bias].unsqueeze(self._side)], self._side)
        rotated = matrices if self.left is None else self.left.T @ matrices
        return rotated if self.right is None else rotated @ self.right

    @property
    def _side(self) -> int:
        """Where the bias joins the weight: as a last row of what acts element by element, else as a last column."""
        return 1 if self.signature[0] == "norm" else 2

    def apply(self, pieces: list[Tensor], power: int) -> None:
        """Multiplies vectors with a power of the root, in place of their pieces.

        Args:
            pieces: One tensor for each parameter, shape ``(c, *shape)``.
            power: 1 for the root, -1 for its inverse, 2 for the inverse of the damped block itself.
        """
        _, weight, bias = self.signature
        product = self.along(pieces) * (self.scale if power == 1 else self.scale**power)
        product = product if self.left is None else self.left @ product
        product = product if self.right is None else product @ self.right.T
        if bias >= 0:
            product, last = torch.split(product, [product.shape[self._side] - 1, 1], self._side)
            pieces[bias] = last.squeeze(self._side)
        pieces[weight] = product.reshape(pieces[weight].shape)


def _second_moment(rows: Tensor, factor: Tensor) -> Tensor:
    """Sum of outer products of rows of shape ``(u, w)``; of their diagonals alone for a diagonal factor."""
    return rows.square().sum(0) if factor.dim() == 1 else rows.T @ rows


def _mean_diagonal(factor: Tensor) -> Tensor:
    return (factor if factor.dim() == 1 else factor.diagonal()).double().mean()


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (float64, rounding below zero taken away) and eigenvectors of a symmetric matrix or a diagonal."""
    if factor.dim() == 1:
        return factor.double().clamp_min(0), None
    values, vectors = torch.linalg.eigh(factor.double())
    return values.clamp_min(0), vectors.to(factor)
