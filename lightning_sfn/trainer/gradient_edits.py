"""Hooks that change gradients: what they do to `.grad` is unknown to derivatives that are taken again."""

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

__all__ = ["GradientEdits"]


class GradientEdits:
    """Sees, at one optimizer step, whether the gradient is still that of `backward` when the optimizer gets it.

    Rows that a hook holds by masking their gradient move in Newton steps, because Hessian-vector products, trial losses
    and later gradients of the same step come from replays, which run no hooks of the module.
    """

    def __init__(self) -> None:
        self._after_backward: Tensor | None = None
        self.over = False

    def note(self, gradient: Tensor) -> None:
        """Keeps the gradient as `backward` left it."""
        self._after_backward = gradient

    def compare(self, gradient: Tensor) -> None:
        """Warns if the gradient has been changed."""
        before, self._after_backward = self._after_backward, None
        if before is None or self.over:
            return
        self.over = True
        if not torch.equal(before, gradient):
            rank_zero_warn(
                "A hook (on_after_backward, on_before_optimizer_step or configure_gradient_clipping) changes "
                "gradients, which the curvature and the trial losses of Newton steps do not see, so that what it masks "
                "may move all the same: freeze by requires_grad=False or Tensor.register_hook, and clip by "
                "gradient_clip_val or max_grad_norm."
            )
