"""The covariance of the cases' gradients: what TONGA puts in the Hessian's place (Le Roux et al. 2007; Section 4)."""

import torch
from torch import Tensor

from lightning_sfn.newton.curvature import GraphOperator, evaluate_without_backward
from lightning_sfn.newton.diagnosis import require_double_backward
from lightning_sfn.newton.jacobian import OutputJacobian
from lightning_sfn.newton.objective import ObjectiveError
from lightning_sfn.newton.substitution import FastSecondDerivatives

__all__ = ["GradientCovarianceOperator"]

_SAME_LOSS = 1e-4  # relative difference of the loss and the mean of the cases' losses, rounding included


class GradientCovarianceOperator(GraphOperator[OutputJacobian]):
    """The uncentred covariance ``mean of g_i g_i'`` of the gradients of single cases.

    The closures return ``(loss, losses)``: the loss, and the losses of the cases (any shape) whose mean it is.

    Args:
        objective: The objective; its closures return pairs.
        parameters: The parameters to differentiate by.
        retention: Whether graphs are kept between products.
        budget: Byte budget for kept graphs; 1 GiB if left out.

    Raises:
        ObjectiveError: At the first product: a closure gives no losses of cases, or the loss is not their mean.

    Example:
        >>> import torch
        >>> from lightning_sfn.newton import Objective
        >>> x, data = torch.ones(1, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> closure = lambda: ((data * x).mean(), data * x)
        >>> GradientCovarianceOperator(Objective([closure]), [x]).matvec(torch.ones(1))  # (1 + 9) / 2
        tensor([5.])
    """

    def _build(self, index: int) -> OutputJacobian:
        with FastSecondDerivatives():
            evaluation = evaluate_without_backward(self.objective, index, self.parameters)
        losses = evaluation.output
        if not isinstance(losses, Tensor) or not losses.requires_grad:
            raise ObjectiveError(
                "curvature='gradient_covariance' needs the losses of the single cases with their graph: let the "
                "closure return the pair (loss, losses)."
            )
        mean = losses.detach().double().mean()
        if not bool((mean - evaluation.loss.detach()).abs() <= _SAME_LOSS * mean.abs()):
            raise ObjectiveError(
                f"curvature='gradient_covariance' needs a loss that is the mean of the cases' losses, but the loss is "
                f"{float(evaluation.loss.detach()):.6g} and their mean {float(mean):.6g}."
            )
        require_double_backward(evaluation.loss)
        return OutputJacobian(losses, self.parameters.tensors)

    def _matvec(self, vector: Tensor) -> Tensor:
        directions = self.parameters.directions(vector)
        total = torch.zeros_like(vector)
        for index, weight in enumerate(self.objective.weights):
            jacobian = self._graphs.get(index, self._build)
            slopes = jacobian.forward(directions)
            if slopes is None:
                continue
            product = jacobian.backward(slopes.detach() / slopes.numel())
            total.add_(self.parameters.flatten(product), alpha=weight)
        return total
