"""A device that is not there: tensors whose values lie on the CPU, but that say they lie elsewhere, and insist on it.

As with CUDA, an operation on tensors of two devices is refused (tensors without dimensions and indices excepted), and a
generator draws for its own device alone. What runs here mixes no devices, whatever the real one is called. Each time
that a value is asked for on the CPU is counted: there the host would wait for a real device.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "Elsewhere", "elsewhere", "move"]

DEVICE = torch.device("meta")  # the one other device for which autograd starts no thread of its own

_aten = torch.ops.aten
_CROSSING = (_aten._to_copy.default, _aten.copy_.default)
_ASKING = (_aten._local_scalar_dense.default, _aten.nonzero.default)  # the host needs the answer to go on
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class Elsewhere(Tensor):
    """A tensor on `DEVICE`."""

    values: Tensor

    @staticmethod
    def __new__(cls: type["Elsewhere"], values: Tensor) -> "Elsewhere":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, values.size(), dtype=values.dtype, device=DEVICE, **layout)
        self.values = values
        return self

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.values!r})"

    def item(self) -> Any:
        _waits.append("item")
        return self.values.item()

    def tolist(self) -> Any:
        _waits.append("tolist")
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what no tensor of `DEVICE` takes part in too: what is made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Generator(torch.Generator):
    device = DEVICE


_drawing_elsewhere: dict[int, torch.Generator] = {}
_waits: list[str] = []


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    there = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)]
    target = _target(func, args, kwargs, there)
    if there and (target != DEVICE or func in _ASKING):
        _waits.append(str(func))
    own = {id(x.values): x for x in there}
    plain = tree_map(_inside, kwargs)
    if plain.get("device") is not None:
        plain["device"] = torch.device("cpu")
    result = func(*tree_map(_inside, args), **plain)
    if target != DEVICE:
        return result
    result = tree_map(lambda x: own.get(id(x)) if id(x) in own else _outside(x), result)
    if not there or func is _aten._to_copy.default:
        return result
    return return_and_correct_aliasing(func, args, kwargs, result)


def _target(func: Any, args: Any, kwargs: dict[str, Any], there: list[Elsewhere]) -> torch.device:
    """The device of the result; refuses what a real device refuses."""
    here = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, Elsewhere)]
    here = [x for x in here if x.dim() > 0]
    picks = func in _INDEXING and isinstance(args[0], Elsewhere)
    if there and here and not picks and func not in _CROSSING:
        raise RuntimeError(f"{func}: tensors of shapes {[tuple(x.shape) for x in here]} lie on the CPU, others do not.")
    if func is _aten.copy_.default:
        target = args[0].device
    elif kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
    else:
        target = DEVICE if there else torch.device("cpu")
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in _drawing_elsewhere) != (target == DEVICE):
        raise RuntimeError(f"{func}: the generator draws for another device than {target}.")
    return torch.device(target)


def _inside(x: Any) -> Any:
    return x.values if isinstance(x, Elsewhere) else x


def _outside(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, Tensor) else x


@contextmanager
def elsewhere() -> Iterator[list[str]]:
    """Tensors and generators for `DEVICE` can be made; gives the list of waits for it, to which each is added."""
    plain, is_autocast = torch.Generator, torch.is_autocast_enabled

    def generator(device: Any = "cpu") -> torch.Generator:
        made = _Generator() if torch.device(device) == DEVICE else plain()
        if isinstance(made, _Generator):
            _drawing_elsewhere[made._cdata] = made
        return made

    def autocast(device: str = "cpu") -> bool:
        return device != DEVICE.type and is_autocast(device)

    def without(device_type: str, **options: Any) -> Any:
        return nullcontext() if device_type == DEVICE.type else torch.amp.autocast(device_type, **options)

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(data, **options)  # torch's own makes it where no mode looks
        return made if device is None else made.to(device)

    make = torch.tensor
    _drawing_elsewhere.clear()
    _waits.clear()
    replaced = {"Generator": generator, "is_autocast_enabled": autocast, "autocast": without, "tensor": tensor}
    with mock.patch.multiple("torch", **replaced), _Mode():
        yield _waits


def move(model: nn.Module) -> nn.Module:
    """Moves a model's parameters and buffers to `DEVICE`."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer.detach())
    return model
