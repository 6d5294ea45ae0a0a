"""The fused recurrence against the same equations written out, and against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import HessianOperator, Objective
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.recurrence import tanh_recurrence

from .cases import assert_close

T, B, H = 5, 3, 4


def written_out(inputs: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    states = []
    for given in inputs.unbind(0):
        start = torch.tanh(given + start @ weight.T)
        states.append(start)
    return torch.stack(states)


def arguments(length: int = T) -> list[Tensor]:
    shapes = [(length, B, H), (B, H), (H, H)]
    return [(0.7 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def scalar(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A nonlinear function of the states as a function of all arguments in one vector."""
    mixture = torch.linspace(-1, 1, tensors[0].numel(), dtype=torch.float64).view_as(tensors[0])

    def of(flat: Tensor) -> Tensor:
        pieces = flat.split([t.numel() for t in tensors])
        return (function(*(p.view_as(t) for p, t in zip(pieces, tensors, strict=True))) * mixture).sin().sum()

    return of


def flattened(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("length", [1, 2, T])
def test_states_gradients_and_second_derivatives_agree_with_finite_differences(length: int) -> None:
    tensors = arguments(length)
    torch.testing.assert_close(tanh_recurrence(*tensors), written_out(*tensors))
    assert torch.autograd.gradcheck(tanh_recurrence, tensors)
    assert torch.autograd.gradgradcheck(tanh_recurrence, tensors)


def test_inputs_may_lie_in_memory_as_batches_of_sequences() -> None:
    _, start, weight = arguments()
    inputs = torch.randn(B, T, H, dtype=torch.float64, requires_grad=True)

    def of_batches(batches: Tensor, start: Tensor, weight: Tensor) -> Tensor:
        return tanh_recurrence(batches.transpose(0, 1), start, weight)

    torch.testing.assert_close(of_batches(inputs, start, weight), written_out(inputs.transpose(0, 1), start, weight))
    assert torch.autograd.gradgradcheck(of_batches, [inputs, start, weight])


@pytest.mark.parametrize("length", [1, 2, T])
def test_the_hessian_is_that_of_the_equations_written_out(length: int) -> None:
    tensors = arguments(length)
    flat = flattened(tensors)
    expected = torch.autograd.functional.hessian(scalar(written_out, tensors), flat)
    for together in (False, True):
        actual = torch.autograd.functional.hessian(scalar(tanh_recurrence, tensors), flat, vectorize=together)
        assert_close(actual, expected, 1e-13)


def test_third_derivatives_are_right_as_well() -> None:
    """A penalty on the gradient is part of some losses; its Hessian is made of third derivatives."""
    tensors = arguments()
    probe = torch.linspace(-1, 1, flattened(tensors).numel(), dtype=torch.float64)
    results = []
    for function in (written_out, tanh_recurrence):
        flat = flattened(tensors).requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(function, tensors)(flat), flat, create_graph=True)
        (product,) = torch.autograd.grad(gradient @ probe, flat, create_graph=True)
        results.append(torch.autograd.grad(product.square().sum(), flat)[0])
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_arguments_without_a_gradient_are_constants(wanted: tuple[int, ...]) -> None:
    tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(arguments())]
    chosen = [tensors[i] for i in wanted]
    actual = dense_matrix(HessianOperator(Objective([lambda: tanh_recurrence(*tensors).square().sum()]), chosen))
    expected = dense_matrix(HessianOperator(Objective([lambda: written_out(*tensors).square().sum()]), chosen))
    assert_close(actual, expected, 1e-12)


def test_functorch_sees_through_it() -> None:
    tensors = [t.detach() for t in arguments()]
    flat = flattened(tensors)
    expected = torch.autograd.functional.hessian(scalar(written_out, tensors), flat)
    assert_close(torch.func.hessian(scalar(tanh_recurrence, tensors))(flat), expected, 1e-12)


def test_single_precision_is_as_accurate_as_the_equations_written_out() -> None:
    tensors = arguments(40)
    exact = torch.autograd.functional.hessian(scalar(written_out, tensors), flattened(tensors))[:, :7]

    def hessian_columns(function: Callable[..., Tensor]) -> Tensor:
        single = [t.detach().float() for t in tensors]
        of = scalar(lambda *a: function(*a).double(), single)
        columns = torch.eye(flattened(single).numel())[:7]
        return torch.stack([torch.autograd.functional.vhp(of, flattened(single), c)[1] for c in columns], 1)

    error, peer = (float((hessian_columns(f) - exact).norm()) for f in (tanh_recurrence, written_out))
    assert error <= 2 * peer
