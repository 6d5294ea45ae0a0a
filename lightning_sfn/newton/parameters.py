"""A flat view of the trainable parameters: the vector space in which every other module of `newton` works."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["FlatParameters"]


class FlatParameters:
    """The trainable parameters of a model seen as one vector.

    Frozen parameters (``requires_grad=False``) and those without elements are left out, a parameter that occurs twice
    (tied weights) counts once, and the order is the order in which the parameters were given. Reading copies; writing
    goes through ``copy_``, so memory layout, aliasing and autograd identity of the parameters stay as they are.

    Args:
        parameters: The parameters, as ``module.parameters()`` or ``module.named_parameters()`` gives them.

    Raises:
        ValueError: There is nothing to train, or the parameters are not dense tensors of one real dtype (float32 or
            float64) on one device.

    Example:
        >>> import torch
        >>> flat = FlatParameters(torch.nn.Linear(2, 3).parameters())
        >>> flat.size
        9
    """

    def __init__(self, parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        if isinstance(parameters, torch.nn.Module):
            raise ValueError(
                f"The parameters were given as a module ({type(parameters).__name__}), but tensors are expected: pass "
                "its parameters(), as in model.parameters()."
            )
        tensors = [p[1] if isinstance(p, tuple) else p for p in parameters]
        if any(map(is_lazy, tensors)):
            raise ValueError(
                "A parameter is not initialized yet (that of a lazy module), so its size is not known: run the model "
                "once on a batch before its optimizer is made."
            )
        trained = {id(p): p for p in tensors if p.requires_grad and p.numel() > 0}
        self.tensors: tuple[Tensor, ...] = tuple(trained.values())
        if not self.tensors:
            raise ValueError(
                "No parameter requires a gradient (empty ones do not count), so there is nothing to optimize: give at "
                "least one parameter with requires_grad=True."
            )
        self._check()
        self.dtype = self.tensors[0].dtype
        self.device = self.tensors[0].device
        self.shapes = tuple(p.shape for p in self.tensors)
        self.sizes = tuple(p.numel() for p in self.tensors)
        self.size = sum(self.sizes)

    @classmethod
    def of_groups(cls, groups: Iterable[dict[str, Any]]) -> "FlatParameters":
        """The trainable parameters of an optimizer's parameter groups.

        Args:
            groups: The groups, as ``optimizer.param_groups`` holds them.
        """
        return cls(parameter for group in groups for parameter in group["params"])

    def learning_rates(self, groups: Iterable[dict[str, Any]]) -> float | Tensor:
        """The learning rates of parameter groups.

        Args:
            groups: The groups that hold the parameters, each with its ``lr``.

        Returns:
            The one learning rate, or a vector of shape ``(n,)`` where groups differ.
        """
        rate_of = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        rates = {rate_of[id(p)] for p in self.tensors}
        if len(rates) == 1:
            return rates.pop()
        return self.flatten([torch.full_like(p, rate_of[id(p)]) for p in self.tensors])

    def _check(self) -> None:
        devices = sorted({str(p.device) for p in self.tensors})
        if len(devices) > 1:
            raise ValueError(
                f"The parameters lie on several devices ({', '.join(devices)}), but curvature needs them on one: move "
                "the model to one device, or optimize the parts with one optimizer each."
            )
        dtypes = sorted({str(p.dtype) for p in self.tensors})
        if any(p.is_complex() for p in self.tensors):
            raise ValueError(
                f"A parameter is complex ({', '.join(dtypes)}), but curvature needs float32 or float64: hold real "
                "parameters, and combine them in the model with torch.view_as_complex."
            )
        if len(dtypes) > 1:
            raise ValueError(
                f"The parameters have several dtypes ({', '.join(dtypes)}), but curvature needs one: convert the model "
                "with model.float() or model.double()."
            )
        if self.tensors[0].dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The parameters have dtype {dtypes[0]}, but curvature needs float32 or float64: convert the model "
                "with model.float() (precision='bf16-mixed' keeps float32 parameters, 'bf16-true' does not)."
            )
        if any(p.layout != torch.strided for p in self.tensors):
            raise ValueError("A parameter is sparse, but curvature needs dense parameters: use a dense layer instead.")

    @property
    def description(self) -> str:
        """Number, dtype and shapes of the parameters in words: what has to be the same on all ranks."""
        shapes = ", ".join("x".join(map(str, shape)) or "1" for shape in self.shapes[:8])
        more = "" if len(self.shapes) <= 8 else f", ... (digest {zlib.crc32(repr(self.shapes).encode()):08x})"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{len(self.shapes)} trainable parameters of {dtype} ({shapes}{more})"

    def random(self, generator: torch.Generator) -> Tensor:
        """A standard normal vector of shape ``(n,)``, in the parameters' dtype and on their device."""
        return torch.randn(self.size, dtype=self.dtype, device=self.device, generator=generator)

    def checksum(self) -> int:
        """A sum of the parameters' bit patterns: equal on two ranks if all bits are."""
        pattern = torch.int32 if self.dtype == torch.float32 else torch.int64
        return sum(int(p.detach().contiguous().view(pattern).sum()) for p in self.tensors)

    def flatten(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Lays tensors shaped like the parameters end to end.

        Args:
            tensors: One tensor for each parameter; ``None`` stands for zeros.
            out: Where the result goes, shape ``(n,)``; a new vector if left out.

        Returns:
            The vector of shape ``(n,)``.

        Raises:
            ValueError: A tensor is sparse.
        """
        pieces = []
        for tensor, parameter in zip(tensors, self.tensors, strict=True):
            if tensor is None:
                pieces.append(torch.zeros(parameter.numel(), dtype=self.dtype, device=self.device))
            elif tensor.layout != torch.strided:
                raise ValueError(
                    "A gradient is sparse, but curvature needs dense gradients: build the layer with sparse=False "
                    "(nn.Embedding, nn.EmbeddingBag)."
                )
            else:
                pieces.append(tensor.detach().reshape(-1))
        return torch.cat(pieces, out=out)

    def accumulate(
        self, total: Tensor | None, tensors: Sequence[Tensor | None], weight: float, out: Tensor | None = None
    ) -> Tensor:
        """Adds tensors shaped like the parameters to a vector, with as few passes over memory as that takes.

        Args:
            total: A vector of shape ``(n,)``, changed in place; ``None`` for the first of several.
            tensors: One tensor for each parameter; ``None`` stands for zeros.
            weight: Factor on the tensors.
            out: Where the first of several goes; a new vector if left out.

        Returns:
            The sum, shape ``(n,)``.

        Raises:
            ValueError: A tensor is sparse.
        """
        if total is None:
            first = self.flatten(tensors, out)
            return first if weight == 1.0 else first.mul_(weight)
        for tensor, piece in zip(tensors, self.unflatten(total), strict=True):
            if tensor is not None:
                piece.add_(tensor.detach(), alpha=weight)
        return total

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Views of a vector of shape ``(n,)``, shaped like the parameters."""
        pieces = torch.split(vector, list(self.sizes))
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def directions(self, vector: Tensor) -> tuple[Tensor, ...]:
        """`unflatten` for what autograd is given: a piece that begins at an odd place is a copy.

        A model that views parameters as complex numbers (`torch.view_as_complex`) does so with directions as well, and
        a view needs an even beginning.
        """
        pieces = self.unflatten(vector)
        return tuple(piece.clone() if piece.storage_offset() % 2 else piece for piece in pieces)

    def read(self) -> Tensor:
        """A copy of the parameters as a vector of shape ``(n,)``."""
        return self.flatten(self.tensors)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copies a vector of shape ``(n,)`` into the parameters, bit for bit."""
        for parameter, piece in zip(self.tensors, self.unflatten(vector), strict=True):
            parameter.copy_(piece)

    def gradients(self) -> Tensor:
        """The parameters' ``.grad`` as a vector of shape ``(n,)``; a missing one counts as zeros."""
        return self.flatten([p.grad for p in self.tensors])
