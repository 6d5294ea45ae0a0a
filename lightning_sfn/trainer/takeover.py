"""The Newton optimizer that takes the place of a module's own, as callback and strategies make it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.trainer.support import require_curvature

__all__ = ["OptimizerFactory", "coupled_decay", "make_newton", "resting_groups"]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimizer from parameter groups: `SaddleFreeNewton` itself, or a `functools.partial` of it."""


def make_newton(make: OptimizerFactory, base: Optimizer, who: str) -> SaddleFreeNewton:
    """Makes the Newton optimizer over another one's parameters, with as many groups.

    Groups that are not meant to train (`resting_groups`) are empty. The other entries of the groups (momentum, names)
    come along for code that reads them.

    Args:
        make: Makes it.
        base: The optimizer whose place it takes.
        who: Name of what asks, for the message.

    Returns:
        The Newton optimizer.

    Raises:
        MisconfigurationException: It cannot be made, or it is no `SaddleFreeNewton` that can work here; or the other
            optimizer maximizes.
    """
    if any(group.get("maximize") for group in base.param_groups):
        raise MisconfigurationException(
            f"{who} got an optimizer with maximize=True, but saddle-free Newton minimizes what training_step returns: "
            "return the negated loss, and leave maximize out."
        )
    try:
        newton = make(
            [
                {"params": [] if rests else group["params"]}
                for group, rests in zip(base.param_groups, resting_groups(base), strict=True)
            ]
        )
    except (TypeError, ValueError) as error:  # Python's word for an option that there is not
        raise MisconfigurationException(f"{who} cannot make its optimizer: {str(error).rstrip('.')}.") from error
    if not isinstance(newton, SaddleFreeNewton):
        raise MisconfigurationException(
            f"{who} got an optimizer of class {type(newton).__name__}, but a SaddleFreeNewton is expected: "
            "pass functools.partial(SaddleFreeNewton, ...)."
        )
    require_curvature(newton.curvature, who)
    if newton.curvature != "hessian" and any(decay for _, decay in coupled_decay(base)):
        raise MisconfigurationException(
            f"{who} got curvature={newton.curvature!r} and an optimizer with weight decay, which is part of the "
            "objective but not a function of the model output: use curvature='hessian', or no weight decay."
        )
    _keep_entries(newton, base)
    return newton


def _keep_entries(newton: SaddleFreeNewton, base: Optimizer) -> None:
    """Copies what Newton's groups lack from the other optimizer's; it means nothing to a Newton step."""
    for name, value in base.defaults.items():  # for groups that are added later
        newton.defaults.setdefault(name, value)
    for group, other in zip(newton.param_groups, base.param_groups, strict=False):
        for name, value in other.items():
            group.setdefault(name, value)
        if "param_names" in other:  # one for each parameter
            group["param_names"] = list(other["param_names"]) if group["params"] else []


def resting_groups(optimizer: Optimizer) -> list[bool]:
    """Whether each parameter group has had a learning rate of zero from the beginning, as one that shall not train.

    A rate that a scheduler has led to zero says nothing about what shall train, and nor does a zero for all groups,
    which a warm-up may begin with.

    Args:
        optimizer: The optimizer whose place Newton's takes.
    """

    def rests(group: dict[str, Any]) -> bool:
        rate = float(group.get("lr", 1.0))
        return rate == 0.0 == float(group.get("initial_lr", rate))  # which schedulers keep in the group

    resting = [rests(group) for group in optimizer.param_groups]
    alone = all(rest or not group["params"] for rest, group in zip(resting, optimizer.param_groups, strict=True))
    return [False] * len(resting) if alone else resting


def coupled_decay(optimizer: Optimizer) -> list[tuple[Sequence[Tensor], float]]:
    """Pairs of parameters and weight decay that is part of the objective, by parameter group.

    AdamW's is not: it shrinks weights beside the gradient step.

    Args:
        optimizer: The optimizer whose place Newton's takes.
    """

    def decay(group: dict[str, Any]) -> float:
        decoupled = group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW)
        return 0.0 if decoupled else float(group.get("weight_decay", 0.0))

    return [(group["params"], decay(group)) for group in optimizer.param_groups]
