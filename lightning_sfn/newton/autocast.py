"""Automatic mixed precision around a step: a matter of the loss alone.

Who calls `step` inside of ``torch.autocast`` means the model. Curvature, Lanczos and steps are computed in the
parameters' own precision, as they would be if the closure entered autocast itself.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["Autocast", "without_autocast"]

_KNOWN = ("cpu", "cuda", "xpu", "mps", "hpu")  # to ask which accelerator there is would wake it


class Autocast:
    """Which kinds of devices compute in mixed precision where this is made, and in which dtype."""

    def __init__(self) -> None:
        self._dtypes = {kind: torch.get_autocast_dtype(kind) for kind in _kinds() if torch.is_autocast_enabled(kind)}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Runs the body in the same mixed precision, if there was any.

        Weights that were cast before are cast anew, and again after it: they may have been changed in between.
        """
        if not self._dtypes:
            yield
            return
        torch.clear_autocast_cache()
        try:
            with ExitStack() as stack:
                for kind, dtype in self._dtypes.items():
                    stack.enter_context(torch.autocast(kind, dtype))
                yield
        finally:
            torch.clear_autocast_cache()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Runs the body, or as a decorator the function, in the precision of its tensors."""
    with ExitStack() as stack:
        for kind in _kinds():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _kinds() -> list[str]:
    """The kinds of devices that know mixed precision."""
    return [kind for kind in _KNOWN if torch.amp.is_autocast_available(kind)]
