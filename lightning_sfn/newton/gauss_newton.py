"""The generalised Gauss-Newton matrix ``J' H_L J``: positive semidefinite wherever the loss is convex in the output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfn.newton.curvature import GraphOperator, evaluate_without_backward
from lightning_sfn.newton.diagnosis import differentiate, require_double_backward
from lightning_sfn.newton.jacobian import OutputJacobian
from lightning_sfn.newton.objective import ObjectiveError
from lightning_sfn.newton.substitution import FastSecondDerivatives

__all__ = ["GaussNewtonOperator"]


@dataclass(frozen=True)
class _OutputGraph:
    """What the products of one part need: dL/d(output) with its graph, and the output's Jacobian."""

    output_gradient: Tensor
    jacobian: OutputJacobian


class GaussNewtonOperator(GraphOperator[_OutputGraph]):
    """The exact generalised Gauss-Newton matrix of an objective (Schraudolph 2002).

    The closures return ``(loss, output)``, where the loss depends on the parameters through the output alone. ``J v``
    is the derivative of ``J'u`` by ``u`` (double backward), ``H_L`` the exact Hessian of the loss by the output.

    Args:
        objective: The objective; its closures return pairs.
        parameters: The parameters to differentiate by.
        retention: Whether graphs are kept between products.
        budget: Byte budget for kept graphs; 1 GiB if left out.

    Raises:
        ObjectiveError: At the first product: a closure gives no output, or the loss depends on parameters other than
            through the output.
    """

    _checked: frozenset[int] = frozenset()  # parts for which `_check_chain` was done

    def _build(self, index: int) -> _OutputGraph:
        with FastSecondDerivatives():
            evaluation = evaluate_without_backward(self.objective, index, self.parameters)
        output = evaluation.output
        if not isinstance(output, Tensor) or not output.requires_grad or not evaluation.loss.requires_grad:
            raise ObjectiveError(
                "curvature='gauss_newton' needs the model output with its graph: let the closure return the pair "
                "(loss, output), or use curvature='hessian'."
            )
        require_double_backward(evaluation.loss)
        (output_gradient,) = differentiate(evaluation.loss, output, create_graph=True, materialize_grads=True)
        if index not in self._checked:
            self._check_chain(evaluation.loss, output, output_gradient)
            self._checked |= {index}
        return _OutputGraph(output_gradient, OutputJacobian(output, self.parameters.tensors))

    def _check_chain(self, loss: Tensor, output: Tensor, output_gradient: Tensor) -> None:
        """J' dL/d(output) must be the whole gradient, or the matrix would belong to another function."""
        tensors = self.parameters.tensors
        whole = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        through = torch.autograd.grad(output, tensors, output_gradient.detach(), retain_graph=True, allow_unused=True)
        gradient = self.parameters.flatten(whole)
        missing = torch.linalg.vector_norm(gradient - self.parameters.flatten(through))
        if missing > 1e-3 * torch.linalg.vector_norm(gradient):
            raise ObjectiveError(
                "curvature='gauss_newton' needs a loss that depends on the parameters through the returned output "
                "alone, but part of its gradient goes another way (a penalty, a second head): return the whole output, "
                "or use curvature='hessian'."
            )

    def _matvec(self, vector: Tensor) -> Tensor:
        directions = self.parameters.directions(vector)
        total = torch.zeros_like(vector)
        for index, weight in enumerate(self.objective.weights):
            graph = self._graphs.get(index, self._build)
            forward = graph.jacobian.forward(directions)
            if forward is None or not graph.output_gradient.requires_grad:
                continue  # the output does not move, or the loss is linear in it
            (curvature,) = differentiate(graph.output_gradient, graph.jacobian.output, forward, retain_graph=True)
            total.add_(self.parameters.flatten(graph.jacobian.backward(curvature)), alpha=weight)
        return total
