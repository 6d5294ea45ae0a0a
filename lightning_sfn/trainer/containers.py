"""Plain containers: copies of their contents, and putting those back without replacing the container."""

from collections import OrderedDict, deque
from typing import Any

__all__ = ["CONTAINERS", "copy_of", "items_of", "refill"]

CONTAINERS = (list, dict, set, deque)
_BUILT_IN = frozenset((*CONTAINERS, OrderedDict))


def copy_of(container: Any) -> Any:
    """What `refill` puts back later into a list, dictionary, set or deque, or one of a class derived from these."""
    if type(container) in _BUILT_IN:
        return container.copy()
    # A class of its own may forbid its methods, or let them do something else, as model outputs do: ask its base.
    base: Any = _base(container)
    return list(base.items(container) if issubclass(base, dict) else base.__iter__(container))


def items_of(container: Any) -> Any:
    """What a container holds: the values of a dictionary, the members of the others."""
    if type(container) in _BUILT_IN:
        return container.values() if isinstance(container, dict) else container
    base: Any = _base(container)
    return list(base.values(container) if issubclass(base, dict) else base.__iter__(container))


def refill(container: Any, copy: Any) -> None:
    """Gives a container its old contents back."""
    base: Any = _base(container)
    base.clear(container)
    if base is OrderedDict:  # whose update would call the methods of the derived class
        for key, value in dict(copy).items():
            OrderedDict.__setitem__(container, key, value)
    elif base in (dict, set):
        base.update(container, copy)
    else:
        base.extend(container, copy)


def _base(container: Any) -> Any:
    """The built-in class whose methods reach the contents, whatever a derived class makes of them."""
    return next(base for base in (OrderedDict, *CONTAINERS) if isinstance(container, base))
