"""Out of memory: how to tell, whatever raised it."""

import torch

__all__ = ["is_out_of_memory"]

_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # what torch's CPU allocator says, on Linux and Windows


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATOR):
            return True
        error = error.__cause__
    return False
