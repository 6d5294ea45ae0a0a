"""Names of our strategies in Lightning's registry, without importing Lightning: it may come later, or never.

Lightning has entry points for callbacks, but none for strategies. So where it is imported already the names are added
at once, and else as soon as it is.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_strategies"]

_LIGHTNING = "pytorch_lightning.strategies"
_OTHER_NAME = "lightning.pytorch.strategies"  # the same code, whose classes are others
# Name: class, description, arguments.
_STRATEGIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "sfn": ("SFNStrategy", "Saddle-free Newton on one device", {}),
    "sfn_ddp": ("SFNDDPStrategy", "Saddle-free Newton on many devices", {"start_method": "popen"}),
    "sfn_ddp_spawn": ("SFNDDPStrategy", "The same, processes started by spawn", {"start_method": "spawn"}),
    "sfn_ddp_fork": ("SFNDDPStrategy", "The same, processes started by fork", {"start_method": "fork"}),
}


def register_strategies() -> None:
    """Makes ``Trainer(strategy="sfn_ddp")`` and the like work, now or as soon as Lightning is imported."""
    for name in (_LIGHTNING, _OTHER_NAME):
        if name in sys.modules:
            _register(sys.modules[name])
        elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(name))


def _register(strategies: ModuleType) -> None:
    for name, (kind, description, options) in _STRATEGIES.items():
        make = partial(_make if strategies.__name__ == _LIGHTNING else _refuse, kind)
        strategies.StrategyRegistry.register(name, make, description=description, override=True, **options)


def _make(kind: str, **options: Any) -> Any:
    return getattr(importlib.import_module("lightning_sfn.trainer.strategies"), kind)(**options)


def _refuse(kind: str, **_: Any) -> Any:
    raise TypeError(
        f"{kind} is for Trainers of pytorch_lightning, but this one is lightning.pytorch's: "
        "import Trainer from pytorch_lightning."
    )


class _Waiting(MetaPathFinder):
    """Finds Lightning's strategies as anyone would, and registers ours once they have been executed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], None] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
