"""Lanczos steps without a wait for the device: how often the host asks, and what happens where something comes up."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sfn.newton import KrylovSubspace, SaddleFreeNewton, krylov, lanczos, unattended
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.spectrum import hessian_spectrum
from lightning_sfn.newton.watch import Watch

from .cases import symmetric

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operations that hand a number of a tensor to the host, each a wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in WAITS
        return func(*args, **(kwargs or {}))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def waits(krylov_dim: int, **options: Any) -> int:
    matrix, start = symmetric(90, dtype=torch.float32), torch.randn(90)
    with Waits() as counter:
        lanczos(lambda v: matrix @ v, start, krylov_dim, generator=generator(), **options)
    return counter.count


def test_waiting_is_counted() -> None:
    with Waits() as counter:
        float(torch.ones(3).sum())
        bool(torch.ones(3).any())
    assert counter.count == 2


def test_lanczos_waits_as_often_for_many_vectors_as_for_few() -> None:
    assert waits(4) == waits(16) == waits(64) <= 8


def test_a_basis_in_lower_precision_waits_no_more() -> None:
    store = BasisStore(dtype=torch.bfloat16, working_dtype=torch.float32)
    assert waits(8, store=store) == waits(32, store=store) <= 8


def test_nothing_waits_between_two_products() -> None:
    matrix = symmetric(50)
    counter = Waits()
    seen = []

    def product(vector: Tensor) -> Tensor:
        seen.append(counter.count)
        return matrix @ vector

    with counter:
        lanczos(product, torch.randn(50, dtype=torch.float64), 20, generator=generator())
    assert len(set(seen)) == 1


def test_a_spectrum_and_a_newton_step_wait_as_often_for_many_vectors_as_for_few() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(20, 6), torch.randn(20, 4)

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    def of_spectrum(krylov_dim: int) -> int:
        with Waits() as counter:
            hessian_spectrum(loss, model.parameters(), krylov_dim)
        return counter.count

    def of_subspace(krylov_dim: int) -> int:
        # A rule without negative curvature asks nothing more where the larger subspace happens to see some.
        rule = {"trust_region": "damped_newton", "damping": 1e3}
        optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=krylov_dim, inner_steps=1, **rule)
        with Waits() as counter:
            optimizer.step(loss)
        return counter.count

    assert of_spectrum(4) == of_spectrum(16)
    assert of_subspace(4) == of_subspace(16)


def _early_end(size: int) -> Tensor:
    """A start vector in an invariant space of three dimensions."""
    start = torch.zeros(size, dtype=torch.float64)
    start[[3, 10, 20]] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return start


def orthogonality(space: KrylovSubspace) -> float:
    return float((space.basis @ space.basis.T - torch.eye(len(space.basis), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("deaf", [False, True])
def test_an_invariant_space_is_left_whether_the_host_hears_of_it_at_once_or_at_the_end(deaf: bool) -> None:
    values = torch.linspace(-1, 2, 40, dtype=torch.float64)
    with mock.patch.object(unattended, "Watch", lambda *a, **k: Watch(*a, **(k | {"deaf": deaf}))):
        space = lanczos(lambda v: values * v, _early_end(40), 40, generator=generator())
    assert len(space) == 40
    assert orthogonality(space) <= 1e-12
    torch.testing.assert_close(space.eigenvalues, values, rtol=0, atol=1e-12)
    assert space.products == (40 if not deaf else pytest.approx(77, abs=3))


@pytest.mark.parametrize("deaf", [False, True])
def test_a_product_that_is_not_finite_ends_it(deaf: bool) -> None:
    matrix, products = symmetric(30), []

    def product(vector: Tensor) -> Tensor:
        products.append(vector)
        image = matrix @ vector
        return image * torch.nan if len(products) == 4 else image

    with mock.patch.object(unattended, "Watch", lambda *a, **k: Watch(*a, **(k | {"deaf": deaf}))):
        space = lanczos(product, torch.randn(30, dtype=torch.float64), 10, generator=generator())
    assert space.projected.isnan().all()
    assert space.products == len(products) == (11 if deaf else 4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_numbers_whose_squares_leave_single_precision(scale: float) -> None:
    matrix = symmetric(5000, dtype=torch.float32)
    start = torch.randn(5000)
    expected = lanczos(lambda v: matrix @ v, start, 6, generator=generator())
    actual = lanczos(lambda v: matrix @ (scale * v), start, 6, generator=generator())
    torch.testing.assert_close(actual.eigenvalues / scale, expected.eigenvalues, rtol=1e-4, atol=1e-3)


def conditions(*values: bool) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("posted", "heard"), [(conditions(False, False), False), (conditions(False, True, False), True), ([], False)]
)
def test_a_watch_hears_of_a_condition_that_is_true(posted: list[Tensor], heard: bool) -> None:
    watch, deaf = (Watch(3, torch.device("cpu"), deaf=deaf) for deaf in (False, True))
    for condition in posted:
        watch.post(condition)
        deaf.post(condition)
    assert watch.raised() is heard
    assert not deaf.raised()


def test_a_watch_hears_each_condition_once_and_of_those_that_come_later() -> None:
    watch = Watch(4, torch.device("cpu"))
    heard = []
    for condition in conditions(False, True, False, True):
        watch.post(condition)
        heard += [watch.raised(), watch.raised()]
    assert heard == [False, False, True, False, False, False, True, False]


def test_nothing_is_heard_of_on_devices_that_cannot_be_asked() -> None:
    watch = Watch(1, torch.device("meta"))
    watch.post(torch.tensor(True))
    assert not watch.raised()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_watch_hears_of_a_condition_on_a_device_once_it_has_come() -> None:
    device = torch.device("cuda")
    watch = Watch(2, device)
    watch.post(torch.tensor(False, device=device))
    watch.post(torch.tensor(True, device=device))
    torch.cuda.synchronize()
    assert watch.raised()


@pytest.mark.parametrize("outlier", [2.0, 30.0, 1000.0, 5000.0])
def test_two_steps_at_a_time_are_as_accurate_as_steps_that_are_watched(outlier: float) -> None:
    """The recurrence equals the projected matrix, the basis is orthonormal, however far one eigenvalue lies outside."""
    values, start = torch.linspace(-0.3, 1.0, 20_000), torch.randn(20_000)
    values[17] = outlier
    mirror = torch.nn.functional.normalize(torch.randn(20_000), dim=0)

    def product(v: Tensor) -> Tensor:
        v = values * (v - 2 * (mirror @ v) * mirror)
        return v - 2 * (mirror @ v) * mirror

    def errors(basis: Tensor, projected: Tensor) -> tuple[float, float]:
        images = torch.stack([product(v) for v in basis]).double()
        exact = basis.double()
        deviation = exact @ exact.T - torch.eye(61, dtype=torch.float64)
        return float(deviation.abs().max()), float((exact @ images.T - projected).abs().max()) / outlier

    space = lanczos(product, start, 61, generator=generator())
    basis, projected = torch.empty(61, 20_000), torch.zeros(61, 61, dtype=torch.float64)
    basis[0] = start / start.norm()
    for j in range(61):
        leftover, coupling = krylov.lanczos_step(product, basis, projected, j)
        if j < 60:
            krylov.append(basis, projected, j + 1, leftover, coupling, generator())
    assert space.products == 61
    for ours, watched in zip(errors(space.basis, space.projected), errors(basis, projected), strict=True):
        assert ours <= max(3 * watched, 1e-6)
