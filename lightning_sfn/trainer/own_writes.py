"""Parameters that a step changes itself: a teacher that follows the network, weights that it keeps normalised."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sfn.trainer.held_state import HeldState

__all__ = [
    "ParameterCopies",
    "UnforeseenWriteError",
    "UntrainedParameters",
    "foreseen",
    "moves_a_teacher",
    "noting_writes",
    "refusal",
    "refusing_writes",
]

Result = TypeVar("Result")

_CHANGES: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""Of each module, by name, whether its step changes a parameter; those that no evaluation tells about are left out."""


class UnforeseenWriteError(MisconfigurationException):
    """A replay changed a parameter that no evaluation before it had changed."""


class UntrainedParameters:
    """Puts back the parameters that a step changes though no optimizer trains them: those of a teacher.

    Copies of all of them for each evaluation would be too many, where a large network is frozen and a small one is
    trained. So the first evaluation, with copies in host memory, tells which ones the step changes; from then on only
    the submodules of these are copied.
    """

    def __init__(self, trainer: Trainer, module: nn.Module, unregistered: Sequence[nn.Module]) -> None:
        self._module = module
        self._known = _CHANGES.setdefault(module, {})
        untrained = list(_untrained(trainer, _named_parameters(module, unregistered)))
        self._kept = [_Kept(name, p, name not in self._known) for name, p in untrained if self._is_suspect(name)]
        self._steady = _Versions((name, p) for name, p in untrained if not self._is_suspect(name))

    def _is_suspect(self, name: str) -> bool:
        # A teacher that begins as a copy of the network changes wherever the network has: not everywhere at once.
        family = _child_of(name)
        return name not in self._known or any(c for n, c in self._known.items() if _child_of(n) == family)

    def restore(self) -> None:
        """Puts them back after an evaluation."""
        for kept in self._kept:
            self._known[kept.name] = kept.restore() or self._known.get(kept.name, False)
        suspects = [kept for kept in self._kept if self._is_suspect(kept.name)]
        if len(suspects) < len(self._kept):
            self._steady.add((kept.name, kept.parameter) for kept in self._kept if kept not in suspects)
            self._kept = suspects

    def require_no_others(self) -> None:
        """Checks that no other one was changed.

        Raises:
            UnforeseenWriteError: One was, for the first time, so that there is no copy of it.
        """
        names = self._steady.changed()
        if names:
            self._known.update(dict.fromkeys(names, True))
            raise UnforeseenWriteError(
                f"A replay of training_step of {type(self._module).__name__} changed {_listed(names)} in place, which "
                "no optimizer trains and no evaluation before it changed, so it cannot be put back: change it in "
                "on_train_batch_end, or keep it in buffers."
            )


def moves_a_teacher(module: nn.Module) -> bool:
    """Whether evaluations of a module's step change parameters that no optimizer trains, as far as is known."""
    return any(_CHANGES.get(module, {}).values())


def foreseen(trainer: Trainer, compute: Callable[[], Result]) -> Result:
    """Computes again, with copies, where an unforeseen write was found, as long as that finds others.

    Args:
        trainer: The Trainer. With several processes there is no second try, since the others do not know of it.
        compute: The computation, which leaves all parameters as they were, also where it fails.

    Returns:
        What it returns.
    """
    while True:
        try:
            return compute()
        except UnforeseenWriteError:
            if trainer.world_size > 1:
                raise


@contextmanager
def noting_writes(trainer: Trainer) -> Iterator[None]:
    """Notes which untrained parameters Lightning's own step, in the body, changes: its replays will do so as well."""
    module = trainer.lightning_module
    versions = _Versions(_untrained(trainer, _named_parameters(module, [])))
    yield
    _CHANGES.setdefault(module, {}).update(dict.fromkeys(versions.changed(), True))


@contextmanager
def refusing_writes(module: LightningModule, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Checks that an evaluation, in the body, leaves the parameters alone that are being trained.

    Raises:
        MisconfigurationException: It does not.
    """
    before = [_mark(p) for p in parameters]
    yield
    after = [_mark(p) for p in parameters]
    if after != before:
        changed = {id(p) for p, then, now in zip(parameters, before, after, strict=True) if now != then}
        raise refusal(module, [name for name, p in module.named_parameters() if id(p) in changed], "A Newton step")


def refusal(module: LightningModule, names: Sequence[str], who: str) -> MisconfigurationException:
    """The error of a step that changes parameters that are being trained."""
    return MisconfigurationException(
        f"{who} needs a training_step that leaves the parameters alone that are being trained, but that of "
        f"{type(module).__name__} changes {_listed(names)} in place: let it use a changed copy (as "
        "torch.nn.functional.normalize makes one), or change them in on_train_batch_end."
    )


class ParameterCopies:
    """Copies of all parameters of a module, in host memory; puts these back at the end of its context."""

    def __init__(self, module: nn.Module) -> None:
        self._known = _CHANGES.setdefault(module, {})
        self._kept = [_Kept(name, p, True) for name, p in _named_parameters(module, HeldState(module).unregistered)]

    def __enter__(self) -> "ParameterCopies":
        return self

    def __exit__(self, *exception: object) -> None:
        """Puts all parameters back."""
        self.restore()

    def restore(self) -> list[str]:
        """Puts all parameters back, bit for bit, and gives the names of those that had been changed."""
        changed = [kept.name for kept in self._kept if kept.restore()]
        self._known.update(dict.fromkeys(changed, True))
        return changed


class _Kept:
    """A parameter, and a copy of its values."""

    def __init__(self, name: str, parameter: nn.Parameter, on_host: bool) -> None:
        self.name, self.parameter = name, parameter
        self._place = parameter.detach()  # the same memory: a step may put other memory in its place (p.data = ...)
        self._copy = self._place.to("cpu" if on_host else self._place.device, copy=True)

    def restore(self) -> bool:
        """Puts the values back, and says whether they were others."""
        moved = self.parameter.data_ptr() != self._place.data_ptr()
        if moved:
            self.parameter.data = self._place
        copy = self._copy.to(self._place.device)
        if _same_bits(self._place, copy):
            return moved
        # Through the parameter's version counter: kept graphs that would be wrong now fail with a sentence of autograd.
        self._place.copy_(copy)
        return True


class _Versions:
    """Tells which of some parameters were changed in place, or got other memory, since it was made.

    Not seen is what is written through ``p.data`` without replacing it.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._noted: list[tuple[str, Tensor, tuple[int, int]]] = []
        self.add(named)

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._noted += [(name, p, _mark(p)) for name, p in named]

    def changed(self) -> list[str]:
        return [name for name, p, mark in self._noted if _mark(p) != mark]


def _mark(tensor: Tensor) -> tuple[int, int]:
    """What changes with a tensor's values: its version, and where they lie."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _named_parameters(module: nn.Module, unregistered: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Dense parameters of a module and of those that it holds without having registered them, each once."""
    seen = set()
    for place, held in enumerate((module, *unregistered)):
        for name, parameter in held.named_parameters(recurse=held is module):
            if id(parameter) not in seen and parameter.layout == torch.strided:
                seen.add(id(parameter))
                yield (name if held is module else f"{type(held).__name__}[{place}].{name}"), parameter


def _untrained(trainer: Trainer, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
    """Those parameters that no optimizer trains."""
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    every = list(named)
    if not any(id(p) in trained for _, p in every):  # copies in another precision stand in the places of all
        trained = {id(p) for _, p in every}
    yield from ((name, p) for name, p in every if not (p.requires_grad and id(p) in trained))


def _child_of(name: str) -> str:
    """The module's own attribute below which a parameter lies."""
    return name.partition(".")[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
