"""Lanczos steps without a wait for the device: how often the host asks, and what happens where something comes up."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sfn.newton import KrylovSubspace, SaddleFreeNewton, krylov, lanczos, unattended
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.reductions import SAFE_NORMS
from lightning_sfn.newton.spectrum import hessian_spectrum
from lightning_sfn.newton.unattended import Steps, Watch, is_invariant, unattended_steps

from .cases import symmetric
from .ranks import Alike

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


def test_a_watch_of_another_than_the_current_device_listens_to_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition counts as arrived once the work on its own device's stream is done."""
    done: set[Any] = set()

    class Event:
        def record(self, stream: Any = "stream of the current device") -> None:
            self.stream = stream

        def query(self) -> bool:
            return self.stream in done

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory, **others: zeros(*shape, **others))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    watch = Watch(1, torch.device("cuda", 1))
    watch.post(torch.tensor(True))
    done.add("stream of the current device")
    assert not watch.raised()
    done.add("stream of cuda:1")
    assert watch.raised()


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


# ------------------------------------------------------------------------------------------------ single steps

D = torch.float64
N = 30


def gram_schmidt(matrix: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The basis of a Krylov space, one row more than that, by a QR decomposition; and the matrix in it."""
    powers = [start / start.norm()]
    for _ in range(count):
        new = matrix @ powers[-1]
        for _ in range(3):
            new = new - torch.stack(powers).T @ (torch.stack(powers) @ new)
        powers.append(new / new.norm())
    basis = torch.stack(powers)
    return basis, basis @ matrix @ basis.T


def taken(
    first: int, last: int, *, rows: int = 0, matrix: Tensor | None = None, **options: Any
) -> tuple[Steps, Tensor, Tensor, int, int]:
    """Steps from row ``first`` to ``last``, rows and numbers that are right, products and shared orthogonalisations."""
    matrix = symmetric(N) if matrix is None else matrix
    right, projected = gram_schmidt(matrix, torch.linspace(1.0, 2.0, N, dtype=D), last)
    basis = torch.full((rows or last, N), torch.nan, dtype=D)
    basis[: first + 1] = right[: first + 1]
    recent = [right[first].clone()] + ([right[first - 1].clone()] if first else [])
    coupling = float(projected[first, first - 1]) if first else 0.0
    products = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ vector

    store = options.pop("store", BasisStore())
    with mock.patch.object(BasisStore, "project_rows", autospec=True, side_effect=BasisStore.project_rows) as pairs:
        steps = unattended_steps(product, basis, first, last, 1.0, coupling, store, recent, **options)
    assert steps.first == first
    count = min(last, rows or last)
    if steps.sound == last - first:
        torch.testing.assert_close(steps.diagonal, projected.diagonal()[first:last], rtol=0, atol=1e-12)
        torch.testing.assert_close(steps.couplings, projected.diagonal(1)[first:last], rtol=0, atol=1e-12)
        torch.testing.assert_close(basis[:count], right[:count], rtol=0, atol=1e-12)
        torch.testing.assert_close(steps.leftover, projected[last - 1, last] * right[last], rtol=0, atol=1e-11)
    return steps, basis, projected, products, pairs.call_count


@pytest.mark.parametrize(
    ("first", "last", "rows", "options", "pairs"),
    [
        (0, 1, 1, {}, 0),
        (0, 2, 2, {}, 0),  # there is no room for the vector of the second beside that of the first
        (0, 2, 3, {}, 0),  # the third row is not theirs
        (0, 2, 3, {"scratch": True}, 1),
        (0, 2, 2, {"scratch": True}, 0),
        (0, 5, 5, {}, 2),
        (0, 6, 6, {}, 2),
        (0, 6, 9, {}, 2),
        (0, 6, 7, {"scratch": True}, 3),
        (0, 6, 7, {"scratch": True, "by_twos": False}, 0),
        (1, 2, 4, {}, 0),
        (2, 7, 7, {}, 2),
        (3, 7, 8, {"scratch": True}, 2),
        (3, 7, 8, {"by_twos": False}, 0),
    ],
)
def test_steps_find_what_gram_schmidt_finds(
    first: int, last: int, rows: int, options: dict[str, bool], pairs: int
) -> None:
    steps, basis, _, products, shared = taken(first, last, rows=rows, **options)
    assert (len(steps), steps.sound, products) == (last - first, last - first, last - first)
    assert shared == pairs
    if not options.get("scratch"):
        assert bool(basis[last:].isnan().all())  # rows that they may not write to


def test_rows_of_lower_precision_take_one_step_at_a_time() -> None:
    matrix, start = symmetric(N, dtype=torch.float32), torch.nn.functional.normalize(torch.ones(N), dim=0)
    basis = torch.zeros(7, N, dtype=torch.bfloat16)
    basis[0] = start
    store = BasisStore(dtype=torch.bfloat16, working_dtype=torch.float32)
    with mock.patch.object(BasisStore, "project_rows", side_effect=AssertionError("two at a time")):
        steps = unattended_steps(lambda v: matrix @ v, basis, 0, 6, 1.0, 0.0, store, [start], scratch=True)
    assert len(steps) == 6
    assert (steps.diagonal.dtype, steps.couplings.dtype) == (D, D)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_numbers_of_the_first_steps_are_filled_in(count: int) -> None:
    steps = Steps(2, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0]), 4, torch.empty(0))
    projected = torch.zeros(7, 7)
    steps.fill(projected, count)
    expected = torch.zeros(7, 7)
    for step in range(count):
        expected[2 + step, 2 + step] = 1.0 + step
    for step in range(count - 1):
        expected[2 + step, 3 + step] = expected[3 + step, 2 + step] = 5.0 + step
    assert torch.equal(projected, expected)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize(("share", "invariant"), [(0.0, True), (4.0, True), (4.5, False), (100.0, False)])
def test_a_space_is_invariant_where_its_coupling_is_rounding(dtype: torch.dtype, share: float, invariant: bool) -> None:
    for scale in (1e-3, 1e3):
        assert is_invariant(share * torch.finfo(dtype).eps * scale, scale, dtype) == invariant


def chain(couplings: list[float]) -> Tensor:
    """A matrix of which the first unit vector makes a Krylov space of unit vectors, with these couplings."""
    matrix = torch.zeros(N, N, dtype=D)
    for j, coupling in enumerate(couplings):
        matrix[j, j + 1] = matrix[j + 1, j] = coupling
    return matrix


@pytest.mark.parametrize("by_twos", [True, False])
@pytest.mark.parametrize("deaf", [True, False])
@pytest.mark.parametrize(
    ("odd", "sound"),
    [
        (4500 * torch.finfo(D).eps, 8),
        (3500 * torch.finfo(D).eps, 2),
        (0.0, 2),
        (float(SAFE_NORMS[1]) * 2, 2),
        (float(SAFE_NORMS[1]) / 2, 8),
        (torch.nan, 2),
        (torch.inf, 2),
    ],
)
def test_steps_are_sound_up_to_one_that_needs_a_second_look(
    by_twos: bool, deaf: bool, odd: float, sound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host hears of it at once, or reads all numbers at the end."""
    monkeypatch.setattr(unattended, "Watch", lambda *a, **k: Watch(*a, **(k | {"deaf": deaf})))
    matrix = chain([1e3, 1e3, odd, 1e3, 1e3, 1e3, 1e3, 1e3, 1e3])
    basis = torch.zeros(9, N, dtype=D)
    basis[0, 0] = 1.0
    seen: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        seen.append(vector)
        support = vector != 0
        return matrix[:, support] @ vector[support]

    start = basis[0].clone()
    steps = unattended_steps(product, basis, 0, 8, 1.0, 0.0, BasisStore(), [start], by_twos=by_twos, scratch=True)
    assert steps.sound == sound
    assert len(steps) == (8 if sound == 8 or deaf else sound + 1)
    assert steps.couplings[:2].tolist() == [1e3, 1e3]


def six_steps(vector: int, share: float, by_twos: bool) -> tuple[Steps, Tensor]:
    """Steps along a chain whose product brings back so much of the first vector from another one, and their basis."""
    matrix, basis = chain([1.0] * 9), torch.zeros(7, N, dtype=D)
    basis[0, 0] = 1.0
    matrix[0, vector] = share
    start = [basis[0].clone()]
    steps = unattended_steps(
        lambda v: matrix @ v, basis, 0, 6, 1.0, 0.0, BasisStore(), start, by_twos=by_twos, scratch=True
    )
    return steps, basis


@pytest.mark.parametrize("by_twos", [True, False])
@pytest.mark.parametrize(("inside", "sound"), [(0.9, True), (1.0002, True), (1.0005, False), (1.1, False)])
def test_a_vector_of_which_orthogonalisation_leaves_little_needs_a_second_look(
    by_twos: bool, inside: float, sound: bool
) -> None:
    """An operator that is not symmetric brings back the vector before last: next to 1 of what is new, so much."""
    steps, _ = six_steps(3, inside, by_twos)
    assert steps.sound == (6 if sound else 3)


@pytest.mark.parametrize(("by_twos", "inside", "sound"), [(True, 5e-5, 6), (True, 2e-4, 3), (False, 2e-4, 6)], ids=str)
def test_two_steps_share_an_orthogonalisation_as_long_as_the_first_needs_little(
    by_twos: bool, inside: float, sound: int
) -> None:
    """The square of what it has to lose may be 1e-8: more spoils the second, which has gone on from it."""
    steps, basis = six_steps(2, inside, by_twos)
    assert steps.sound == sound
    torch.testing.assert_close(steps.couplings[:3], torch.ones(3, dtype=D), rtol=0, atol=1e-12)
    rows = basis[:sound]
    torch.testing.assert_close(rows @ rows.T, torch.eye(sound, dtype=D), rtol=0, atol=1e-12)


class Hearing(BasisStore):
    """Another process has found fewer steps sound."""

    def agreed(self, *numbers: float, reduced: bool = False) -> list[float]:
        assert numbers == (4,)
        assert reduced
        return [3.0]


def test_processes_agree_on_how_many_steps_are_sound_and_do_not_end_alone() -> None:
    basis = torch.zeros(5, N, dtype=D)
    basis[0, 0] = 1.0
    store = Hearing(Alike(), False)
    matrix = chain([1.0] * 9)
    steps = unattended_steps(lambda v: matrix @ v, basis, 0, 4, 1.0, 0.0, store, [basis[0].clone()])
    assert (len(steps), steps.sound) == (4, 3)
    matrix = chain([1.0, 0.0, 1.0, 1.0, 1.0])
    with mock.patch.object(Hearing, "agreed", lambda self, value, reduced: [value]):
        steps = unattended_steps(lambda v: matrix @ v, basis, 0, 4, 1.0, 0.0, store, [basis[0].clone()])
    assert (len(steps), steps.sound) == (4, 1)


def test_no_steps_need_no_product() -> None:
    """Where the numbers are asked for, there are none to read."""
    basis = torch.zeros(5, N, dtype=D)
    course = unattended._Course(mock.Mock(), basis, 2, 2, 1.0, 0.0, BasisStore(), [basis[2], basis[1]])
    assert not course.goes_on()


def test_the_largest_number_so_far_says_what_is_rounding() -> None:
    """A coupling of 1e-13 is one next to 1e-3 as the scale so far, and none next to 1e6 or to a diagonal element.

    One of less than 1e-15 has a square that single precision does not hold.
    """
    basis = torch.zeros(3, N, dtype=D)
    basis[0, 0] = 1.0
    for scale, element, coupling, sound in (
        (1e-3, 0.0, 1e-13, 2),
        (1e6, 0.0, 1e-13, 0),
        (1e-3, 1e6, 1e-13, 0),
        (1e-3, 0.0, 2e-15, 2),
        (1e-3, 0.0, 5e-16, 0),
    ):
        matrix = chain([coupling] * 3)
        matrix[0, 0] = element
        steps = unattended_steps(lambda v, m=matrix: m @ v, basis, 0, 2, scale, 0.0, BasisStore(), [basis[0].clone()])
        assert steps.sound == sound
