"""Blocks of a Kronecker-factored matrix, and their inverse square roots as maps on parameters.

A block says of the parameters of one layer that their Fisher or Gauss-Newton matrix is about ``A x S``: A the second
moment of the layer's inputs, S the sum of the outer products of its output gradients (Martens and Grosse 2015). Where A
or S is diagonal, its diagonal is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "BlockRoots", "Signature"]

Signature = tuple[str, int, int]
"""Kind of a block, index of its weight and index of its bias (-1 for none) among the parameters."""


@dataclass
class Block:
    """The factors of one layer.

    Attributes:
        signature: Which parameters it is about, and how they act.
        inputs: A: ``(i, i)`` for a matrix (the bias is its last input), ``(i,)`` for a table of i rows, ``(1,)`` for
            what acts element by element.
        outputs: S: ``(o, o)``; ``(b, o)`` for what acts element by element (weight, then bias).
    """

    signature: Signature
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def zeros(cls, signature: Signature, shapes: Sequence[torch.Size], like: Tensor) -> "Block":
        """A block of zeros for parameters of the given shapes, in the dtype and on the device of ``like``."""
        kind, weight, bias = signature
        shape = shapes[weight]
        if kind == "dense":
            rows, columns = shape[0], math.prod(shape[1:]) + (bias >= 0)
            return cls(signature, like.new_zeros(columns, columns), like.new_zeros(rows, rows))
        if kind == "embedding":
            return cls(signature, like.new_zeros(shape[0]), like.new_zeros(shape[1], shape[1]))
        if kind == "norm":
            return cls(signature, like.new_ones(1), like.new_zeros(1 + (bias >= 0), shape[0]))
        return cls(signature, like.new_ones(1), like.new_zeros(1, 1))  # "number": one for the whole tensor

    @staticmethod
    def cost(signature: Signature, shapes: Sequence[torch.Size], itemsize: int) -> int:
        """Bytes of a block: its factors, their roots and the roots' inverses."""
        block = Block.zeros(signature, shapes, torch.empty(0, device="meta"))
        return 3 * (block.inputs.numel() + block.outputs.numel()) * itemsize

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
        self.outputs += gradients.T @ gradients
        if kind == "embedding":
            counts = torch.bincount(inputs, minlength=len(self.inputs)).to(self.inputs)
            self.inputs += counts * (weight / len(inputs))
            return
        if bias >= 0:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        self.inputs += inputs.T @ inputs * (weight / len(inputs))

    @property
    def magnitude(self) -> float:
        """Product of the mean diagonals: how large the block's entries are."""
        return _mean_diagonal(self.inputs) * _mean_diagonal(self._square)

    @property
    def _square(self) -> Tensor:
        """S as `_power` and `_mean_diagonal` expect it: a matrix or a vector."""
        return self.outputs if self.signature[0] in ("dense", "embedding") else self.outputs.reshape(-1)

    def roots(self, damping: float) -> "BlockRoots":
        """``(A + a)^(-1/2)`` and ``(S + s)^(-1/2)`` with ``a s`` the damping, split as the traces are (pi).

        Args:
            damping: A positive number.
        """
        a, s = _mean_diagonal(self.inputs), _mean_diagonal(self._square)
        ratio = math.sqrt(a / s) if a > 0 and s > 0 and self.signature[0] in ("dense", "embedding") else 1.0
        root = math.sqrt(damping)
        if self.signature[0] not in ("dense", "embedding"):  # A is one: all of the damping belongs to S
            scale = (self.outputs + damping).rsqrt()
            return BlockRoots(self.signature, self.inputs, self.inputs, scale, 1 / scale)
        right, right_inverse = _power(self.inputs, ratio * root)
        left, left_inverse = _power(self.outputs, root / ratio)
        return BlockRoots(self.signature, right, right_inverse, left, left_inverse)


@dataclass(frozen=True)
class BlockRoots:
    """A block's inverse square root ``right x left``, and its inverse.

    Attributes:
        signature: Which parameters it is about.
        right: ``(A + a)^(-1/2)``: a matrix, or a diagonal.
        right_inverse: ``(A + a)^(1/2)``.
        left: ``(S + s)^(-1/2)``.
        left_inverse: ``(S + s)^(1/2)``.
    """

    signature: Signature
    right: Tensor
    right_inverse: Tensor
    left: Tensor
    left_inverse: Tensor

    def apply(self, pieces: list[Tensor], *, inverse: bool) -> None:
        """Multiplies vectors with the root, in place of their pieces.

        Args:
            pieces: One tensor for each parameter, shape ``(c, *shape)``.
            inverse: Whether to multiply with its inverse instead.
        """
        kind, weight, bias = self.signature
        left, right = (self.left_inverse, self.right_inverse) if inverse else (self.left, self.right)
        vectors = pieces[weight]
        if kind == "embedding":
            pieces[weight] = right[:, None] * (vectors @ left)
        elif kind == "dense":
            joined = vectors.flatten(2)
            if bias >= 0:
                joined = torch.cat([joined, pieces[bias].unsqueeze(-1)], -1)
            product = left @ joined @ right
            if bias >= 0:
                pieces[bias] = product[..., -1]
                product = product[..., :-1]
            pieces[weight] = product.reshape(vectors.shape)
        else:
            pieces[weight] = vectors * left[0]
            if bias >= 0:
                pieces[bias] = pieces[bias] * left[1]


def _mean_diagonal(factor: Tensor) -> float:
    return float((factor if factor.dim() == 1 else factor.diagonal()).double().mean())


def _power(factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``(F + damping)^(-1/2)`` and ``(F + damping)^(1/2)`` of a symmetric matrix or a diagonal, through float64."""
    if factor.dim() == 1:
        damped = factor.double().clamp_min(0) + damping
        return damped.rsqrt().to(factor), damped.sqrt().to(factor)
    values, vectors = torch.linalg.eigh(factor.double())
    damped = values.clamp_min(0) + damping
    return ((vectors * damped.rsqrt()) @ vectors.T).to(factor), ((vectors * damped.sqrt()) @ vectors.T).to(factor)
