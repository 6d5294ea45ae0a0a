"""Ways to hold a basis."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfn.newton import SaddleFreeNewton
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.krylov import KrylovSubspace, lanczos
from lightning_sfn.newton.processes import Processes

from .ranks import on_ranks

N = 4000
D = torch.float64
RANKS, SIZE = 3, 7  # parts of three entries, of which the last one has two of padding


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


# ------------------------------------------------------------------------------------------------ dtypes and devices

META = torch.device("meta")


def test_rows_have_the_dtype_and_the_device_of_the_store_or_else_of_the_vectors() -> None:
    vector = torch.ones(3)
    own = BasisStore().empty(2, vector)
    assert (own.shape, own.dtype, own.device) == ((2, 3), torch.float32, vector.device)
    assert BasisStore().empty(2, vector.to(META)).device == META
    told = BasisStore(dtype=torch.bfloat16, device=META).empty(2, vector)
    assert (told.shape, told.dtype, told.device) == ((2, 3), torch.bfloat16, META)


def test_a_row_is_computed_with_in_working_dtype_and_on_the_working_device() -> None:
    row = torch.ones(3, dtype=torch.bfloat16)
    assert BasisStore().working(row) is row
    there = BasisStore(working_dtype=torch.float64, working_device=META).working(row)
    assert (there.dtype, there.device) == (torch.float64, META)
    assert BasisStore(working_dtype=torch.float64).working(row).tolist() == [1, 1, 1]


@pytest.mark.parametrize("divided", [False, True])
def test_a_row_is_returned_itself_where_nothing_was_lost_by_keeping_it(divided: bool) -> None:
    store, part = BasisStore(), torch.tensor([1.0, 3.0])

    def kept(basis: Tensor) -> Tensor:
        if divided:
            return store.keep_divided(basis, 1, part, torch.tensor(3.0, dtype=D))
        return store.keep(basis, 1, part / 3)

    same = torch.zeros(2, 2)
    assert kept(same).data_ptr() == same[1].data_ptr()
    torch.testing.assert_close(same, torch.tensor([[0, 0], [1 / 3, 1]]))
    half = torch.zeros(2, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(kept(half), part / 3)
    torch.testing.assert_close(half[1], (part / 3).bfloat16())
    elsewhere = kept(torch.zeros(2, 2, device=META))
    torch.testing.assert_close(elsewhere, part / 3)


@pytest.mark.parametrize(("block", "rows"), [(1, 1), (7, 1), (8, 2), (13, 3), (100, 25)])
def test_rows_that_are_to_be_converted_come_a_few_at_a_time(
    block: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as make up so many entries, at least one; all together where nothing is to be done."""
    monkeypatch.setattr("lightning_sfn.newton.basis._BLOCK", block)
    basis, store = torch.randn(6, 4), BasisStore()
    pieces = list(store._blocks(basis, D, basis.device))
    assert [len(piece) for _, piece in pieces] == [len(part) for part in torch.split(basis, rows)]
    assert torch.equal(torch.cat([piece for _, piece in pieces]), basis.double())
    assert torch.equal(torch.cat([basis[where] for where, _ in pieces]), basis)
    assert len(list(store._blocks(basis, basis.dtype, basis.device))) == 1
    assert [piece.device for _, piece in store._blocks(basis, basis.dtype, META)] == [META] * len(pieces)
    assert [len(list(store._blocks(basis[:few], D, basis.device))) for few in (0, 1)] == [1, 1]


# ------------------------------------------------------------------------------------------------ parts of vectors


def _vectors() -> Tensor:
    return torch.randn(4, SIZE, dtype=D, generator=torch.Generator().manual_seed(0))


def _on_a_rank() -> dict[str, Any]:
    """What a sharded basis of three vectors gives, and a fourth vector that is not in it."""
    processes, vectors, coefficients = Processes(), _vectors(), torch.tensor([[1.0, -2.0, 0.5]], dtype=D)
    store, mine = BasisStore(processes, sharded=True), processes.rank + 1 / 3
    basis, parts = store.empty(3, vectors[0]), store.local(vectors)
    for row in range(3):
        store.keep(basis, row, store.local(vectors[row]))
    part, left, both = store.local(vectors[3]), store.local(vectors[3]), store.local(vectors[2:])
    store.subtract(left, coefficients[0], basis)
    store.subtract_rows(both, coefficients.expand(2, 3), basis)
    whole = BasisStore(processes)
    return {
        "basis": basis,
        "parts": parts,
        "is a copy": part.untyped_storage().data_ptr() != vectors.untyped_storage().data_ptr(),
        "one": store.whole(part, SIZE),
        "several": store.whole(parts, SIZE),
        "shared out": [store.is_shared_out, whole.is_shared_out],
        "dot": store.dot(part, parts[0]),
        "lengths": [float(store.length(part)), store.norm(part), store.norm(1e-30 * part)],
        "project": store.project(basis, part),
        "project rows": store.project_rows(basis, parts[2:]),
        "combine": store.whole(store.combine(coefficients, basis), SIZE),
        "subtract": store.whole(left, SIZE),
        "subtract rows": store.whole(both, SIZE),
        "anywhere": store.anywhere(torch.arange(SIZE) == processes.rank),
        "anywhere, replicated": whole.anywhere(torch.arange(SIZE) == processes.rank),
        "agreed": [store.agreed(mine, 2.0, reduced=True), store.agreed(mine, 2.0), whole.agreed(mine, reduced=True)],
        "eigen": store.agreed_eigen(torch.full((2,), mine, dtype=D), torch.full((2, 2), -mine, dtype=D)),
        "point": store.agreed_point(torch.full((SIZE,), mine, dtype=D)),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(RANKS, _on_a_rank)


def test_each_rank_keeps_a_part_and_together_they_are_the_vectors(ranks: list[dict[str, Any]]) -> None:
    padded = torch.nn.functional.pad(_vectors(), (0, 2))
    for rank, found in enumerate(ranks):
        expected = padded[:, 3 * rank : 3 * rank + 3]
        assert torch.equal(found["parts"], expected)
        assert torch.equal(found["basis"], expected[:3])
        assert found["is a copy"]
        assert torch.equal(found["one"], _vectors()[3])
        assert torch.equal(found["several"], _vectors())
        assert found["shared out"] == [True, False]


def test_arithmetic_on_parts_is_that_on_whole_vectors(ranks: list[dict[str, Any]]) -> None:
    vectors, coefficients = _vectors(), torch.tensor([[1.0, -2.0, 0.5]], dtype=D)
    combined = coefficients @ vectors[:3]
    length = float(vectors[3].square().sum().sqrt())
    for found in ranks:
        assert found["dot"] == pytest.approx(float(vectors[3] @ vectors[0]))
        assert found["lengths"] == pytest.approx([length, length, 1e-30 * length])
        torch.testing.assert_close(found["project"], vectors[:3] @ vectors[3])
        torch.testing.assert_close(found["project rows"], vectors[2:] @ vectors[:3].T)
        torch.testing.assert_close(found["combine"], combined)
        torch.testing.assert_close(found["subtract"], vectors[3] - combined[0])
        torch.testing.assert_close(found["subtract rows"], vectors[2:] - combined)


def test_ranks_agree_on_what_rank_zero_has_unless_it_was_reduced_anyway(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["agreed"] == [[rank + 1 / 3, 2.0], [1 / 3, 2.0], [1 / 3]]
        assert found["anywhere"].tolist() == [True] * RANKS + [False] * (SIZE - RANKS)
        assert found["anywhere, replicated"].tolist() == (torch.arange(SIZE) == rank).tolist()
        values, vectors = found["eigen"]
        assert (values.tolist(), vectors.tolist()) == ([1 / 3] * 2, [[-1 / 3] * 2] * 2)
        assert found["point"].tolist() == [1 / 3] * SIZE


def test_one_process_agrees_with_itself_and_keeps_everything() -> None:
    store, vector = BasisStore(sharded=True), torch.randn(SIZE)
    assert store.local(vector) is store.whole(vector, SIZE) is store.agreed_point(vector) is vector
    assert not store.is_shared_out
    assert store.agreed(2.5, 3.0) == store.agreed(2.5, 3.0, reduced=True) == [2.5, 3.0]
    mask = vector > 0
    assert store.anywhere(mask) is mask
    values, vectors = store.agreed_eigen(vector[:2], vector[:4].view(2, 2))
    assert torch.equal(values, vector[:2])
    assert torch.equal(vectors, vector[:4].view(2, 2))
