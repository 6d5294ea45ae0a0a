"""BFGS in a Krylov subspace, on losses whose minima are known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import ObjectiveError
from lightning_sfn.newton.subspace_descent import KrylovSubspaceDescent

from .cases import bits

D = torch.float64


def test_krylov_subspace_descent_minimizes_a_quadratic_and_leaves_a_saddle() -> None:
    scales = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = KrylovSubspaceDescent([x], 3)
    for _ in range(2):
        optimizer.step(lambda: (scales * x**2).sum())
    assert float(x.detach().abs().max()) < 1e-6
    y = torch.tensor([1.0, 1e-3], dtype=torch.float64, requires_grad=True)
    KrylovSubspaceDescent([y], 2).step(lambda: 5 * y[0] ** 2 - y[1] ** 2 + y[1] ** 4)
    assert abs(abs(float(y[1].detach())) - 0.5**0.5) < 1e-3
    with pytest.raises(ValueError, match="krylov_dim is 0"):
        KrylovSubspaceDescent([y], 0)


def test_options_left_out_and_at_their_bounds() -> None:
    x = torch.tensor([3.0, 1.0], dtype=D, requires_grad=True)
    optimizer = KrylovSubspaceDescent([x])
    assert (optimizer.krylov_dim, optimizer.bfgs_steps, optimizer.curvature) == (20, 20, "hessian")
    for name in ("krylov_dim", "bfgs_steps"):
        with pytest.raises(ValueError, match=rf"^{name} is 0, but a positive number is expected\.$"):
            KrylovSubspaceDescent([x], **{name: 0})
        KrylovSubspaceDescent([x], **{name: 1})


def test_a_step_without_closure_is_refused() -> None:
    words = r"^step\(\) needs a closure that returns the loss with its graph: step\(lambda: loss\(\)\)\.$"
    with pytest.raises(ObjectiveError, match=words):
        KrylovSubspaceDescent([torch.ones(2, requires_grad=True)]).step()


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_error_in_any_call_leaves_the_parameters_as_they_were(failing: int) -> None:
    x, calls = torch.tensor([3.0, 1.0], requires_grad=True), 0
    before = bits([x])

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= failing + 1:
            raise KeyError("boom")
        return (x**4).sum()

    with pytest.raises(KeyError):
        KrylovSubspaceDescent([x], 2).step(closure)
    assert bits([x]) == before


def elsewhere(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
    """A quartic that is something else where it is not at the start."""
    x = torch.tensor([3.0, 1.0], dtype=D, requires_grad=True)
    start = x.detach().clone()
    return x, lambda: (x**4).sum() if torch.equal(x.detach(), start) else change((x**4).sum())


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss + 1000.0,
        lambda loss: loss - loss.detach() + 82.0,  # the loss at the start, and a slope
        lambda loss: loss - math.inf,
        lambda loss: loss * math.nan,
    ],
    ids=["higher", "level", "infinite", "nan"],
)
def test_a_step_that_does_not_lower_the_loss_is_not_taken(change: Callable[[Tensor], Tensor]) -> None:
    x, closure = elsewhere(change)
    before = bits([x])
    optimizer = KrylovSubspaceDescent([x], 2)
    assert float(optimizer.step(closure)) == 82.0
    assert bits([x]) == before
    assert optimizer._last is None


def test_the_last_step_joins_the_subspace() -> None:
    """With one Lanczos vector in two dimensions: a line search first, the whole plane then."""
    x = torch.tensor([1.0, 1.0], dtype=D, requires_grad=True)
    optimizer = KrylovSubspaceDescent([x], 1)
    loss = lambda: x[0] ** 2 + 10 * x[1] ** 2  # noqa: E731
    optimizer.step(loss)
    along = 1 - (1 + 10**2) / (2 * (1 + 10**3)) * torch.tensor([2.0, 20.0], dtype=D)
    torch.testing.assert_close(x.detach(), along, rtol=1e-6, atol=1e-9)
    optimizer.step(loss)
    assert float(x.detach().abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_the_loss_comes_in_the_dtype_of_the_parameters_and_no_global_random_number_is_drawn(dtype: torch.dtype) -> None:
    """All curvatures are one: the space is exhausted by its first vector, and filled with random ones."""
    x = torch.tensor([1.0, 2.0, 2.0], dtype=dtype, requires_grad=True)
    before = torch.get_rng_state()
    loss = KrylovSubspaceDescent([x], 3).step(lambda: (x**2).sum() / 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert (float(loss), loss.dtype, loss.shape) == (4.5, dtype, ())


class Listening(torch.optim.LBFGS):
    """Keeps what it is given, and stays where it is."""

    given: dict[str, Any]

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        super().__init__(params, **options)
        type(self).given = {"params": params, **self.defaults}

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize(
    ("curvatures", "sizes"),
    [([4.0, -0.5, 0.0], [4.0004, 0.5004, 0.0004]), ([0.0, 0.0, 0.0], [1e-4, 1e-4, 1e-4])],
    ids=["saddle", "flat"],
)
def test_coordinates_are_scaled_by_curvature_and_all_steps_are_remembered(
    curvatures: list[float], sizes: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The squared gradient in them is the sum of g_i^2 over the absolute curvatures; a ten-thousandth is the least."""
    monkeypatch.setattr(torch.optim, "LBFGS", Listening)
    x = torch.zeros(3, dtype=D, requires_grad=True)
    slope, matrix = torch.tensor([1.0, 2.0, 3.0], dtype=D), torch.tensor(curvatures, dtype=D)
    KrylovSubspaceDescent([x], 3, bfgs_steps=150).step(lambda: (slope * x + matrix * x**2 / 2).sum())
    given = Listening.given
    assert float(given["params"][0].grad.square().sum()) == pytest.approx(
        float((slope**2 / torch.tensor(sizes, dtype=D)).sum()), rel=1e-9
    )
    assert (given["max_iter"], given["history_size"], given["line_search_fn"]) == (150, 150, "strong_wolfe")
    assert (given["tolerance_grad"], given["tolerance_change"]) == (0.0, 1e-12)
