"""What a module holds besides parameters: noted once, and put back after each evaluation of its `training_step`."""

import sys
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache, partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sfn.trainer.containers import CONTAINERS, copy_of, items_of, refill

__all__ = ["HeldState"]

_NUMBERS = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type)
_PLAIN = (*_NUMBERS, *_FUNCTIONS, *CONTAINERS, tuple, Enum, PurePath, np.ndarray, Tensor, nn.Module)
_LEAVES = frozenset((*_NUMBERS, *_FUNCTIONS, Tensor, nn.Parameter))  # exact types, for a fast answer about most values
_FOREIGN = sys.stdlib_module_names | {"torch", "lightning", "lightning_fabric", "pytorch_lightning"}
_NEUTRAL = ("object", "ABC", "Generic", "Protocol")  # bases that hold nothing themselves


class HeldState:
    """The attributes of a module and of all that it holds: submodules, containers, simple objects.

    Submodules count also where a list, a dictionary or an object holds them (metrics). An object is simple if its class
    is neither torch's, Lightning's nor Python's own and its attributes are numbers, strings, tensors, containers,
    modules, functions and objects of such classes: a meter is, what holds a file, a thread or a Trainer is not.

    Args:
        module: The module.

    Attributes:
        unregistered: Modules that it holds without having registered them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules: list[nn.Module] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor]] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []  # whether parameters are trained, which a step may set
        self._logs: list[tuple[dict[str, Any], str]] = []
        self._compiled: list[tuple[nn.Module, str, Tensor]] = []  # buffers of torch.jit, which are in no dictionary
        self._seen: set[int] = {id(module)}
        self._waiting: list[Any] = [module]
        while self._waiting:
            held = self._waiting.pop()
            if isinstance(held, CONTAINERS):
                self._contents.append((held, copy_of(held)))
                self._await(items_of(held))
            else:
                self._note(held)
        registered = set(module.modules())
        self.unregistered = [held for held in self._modules if held not in registered]

    def _await(self, values: Iterable[Any]) -> None:
        """Puts what is to be noted, among some values, on the list of what waits."""
        for value in values:
            if type(value) not in _LEAVES and id(value) not in self._seen and _is_noted(value):
                self._seen.add(id(value))
                self._waiting.append(value)

    def _note(self, held: Any) -> None:
        """Notes a module or an object."""
        attributes = held.__dict__
        self._attributes.append((attributes, attributes.copy()))
        self._note_tensors(attributes)
        if isinstance(held, nn.Module):
            self._modules.append(held)
            if isinstance(held, torch.jit.ScriptModule):
                self._compiled += [(held, name, buffer) for name, buffer in held.named_buffers(recurse=False)]
                self._await(held.children())
            else:
                self._note_tensors(attributes["_buffers"])
                self._flags += [(p, p.requires_grad) for p in attributes["_parameters"].values() if p is not None]
            if hasattr(held, "training_step"):
                self._logs += [(attributes, "log"), (attributes, "log_dict")]
        for name, value in attributes.items():
            if type(value) is tuple:
                self._await(value)
            elif type(value) is MethodType and _logs(value):
                self._logs.append((attributes, name))
        self._await(attributes.values())

    def _note_tensors(self, attributes: dict[str, Any]) -> None:
        """Notes where tensors stand, parameters apart: buffers and plain attributes."""
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not (
                value.requires_grad or isinstance(value, nn.Parameter) or is_lazy(value)
            ):
                self._tensors.append((attributes, name, value))

    def restore(self) -> None:
        """Puts everything back."""
        for attributes, values in self._attributes:
            attributes.clear()
            attributes.update(values)
        for container, copy in self._contents:
            if copy or container:  # most hooks of most modules are empty
                refill(container, copy)
        for module, name, buffer in self._compiled:
            setattr(module, name, buffer)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    def stand_in(self) -> None:
        """Puts copies in place of the tensors, which an evaluation may change, and silence in place of `log`."""
        copies: dict[int, Tensor] = {}
        for attributes, name, tensor in self._tensors:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.clone()
            attributes[name] = copies[id(tensor)]
        for module, name, buffer in self._compiled:
            setattr(module, name, buffer.clone())
        for attributes, name in self._logs:
            attributes[name] = _log_nothing


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `log` and `log_dict` in a replay."""


def _logs(method: MethodType) -> bool:
    """Whether a bound method is a module's `log`, kept to be called later."""
    return method.__name__ in ("log", "log_dict") and hasattr(method.__self__, "training_step")


def _is_noted(value: Any) -> bool:
    if isinstance(value, (*CONTAINERS, nn.Module)):
        return True
    return _is_own(value) and all(isinstance(held, _PLAIN) or _is_own(held) for held in value.__dict__.values())


def _is_own(value: object) -> bool:
    """Whether all of an object lies in its ``__dict__``, and somebody's own code wrote its class."""
    kind: Any = type(value)
    return _is_own_class(kind)


@lru_cache(maxsize=4096)
def _is_own_class(kind: type) -> bool:
    if "__dict__" not in dir(kind):
        return False
    bases = [base for base in kind.__mro__ if base.__name__ not in _NEUTRAL]
    return all(base.__module__.partition(".")[0] not in _FOREIGN and "__slots__" not in base.__dict__ for base in bases)
