"""Where the vectors of a large basis are kept: whole or shared out over processes, in which dtype, on which device.

With W processes each keeps ``n / W`` entries of every vector. A product then costs a reduce-scatter of ``Hv`` and an
all-gather of the next ``v``, together the bytes of one all-reduce, and a dot product costs an all-reduce of one number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lightning_sfn.newton import reductions
from lightning_sfn.newton.processes import Processes

__all__ = ["WHOLE", "BasisName", "BasisStore", "check_basis"]

BasisName = Literal["replicated", "sharded"]
"""``"replicated"`` keeps all of every vector on each process, ``"sharded"`` a part of it."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_BLOCK = 2**21  # entries that are converted or brought to the device at a time, at least one row


def check_basis(basis: str, dtype: str | torch.dtype | None, device: str | torch.device | None) -> torch.dtype | None:
    """Checks the options of a basis.

    Args:
        basis: ``"replicated"`` or ``"sharded"``.
        dtype: ``"bfloat16"``, ``"float32"``, ``"float64"``, the same as torch dtypes, or ``None``.
        device: ``"cpu"`` or ``None``.

    Returns:
        The dtype.

    Raises:
        ValueError: An option is unknown.
    """
    if basis not in get_args(BasisName):
        raise ValueError(f"basis is {basis!r}, but 'replicated' or 'sharded' is expected.")
    if device is not None and str(device) != "cpu":
        raise ValueError(f"basis_device is {str(device)!r}, but 'cpu' or None (the parameters' device) is expected.")
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in _DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"basis_dtype is {dtype!r}, but one of {', '.join(map(repr, _DTYPES))} or None is expected.")
    return _DTYPES[dtype]


@dataclass(frozen=True)
class BasisStore:
    """How vectors are kept, and the arithmetic on vectors kept so.

    A *part* is what this process keeps of a vector: all of it, unless the basis is sharded. Rows of a basis are parts
    in the store's dtype and on its device; parts outside of a basis stay in the working dtype and on the working
    device.

    Attributes:
        processes: The processes that run the same program; ``None`` for one.
        sharded: Whether each process keeps a part of every vector.
        dtype: Of the rows; ``None`` for that of the vectors. In ``bfloat16`` a row is off by 2^-9 of each entry, and
            dot products with it by about that over the square root of n.
        device: Of the rows; ``None`` for that of the vectors. On the CPU they lie in pinned memory where there is CUDA,
            and are brought to the vectors' device block by block.
        working_dtype: Dtype of what is computed with the rows; that of the rows if ``None``.
        working_device: Device of it, likewise.
    """

    processes: Processes | None = None
    sharded: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    working_dtype: torch.dtype | None = None
    working_device: torch.device | None = None

    @property
    def _owners(self) -> Processes | None:
        """The processes that a vector is spread over, if there are any."""
        return self.processes if self.sharded and self.processes is not None and self.processes.size > 1 else None

    # ------------------------------------------------------------------------------------------------ keeping vectors

    def empty(self, capacity: int, like: Tensor) -> Tensor:
        """Room for a basis.

        Args:
            capacity: Number of rows.
            like: A whole vector of shape ``(n,)``.

        Returns:
            Shape ``(capacity, n)``, or ``(capacity, ceil(n / W))`` where it is sharded.
        """
        owners = self._owners
        length = like.numel() if owners is None else owners.part_length(like.numel())
        device = self.device or like.device
        pinned = device.type == "cpu" and like.device.type == "cuda"
        return torch.empty(capacity, length, dtype=self.dtype or like.dtype, device=device, pin_memory=pinned)

    def keep(self, basis: Tensor, row: int, part: Tensor) -> Tensor:
        """Copies a part into a row of a basis, and returns the part (the row itself where nothing is lost by it)."""
        basis[row].copy_(part)
        return basis[row] if basis.dtype == part.dtype and basis.device == part.device else part

    def keep_divided(self, basis: Tensor, row: int, part: Tensor, divisor: Tensor) -> Tensor:
        """Puts a part divided by a number (a tensor without dimensions) into a row of a basis, and returns that."""
        if basis.dtype == part.dtype and basis.device == part.device:
            return torch.div(part, divisor.to(part.dtype), out=basis[row])
        return self.keep(basis, row, part / divisor.to(part.dtype))

    def working(self, row: Tensor) -> Tensor:
        """A row of a basis in the dtype and on the device of what is computed with it."""
        return row.to(self.working_device or row.device, self.working_dtype or row.dtype)

    def local(self, vector: Tensor) -> Tensor:
        """The part of a whole vector of shape ``(n,)``, or of each of several, shape ``(c, n)``."""
        owners = self._owners
        if owners is None:
            return vector
        length = owners.part_length(vector.shape[-1])
        part = vector[..., owners.rank * length : (owners.rank + 1) * length]
        # A copy in any case, so that the whole vector can go; padded like what a reduce-scatter gives.
        return torch.nn.functional.pad(part, (0, length - part.shape[-1]))

    def whole(self, parts: Tensor, size: int) -> Tensor:
        """The whole vectors that this and the other processes' parts make up.

        Args:
            parts: Shape ``(m,)`` or ``(c, m)``.
            size: Length of a whole vector.

        Returns:
            Shape ``(size,)`` or ``(c, size)``.
        """
        owners = self._owners
        if owners is None:
            return parts
        if parts.ndim == 1:
            return owners.gather(parts, size)
        return torch.stack([owners.gather(part, size) for part in parts])

    @property
    def is_shared_out(self) -> bool:
        """Whether each process keeps a part of every vector alone."""
        return self._owners is not None

    def anywhere(self, mask: Tensor) -> Tensor:
        """Where a mask of shape ``(n,)`` is true on any process; the same everywhere already unless shared out."""
        owners = self._owners
        return mask if owners is None else owners.sum(mask.float()) > 0

    # ------------------------------------------------------------------------------------------------ arithmetic

    def dot(self, x: Tensor, y: Tensor) -> float:
        """Inner product of two vectors given by their parts."""
        return float(self.inner(x, y))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product of two vectors given by their parts, left on the device."""
        return self._sum(reductions.dot(x, y))

    def length(self, x: Tensor) -> Tensor:
        """Norm of a vector given by its parts, left on the device; right within `reductions.SAFE_NORMS`."""
        own = reductions.plain_norm(x)
        return own if self._owners is None else self._sum(own.square()).sqrt()

    def norm(self, x: Tensor) -> float:
        """Norm of a vector given by its parts."""
        return self.norms(x)[0]

    def norms(self, *vectors: Tensor) -> list[float]:
        """Norms of vectors given by their parts, by one collective and one wait for the device."""
        lengths = torch.stack([reductions.norm(x) for x in vectors])
        lengths = lengths if self._owners is None else self._sum(lengths.square()).sqrt()
        return cast("list[float]", lengths.tolist())

    def project(self, basis: Tensor, part: Tensor) -> Tensor:
        """Coordinates of a vector in a basis, float64, shape ``(k,)``, on the vector's device."""
        blocks = self._blocks(basis, part.dtype, part.device)
        return self._sum(torch.cat([reductions.project(block, part) for _, block in blocks]))

    def combine(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        """Linear combinations of the rows of a basis.

        Args:
            coefficients: Shape ``(k,)`` or ``(c, k)``.
            basis: The rows.

        Returns:
            Parts of shape ``(m,)`` or ``(c, m)``.
        """
        dtype, device = self.working_dtype or basis.dtype, self.working_device or basis.device
        total: Tensor | None = None
        for rows, block in self._blocks(basis, dtype, device):
            term = reductions.combine(coefficients[..., rows], block)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def subtract(self, part: Tensor, coefficients: Tensor, basis: Tensor) -> None:
        """Subtracts a linear combination of the rows of a basis from a part, in place."""
        for rows, block in self._blocks(basis, part.dtype, part.device):
            reductions.subtract(part, coefficients[rows], block)

    def project_rows(self, basis: Tensor, parts: Tensor) -> Tensor:
        """`project` for a few vectors together, where rows lie on their device in their dtype; shape ``(c, k)``."""
        return self._sum(reductions.project_rows(basis, parts))

    def subtract_rows(self, parts: Tensor, coefficients: Tensor, basis: Tensor) -> None:
        """`subtract` for a few vectors together, likewise."""
        reductions.subtract_rows(parts, coefficients, basis)

    def _blocks(self, basis: Tensor, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The rows in a dtype and on a device: all at once if they are so already, else a few at a time."""
        at_once = len(basis) if (basis.dtype, basis.device) == (dtype, device) else _BLOCK // basis.shape[1]
        step = max(1, at_once)
        for start in range(0, max(1, len(basis)), step):
            rows = slice(start, start + step)
            yield rows, basis[rows].to(device, non_blocking=True).to(dtype)

    def _sum(self, tensor: Tensor) -> Tensor:
        owners = self._owners
        return tensor if owners is None else owners.sum(tensor)

    # ------------------------------------------------------------------------------------------------ agreement

    def agreed(self, *numbers: float, reduced: bool = False) -> list[float]:
        """Rank zero's numbers, where the course of the program depends on them.

        Args:
            numbers: This process' numbers.
            reduced: Whether they come from `dot`, `norm` and the like: of a basis that is shared out, all processes
                have the same ones anyway.
        """
        if self.processes is None or (reduced and self.sharded):
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return cast("list[float]", self.processes.from_first(own).tolist())

    def agreed_eigen(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Rank zero's eigendecomposition: another processor's rounding must not make another step."""
        if self.processes is None:
            return values, vectors
        both = self.processes.from_first(torch.cat([values.unsqueeze(0), vectors]))
        return both[0], both[1:]

    def agreed_point(self, vector: Tensor) -> Tensor:
        """Rank zero's version of a whole vector that every process has computed: the parameters after a step."""
        return vector if self.processes is None else self.processes.from_first(vector)


WHOLE = BasisStore()
"""Rows that are kept as vectors are."""
