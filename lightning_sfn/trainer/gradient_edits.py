"""Hooks that change gradients: what they do to `.grad` is unknown to derivatives that are taken again."""

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

__all__ = ["warn_if_edited"]


def warn_if_edited(after_backward: Tensor, given: Tensor) -> None:
    """Warns if the gradient is no longer that of `backward` when the optimizer gets it.

    Rows that a hook holds by masking their gradient move in Newton steps, because Hessian-vector products, trial losses
    and later gradients of the same step come from replays, which run no hooks of the module.
    """
    if not torch.equal(after_backward, given):
        rank_zero_warn(
            "A hook (on_after_backward, on_before_optimizer_step or configure_gradient_clipping) changes "
            "gradients, which the curvature and the trial losses of Newton steps do not see, so that what it masks "
            "may move all the same: freeze by requires_grad=False or Tensor.register_hook, and clip by "
            "gradient_clip_val or max_grad_norm."
        )
