"""Which gradient graphs to keep: all of them while a byte budget lasts, the rest is built again for each product.

A Hessian-vector product on a kept graph costs one backward pass through it; without it, a forward and a backward pass
come on top (2.8 gradients in place of 1.8 on a deep autoencoder).
"""

import math
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_sfn.newton.shortage import is_out_of_memory

__all__ = ["GraphBudget", "GraphStore", "Retention", "root_of", "towards"]

Retention = Literal["auto", "retain", "recompute"]
"""``"retain"`` keeps every graph, ``"recompute"`` none, ``"auto"`` as many as the budget allows."""

Graph = TypeVar("Graph")


_EDGES_ARE_SAFE = torch.__version__ >= "2.13"  # in 2.6 one into a node with an undefined gradient ends the interpreter


def root_of(tensor: Tensor) -> GradientEdge | None:
    """Where backward passes from a tensor begin; ``None`` if it has no graph.

    From torch 2.13 on without the memory of its values, which `GraphBudget` does not count.
    """
    if not tensor.requires_grad:
        return None
    # Either is good as a root of `torch.autograd.grad`, which has no type for a mixture.
    return get_gradient_edge(tensor) if _EDGES_ARE_SAFE else cast("GradientEdge", tensor)


def towards(roots: Sequence[GradientEdge | None], along: Sequence[Tensor]) -> tuple[list[GradientEdge], list[Tensor]]:
    """The roots that there are, with their directions: what is linear in a parameter has none there."""
    both = [(root, direction) for root, direction in zip(roots, along, strict=True) if root is not None]
    return [root for root, _ in both], [direction for _, direction in both]


class GraphBudget:
    """How many bytes kept graphs may take, and how many one part takes.

    The bytes of a graph are measured once, on a graph that is thrown away, and scaled by the parts' sizes later:
    hooks that count would slow down each product if they stayed on the graphs in use.

    Args:
        limit: Bytes that the kept graphs of one operator may take together.

    Raises:
        ValueError: The limit is negative.
    """

    def __init__(self, limit: int = 2**30) -> None:
        if limit < 0:
            raise ValueError(f"graph_bytes is {limit}, but a number of bytes of zero or more is expected.")
        self.limit = limit
        self.bytes_per_size: float | None = None

    def measure(self, build: Callable[[], object], size: float, excluded: Sequence[Tensor]) -> None:
        """Counts the bytes that one part's graph saves for backward, storages of ``excluded`` left out."""
        known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            if tensor.layout != torch.strided:
                return tensor.detach()  # a sparse gradient, refused with its own message later
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                count += storage.nbytes()
            return tensor.detach()  # the tensor itself would tie a reference cycle through its own node

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            build()
        self.bytes_per_size = count / size

    def affordable(self, sizes: Sequence[float]) -> list[bool]:
        """Which parts, in order, may keep their graphs (all, as long as nothing has been measured)."""
        left = float(self.limit)
        kept = []
        for size in sizes:
            cost = (self.bytes_per_size or 0.0) * size
            kept.append(cost <= left)
            if kept[-1]:
                left -= cost
        return kept


class GraphStore(Generic[Graph]):
    """The graphs of the parts of one objective.

    Args:
        sizes: Sizes of the parts, in cases or in any unit that objectives share.
        retention: Which graphs to keep.
        budget: The byte budget that ``"auto"`` keeps to.
        excluded: Tensors that exist anyway (the parameters) and do not count.
        slimmed: What of a new graph is kept; all of it if left out.
    """

    def __init__(
        self,
        sizes: Sequence[float],
        retention: Retention,
        budget: GraphBudget,
        excluded: Sequence[Tensor],
        slimmed: Callable[[Graph], Graph] = lambda graph: graph,
    ) -> None:
        self._sizes, self._retention, self._budget, self._excluded = sizes, retention, budget, excluded
        self._slimmed = slimmed
        self._keep: list[bool] | None = None  # which graphs, once the first is asked for
        self._kept: dict[int, Graph] = {}

    def get(self, index: int, build: Callable[[int], Graph]) -> Graph:
        """The graph of a part, kept or built now.

        Args:
            index: Which part.
            build: Builds the graph of a part. It is no attribute of the store: the operator's own method there would
                make a cycle, which keeps data and graphs in memory until the garbage collector happens to run.

        Returns:
            The graph.
        """
        if index in self._kept:
            return self._kept[index]
        unmeasured = self._keep is None and not self._measure(build)
        graph = build(index)  # a loss that cannot be evaluated at all says so itself here
        if unmeasured:
            self._budget.bytes_per_size = math.inf  # larger than any limit, so that none is kept
        if self._keep is None:
            alike = [self._retention == "retain"] * len(self._sizes)
            self._keep = self._budget.affordable(self._sizes) if self._retention == "auto" else alike
        if self._keep[index]:
            self._kept[index] = self._slimmed(graph)
        return graph

    def _measure(self, build: Callable[[int], Graph]) -> bool:
        """Measures a graph if the budget asks for it; whether what torch does inside the loss let it.

        A part that has to be measured is built here, not where the store is made: here whoever asks for a graph
        is prepared for an evaluation that fails, on one process of several too.
        """
        if self._retention != "auto" or self._budget.bytes_per_size is not None:
            return True
        try:
            self._budget.measure(lambda: build(0), self._sizes[0], self._excluded)
        except RuntimeError as error:
            # Transforms of torch.func refuse hooks on saved tensors, by errors of these very classes.
            if type(error) not in (RuntimeError, NotImplementedError) or is_out_of_memory(error):
                raise
            return False
        return True

    @property
    def retained(self) -> int:
        """Number of graphs held now."""
        return len(self._kept)

    def clear(self) -> None:
        """Drops every graph, and with it the memory that it held."""
        self._kept.clear()
