"""`pytorch_lightning` and `lightning.pytorch` are one code under two names, whose classes do not know each other."""

from importlib import import_module

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
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        callback.__class__ = type(cls.__name__, (cls, own), names)
