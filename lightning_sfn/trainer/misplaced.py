"""Options of `SaddleFreeNewton` that were given to a class that makes one: where they belong, in one sentence."""

import inspect
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.newton.optimizer import SaddleFreeNewton

__all__ = ["NamesMisplacedOptions"]


class NamesMisplacedOptions:
    """Refuses options of `SaddleFreeNewton` that a class does not have, before Python calls them unexpected.

    Raises:
        MisconfigurationException: There is such an option.
    """

    def __new__(cls, *_: Any, **options: Any) -> Any:
        """Looks at the names alone; the values are for ``__init__``."""
        own = inspect.signature(cls.__init__).parameters
        misplaced = [f"{name}={options[name]!r}" for name in options if name in _NEWTON and name not in own]
        if misplaced:
            given = ", ".join(misplaced)
            maker = cls.__name__ if "optimizer" in own else "SwitchToSFN"
            raise MisconfigurationException(
                f"{cls.__name__} was given {given}, which is for the optimizer: write "
                f"{maker}(optimizer=functools.partial(SaddleFreeNewton, {given}))."
            )
        return super().__new__(cls)


_NEWTON = set(inspect.signature(SaddleFreeNewton).parameters) - {"params"}
