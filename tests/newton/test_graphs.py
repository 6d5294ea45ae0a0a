import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

from lightning_sfn.newton import HessianOperator, Objective, SaddleFreeNewton, graphs
from lightning_sfn.newton.graphs import GraphBudget, GraphStore, root_of


def measured(limit: int, bytes_per_size: float) -> GraphBudget:
    budget = GraphBudget(limit)
    budget.bytes_per_size = bytes_per_size
    return budget


def test_measuring_counts_each_saved_storage_once_and_parameters_never() -> None:
    budget = GraphBudget()
    parameter = torch.ones(1000, requires_grad=True)

    def build() -> Tensor:
        activation = parameter * torch.ones(1000)  # saves the ones
        return activation * activation + activation.view(10, 100).square().sum()  # saves the activation

    budget.measure(build, 0.5, [parameter])
    assert budget.bytes_per_size == 2 * 4000 / 0.5


@pytest.mark.parametrize(
    ("limit", "weights", "kept"),
    [
        (100, [0.25] * 4, [True] * 4),
        (99, [0.25] * 4, [True, True, True, False]),
        (50, [0.6, 0.2, 0.2], [False, True, True]),
        (24, [0.25] * 4, [False] * 4),
        (0, [1.0], [False]),
    ],
)
def test_the_budget_is_never_exceeded(limit: int, weights: list[float], kept: list[bool]) -> None:
    assert measured(limit, 100.0).affordable(weights) == kept


@pytest.mark.parametrize(("limit", "retained"), [(100, 4), (60, 2), (10, 0)])
def test_the_store_holds_as_many_graphs_as_the_budget_allows(limit: int, retained: int) -> None:
    build = mock.Mock(side_effect=lambda index: f"graph {index}")
    store: GraphStore[str] = GraphStore([0.25] * 4, "auto", measured(limit, 100.0), [])
    for _ in range(3):
        assert [store.get(index, build) for index in range(4)] == [f"graph {index}" for index in range(4)]
    assert store.retained == retained
    assert build.call_count == retained + 3 * (4 - retained)
    store.clear()
    assert store.retained == 0


@pytest.mark.parametrize(("retention", "retained"), [("retain", 3), ("recompute", 0)])
def test_retain_and_recompute_ask_no_budget(retention: str, retained: int) -> None:
    budget = GraphBudget(0)
    store: GraphStore[int] = GraphStore([1.0] * 3, retention, budget, [])  # type: ignore[arg-type]
    assert [store.get(index, lambda index: index) for index in range(3)] == [0, 1, 2]
    assert store.retained == retained
    assert budget.bytes_per_size is None


def parts(count: int, x: Tensor) -> list:
    """Parts of one size: each saves about the same number of bytes."""
    return [lambda: (x * torch.ones(250)).sin().sum()] * count


def test_real_graphs_obey_the_budget() -> None:
    x = torch.ones(250, requires_grad=True)
    probe = GraphBudget()
    HessianOperator(Objective(parts(1, x)), [x], budget=probe).loss_and_gradient()
    assert probe.bytes_per_size is not None
    limit = int(2.5 * probe.bytes_per_size)
    operator = HessianOperator(Objective(parts(4, x)), [x], budget=GraphBudget(limit))
    operator.loss_and_gradient()
    assert operator._graphs.retained == 2


def test_a_budget_that_measured_a_small_objective_holds_for_a_larger_one() -> None:
    """An optimizer keeps its budget from step to step, while the number of micro-batches may change."""
    x = torch.ones(250, requires_grad=True)
    budget = GraphBudget()
    HessianOperator(Objective(parts(1, x)), [x], budget=budget).loss_and_gradient()
    assert budget.bytes_per_size is not None
    budget.limit = int(2.5 * budget.bytes_per_size)  # room for two such parts and a half
    operator = HessianOperator(Objective(parts(4, x)), [x], budget=budget)
    operator.loss_and_gradient()
    assert operator._graphs.retained == 2


def test_a_part_that_cannot_be_measured_fails_where_its_graph_is_asked_for_and_is_measured_later() -> None:
    build = mock.Mock(side_effect=[KeyError("the first"), "measured", "graph"])
    budget = GraphBudget()
    store: GraphStore[str] = GraphStore([1.0], "auto", budget, [])
    assert not build.called
    with pytest.raises(KeyError, match="the first"):
        store.get(0, build)
    assert budget.bytes_per_size is None
    assert store.get(0, build) == "graph"
    assert budget.bytes_per_size == 0.0


class Unmeasurable:
    """Builds graphs by a transform, which refuses the hooks that count what is saved."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0

    def __call__(self, index: int) -> str:
        self.calls += 1
        if self.error is not None:
            raise self.error
        torch.func.grad(torch.square)(torch.ones(()))
        return f"graph {index}"


def test_graphs_that_cannot_be_measured_are_built_again_each_time_and_tried_once() -> None:
    budget, build = GraphBudget(), Unmeasurable()
    for _ in range(2):
        store: GraphStore[str] = GraphStore([1.0, 3.0], "auto", budget, [])
        assert [store.get(index, build) for index in (0, 1, 1)] == ["graph 0", "graph 1", "graph 1"]
        assert store.retained == 0
    assert build.calls == 1 + 2 * 3


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (RuntimeError("a broken loss"), 2),
        (torch.OutOfMemoryError("full"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
        (ValueError("another"), 1),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_evaluated_raises_its_own_error_and_is_measured_later(
    error: Exception, calls: int
) -> None:
    """For want of memory above all: the step is tried again with fewer graphs only if it hears of that."""
    budget, build = GraphBudget(), Unmeasurable(error)
    with pytest.raises(type(error)) as raised:
        GraphStore([1.0], "auto", budget, []).get(0, build)
    assert raised.value is error
    assert build.calls == calls
    assert budget.bytes_per_size is None


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"graph_bytes is -1.*zero or more"):
        GraphBudget(-1)


def test_everything_is_kept_as_long_as_nothing_has_been_measured() -> None:
    assert GraphBudget(0).affordable([1.0, 5.0]) == [True, True]


@pytest.mark.parametrize("safe", [True, False])
def test_backward_passes_begin_at_a_root_without_the_tensor_where_that_is_safe(
    safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_EDGES_ARE_SAFE", safe)
    x = torch.tensor([2.0, -1.0], requires_grad=True)
    root = root_of((x**3).sum())
    assert root is not None
    assert isinstance(root, Tensor) is not safe
    assert torch.autograd.grad([root], [x])[0].tolist() == [12, 3]
    assert root_of(x.detach()) is None


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector of reference cycles: nothing but the last reference frees memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher", "gradient_covariance"])
@pytest.mark.parametrize("hvp", ["auto", "retain", "recompute"])
def test_data_and_graphs_of_a_step_are_gone_with_it(curvature: str, hvp: str) -> None:
    """A collector that counts Python objects does not run for want of a device's memory."""
    model = torch.nn.Linear(4, 3)
    options: dict[str, Any] = {"curvature": curvature, "hvp": hvp}
    optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=4, preconditioner=None, **options)

    def step() -> list[weakref.ref[Tensor]]:
        x, y = torch.randn(20, 4), torch.randint(3, (20,))
        seen = [weakref.ref(x)]

        def closure() -> Any:
            logits = model(x)
            seen.append(weakref.ref(logits))
            losses = F.cross_entropy(logits, y, reduction="none")
            others = {"gauss_newton": logits, "fisher": Categorical(logits=logits), "gradient_covariance": losses}
            return (losses.mean(), others[curvature]) if curvature in others else losses.mean()

        optimizer.step(closure)
        return seen

    alive = [tensor() is not None for tensor in step()]
    assert len(alive) > 2
    assert not any(alive)
