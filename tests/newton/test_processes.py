"""Several ranks: exactness against one process, what they send each other, the sharded basis, and failures."""

import contextlib
import copy
import gc
import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sfn.newton import Objective, SaddleFreeNewton
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ContributionError, ProcessError, Processes, ProcessMean
from lightning_sfn.newton.step import StepRecord

from .ranks import Collectives, Failed, on_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

ROWS = 24


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss_on(module: nn.Module, rows: slice, dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = (x[:, :3] * x[:, 2:]).tanh()
    inputs, targets = x[rows].to(dtype), y[rows].to(dtype)
    return lambda: (module(inputs) - targets).square().mean()


def even(rank: int, size: int) -> slice:
    return slice(rank * ROWS // size, (rank + 1) * ROWS // size)


def uneven(rank: int, size: int) -> slice:
    """Half of the rows to the first rank, what is left to the others."""
    if rank == 0:
        return slice(0, ROWS // 2)
    each = ROWS / 2 / (size - 1)
    return slice(ROWS // 2 + round((rank - 1) * each), ROWS // 2 + round(rank * each))


@dataclass(frozen=True)
class Run:
    """What a few steps led to."""

    parameters: list[Tensor]
    records: list[StepRecord]
    large: Counter[str]
    small: Counter[str]
    bytes: Counter[str]
    state: dict[str, Any]
    basis_bytes: int
    agreements: Counter[str]  # how often rank zero's numbers were asked for: "reduced" ones, and others


def run(
    count: int,
    dtype: torch.dtype = torch.float64,
    cut: Callable[[int, int], slice] = even,
    state: dict[str, Any] | None = None,
    preconditioner: str | None = "diagonal",  # targets are drawn on each rank, so that factors depend on their number
    **options: Any,
) -> Run:
    """A few steps on this rank's rows, each row weighted alike; on all rows where there is no process group."""
    processes = Processes() if dist.is_initialized() else None
    rows = slice(0, ROWS) if processes is None else cut(processes.rank, processes.size)
    mean = None if processes is None else ProcessMean(processes, (rows.stop - rows.start) / ROWS)
    module = network(dtype)
    shared = {"processes": processes, "check_ranks": True, "preconditioner": preconditioner}
    optimizer = SaddleFreeNewton(module.parameters(), **shared, **options)
    if state is not None:
        optimizer.load_state_dict(state)
        FlatParameters(module.parameters()).write(state["parameters"])
    size = sum(p.numel() for p in module.parameters())
    parameters, records, kept, agreements = [], [], [torch.empty(0)], Counter[str]()
    make_room, agreed = BasisStore.empty, BasisStore.agreed

    def noting(*args: Any) -> Tensor:
        kept[0] = make_room(*args)
        return kept[0]

    def agreeing(store: BasisStore, *numbers: float, reduced: bool = False) -> list[float]:
        agreements["reduced" if reduced else "own"] += 1
        return agreed(store, *numbers, reduced=reduced)

    with (
        Collectives(small=size * dtype.itemsize // 8) as counted,
        mock.patch.multiple(BasisStore, empty=noting, agreed=agreeing),
    ):
        for _ in range(count):
            records.append(optimizer.step_on(Objective([loss_on(module, rows, dtype)], reduce=mean)))
            parameters.append(FlatParameters(module.parameters()).read())
    saved = optimizer.state_dict() | {"parameters": parameters[-1]}
    return Run(parameters, records, counted.large, counted.small, counted.bytes, saved, kept[0].nbytes, agreements)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


# ------------------------------------------------------------------------------------------------ exactness


def all_runs(state: dict[str, Any]) -> dict[str, Run]:
    return {
        "replicated": run(3),
        "sharded": run(3, basis="sharded"),
        "uneven": run(2, cut=uneven),
        "uneven sharded": run(2, cut=uneven, basis="sharded"),
        # With the damping of 0.25 that a search finds, the order of the rows alone moves the step by 3e-6 in float32.
        "float32": run(1, torch.float32, damping=1.0),
        "float32 sharded": run(1, torch.float32, damping=1.0, basis="sharded"),
        "paper": run(1, krylov_dim=12, damping="grid", previous_directions=1, secants=False, preconditioner=None),
        "kronecker": run(2, preconditioner="auto", krylov_dim=16),
        "kronecker sharded": run(2, preconditioner="auto", krylov_dim=16, basis="sharded"),
        "exact": run(1, krylov_dim="full", basis="sharded"),
        "resumed": run(1, basis="sharded", state=state),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    torch.set_num_threads(1)
    return all_runs(run(3, basis="sharded").state)


@pytest.fixture(scope="module", params=[2, 4])
def many(request: pytest.FixtureRequest, alone: dict[str, Run]) -> list[dict[str, Run]]:
    """The runs on 2 and on 4 ranks; what is resumed was saved by one process."""
    runs = on_ranks(request.param, all_runs, alone["sharded"].state)
    assert not any(isinstance(result, Failed) for result in runs), runs
    return runs


def test_parameters_are_the_same_bits_on_all_ranks_after_every_step(many: list[dict[str, Run]]) -> None:
    for name, first in many[0].items():
        for other in many[1:]:
            assert all(map(torch.equal, first.parameters, other[name].parameters)), name
            assert [repr(r) for r in other[name].records] == [repr(r) for r in first.records], name


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("replicated", 1e-12),
        ("sharded", 1e-12),
        ("uneven", 1e-12),
        ("uneven sharded", 1e-12),
        ("float32", 1e-6),
        ("float32 sharded", 1e-6),
        ("paper", 1e-12),
        ("exact", 1e-12),
        ("resumed", 1e-12),
    ],
)
def test_ranks_take_the_step_of_one_process_on_all_rows(
    many: list[dict[str, Run]], alone: dict[str, Run], name: str, bound: float
) -> None:
    for shared, own in zip(many[0][name].parameters, alone[name].parameters, strict=True):
        assert relative(shared, own) < bound
    assert alone[name].records[0].accepted


def test_the_sharded_basis_gives_the_replicated_step(many: list[dict[str, Run]]) -> None:
    pairs = {"sharded": "replicated", "uneven sharded": "uneven", "kronecker sharded": "kronecker"}
    for sharded, replicated in pairs.items():
        assert relative(many[0][sharded].parameters[-1], many[0][replicated].parameters[-1]) < 1e-12
        assert many[0][sharded].records[-1].subspace_dim > 16  # with remembered steps


def test_a_rank_keeps_its_share_of_the_sharded_basis(many: list[dict[str, Run]], alone: dict[str, Run]) -> None:
    whole, ranks = alone["sharded"].basis_bytes, len(many)
    rows = whole // alone["sharded"].parameters[0].nbytes
    assert many[0]["replicated"].basis_bytes == whole
    assert whole <= many[0]["sharded"].basis_bytes * ranks <= whole + rows * 8 * ranks  # an entry of padding each


def test_a_state_saved_on_any_number_of_ranks_is_the_same(many: list[dict[str, Run]], alone: dict[str, Run]) -> None:
    ours, theirs = (runs["sharded"].state["newton"]["memory"]["steps"] for runs in (many[0], alone))
    assert len(ours) == len(theirs) > 3
    for (vector, product), (other, its_product) in zip(ours, theirs, strict=True):
        assert relative(vector, other) < 1e-10
        assert relative(product, its_product) < 1e-10


# ------------------------------------------------------------------------------------------------ collectives


def test_a_product_costs_one_collective_and_a_batch_of_trials_another(many: list[dict[str, Run]]) -> None:
    for name in ("replicated", "uneven"):
        shared = many[0][name]
        products, gradients, inner = (
            sum(getattr(record, what) for record in shared.records) for what in ("products", "gradients", "inner_steps")
        )
        assert shared.large["allreduce"] == products + gradients
        # Rank zero's point after each inner step, and its eigenvectors, which are large beside so few parameters.
        assert shared.large["broadcast"] == inner + len(shared.records)
        assert set(shared.large) == {"allreduce", "broadcast"}
        # A loss with each gradient, one for repeatability; a warm search asks for one trial loss at a time.
        trials = sum(record.trials for record in shared.records)
        assert shared.small["allreduce"] == trials + gradients + 1
        assert shared.small["broadcast"] == shared.agreements["own"] + shared.agreements["reduced"]


def test_what_the_model_predicts_is_rank_zeros_whatever_the_basis(many: list[dict[str, Run]]) -> None:
    """Before each trial but the first, and before each that is not made; reduced numbers are alike in a sharded one."""
    for name in ("replicated", "sharded"):
        found = many[0][name].agreements
        assert found["own"] > 0
        assert found["reduced"] > 0
    small = many[0]["sharded"].small
    assert small["broadcast"] == many[0]["sharded"].agreements["own"]


def test_the_grid_is_one_batch_of_trials(many: list[dict[str, Run]]) -> None:
    shared = many[0]["paper"]
    gradients, inner = sum(r.gradients for r in shared.records), 2 * len(shared.records)
    assert sum(record.trials for record in shared.records) == 6 * inner
    assert shared.small["allreduce"] == gradients + 1 + inner


def test_a_sharded_product_costs_a_scatter_and_a_gather(many: list[dict[str, Run]]) -> None:
    shared, vector = many[0]["sharded"], many[0]["sharded"].parameters[0].nbytes
    lanczos = sum(record.products - 1 for record in shared.records)  # without the probe of the preconditioner
    assert shared.large["reduce_scatter_base"] == lanczos == 16 * len(shared.records)
    # What else is gathered: candidates for steps, the ends of the spectrum, the way out of a saddle.
    others = shared.large["allgather_base"] - lanczos
    candidates = sum(record.trials for record in shared.records) + 2 * len(shared.records)
    assert candidates <= others <= candidates + 2 * len(shared.records)
    padding = 1 + len(many) * 8 / vector
    assert shared.bytes["reduce_scatter_base"] <= lanczos * vector * padding
    assert shared.bytes["allgather_base"] <= (lanczos + others) * vector * padding


# ------------------------------------------------------------------------------------------------ failures


def attempt(closure_on: Callable[[nn.Module, int], Callable[[], Tensor]], **options: Any) -> tuple[Failed | None, bool]:
    """A step on a closure of this rank's: how it failed, and whether the parameters are as they were."""
    processes = Processes()
    module = network(torch.float64)
    before = FlatParameters(module.parameters()).read()
    optimizer = SaddleFreeNewton(module.parameters(), processes=processes, **options)
    failed = None
    try:
        optimizer.step(closure_on(module, processes.rank))
    except Exception as error:
        failed = Failed(type(error).__name__, str(error))
    return failed, torch.equal(before, FlatParameters(module.parameters()).read())


def spoilt(culprit: int, evaluation: int, how: Callable[[Tensor], Tensor]) -> Callable[..., Callable[[], Tensor]]:
    """Closures of which one rank's is spoilt from its n-th evaluation on."""

    def closure_on(module: nn.Module, rank: int) -> Callable[[], Tensor]:
        count, loss = 0, loss_on(module, even(rank, 3), torch.float64)

        def closure() -> Tensor:
            nonlocal count
            count += 1
            return how(loss()) if rank == culprit and count >= evaluation else loss()

        return closure

    return closure_on


def raising(loss: Tensor) -> Tensor:
    raise ArithmeticError("the disk is gone")


def curved_without_bound(loss: Tensor) -> Tensor:
    """Adds something with a gradient of zero and an infinite second derivative."""
    return loss + (loss - loss.detach()).abs().pow(1.5)


def failures() -> dict[str, tuple[Failed | None, bool]]:
    return {
        "raises": attempt(spoilt(1, 1, raising), hvp="retain"),
        "raises in measuring a graph": attempt(spoilt(1, 1, raising)),
        "raises in a second look": attempt(spoilt(1, 2, raising), hvp="retain"),
        "raises in a product": attempt(spoilt(1, 4, raising), hvp="recompute", preconditioner="diagonal"),
        "raises in a trial": attempt(spoilt(1, 3, raising), hvp="retain", preconditioner="diagonal"),
        "raises in estimating factors": attempt(spoilt(1, 3, raising), hvp="retain"),
        "nan": attempt(spoilt(2, 1, lambda loss: loss * math.nan), hvp="retain"),
        "nan in a product": attempt(spoilt(2, 1, curved_without_bound), hvp="retain"),
        "nan everywhere": attempt(lambda module, rank: lambda: (next(module.parameters()) * math.nan).sum()),
        "nothing": attempt(spoilt(0, 10**6, raising)),
    }


@pytest.fixture(scope="module")
def failed() -> list[dict[str, tuple[Failed, bool]]]:
    torch.set_num_threads(1)
    outcomes = on_ranks(3, failures)
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    return outcomes


@pytest.mark.parametrize(
    "how",
    [
        "raises",
        "raises in measuring a graph",
        "raises in a second look",
        "raises in a product",
        "raises in a trial",
        "raises in estimating factors",
    ],
)
def test_an_error_on_one_rank_ends_the_step_on_all_and_names_it(failed: list[Any], how: str) -> None:
    for rank, outcome in enumerate(failed):
        failure, unchanged = outcome[how]
        assert unchanged
        if rank == 1:
            assert failure == Failed("ArithmeticError", "the disk is gone")
        else:
            message = "Rank 1 of 3 failed in the middle of a step: ArithmeticError: the disk is gone"
            assert failure == Failed("ProcessError", message)


@pytest.mark.parametrize("how", ["nan", "nan in a product"])
def test_a_nan_on_one_rank_ends_the_step_on_all_and_names_it(failed: list[Any], how: str) -> None:
    for failure, unchanged in (outcome[how] for outcome in failed):
        assert unchanged
        assert failure.error == "ContributionError"
        assert failure.message.startswith("The contribution of rank 2 of 3 to the objective is not finite")


def test_what_is_not_finite_anywhere_is_not_blamed_on_a_rank(failed: list[Any]) -> None:
    assert all(outcome["nan everywhere"][0].error == "FloatingPointError" for outcome in failed)
    assert all(outcome["nan everywhere"][1] for outcome in failed)


def test_a_step_after_failures_is_taken(failed: list[Any]) -> None:
    assert all(outcome["nothing"] == (None, False) for outcome in failed)


def lost(how: str) -> Failed | None:
    """Rank 1 dies, or hangs, in the middle of a product."""
    rank = dist.get_rank()

    def gone(loss: Tensor) -> Tensor:
        if rank == 1 and how == "hangs":  # until the others have given it up
            dist.distributed_c10d._get_default_store().wait(
                ["lightning_sfn/roll_call/0", "lightning_sfn/roll_call/2"], timedelta(seconds=60)
            )
        if rank == 1:
            os._exit(1)
        # The others reach the collective when the dead one's connections are closed. Before that, a send to it still
        # succeeds now and then, and its sender waits for the other survivor, which names both.
        time.sleep(1.0 if how == "dies" else 0.0)
        return loss

    return attempt(spoilt(rank, 4, gone), hvp="recompute")[0]


@pytest.mark.parametrize(("how", "timeout"), [("dies", 60.0), ("hangs", 2.0)])
def test_a_rank_that_is_gone_is_named_by_the_others(how: str, timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sfn.newton.processes._ROLL_CALL", timedelta(seconds=3))
    first, second, third = on_ranks(3, lost, how, timeout=timeout)
    assert second == Failed()
    for failure in (first, third):
        assert failure.error == "ProcessError"
        assert failure.message.startswith("No sign of life from rank 1 of 3: the process died, or hangs longer")


def test_of_two_silent_ranks_one_may_only_be_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sfn.newton.processes._ROLL_CALL", timedelta(milliseconds=100))
    first, *_ = on_ranks(3, silent_but_for_rank_zero)
    assert first.startswith("No sign of life from rank 1 and rank 2 of 3: the process died, or hangs longer than the ")
    assert "timeout (one of them is enough: the others may wait for it). Look at" in first


def silent_but_for_rank_zero() -> str:
    processes = Processes()
    message = processes._roll_call() if processes.rank == 0 else ""
    dist.barrier()
    return message


def other_models() -> list[str]:
    """What the first step says where the ranks hold different models."""
    rank, messages = dist.get_rank(), []
    wide = torch.ones(2 + rank, requires_grad=True)
    double = torch.ones(2, dtype=torch.float64 if rank else torch.float32, requires_grad=True)
    other = torch.full((2,), 1.0 + rank, requires_grad=True)
    for parameter in (wide, double, other):
        optimizer = SaddleFreeNewton([parameter], processes=Processes())
        try:
            optimizer.step(lambda parameter=parameter: parameter.square().sum())
        except ProcessError as error:
            messages.append(str(error))
    return messages


def test_ranks_with_different_models_are_told_before_the_first_step() -> None:
    first, second = on_ranks(2, other_models)
    assert first == second
    shapes, dtypes, values = first
    assert shapes.startswith(
        "The ranks have different models: rank 0 has 1 trainable parameters of float32 (2), rank 1 has 1 trainable "
        "parameters of float32 (3): build the same model on every rank"
    )
    assert (
        "rank 0 has 1 trainable parameters of float32 (2), rank 1 has 1 trainable parameters of float64 (2)" in dtypes
    )
    assert values.startswith("The ranks have different parameters: rank 0 has the checksum")


def test_processes_need_a_process_group() -> None:
    with pytest.raises(ProcessError, match=r"^There is no process group.*init_process_group\(\) first\.$"):
        Processes()


# ------------------------------------------------------------------------------------------------ played collectives

MODULE = "lightning_sfn.newton.processes"


def one_of(size: int, rank: int = 0, group: Any = None) -> Processes:
    """One process of several that are not there."""
    processes = object.__new__(Processes)
    processes.rank, processes.size, processes._group, processes._device = rank, size, group, None
    processes._failure, processes._contributions, processes._first_bad = None, 0, None
    return processes


@pytest.mark.parametrize("group", [None, "a part of all"])
def test_a_sum_is_taken_where_the_tensor_is(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: Tensor, *, group: Any) -> None:
        assert group == processes._group
        assert tensor.is_contiguous()
        tensor.mul_(3)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    processes, tensor = one_of(3, group=group), torch.tensor([1.0, 2.0])
    total = processes.sum(tensor)
    assert total.tolist() == [3, 6]
    assert total.data_ptr() == tensor.data_ptr()
    assert processes.sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T).tolist() == [[3, 9], [6, 12]]
    assert ProcessMean(processes)(torch.tensor([1.0, 2.0])).tolist() == pytest.approx([1, 2])
    assert ProcessMean(processes, 0.5)(torch.tensor([1.0, 2.0])).tolist() == pytest.approx([1.5, 3])


@pytest.mark.parametrize(("group", "source"), [(None, 0), ("a part of all", 7)])
def test_numbers_of_the_first_come_from_the_first_of_the_group(
    group: Any, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broadcast(tensor: Tensor, *, src: int, group: Any) -> None:
        assert (src, group) == (source, processes._group)
        tensor.fill_(5)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: {("a part of all", 0): 7}[group, rank])
    processes = one_of(3, rank=1, group=group)
    assert processes.from_first(torch.zeros(2, 2).T).tolist() == [[5, 5], [5, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("rank", "part", "share"), [(0, [1, 2, 3], 1 / 3), (1, [4, 5, 6], 0.25), (2, [7, 0, 0], None)], ids=str
)
def test_parts_of_a_sum_are_scattered_and_gathered(
    rank: int, part: list[int], share: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduce_scatter(part: Tensor, padded: Tensor, *, group: Any) -> None:
        assert group == "all"
        part.copy_(3 * padded.view(3, 3)[rank])

    def all_gather(whole: Tensor, part: Tensor, *, group: Any) -> None:
        assert group == "all"
        assert part.is_contiguous()
        whole.copy_(torch.cat([part, part + 10, part + 20]))

    monkeypatch.setattr(f"{MODULE}._reduce_scatter", reduce_scatter)
    monkeypatch.setattr(f"{MODULE}._all_gather", all_gather)
    processes, vector = one_of(3, rank, "all"), torch.arange(1.0, 8.0, dtype=dtype)
    scattered = processes.scatter_sum(vector)
    assert scattered.dtype == dtype
    assert scattered.tolist() == [3 * value for value in part]
    mean = ProcessMean(processes, share).part(vector)
    assert mean.tolist() == pytest.approx([3 * (share or 1 / 3) * value for value in part])
    gathered = processes.gather(torch.stack([scattered, scattered], 1)[:, 0], 7)
    assert gathered.dtype == dtype
    assert gathered.tolist() == [3 * v for v in part] + [3 * v + 10 for v in part] + [3 * part[0] + 20]


@pytest.mark.parametrize(("size", "length"), [(0, 0), (1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_parts_are_as_long_as_the_longest(size: int, length: int) -> None:
    assert one_of(3).part_length(size) == length


@pytest.mark.parametrize(("rank", "expected"), [(0, [5.0, 6.0]), (1, [0.0, 0.0])])
def test_means_and_numbers_of_the_first_share_a_collective(
    rank: int, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *, group: calls.append(tensor))
    means, numbers = ProcessMean(one_of(2, rank)).with_numbers(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([5.0, 6.0]))
    assert means.tolist() == [1, 2, 3]
    assert numbers.tolist() == expected
    assert len(calls) == 1


def test_objects_of_all_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(values: list[Any], value: Any, *, group: Any) -> None:
        assert group == "all"
        assert values == [None, None]
        values[:] = [value, "theirs"]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    assert one_of(2, group="all").collect("mine") == ["mine", "theirs"]


class Store:
    """A key-value store that some ranks have left a sign in; or that is gone."""

    def __init__(self, here: list[int], *, gone: bool = False) -> None:
        self.here, self.gone = here, gone

    def set(self, key: str, value: str) -> None:
        if self.gone:
            raise RuntimeError("connection reset")
        assert (key, value) == ("lightning_sfn/roll_call/1", "here")

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        (key,) = keys
        assert timeout == timedelta(seconds=5)
        if key not in [f"lightning_sfn/roll_call/{rank}" for rank in self.here]:
            raise RuntimeError("timeout")


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (
            Store([0, 1, 2]),
            "A collective failed although every rank is there: look at the network, or at another rank's error.",
        ),
        (
            Store([1, 2]),
            "No sign of life from rank 0 of 3: the process died, or hangs longer than the process group's timeout. "
            "Look at its output, and resume from the last checkpoint.",
        ),
        (
            Store([1]),
            "No sign of life from rank 0 and rank 2 of 3: the process died, or hangs longer than the process group's "
            "timeout (one of them is enough: the others may wait for it). Look at its output, and resume from the last "
            "checkpoint.",
        ),
        (
            Store([], gone=True),
            "No sign of life from rank 0 of 3: the process died, or hangs longer than the process group's timeout. "
            "Look at its output, and resume from the last checkpoint.",
        ),
    ],
    ids=["nobody", "one", "two", "store"],
)
def test_who_is_missing_after_a_failed_collective_is_said(
    store: Store, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "all_reduce", mock.Mock(side_effect=RuntimeError("connection closed")))
    with pytest.raises(ProcessError) as failure:
        one_of(3, rank=1).sum(torch.ones(1))
    assert str(failure.value) == f"{message} The step of rank 1 is undone."


def reporting(processes: Processes, others: list[tuple[str | None, float]]) -> Processes:
    """With reports of the other processes."""
    processes.collect = lambda value: [value, *others]  # type: ignore[method-assign]
    return processes


FINE = (None, math.inf)


def contributed(values: list[float], others: list[tuple[str | None, float]]) -> Processes:
    processes = reporting(one_of(1 + len(others)), others)
    for value in values:
        tensor = torch.tensor([1.0, value])
        assert processes.contribute(tensor) is tensor
    return processes


@pytest.mark.parametrize(
    ("values", "others", "culprits"),
    [
        ([1.0, math.nan], [FINE, FINE], "rank 0"),
        ([1.0, math.inf], [FINE, FINE], "rank 0"),
        ([1.0, math.nan, 1.0, math.nan], [(None, 3.0), FINE], "rank 0"),  # the second contribution, before their third
        ([1.0, 1.0, math.nan], [(None, 2.0), (None, 3.0)], "rank 1"),
        ([1.0, 1.0], [(None, 2.0), (None, 2.0)], "rank 1 and rank 2"),
        ([1.0, math.nan], [(None, 2.0), FINE], "rank 0 and rank 1"),
        ([math.nan], [(None, 1.0), (None, 1.0)], None),  # of all of them: the objective itself is to blame
        ([1.0], [FINE, FINE], None),
        ([], [FINE, FINE], None),
    ],
)
def test_who_contributed_the_first_number_that_is_not_finite_is_blamed(
    values: list[float], others: list[tuple[str | None, float]], culprits: str | None
) -> None:
    contributed(values, others).require_sound(blame_nan=False)
    processes = contributed(values, others)
    if culprits is None:
        processes.require_sound()
        return
    with pytest.raises(ContributionError) as failure:
        processes.require_sound()
    assert str(failure.value) == (
        f"The contribution of {culprits} of 3 to the objective is not finite (loss, gradient or Hessian-vector "
        "product), so the step is undone on all ranks: look at the batch that it has."
    )
    reporting(processes, [FINE, FINE]).require_sound()  # it is told once


def test_a_failed_computation_is_nan_until_all_processes_know() -> None:
    processes = reporting(one_of(3), [FINE, (None, 1.0)])
    assert processes.guard(lambda: torch.ones(2), torch.zeros(2)).tolist() == [1, 1]
    processes.require_sound(blame_nan=False)
    spoilt = processes.guard(mock.Mock(side_effect=KeyError("boom")), torch.zeros(2, 3))
    assert spoilt.shape == (2, 3)
    assert bool(spoilt.isnan().all())
    told: list[Any] = []
    processes.collect = lambda value: told.append(value) or [value, FINE, FINE]  # type: ignore[func-returns-value,method-assign]
    with pytest.raises(KeyError, match="boom"):
        processes.require_sound()
    processes.require_sound()
    assert told == [("KeyError: 'boom'", math.inf), (None, math.inf)]


def test_a_failure_that_was_told_keeps_nothing_in_memory() -> None:
    """Without the collector of reference cycles."""
    processes, seen = reporting(one_of(2), [FINE]), list[weakref.ref[Tensor]]()

    def compute() -> Tensor:
        large = torch.ones(5)
        seen.append(weakref.ref(large))
        raise KeyError("boom")

    gc.collect()
    gc.disable()
    try:
        processes.guard(compute, torch.zeros(2))
        with contextlib.suppress(KeyError):
            processes.require_sound()
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("blame_nan", [True, False])
def test_a_failure_elsewhere_is_named(blame_nan: bool) -> None:
    processes = reporting(one_of(3), [FINE, ("KeyError: 'boom'", 1.0)])
    with pytest.raises(ProcessError) as failure:
        processes.require_sound(blame_nan=blame_nan)
    assert str(failure.value) == "Rank 2 of 3 failed in the middle of a step: KeyError: 'boom'"


def test_what_was_noted_is_dropped() -> None:
    processes = contributed([math.nan], [FINE, FINE])
    processes.guard(mock.Mock(side_effect=KeyError("boom")), torch.zeros(2))
    processes.release()
    processes.require_sound()
    assert copy.deepcopy({"processes": processes})["processes"] is processes


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["a", "a"], None),
        (["a", "b"], "The ranks have different things: rank 0 has a, rank 2 has b: make them equal."),
        (["b", "c"], "The ranks have different things: rank 0 has a, rank 1 has b: make them equal."),
    ],
)
def test_descriptions_that_differ_are_told(others: list[str], message: str | None) -> None:
    processes = reporting(one_of(3), others)  # type: ignore[arg-type]
    if message is None:
        processes.require_equal("a", "things", "make them equal.")
        return
    with pytest.raises(ProcessError) as failure:
        processes.require_equal("a", "things", "make them equal.")
    assert str(failure.value) == message


@pytest.mark.parametrize(("available", "initialized"), [(False, True), (True, False)])
def test_without_a_process_group_one_is_asked_for(
    available: bool, initialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: available)
    monkeypatch.setattr(dist, "is_initialized", lambda: initialized)
    with pytest.raises(ProcessError) as failure:
        Processes()
    assert str(failure.value) == (
        "There is no process group, but processes that share an objective need one: call "
        "torch.distributed.init_process_group() first."
    )


@pytest.mark.parametrize(("backend", "device"), [("gloo", None), ("nccl", torch.device("cuda", 3))])
def test_a_group_is_asked_for_its_rank_size_and_backend(
    backend: str, device: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", {"all": 2}.__getitem__)
    monkeypatch.setattr(dist, "get_world_size", {"all": 5}.__getitem__)
    monkeypatch.setattr(dist, "get_backend", {"all": backend}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    processes = Processes("all")  # type: ignore[arg-type]
    assert (processes.rank, processes.size, processes._device) == (2, 5, device)
    assert (processes._group, processes._failure, processes._first_bad) == ("all", None, None)
    processes.contribute(torch.tensor([math.nan]))
    told: list[Any] = []
    processes.collect = lambda value: told.append(value) or [value] * 5  # type: ignore[func-returns-value,method-assign]
    processes.require_sound()
    assert told == [(None, 1.0)]
