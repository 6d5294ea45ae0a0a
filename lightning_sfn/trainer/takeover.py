"""The Newton optimizer that takes the place of a module's own, as callback and strategies make it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.trainer.support import require_curvature

__all__ = ["OptimizerFactory", "coupled_decay", "make_newton"]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimizer from parameter groups: `SaddleFreeNewton` itself, or a `functools.partial` of it."""


def make_newton(make: OptimizerFactory, base: Optimizer, who: str) -> SaddleFreeNewton:
    """Makes the Newton optimizer over another one's parameters.

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
        newton = make([{"params": group["params"]} for group in base.param_groups])
    except ValueError as error:
        raise MisconfigurationException(f"{who} cannot make its optimizer: {error}") from error
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
    return newton


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
