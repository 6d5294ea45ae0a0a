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
