import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sfn.newton import CurvatureError, HessianOperator, Objective, ObjectiveError
from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.parameters import FlatParameters

from .cases import (
    BATCH,
    CASES,
    DTYPES,
    INDEPENDENT_ROWS,
    assert_close,
    frozen_probes,
    make,
    quadratic,
    reference,
    symmetric,
    tolerance,
)
from .ranks import HalfShare

RETENTIONS = {
    "auto": {},
    "auto_tiny": {"budget": GraphBudget(2000)},
    "auto_zero": {"budget": GraphBudget(0)},
    "retain": {"retention": "retain"},
    "recompute": {"retention": "recompute"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_and_gradient_equal_the_dense_float64_hessian(name: str, dtype: torch.dtype) -> None:
    case, expected = make(name, dtype), reference(name)
    vectors = frozen_probes(3, case)
    operator = HessianOperator(Objective([case.closure]), case.parameters)
    loss, gradient = operator.loss_and_gradient()
    assert abs(loss - expected.loss) <= tolerance(dtype) * abs(expected.loss)
    assert_close(gradient, expected.gradient, tolerance(dtype))
    for vector in vectors:
        assert_close(operator.matvec(vector), expected.hessian @ vector.double(), tolerance(dtype))
    assert operator.products == 3


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_symmetric(name: str) -> None:
    case = make(name)
    operator = HessianOperator(Objective([case.closure]), case.parameters)
    u, v = torch.randn(2, operator.parameters.size, dtype=torch.float64)
    left, right = u @ operator.matvec(v), v @ operator.matvec(u)
    assert abs(float(left - right)) <= 1e-12 * float(operator.matvec(v).norm() * u.norm())


@pytest.mark.parametrize("name", INDEPENDENT_ROWS)
def test_uneven_micro_batches_equal_the_full_batch(name: str) -> None:
    case, expected = make(name), reference(name)
    cuts = [0, 1, 4, BATCH]
    rows = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    objective = Objective([case.part(r) for r in rows], weights=[r.stop - r.start for r in rows])
    operator = HessianOperator(objective, case.parameters)
    vector = torch.randn(operator.parameters.size, dtype=torch.float64)
    assert objective.value() == pytest.approx(expected.loss, rel=1e-12)
    assert_close(operator.loss_and_gradient()[1], expected.gradient, 1e-12)
    assert_close(gradient_of(objective, operator.parameters)[1], expected.gradient, 1e-12)
    assert_close(operator.matvec(vector), expected.hessian @ vector, 1e-10)


@pytest.mark.parametrize("options", RETENTIONS.values(), ids=RETENTIONS)
@pytest.mark.parametrize("name", ["mlp_classifier", "cnn_batchnorm_dropout"])
def test_retention_does_not_change_products(name: str, options: dict) -> None:
    case, expected = make(name), reference(name)
    vectors = frozen_probes(3, case)
    operator = HessianOperator(Objective([case.closure]), case.parameters, **options)
    for vector in vectors:
        assert_close(operator.matvec(vector), expected.hessian @ vector, 1e-10)
    assert_close(operator.loss_and_gradient()[1], expected.gradient, 1e-10)


@pytest.mark.parametrize("retention", ["retain", "recompute"])
def test_products_survive_evaluations_in_between(retention: str) -> None:
    """Batch norm changes its running statistics in place at each evaluation; kept graphs must not mind."""
    case, expected = make("cnn_batchnorm_dropout"), reference("cnn_batchnorm_dropout")
    (vector,) = frozen_probes(1, case)
    objective = Objective([case.closure])
    operator = HessianOperator(objective, case.parameters, retention=retention)
    operator.matvec(vector)
    objective.value()
    assert_close(operator.matvec(vector), expected.hessian @ vector, 1e-10)


@pytest.mark.parametrize(("retention", "evaluations"), [("retain", 1), ("recompute", 6)])
def test_a_retained_graph_is_reused(retention: str, evaluations: int) -> None:
    case = make("mlp")
    closure = mock.Mock(side_effect=case.closure)
    operator = HessianOperator(Objective([closure]), case.parameters, retention=retention)
    operator.loss_and_gradient()
    for _ in range(5):
        operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))
    assert closure.call_count == evaluations


def test_auto_measures_once_and_then_reuses() -> None:
    case, budget = make("mlp"), GraphBudget()
    closure = mock.Mock(side_effect=case.closure)
    for calls in (2, 3):  # the first operator measures, the second knows
        operator = HessianOperator(Objective([closure]), case.parameters, budget=budget)
        for _ in range(4):
            operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))
        assert closure.call_count == calls


def test_closing_drops_the_graphs() -> None:
    case = make("mlp")
    operator = HessianOperator(Objective([case.closure]), case.parameters, retention="retain")
    operator.loss_and_gradient()
    assert operator._graphs.retained == 1
    operator.close()
    assert operator._graphs.retained == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_a_quadratic_are_matrix_products(dtype: torch.dtype) -> None:
    matrix = symmetric(6, dtype=dtype)
    x = torch.randn(6, dtype=dtype, requires_grad=True)
    operator = HessianOperator(Objective([quadratic(matrix)(x)]), [x])
    vector = torch.randn(6, dtype=dtype)
    assert_close(operator.matvec(vector), matrix.double() @ vector.double(), tolerance(dtype))


def test_linear_and_unused_parameters_have_zero_rows() -> None:
    x, linear, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    operator = HessianOperator(Objective([lambda: (x**3).sum() + 2 * linear.sum()]), [x, linear, unused])
    assert operator.loss_and_gradient()[1].tolist() == [3, 3, 2, 2, 0, 0]
    assert operator.matvec(torch.ones(6)).tolist() == [6, 6, 0, 0, 0, 0]


def test_a_loss_linear_in_everything_has_a_zero_hessian() -> None:
    x = torch.ones(2, requires_grad=True)
    assert HessianOperator(Objective([lambda: 3 * x.sum()]), [x]).matvec(torch.ones(2)).tolist() == [0, 0]


def test_frozen_tied_and_non_contiguous_parameters() -> None:
    """f(w, u) = |W'W u|^2 with W tied in two places and stored transposed, next to a frozen bias."""
    weight = nn.Parameter(torch.arange(6.0, dtype=torch.float64).view(2, 3).T / 5)
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    vector = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return (w.T @ (w @ vector) + frozen).square().sum()

    operator = HessianOperator(Objective([lambda: loss(weight)]), [weight, frozen, weight])
    flat = weight.detach().clone().contiguous()
    hessian = torch.autograd.functional.hessian(loss, flat).reshape(6, 6)
    probe = torch.randn(6, dtype=torch.float64)
    assert_close(operator.matvec(probe), hessian @ probe, 1e-12)


def test_products_and_gradients_are_averaged_over_processes_once() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([lambda: (x**2).sum()], reduce=HalfShare()), [x])
    assert operator.matvec(torch.ones(2, dtype=torch.float64)).tolist() == [1, 1]
    loss, gradient = operator.loss_and_gradient()
    assert loss == 1.0
    assert gradient.tolist() == [1, 1]


def test_neither_products_nor_gradients_touch_grad_fields() -> None:
    case = make("mlp")
    operator = HessianOperator(Objective([case.closure]), case.parameters)
    operator.loss_and_gradient()
    operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))
    assert all(p.grad is None for p in case.parameters)


@pytest.mark.parametrize("of", [lambda o, p: HessianOperator(o, p).loss_and_gradient(), gradient_of])
def test_a_loss_without_graph_is_refused(of: Callable[..., object]) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ObjectiveError, match=r"without a graph.*remove \.detach\(\)"):
        of(Objective([lambda: (x**2).sum().detach()]), FlatParameters([x]))


class Cube(torch.autograd.Function):
    """x^3 with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def flash(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(x, x, x).square().mean()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (flash, ["_scaled_dot_product_flash_attention_for_cpu_backward", "SDPBackend.MATH", "hvp='finite_difference'"]),
        (lambda x: Cube.apply(x).square().sum(), ["once_differentiable", "hvp='finite_difference'"]),
        (lambda x: Cube.apply(x).sum(), ["once_differentiable", "hvp='finite_difference'"]),
    ],
    ids=["flash_attention", "once_differentiable", "once_differentiable_before_a_linear_loss"],
)
def test_operations_without_second_derivative_are_named(loss: Callable[[Tensor], Tensor], words: list[str]) -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    with pytest.raises(CurvatureError, match=r"^[^\n]+\.$") as refusal:
        HessianOperator(Objective([lambda: loss(x)]), [x]).matvec(torch.ones(12))
    assert all(word in str(refusal.value) for word in words), refusal.value
