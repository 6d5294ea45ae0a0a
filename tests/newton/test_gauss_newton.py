import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import GaussNewtonOperator, Objective, ObjectiveError
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.graphs import GraphBudget

from .cases import (
    BATCH,
    CASES,
    DTYPES,
    INDEPENDENT_ROWS,
    assert_close,
    frozen_probes,
    gauss_newton_reference,
    make,
    reference,
    tolerance,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_equal_the_dense_matrix(name: str, dtype: torch.dtype) -> None:
    case, expected = make(name, dtype), gauss_newton_reference(name)
    vectors = frozen_probes(3, case)
    operator = GaussNewtonOperator(Objective([case.pair]), case.parameters)
    for vector in vectors:
        assert_close(operator.matvec(vector), expected @ vector.double(), tolerance(dtype))
    assert_close(operator.loss_and_gradient()[1], reference(name).gradient, tolerance(dtype))


@pytest.mark.parametrize("name", ["mlp", "mlp_classifier"])
def test_the_matrix_is_positive_semidefinite_where_the_hessian_is_not(name: str) -> None:
    case = make(name)
    matrix = dense_matrix(GaussNewtonOperator(Objective([case.pair]), case.parameters))
    lowest, highest = torch.linalg.eigvalsh(matrix)[[0, -1]].tolist()
    assert lowest >= -1e-14 * highest
    assert float(torch.linalg.eigvalsh(reference(name).hessian)[0]) < -1e-3 * highest


@pytest.mark.parametrize("name", INDEPENDENT_ROWS)
def test_uneven_micro_batches_equal_the_full_batch(name: str) -> None:
    case = make(name)
    rows = [slice(0, 5), slice(5, BATCH)]
    objective = Objective([case.part(r, pair=True) for r in rows], weights=[5, BATCH - 5])
    operator = GaussNewtonOperator(objective, case.parameters)
    vector = torch.randn(operator.parameters.size, dtype=torch.float64)
    assert_close(operator.matvec(vector), gauss_newton_reference(name) @ vector, 1e-10)
    assert_close(operator.loss_and_gradient()[1], reference(name).gradient, 1e-10)


@pytest.mark.parametrize(
    "options",
    [{"retention": "retain"}, {"retention": "recompute"}, {"budget": GraphBudget(0)}],
    ids=["retain", "recompute", "no budget"],
)
def test_retention_does_not_change_products(options: dict) -> None:
    case, expected = make("transformer"), gauss_newton_reference("transformer")
    vectors = frozen_probes(2, case)
    operator = GaussNewtonOperator(Objective([case.pair]), case.parameters, **options)
    for vector in vectors:
        assert_close(operator.matvec(vector), expected @ vector, 1e-10)
    operator.close()
    assert_close(operator.matvec(vector), expected @ vector, 1e-10)


def test_a_loss_linear_in_the_output_has_no_curvature() -> None:
    x = torch.ones(2, requires_grad=True)

    def closure() -> tuple[Tensor, Tensor]:
        output = x**2
        return output.sum(), output

    assert GaussNewtonOperator(Objective([closure]), [x]).matvec(torch.ones(2)).tolist() == [0, 0]


def test_an_output_linear_in_the_parameters_gives_the_hessian() -> None:
    x, features = torch.ones(2, requires_grad=True), torch.tensor([[1.0, 2.0], [3.0, -1.0]])

    def closure() -> tuple[Tensor, Tensor]:
        output = features @ x
        return (output**2).sum(), output

    matrix = dense_matrix(GaussNewtonOperator(Objective([closure]), [x]))
    torch.testing.assert_close(matrix, (2 * features.T @ features).double())


x = torch.ones(3, requires_grad=True)


def _without_output() -> Tensor:
    return (x**2).sum()


def _detached_output() -> tuple[Tensor, Tensor]:
    output = 2 * x
    return (output**2).sum(), output.detach()


def _penalty_beside_the_output() -> tuple[Tensor, Tensor]:
    output = 2 * x
    return (output**2).sum() + (x**2).sum(), output


def _output_of_another_forward_pass() -> tuple[Tensor, Tensor]:
    return ((2 * x) ** 2).sum(), 2 * x


@pytest.mark.parametrize(
    "closure", [_without_output, _detached_output, _penalty_beside_the_output, _output_of_another_forward_pass]
)
def test_a_loss_that_bypasses_the_output_is_refused(closure: object) -> None:
    with pytest.raises(ObjectiveError, match=r"^[^\n]*gauss_newton[^\n]*use curvature='hessian'[^\n]*\.$"):
        GaussNewtonOperator(Objective([closure]), [x]).matvec(torch.ones(3))  # type: ignore[list-item]


def _faint_penalty() -> tuple[Tensor, Tensor]:
    output = 2e-3 * x
    return (output**2).sum() + 1e-7 * (x**2).sum(), output


def _penalty_beside_a_steep_output() -> tuple[Tensor, Tensor]:
    output = 100 * x
    return (output**2).sum() + 1e-2 * (x**2).sum(), output


def test_the_share_of_the_gradient_that_goes_another_way_counts() -> None:
    """Of a gradient of length 1e-5 two and a half percent are too much; of one of 3e4 a millionth is rounding."""
    with pytest.raises(ObjectiveError, match="part of its gradient goes another way"):
        GaussNewtonOperator(Objective([_faint_penalty]), [x]).matvec(torch.ones(3))
    product = GaussNewtonOperator(Objective([_penalty_beside_a_steep_output]), [x]).matvec(torch.ones(3))
    torch.testing.assert_close(product, torch.full((3,), 2e4))


def test_a_part_whose_output_does_not_move_leaves_the_others_alone() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)

    def part(y: Tensor) -> object:
        return lambda: ((y**2).sum(), y)

    parts = [part(a[:1] * 3), part(b + 0 * a.sum().detach()), part(a[1:] * 5)]
    operator = GaussNewtonOperator(Objective(parts), [a, b])  # type: ignore[arg-type]
    torch.testing.assert_close(operator.matvec(torch.tensor([1.0, 0.0, 0.0])), torch.tensor([6.0, 0.0, 0.0]))
    torch.testing.assert_close(operator.matvec(torch.tensor([0.0, 1.0, 0.0])), torch.tensor([0.0, 50.0 / 3, 0.0]))
    torch.testing.assert_close(operator.matvec(torch.tensor([0.0, 0.0, 1.0])), torch.tensor([0.0, 0.0, 2.0 / 3]))


def test_a_linear_part_leaves_those_after_it_alone() -> None:
    y = torch.ones(2, requires_grad=True)

    def linear() -> tuple[Tensor, Tensor]:
        output = 2 * y
        return output.sum(), output

    def quadratic() -> tuple[Tensor, Tensor]:
        output = 1 * y
        return (output**2).sum(), output

    operator = GaussNewtonOperator(Objective([linear, quadratic]), [y])
    assert operator.matvec(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("retention", "evaluations"), [("retain", 1), ("recompute", 3), ("auto", 2)])
def test_retention_decides_how_often_the_closure_runs(retention: str, evaluations: int) -> None:
    """Once to measure the graph, where the budget decides."""
    count = 0

    def closure() -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        output = 2 * x
        return (output**2).sum(), output

    options = {} if retention == "auto" else {"retention": retention}
    operator = GaussNewtonOperator(Objective([closure]), [x], **options)  # type: ignore[arg-type]
    for _ in range(3):
        operator.matvec(torch.ones(3))
    assert count == evaluations


def test_the_chain_is_checked_once_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(GaussNewtonOperator, "_check_chain", lambda *_: checked.append(1))
    case = make("mlp")
    objective = Objective([case.part(rows, pair=True) for rows in (slice(0, 5), slice(5, BATCH))])
    operator = GaussNewtonOperator(objective, case.parameters, retention="recompute")
    for _ in range(3):
        operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))
    assert len(checked) == 2
