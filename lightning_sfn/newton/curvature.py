"""Curvature operators: what answers gradient and matrix-vector questions about an objective.

`HessianOperator` is the exact Hessian by reverse-over-reverse differentiation (Pearlmutter 1994; the paper's L-op) on
retained gradient graphs. Its siblings `GaussNewtonOperator`, `FisherOperator`, `GradientCovarianceOperator` and
`FiniteDifferenceOperator` stand in files of their own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_sfn.newton.diagnosis import differentiate, require_double_backward
from lightning_sfn.newton.graphs import Graph, GraphBudget, GraphStore, Retention, root_of, towards
from lightning_sfn.newton.objective import Evaluation, Objective, ObjectiveError
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.substitution import FastSecondDerivatives

__all__ = ["CurvatureOperator", "GraphOperator", "HessianOperator", "gradient_of"]

_LARGEST_BATCH = 64


class CurvatureOperator(ABC):
    """A symmetric matrix over the flat parameters, known by its products with vectors.

    Args:
        objective: The loss as one fixed function of the parameters.
        parameters: The parameters to differentiate by.

    Attributes:
        products: Number of matrix-vector products computed so far.
        inaccuracy: Error of a product beyond rounding, relative to the largest eigenvalue; 0 where products are exact.
        is_hessian: Whether differences of the objective's gradients are products with it.
    """

    inaccuracy = 0.0
    is_hessian = False

    def __init__(self, objective: Objective, parameters: FlatParameters | Iterable[Tensor]) -> None:
        self.objective = objective
        self.parameters = parameters if isinstance(parameters, FlatParameters) else FlatParameters(parameters)
        self.products = 0
        objective.device = self.parameters.device

    def matvec(self, vector: Tensor) -> Tensor:
        """The product of the matrix with a vector.

        Args:
            vector: Shape ``(n,)``, dtype and device of the parameters.

        Returns:
            A vector of shape ``(n,)``, averaged over the processes that share the objective.

        Raises:
            CurvatureError: An operation of the model has no second derivative.
        """
        return self.objective.reduce(self.local_matvec(vector))

    def matvec_into(self, vector: Tensor, room: Tensor) -> Tensor:
        """`matvec`, perhaps in memory that is there already: fresh memory for large vectors costs time to map.

        Args:
            vector: Shape ``(n,)``.
            room: Shape ``(n,)``; its content is lost.

        Returns:
            The product, in ``room`` or elsewhere.
        """
        return self.matvec(vector)

    def local_matvec(self, vector: Tensor) -> Tensor:
        """This process' share of the product, before the mean over processes; NaN where it fails on one of several."""
        self.products += 1
        return self.objective.guarded(lambda: self._matvec(vector.detach()), vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products of the matrix with several vectors, together where the operator can do that.

        Args:
            vectors: Shape ``(c, n)``, one vector a row.

        Returns:
            The products, shape ``(c, n)``.

        Raises:
            CurvatureError: An operation of the model has no second derivative.
        """
        self.products += len(vectors)
        part = self.objective.guarded(lambda: self._matmat(vectors.detach()), vectors)
        return self.objective.reduce(part)

    @property
    def batch(self) -> int:
        """How many products `matmat` should be asked for at once, so that they fit into memory."""
        return 1

    @abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """This process' share of the product."""

    def _matmat(self, vectors: Tensor) -> Tensor:
        """This process' part of several products."""
        return torch.stack([self._matvec(vector) for vector in vectors])

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Loss and gradient of the objective at the present parameters.

        Returns:
            The loss, and the gradient of shape ``(n,)``.

        Raises:
            ObjectiveError: A part's loss has no graph.
        """
        return gradient_of(self.objective, self.parameters)

    def close(self) -> None:  # noqa: B027  (an operator that holds nothing has nothing to give back)
        """Gives back what the operator holds; call it before the parameters are changed."""


class GraphOperator(CurvatureOperator, Generic[Graph]):
    """An operator whose products take a graph of each part.

    Args:
        objective: The loss as one fixed function of the parameters.
        parameters: The parameters to differentiate by.
        retention: Whether graphs are kept between products: ``"auto"`` keeps as many as the budget allows.
        budget: Byte budget for kept graphs; 1 GiB if left out.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: FlatParameters | Iterable[Tensor],
        *,
        retention: Retention = "auto",
        budget: GraphBudget | None = None,
    ) -> None:
        super().__init__(objective, parameters)
        self._budget = budget or GraphBudget()
        self._graphs = GraphStore(objective.sizes, retention, self._budget, self.parameters.tensors, self._slimmed)

    @abstractmethod
    def _build(self, index: int) -> Graph:
        """The graph of one part."""

    @staticmethod
    def _slimmed(graph: Graph) -> Graph:
        """What of a new graph is worth keeping; static, since a bound method in the store would make a cycle."""
        return graph

    def close(self) -> None:
        """Drops the retained graphs."""
        self._graphs.clear()


@dataclass(frozen=True)
class _GradientGraph:
    """Loss and gradient of one part.

    Attributes:
        loss: The loss, without its graph.
        roots: Where the graph of the gradient by each parameter begins; ``None`` where it has none.
        gradient: The values, as long as they are at hand: as large as the parameters, and products need none of them.
        rounds_otherwise: Whether the loss is off from the closure's own by rounding (see `FastSecondDerivatives`).
    """

    loss: Tensor
    roots: tuple[GradientEdge | None, ...]
    gradient: tuple[Tensor, ...] | None
    rounds_otherwise: bool


class HessianOperator(GraphOperator[_GradientGraph]):
    """The exact Hessian of an objective by double backward.

    Args:
        objective: The loss as one fixed function of the parameters.
        parameters: The parameters to differentiate by.
        retention: Whether gradient graphs are kept between products: ``"auto"`` keeps as many as the budget allows.
        budget: Byte budget for kept graphs; 1 GiB if left out.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianOperator(Objective([lambda: 5 * x[0] ** 2 - x[1] ** 2]), [x])
        >>> hessian.matvec(torch.tensor([1.0, 1.0]))
        tensor([10., -2.])
    """

    is_hessian = True
    _batchable = True
    _room: Tensor | None = None  # memory for the next product

    def _build(self, index: int) -> _GradientGraph:
        """Loss and gradient of one part, the gradient with its graph."""
        with FastSecondDerivatives() as substitution:
            loss = _with_graph(evaluate_without_backward(self.objective, index, self.parameters).loss)
        require_double_backward(loss)
        gradient = differentiate(loss, self.parameters.tensors, create_graph=True, materialize_grads=True)
        return _GradientGraph(
            loss.detach(),
            tuple(map(root_of, gradient)),
            tuple(g.detach() for g in gradient),
            substitution.rounds_otherwise,
        )

    @staticmethod
    def _slimmed(graph: _GradientGraph) -> _GradientGraph:
        return replace(graph, gradient=None)

    def matvec_into(self, vector: Tensor, room: Tensor) -> Tensor:
        """See the base class."""
        self._room = room
        try:
            return self.matvec(vector)
        finally:
            self._room = None

    def _matvec(self, vector: Tensor) -> Tensor:
        total: Tensor | None = None
        directions = self.parameters.directions(vector)
        for index, weight in enumerate(self.objective.weights):
            roots, along = towards(self._graphs.get(index, self._build).roots, directions)
            if not roots:
                continue
            product = differentiate(roots, self.parameters.tensors, along, retain_graph=True, allow_unused=True)
            total = self.parameters.accumulate(total, product, weight, self._room)
        return torch.zeros_like(vector) if total is None else total

    @property
    def batch(self) -> int:
        """As many products as the budget has room for copies of the largest graph, 64 at most.

        More do not go faster. A graph whose bytes were never measured counts as a hundredth of the budget.
        """
        largest = (self._budget.bytes_per_size or 0.0) * max(self.objective.sizes)
        return max(1, min(_LARGEST_BATCH, int(self._budget.limit / (largest or self._budget.limit / 100 or 1.0))))

    def _matmat(self, vectors: Tensor) -> Tensor:
        """Products by one vectorised backward pass; one by one where an operation does not vectorise."""
        if self._batchable:
            try:
                return self._batched(vectors)
            except (RuntimeError, NotImplementedError):
                self._batchable = False
        return super()._matmat(vectors)

    def _batched(self, vectors: Tensor) -> Tensor:
        tensors = self.parameters.tensors
        pieces = torch.split(vectors, list(self.parameters.sizes), dim=1)
        directions = [piece.reshape(-1, *shape) for piece, shape in zip(pieces, self.parameters.shapes, strict=True)]
        total = torch.zeros_like(vectors)
        for index, weight in enumerate(self.objective.weights):
            roots, along = towards(self._graphs.get(index, self._build).roots, directions)
            if not roots:
                continue
            product = torch.autograd.grad(
                roots,
                tensors,
                grad_outputs=along,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            rows = [
                torch.zeros_like(direction) if column is None else column
                for column, direction in zip(product, directions, strict=True)
            ]
            total.add_(torch.cat([row.detach().reshape(len(vectors), -1) for row in rows], dim=1), alpha=weight)
        return total

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Loss and gradient, read off the graphs that the products use as well.

        Where those round otherwise than the closure, the loss is evaluated apart: trial losses are compared with it,
        and close to a loss of zero the difference is all that they would show.
        """

        def parts() -> Iterable[tuple[float, Tensor, tuple[Tensor, ...]]]:
            for index, weight in enumerate(self.objective.weights):
                graph = self._graphs.get(index, self._build)
                if graph.gradient is None:  # a product came first, and the values were let go
                    graph = self._build(index)
                assert graph.gradient is not None
                loss = self.objective.evaluate(index).loss.detach() if graph.rounds_otherwise else graph.loss
                yield weight, loss, graph.gradient

        return _average(self.objective, self.parameters, parts())


def gradient_of(objective: Objective, parameters: FlatParameters, *, far: bool = False) -> tuple[float, Tensor]:
    """Loss and gradient of an objective, part by part, no graph kept.

    Args:
        objective: The objective.
        parameters: The parameters to differentiate by.
        far: Whether the parameters are those of a trial, where the objective may overflow on some processes alone.

    Returns:
        The loss, and the gradient of shape ``(n,)``.

    Raises:
        ObjectiveError: A part's loss has no graph.
    """

    def parts() -> Iterable[tuple[float, Tensor, tuple[Tensor | None, ...]]]:
        for index, weight in enumerate(objective.weights):
            loss = _with_graph(evaluate_without_backward(objective, index, parameters).loss)
            gradient = differentiate(loss, parameters.tensors, allow_unused=True)
            yield weight, loss.detach(), gradient

    return _average(objective, parameters, parts(), far=far)


def _average(
    objective: Objective,
    parameters: FlatParameters,
    parts: Iterable[tuple[float, Tensor, tuple[Tensor | None, ...]]],
    *,
    far: bool = False,
) -> tuple[float, Tensor]:
    """Weighted mean of the parts' losses and gradients, over all processes."""
    total = torch.zeros((), dtype=torch.float64, device=parameters.device)
    gradient = torch.zeros(parameters.size, dtype=parameters.dtype, device=parameters.device)

    def accumulate() -> Tensor:
        for weight, loss, pieces in parts:
            total.add_(loss.double().to(total.device) * weight)
            gradient.add_(parameters.flatten(pieces), alpha=weight)
        return gradient

    gradient = objective.guarded(accumulate, gradient)
    loss, gradient = objective.reduce(total), objective.reduce(gradient)
    objective.require_sound(gradient, far=far)
    return float(loss), gradient


def evaluate_without_backward(objective: Objective, index: int, parameters: FlatParameters) -> Evaluation:
    """Evaluates a part, and refuses a closure that called ``backward`` on the way.

    Args:
        objective: The objective.
        index: Which part.
        parameters: The parameters whose ``.grad`` would give it away.

    Returns:
        The evaluation.

    Raises:
        ObjectiveError: A ``.grad`` was made or changed during the evaluation; one that was cleared is no matter.
    """
    before = [(p.grad, _version_of(p.grad)) for p in parameters.tensors]
    objective.device = parameters.device
    evaluation = objective.evaluate(index)
    if any(_is_accumulated(p.grad, *was) for p, was in zip(parameters.tensors, before, strict=True)):
        raise ObjectiveError(
            "The closure called backward() itself, but it must only return the loss with its graph: remove "
            "loss.backward() from it (a training loop that calls it by itself, as automatic optimization does, needs "
            "SwitchToSFN, strategy='sfn' or SaddleFreeNewtonMixin)."
        )
    return evaluation


def _version_of(gradient: Tensor | None) -> int:
    return 0 if gradient is None else gradient._version


def _is_accumulated(gradient: Tensor | None, before: Tensor | None, version: int) -> bool:
    """Whether ``backward`` has been at work, given the ``.grad`` from before with its version then."""
    if gradient is None or (gradient is before and gradient._version == version):
        return False
    cleared = gradient is before and gradient.layout == torch.strided and not gradient.any()
    return not cleared


def _with_graph(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise ObjectiveError(
            "The closure returned a loss without a graph, but the loss must be differentiable: remove .detach(), "
            ".item() and torch.no_grad() from it."
        )
    return loss
