"""Whether a Krylov basis fits into memory, and how large one that fits can be."""

from pathlib import Path

import torch

from lightning_sfn.newton.basis import check_basis

__all__ = ["available_bytes", "basis_bytes", "require_room"]

_VECTORS = 16  # vectors of length n beside the basis: gradient, steps of the damping grid, trial points, images
_GIB = 2**30
_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, those that torch's allocator holds in reserve included.

    ``None`` where the system does not tell: only Linux has a number that counts what its caches would give back.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def basis_bytes(size: int, krylov_dim: int, basis_dtype: str | None) -> int:
    """Bytes of a basis of k Lanczos vectors and the past update, in float32 unless another dtype is named."""
    return size * (krylov_dim + 1) * (check_basis("replicated", basis_dtype, None) or torch.float32).itemsize


def require_room(
    size: int,
    krylov_dim: int,
    *,
    device: torch.device,
    basis_dtype: str | None = None,
    graphs: int = 0,
    available: int | None = None,
) -> None:
    """Refuses a basis that does not fit, before anything has been spent.

    Args:
        size: Number of parameters n.
        krylov_dim: Lanczos vectors k.
        device: Where the basis goes.
        basis_dtype: Its dtype; float32 if None.
        graphs: Bytes for kept graphs. At most half of the memory counts: where it runs short fewer graphs are kept.
        available: Bytes that are free; asked of the device if None, and nothing is refused if that does not tell.

    Raises:
        ValueError: It does not fit; the message says how large k can be.
    """
    available = available_bytes(device) if available is None else available
    if available is None:
        return
    room = available - min(graphs, available // 2) - 4 * size * _VECTORS
    needed = basis_bytes(size, krylov_dim, basis_dtype)
    if needed <= room:
        return
    largest = room // basis_bytes(size, 0, basis_dtype) - 1
    half = room // basis_bytes(size, 0, "bfloat16") - 1
    remedy = f"set krylov_dim to at most {largest}" if largest >= 1 else "free memory, or take another device"
    if basis_dtype is None and half > max(largest, 0):
        remedy += f" (up to {half} with basis_dtype=bfloat16)"
    raise ValueError(
        f"A basis of {krylov_dim} vectors of {size} parameters takes {needed / _GIB:.2f} GiB, but only "
        f"{max(room, 0) / _GIB:.2f} GiB of {available / _GIB:.2f} GiB free on {device} are left for it: {remedy}."
    )
