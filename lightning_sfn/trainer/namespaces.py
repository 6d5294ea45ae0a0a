"""`pytorch_lightning` and `lightning.pytorch` are one code under two names, whose classes do not know each other."""

from importlib import import_module
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping

__all__ = ["join_namespace"]

_OTHER = "lightning.pytorch"


def join_namespace(callback: Callback, trainer: Trainer) -> None:
    """Lets an `EarlyStopping` count as one for a Trainer of the other name as well.

    Such a Trainer calls its own `EarlyStopping` callbacks after the module's ``on_train_epoch_end``, and all others
    before it, where a metric logged there is one epoch old.

    Args:
        callback: The callback, an `EarlyStopping` of `pytorch_lightning`.
        trainer: The Trainer that it works for, of either name.
    """
    if not any(cls.__module__.startswith(_OTHER) for cls in type(trainer).__mro__):
        return
    own = import_module(f"{_OTHER}.callbacks").EarlyStopping
    cls = type(callback)
    if issubclass(cls, EarlyStopping) and not issubclass(cls, own):
        named = getattr(import_module("lightning_sfn.lightning"), cls.__name__, None)
        callback.__class__ = named if named is not None and named.__bases__[0] is cls else _joined(cls, own)


def _joined(cls: type, own: type) -> type:
    """Somebody's subclass of a callback, as a class of the other name too; what is pickled is of his class."""

    def reduce(self: Any, protocol: int) -> Any:
        return object.__new__, (cls,), self.__dict__

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, own), names | {"__reduce_ex__": reduce})
