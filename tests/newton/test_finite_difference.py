import pytest
import torch

from lightning_sfn.newton import FiniteDifferenceOperator, Objective

from .cases import CASES, DTYPES, assert_close, bits, frozen_probes, make, quadratic, reference, symmetric
from .ranks import HalfShare


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 2e-3)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_are_within_the_error_bound_of_the_dtype(name: str, dtype: torch.dtype, bound: float) -> None:
    case, expected = make(name, dtype), reference(name)
    vectors = frozen_probes(3, case)
    operator = FiniteDifferenceOperator(Objective([case.closure]), case.parameters)
    for vector in vectors:
        assert_close(operator.matvec(vector), expected.hessian @ vector.double(), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_length_of_the_vector_does_not_matter(dtype: torch.dtype) -> None:
    matrix = symmetric(5, dtype=dtype)
    x = torch.randn(5, dtype=dtype, requires_grad=True)
    operator = FiniteDifferenceOperator(Objective([quadratic(matrix)(x)]), [x])
    for length in (1e-12, 1.0, 1e12):
        vector = torch.randn(5, dtype=dtype) * length
        assert_close(operator.matvec(vector), matrix.double() @ vector.double(), 1e-3)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_parameters_of_any_size_are_moved_by_enough(size: float) -> None:
    """5e-3 would be next to nothing beside 1e4 in float32, whose spacing there is 1e-3."""
    matrix = symmetric(5, dtype=torch.float32)
    x = torch.full((5,), size, requires_grad=True)
    vector = torch.randn(5)
    product = FiniteDifferenceOperator(Objective([quadratic(matrix)(x)]), [x]).matvec(vector)
    assert_close(product, matrix.double() @ vector.double(), 2e-3)


def test_a_zero_vector_costs_nothing() -> None:
    operator = FiniteDifferenceOperator(Objective([pytest.fail]), [torch.ones(2, requires_grad=True)])
    assert operator.matvec(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_put_back_bit_for_bit(dtype: torch.dtype) -> None:
    case = make("mlp", dtype)
    case.parameters[0].data.mul_(1e3)
    case.parameters[1].data[0] = -0.0
    before = bits(case.parameters)
    operator = FiniteDifferenceOperator(Objective([case.closure]), case.parameters)
    operator.matvec(torch.randn(operator.parameters.size, dtype=dtype))
    assert bits(case.parameters) == before


@pytest.mark.parametrize("failing_call", [1, 2])
def test_parameters_are_put_back_when_the_closure_raises(failing_call: int) -> None:
    case, calls = make("mlp"), []
    before = bits(case.parameters)

    def closure() -> torch.Tensor:
        calls.append(bits(case.parameters))
        if len(calls) == failing_call:
            raise KeyError("broken")
        return case.closure()

    operator = FiniteDifferenceOperator(Objective([closure]), case.parameters)
    with pytest.raises(KeyError, match="broken"):
        operator.matvec(torch.randn(operator.parameters.size, dtype=torch.float64))
    assert calls[-1] != before  # it failed away from the origin
    assert bits(case.parameters) == before


def test_works_where_there_is_no_second_derivative() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(value: torch.Tensor, backend: torch.nn.attention.SDPBackend) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(value, value, value).square().mean()

    backends = torch.nn.attention.SDPBackend
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, backends.MATH), x.detach()).reshape(12, 12)
    operator = FiniteDifferenceOperator(Objective([lambda: loss(x, backends.FLASH_ATTENTION)]), [x])
    vector = torch.randn(12, dtype=torch.float64)
    assert_close(operator.matvec(vector), hessian @ vector, 1e-8)


def test_the_product_is_averaged_over_processes_once() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    operator = FiniteDifferenceOperator(Objective([lambda: (x**2).sum()], reduce=HalfShare()), [x])
    torch.testing.assert_close(operator.matvec(torch.ones(2, dtype=torch.float64)), torch.ones(2, dtype=torch.float64))


def test_the_step_can_be_chosen() -> None:
    """Central differences of a cubic's gradient are exact; those of a quartic err by h^2 f'''' v^3 / 6."""
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    operator = FiniteDifferenceOperator(Objective([lambda: (x**4).sum()]), [x], step=0.1)
    assert float(operator.matvec(torch.ones(1, dtype=torch.float64))) == pytest.approx(12 + 24 * 0.1**2 / 6, rel=1e-12)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_steps_that_are_not_positive_are_refused(step: float) -> None:
    with pytest.raises(ValueError, match=f"step is {step}.*positive"):
        FiniteDifferenceOperator(Objective([lambda: torch.ones(())]), [torch.ones(1, requires_grad=True)], step=step)
