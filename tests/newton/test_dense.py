from typing import Any
from unittest import mock

import pytest
import torch

from lightning_sfn.newton import DiagonalPreconditioner, HessianOperator, Objective
from lightning_sfn.newton.dense import dense_matrix, full_space
from lightning_sfn.newton.processes import ProcessMean

from .cases import DTYPES, assert_close, frozen_probes, make, quadratic, reference, symmetric, tolerance
from .ranks import Alike


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout"])
def test_the_matrix_is_the_dense_hessian(name: str, dtype: torch.dtype) -> None:
    case = make(name, dtype)
    frozen_probes(1, case)
    matrix = dense_matrix(HessianOperator(Objective([case.closure]), case.parameters))
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix, matrix.T)
    assert_close(matrix, reference(name).hessian, tolerance(dtype))


def test_the_full_space_gives_all_eigenpairs() -> None:
    matrix = symmetric(6)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([quadratic(matrix)(x)]), [x])
    space = full_space(operator)
    torch.testing.assert_close(space.eigenvalues, torch.linalg.eigvalsh(matrix))
    for index, value in enumerate(space.eigenvalues):
        vector = space.ritz_vector(index)
        torch.testing.assert_close(matrix @ vector, value * vector)
    assert space.residuals.max() <= 1e-13
    assert space.products == operator.products == len(space) == 6


def test_each_column_takes_one_product_however_many_go_at_once() -> None:
    weights = torch.arange(1.0, 151.0, dtype=torch.float64)
    x = torch.ones(150, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([lambda: (weights * x**2).sum() / 2]), [x])
    assert operator.batch < 75
    assert torch.equal(dense_matrix(operator), torch.diag(weights))
    assert operator.products == 150


def test_a_preconditioner_scales_rows_and_columns() -> None:
    matrix = symmetric(6)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(Objective([quadratic(matrix)(x)]), [x])
    preconditioner = DiagonalPreconditioner()
    preconditioner.refresh(operator, torch.Generator().manual_seed(0))
    d = preconditioner.scale(torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(full_space(operator, preconditioner).projected, d[:, None] * matrix * d)


class Smaller(Alike):
    """The other process has room for three products at once."""

    def collect(self, value: Any) -> list[Any]:
        return [value, 3]


def test_processes_ask_for_as_many_products_at_once() -> None:
    matrix = symmetric(7)
    x = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    objective = Objective([quadratic(matrix)(x)], reduce=ProcessMean(Smaller(), 1.0))
    operator = HessianOperator(objective, [x])
    with mock.patch.object(operator, "matmat", side_effect=operator.matmat) as together:
        torch.testing.assert_close(dense_matrix(operator), matrix)
    assert [len(call.args[0]) for call in together.call_args_list] == [3, 3, 1]
