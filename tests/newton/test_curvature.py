import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sfn.newton import CurvatureError, CurvatureOperator, HessianOperator, Objective, ObjectiveError
from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.graphs import GraphBudget, Retention
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ContributionError, ProcessMean
from lightning_sfn.newton.substitution import FastSecondDerivatives

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
from .ranks import HalfShare, Healthy

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
    for loss, gradient in (operator.loss_and_gradient(), gradient_of(objective, operator.parameters)):
        assert loss == pytest.approx(expected.loss, rel=1e-12)
        assert_close(gradient, expected.gradient, 1e-12)
    assert_close(operator.matvec(vector), expected.hessian @ vector, 1e-10)
    with mock.patch.object(operator, "_matvec", side_effect=AssertionError("one by one")):
        for _ in range(2):  # in one backward pass of graphs that are still there
            several = operator.matmat(torch.stack([vector, -vector]))
    assert_close(several, torch.stack([expected.hessian @ vector, -expected.hessian @ vector]), 1e-10)
    assert operator.products == 1 + 2 + 2


def parts_without_curvature() -> tuple[HessianOperator, list[int]]:
    """Half of the weight on parts that are linear in all that they see, around the one that is curved."""
    x, linear, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    closures = [
        lambda: 2 * linear.sum() + x.sum() - unused.sum(),
        lambda: (x**3).sum() + linear.sum(),
        lambda: 5 * x.sum(),
    ]
    return HessianOperator(Objective(closures, [1, 2, 1]), [x, linear, unused]), [3, 3, 0, 0, 0, 0]


def test_parts_without_curvature_add_nothing() -> None:
    operator, expected = parts_without_curvature()
    assert operator.matvec(torch.ones(6)).tolist() == expected
    with mock.patch.object(operator, "_matvec", side_effect=AssertionError("one by one")):
        several = operator.matmat(torch.stack([torch.ones(6), torch.zeros(6), torch.full((6,), 2.0)]))
    assert several.tolist() == [expected, [0] * 6, [2 * value for value in expected]]


def test_what_does_not_vectorise_once_is_not_tried_again() -> None:
    operator, expected = parts_without_curvature()
    with mock.patch.object(operator, "_batched", side_effect=RuntimeError("no batching rule")) as refused:
        for _ in range(2):
            assert operator.matmat(torch.ones(3, 6)).tolist() == [expected] * 3
    assert refused.call_count == 1


def test_a_product_in_room_that_is_there_already() -> None:
    operator, expected = parts_without_curvature()
    room = torch.full((6,), math.nan)
    product = operator.matvec_into(torch.ones(6), room)
    assert product.tolist() == expected
    assert product.data_ptr() == room.data_ptr()
    operator.matvec(torch.full((6,), 7.0))
    assert room.tolist() == expected


def test_kept_graphs_are_kept_without_the_values_of_their_gradients() -> None:
    operator, _ = parts_without_curvature()
    operator.loss_and_gradient()
    assert operator._graphs.retained == 3
    assert all(operator._graphs.get(index, mock.Mock()).gradient is None for index in range(3))


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


def recurrent(seed: int) -> tuple[nn.Module, Objective]:
    torch.manual_seed(seed)
    module, x = nn.RNN(4, 16, batch_first=True), torch.randn(3, 5, 4)
    return module, Objective([lambda: (module(x)[0] - 0.3).square().mean()] * 2)


@pytest.mark.parametrize("retention", ["retain", "recompute"])
def test_the_loss_is_bit_for_bit_the_one_that_trial_losses_are_compared_with(retention: Retention) -> None:
    """Other operations for the second derivative of a recurrence round otherwise."""
    substituted = []
    for seed in range(8):
        module, objective = recurrent(seed)
        operator = HessianOperator(objective, module.parameters(), retention=retention)
        loss, _ = operator.loss_and_gradient()
        assert loss == objective.value()
        with FastSecondDerivatives():
            substituted.append(objective.value() == loss)
    assert not all(substituted)


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
    assert gradient_of(operator.objective, operator.parameters)[1].tolist() == [3, 3, 2, 2, 0, 0]
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
    words = (
        r"^The closure returned a loss without a graph, but the loss must be differentiable: remove \.detach\(\), "
        r"\.item\(\) and torch\.no_grad\(\) from it\.$"
    )
    with pytest.raises(ObjectiveError, match=words):
        of(Objective([lambda: (x**2).sum().detach()]), FlatParameters([x]))


@pytest.mark.parametrize("of", [lambda o, p: HessianOperator(o, p).loss_and_gradient(), gradient_of])
@pytest.mark.parametrize("gradient", ["made", "changed", "replaced"])
def test_a_closure_that_calls_backward_is_refused(of: Callable[..., object], gradient: str) -> None:
    x = torch.ones(2, requires_grad=True)
    x.grad = None if gradient == "made" else torch.ones(2)

    def closure() -> Tensor:
        if gradient == "replaced":
            x.grad = torch.ones(2)
        else:
            x.sum().backward()
        return (x**2).sum()

    words = (
        r"^The closure called backward\(\) itself, but it must only return the loss with its graph: remove "
        r"loss\.backward\(\) from it \(a training loop that calls it by itself, as automatic optimization does, needs "
        r"SwitchToSFN, strategy='sfn' or SaddleFreeNewtonMixin\)\.$"
    )
    with pytest.raises(ObjectiveError, match=words):
        of(Objective([closure]), FlatParameters([x]))


@pytest.mark.parametrize("of", [lambda o, p: HessianOperator(o, p).loss_and_gradient(), gradient_of])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_closure_that_clears_gradients_is_none_that_calls_backward(of: Callable[..., Any], to_none: bool) -> None:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.full((2,), 3.0)

    def closure() -> Tensor:
        torch.optim.SGD([x]).zero_grad(to_none)
        return (x**2).sum()

    for _ in range(2):
        loss, gradient = of(Objective([closure]), FlatParameters([x]))
        assert (loss, gradient.tolist()) == (2.0, [2.0, 2.0])


def test_a_closure_that_clears_gradients_and_calls_backward_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    for to_none in (True, False):
        x.grad = torch.full((2,), 2.0)

        def closure(to_none: bool = to_none) -> Tensor:
            torch.optim.SGD([x]).zero_grad(to_none)
            (x**2).sum().backward()
            return (x**2).sum()

        with pytest.raises(ObjectiveError, match="called backward"):
            gradient_of(Objective([closure]), FlatParameters([x]))


# ------------------------------------------------------------------------------------------------ of any kind


class Diagonal(CurvatureOperator):
    """Knows one product, which is all that an operator has to know, and fails on a vector of zeros."""

    def _matvec(self, vector: Tensor) -> Tensor:
        if not vector.any():
            raise KeyError("nothing")
        return vector * torch.arange(1.0, len(vector) + 1.0)


def test_an_operator_needs_to_know_one_product_alone() -> None:
    x = torch.ones(2, requires_grad=True)
    operator = Diagonal(Objective([lambda: (x**2).sum()]), [x])
    assert operator.matvec(torch.ones(2)).tolist() == [1, 2]
    assert operator.matvec_into(torch.ones(2), torch.empty(2)).tolist() == [1, 2]
    for _ in range(2):
        assert operator.matmat(torch.tensor([[1.0, 1.0], [2.0, 3.0], [1.0, 0.0]])).tolist() == [[1, 2], [2, 6], [1, 0]]
    assert operator.products == 8
    assert operator.batch == 1
    loss, gradient = operator.loss_and_gradient()
    assert (loss, gradient.tolist()) == (2.0, [2.0, 2.0])


def test_a_product_that_fails_on_one_of_several_processes_is_nan_until_all_know() -> None:
    x, processes = torch.ones(2, requires_grad=True), Healthy()
    operator = Diagonal(Objective([lambda: (x**2).sum()], reduce=ProcessMean(processes)), [x])
    for product, shape in ((operator.matvec(torch.zeros(2)), (2,)), (operator.matmat(torch.zeros(3, 2)), (3, 2))):
        assert product.shape == shape
        assert bool(product.isnan().all())
    with pytest.raises(KeyError, match="nothing"):
        operator.objective.require_sound(product)


@pytest.mark.parametrize("far", [None, False, True])
def test_a_loss_that_is_not_finite_on_one_process_is_blamed_on_it_unless_far_away(far: bool | None) -> None:
    x = torch.ones(2, requires_grad=True)
    mean = ProcessMean(Healthy())
    options = {} if far is None else {"far": far}
    objective = Objective([lambda: (x * math.nan).sum()], reduce=mean)
    if far:
        loss, gradient = gradient_of(objective, FlatParameters([x]), **options)
        assert math.isnan(loss)
        assert bool(gradient.isnan().all())
    else:
        with pytest.raises(ContributionError, match="rank 0 of 2"):
            gradient_of(objective, FlatParameters([x]), **options)
    with pytest.raises(ContributionError, match="rank 0 of 2"):
        HessianOperator(objective, [x]).loss_and_gradient()


def test_an_evaluation_that_fails_on_one_of_several_processes_fails_with_its_own_error() -> None:
    x = torch.ones(2, requires_grad=True)
    objective = Objective([mock.Mock(side_effect=KeyError("boom"))], reduce=ProcessMean(Healthy()))
    with pytest.raises(KeyError, match="boom"):
        gradient_of(objective, FlatParameters([x]))


class Refusing(torch.autograd.Function):
    """Has no derivative at all."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        raise RuntimeError("derivative for aten::refusing is not implemented")


@pytest.mark.parametrize("of", [lambda o, p: HessianOperator(o, p).loss_and_gradient(), gradient_of])
def test_an_operation_without_a_derivative_is_named(of: Callable[..., object]) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(CurvatureError, match=r"^The operation aten::refusing has no second derivative"):
        of(Objective([lambda: Refusing.apply(x).sum()]), FlatParameters([x]))


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
