"""The precision of steps and spectra: that of the parameters, whatever arithmetic training chose for speed.

Who calls `step` inside of ``torch.autocast`` means the model: its loss is evaluated as asked for. Curvature, Lanczos
and steps are computed in the parameters' own precision, as they would be if the closure entered autocast itself.

Float32 can be less inside of matrix products, convolutions and recurrent layers, by switches of the whole process. What
that does to eigenvalues and to steps is measured (`docs/benchmarks.md`, "Rounded products"): with TF32, which is asked
for by ``torch.set_float32_matmul_precision("high")``, steps are about as good as without, so they leave it; the small
eigenvalues are not, so spectra do without; and bfloat16, which ``"medium"`` means on some processors, serves neither.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["Autocast", "full_precision", "rounds_to_bfloat16"]

_KNOWN = ("cpu", "cuda", "xpu", "mps", "hpu")  # to ask which accelerator there is would wake it
_MATMUL = ("highest", "high", "medium")
_OPERATIONS = ("matmul", "conv", "rnn")


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
def full_precision(*, tf32: bool = True) -> Iterator[None]:
    """Runs the body, or as a decorator the function, in the precision of its tensors.

    Args:
        tf32: Whether float32 products may be rounded to TF32 where the process allows it; never to bfloat16.
    """
    with ExitStack() as stack:
        for kind in _kinds():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_float32_products(tf32=tf32))
        yield


@contextmanager
def _float32_products(*, tf32: bool) -> Iterator[None]:
    """Runs the body with products of float32 that are, or of TF32; the process' switches come back.

    Torch has an older set of switches and a newer one (2.9), and does not answer by the older where the newer differ.
    So what the older ones have set is set by them here too.
    """
    coarse = ("bf16",) if tf32 else ("tf32", "bf16")
    switches = [(switch, switch.fp32_precision) for switch in _switches("cuda", "cpu")]
    if switches and not any(before in coarse for _, before in switches):
        yield
        return
    try:
        with _older_switches(tf32=tf32):
            for switch, before in switches:
                _put(switch, ("tf32" if tf32 else "ieee") if before in coarse else before)
            yield
    finally:
        for switch, before in switches:
            _put(switch, before)


@contextmanager
def _older_switches(*, tf32: bool) -> Iterator[None]:
    """Sets the older switches for the body, where they allow more rounding than it may have."""
    least = "high" if tf32 else "highest"
    with _undeprecated():
        matmul, cudnn = _matmul_precision(), not tf32 and _cudnn_allows_tf32()
        too_coarse = _MATMUL.index(matmul) > _MATMUL.index(least)
        if too_coarse:
            torch.set_float32_matmul_precision(least)
        if cudnn:
            torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        with _undeprecated():
            if too_coarse:
                torch.set_float32_matmul_precision(matmul)
            if cudnn:
                torch.backends.cudnn.allow_tf32 = True


@contextmanager
def _undeprecated() -> Iterator[None]:
    """Older switches are asked without the warning that some versions of torch have for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rounds_to_bfloat16() -> bool:
    """Whether the process lets operations on float32 numbers on the CPU be rounded to bfloat16."""
    if newer := _switches("cpu"):
        return any(switch.fp32_precision == "bf16" for switch in newer)
    return _matmul_precision() == "medium"


def _put(switch: Any, precision: str) -> None:
    """Sets a newer switch; one that reads like the switch above it follows that one again."""
    if switch.fp32_precision != precision:
        switch.fp32_precision = "none"
    if switch.fp32_precision != precision:
        switch.fp32_precision = precision


def _cudnn_allows_tf32() -> bool:
    """Whether the older switch of cuDNN allows TF32 in convolutions and recurrent layers."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by the newer ones
        return False


def _matmul_precision() -> str:
    """What the older switch of matrix products says; the exact one where only the newer have been set."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def _switches(*kinds: str) -> list[Any]:
    """The newer switches of kinds of devices, one for each operation; none before torch 2.9."""
    found = [_switch(kind, name) for kind in kinds for name in _OPERATIONS]
    return [switch for switch in found if hasattr(switch, "fp32_precision")]


def _switch(kind: str, operation: str) -> Any:
    if kind == "cpu":
        library: Any = torch.backends.mkldnn
    else:
        library = torch.backends.cuda if operation == "matmul" else torch.backends.cudnn
    return getattr(library, operation, None)


def _kinds() -> list[str]:
    """The kinds of devices that know mixed precision."""
    return [kind for kind in _KNOWN if torch.amp.is_autocast_available(kind)]
