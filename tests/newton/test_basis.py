"""Ways to hold a basis, in one process."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import SaddleFreeNewton
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.krylov import KrylovSubspace, lanczos

N = 4000


def subspace(monkeypatch: pytest.MonkeyPatch, block: int = 3 * N, **options: Any) -> KrylovSubspace:
    """The Krylov space of a diagonal matrix with outliers at both ends; rows come in blocks of three."""
    monkeypatch.setattr("lightning_sfn.newton.basis._BLOCK", block)
    values = torch.cat([torch.linspace(-0.1, 1.0, N - 3), torch.tensor([30.0, 10.0, -2.0])])
    start = torch.randn(N, generator=torch.Generator().manual_seed(0))
    store = BasisStore(working_dtype=torch.float32, **options)
    return lanczos(lambda v: v * values, start, 20, generator=torch.Generator().manual_seed(1), store=store)


def step_of(space: KrylovSubspace) -> Tensor:
    return space.lift(space.eigenvectors[0] / (space.eigenvalues.abs() + 0.5))


def test_bfloat16_halves_the_memory_and_loses_as_much_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, half = (subspace(monkeypatch, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.basis.dtype == torch.bfloat16
    assert 2 * half.basis.nbytes == whole.basis.nbytes
    loss = float((half.eigenvalues - whole.eigenvalues).abs().max() / 30)
    assert 1e-7 < loss < 1e-3
    assert 1e-4 < float((step_of(half) - step_of(whole)).norm() / step_of(whole).norm()) < 3e-2
    assert step_of(half).dtype == torch.float32


def test_residuals_of_a_bfloat16_basis_say_how_little_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    space = subspace(monkeypatch, dtype=torch.bfloat16)
    assert abs(float(space.eigenvalues[-1]) - 30) < float(space.residuals[-1])
    assert abs(float(space.eigenvalues[0]) + 2) < float(space.residuals[0])


def test_rows_by_blocks_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What crosses a bus, or is converted, comes a few rows at a time; the sums are the same to rounding."""
    by_three, at_once = (subspace(monkeypatch, block, dtype=torch.float64) for block in (3 * N, 10**9))
    torch.testing.assert_close(by_three.eigenvalues, at_once.eigenvalues, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(step_of(by_three), step_of(at_once), rtol=1e-4, atol=1e-6)


def test_the_cpu_is_where_it_is_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = subspace(monkeypatch, device=torch.device("cpu")), subspace(monkeypatch)
    assert torch.equal(there.basis, here.basis)
    assert torch.equal(step_of(there), step_of(here))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_basis_in_pinned_host_memory() -> None:
    vectors = torch.randn(5, N, device="cuda")
    store = BasisStore(device=torch.device("cpu"), working_dtype=torch.float32, working_device=vectors.device)
    basis = store.empty(5, vectors[0])
    assert basis.is_pinned()
    for row, vector in enumerate(vectors):
        store.keep(basis, row, vector)
    torch.testing.assert_close(store.project(basis, vectors[0]).float(), vectors @ vectors[0], rtol=1e-4, atol=1e-3)
    coefficients = torch.randn(5)
    torch.testing.assert_close(store.combine(coefficients, basis), coefficients.cuda() @ vectors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"basis": "sharded"}, {"basis_device": "cpu"}, {"basis_dtype": "bfloat16"}])
def test_the_optimizer_takes_the_options(options: dict[str, Any]) -> None:
    x = torch.tensor([1.0, 1e-3, 0.5], requires_grad=True)
    optimizer = SaddleFreeNewton([x], **options)
    for _ in range(12):
        optimizer.step(lambda: 5 * x[0] ** 2 - x[1] ** 2 + x[1] ** 4 + (x[2] * x[0]) ** 2)
    assert abs(float(x[1].detach())) == pytest.approx(0.5**0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "shared"}, "basis is 'shared', but 'replicated' or 'sharded' is expected."),
        ({"basis_device": "cuda"}, "basis_device is 'cuda', but 'cpu' or None (the parameters' device) is expected."),
        ({"basis_dtype": "int8"}, "basis_dtype is 'int8', but one of 'bfloat16', 'float32', 'float64' or None"),
        ({"basis_dtype": torch.int8}, "basis_dtype is torch.int8, but one of 'bfloat16', 'float32', 'float64' or None"),
    ],
)
def test_options_that_are_unknown_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SaddleFreeNewton([torch.ones(2, requires_grad=True)], **options)
