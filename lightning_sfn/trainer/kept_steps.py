"""Recorded steps in a checkpoint: batches as plain data, which ``torch.load(weights_only=True)`` opens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_structure, tree_unflatten, treespec_dumps, treespec_loads

from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.trainer.recording import RecordedStep

__all__ = ["is_plain", "pack_steps", "unpack_steps"]

_PLAIN = (Tensor, bool, int, float, str, bytes, type(None))


def pack_steps(steps: Sequence[RecordedStep]) -> list[dict[str, Any]] | None:
    """The steps as lists, dictionaries, tensors and numbers.

    Returns:
        One dictionary for each step; ``None`` if a batch holds anything but tensors, numbers and strings in Python's
        own containers.
    """
    packed = []
    for step in steps:
        leaves, structure = tree_flatten((step.args, step.kwargs))
        named = _name(structure)
        if named is None or not all(map(is_plain, leaves)):  # a container or a leaf of somebody's own class
            return None
        packed.append(
            {
                # Copies: a view would take the whole data set that it was cut from into the checkpoint.
                "leaves": [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves],
                "on_accelerator": [isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in leaves],
                "structure": named,
                "random_state": step.random_state.state_dict(),
            }
        )
    return packed


def unpack_steps(packed: Sequence[dict[str, Any]], device: torch.device) -> list[RecordedStep]:
    """The steps that `pack_steps` gave.

    Args:
        packed: What it gave.
        device: Where the tensors that were on an accelerator go.
    """
    steps = []
    for state in packed:
        pairs = zip(state["leaves"], state["on_accelerator"], strict=True)
        leaves = [leaf.to(device) if moved else leaf for leaf, moved in pairs]
        named = state["structure"]
        structure = treespec_loads(named) if isinstance(named, str) else tree_structure(named)
        args, kwargs = tree_unflatten(leaves, structure)
        steps.append(RecordedStep(args, kwargs, RandomState.from_state(state["random_state"]), None))
    return steps


def _name(structure: TreeSpec) -> Any:
    """A structure as plain data: as JSON, or as containers filled with numbers where JSON would change a key."""
    try:
        named = treespec_dumps(structure)
    except (NotImplementedError, TypeError):
        return None
    try:
        if treespec_loads(named) == structure:
            return named
    except TypeError:  # a key that JSON has made a list
        pass
    filled = tree_unflatten(range(structure.num_leaves), structure)
    return filled if is_plain(filled) else None


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold the value so that ``torch.load(weights_only=True)`` reads it."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    return type(value) in _PLAIN  # a subclass is a type of its own
