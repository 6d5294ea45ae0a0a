"""What one look at the data gives, part by part, and what it does where there is little or nothing to see."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn.newton import FlatParameters, HessianOperator, KroneckerFactors, Objective
from lightning_sfn.newton.kronecker_blocks import Block
from lightning_sfn.newton.kronecker_estimate import FactorsError, Limits, NoRoomForFactors, estimated
from lightning_sfn.newton.processes import Processes, ProcessMean
from lightning_sfn.newton.weight_uses import Use

from .ranks import on_ranks

D = torch.float64


def estimate(
    model: nn.Module, *parts: Callable[[], Tensor], reduce: Any = None, **options: Any
) -> dict[tuple[str, int, int], Block]:
    """The blocks, by signature, from the gradients of the loss as it is."""
    limits = Limits(**{"max_width": 99, "max_memory": None, "min_rows": 0.0, **options})
    objective = Objective(list(parts), reduce=reduce)
    blocks = estimated(objective, FlatParameters(model.parameters()), 0, "given", limits)
    return {block.signature: block for block in blocks}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Branches(nn.Module):
    """A layer that feeds two heads, of which one goes on through a residual sum; and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.beside = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(h + self.inner(h.tanh())) + self.beside(x)


def test_layers_whose_outputs_others_see_are_hidden_and_the_last_ones_are_not() -> None:
    model, x = Branches().double(), torch.randn(7, 3, dtype=D)
    blocks = estimate(model, lambda: model(x).square().mean())
    names = ("first", "inner", "head", "beside")
    hidden = {name: blocks["dense", 2 * i, 2 * i + 1].hidden for i, name in enumerate(names)}
    assert hidden == {"first": True, "inner": True, "head": False, "beside": False}


def test_a_layer_that_is_the_last_in_one_part_alone_is_hidden() -> None:
    model, x = Branches().double(), torch.randn(7, 3, dtype=D)
    last, whole = lambda: model.first(x).square().mean(), lambda: model(x).square().mean()
    assert not estimate(model, last)["dense", 0, 1].hidden
    assert estimate(model, last, whole)["dense", 0, 1].hidden


def test_steps_of_the_last_layer_are_as_long_as_the_loss_allows_whatever_the_unit_of_the_targets() -> None:
    """A linear model is solved by one step from a full basis of its curvature, a thousand units away."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(20, 3, dtype=D)
    factors = KroneckerFactors()
    factors.refresh(HessianOperator(Objective([lambda: model(x).square().mean()]), model.parameters()), generator())
    assert factors.shares(torch.full((1, 4), 1e3, dtype=D)).tolist() == [1.0]


@pytest.mark.parametrize("rows", [3, 4, 8])
def test_factors_of_fewer_rows_than_asked_for_each_unit_of_width_are_diagonal(rows: int) -> None:
    """The inputs are 4 wide with the bias, the outputs 2."""
    model, x = nn.Linear(3, 2).double(), torch.randn(rows, 3, dtype=D)
    narrow = estimate(model, lambda: model(x).square().sum(), min_rows=2.0)["dense", 0, 1]
    whole = estimate(model, lambda: model(x).square().sum())["dense", 0, 1]
    assert [narrow.inputs.dim(), narrow.outputs.dim()] == [1 + (rows >= 8), 1 + (rows >= 4)]
    for factor, full in ((narrow.inputs, whole.inputs), (narrow.outputs, whole.outputs)):
        torch.testing.assert_close(factor, full if factor.dim() == 2 else full.diagonal())


def test_rows_are_counted_over_uses_and_parts() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(2, 2, 3, dtype=D)
    part = lambda: (model(x) + model(-x)).square().sum()  # noqa: E731
    assert estimate(model, part, min_rows=2.0)["dense", 0, 1].inputs.dim() == 2  # 8 rows
    assert estimate(model, part, part, min_rows=4.0)["dense", 0, 1].inputs.dim() == 2
    assert estimate(model, part, min_rows=2.1)["dense", 0, 1].inputs.dim() == 1


def test_one_parts_inputs_are_gathered_at_a_time_and_one_layers() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)).double(), torch.randn(4, 1, 6, 6, dtype=D)
    alive, most = [], 0
    gather = Use.inputs.fget  # type: ignore[attr-defined]

    def noting(use: Use) -> Tensor:
        nonlocal most
        inputs = gather(use)
        alive.append(torch._C._WeakTensorRef(inputs))
        most = max(most, sum(not reference.expired() for reference in alive))
        return inputs

    with mock.patch.object(Use, "inputs", property(noting)):
        estimate(model, *[lambda: model(x).square().mean()] * 3)
    assert len(alive) == 6
    assert most == 1


# ------------------------------------------------------------------------------------------------ nothing to see


def test_uses_on_no_rows_are_left_out() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3, dtype=D)
    none = x[:0]
    blocks = estimate(model, lambda: model(x).square().sum() + model[2](model[0](none)).sum())
    assert set(blocks) == {("dense", 0, 1), ("dense", 2, 3)}
    exact = estimate(model, lambda: model(x).square().sum())
    for signature, block in blocks.items():
        torch.testing.assert_close(block.inputs, exact[signature].inputs)


def test_a_layer_that_is_used_on_no_rows_at_all_gets_a_number() -> None:
    model, x = (
        nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2), nn.Embedding(4, 2)]).double(),
        torch.randn(5, 3, dtype=D),
    )
    nobody = torch.empty(0, dtype=torch.long)
    blocks = estimate(model, lambda: model[0](x).square().sum() + model[1](x[:0]).sum() + model[2](nobody).sum())
    assert set(blocks) == {("dense", 0, 1), ("number", 2, -1), ("number", 3, -1), ("number", 4, -1)}


def test_a_weight_that_is_a_vector_gets_a_number() -> None:
    model, x = nn.ParameterList([torch.randn(3, dtype=D)]), torch.randn(5, 3, dtype=D)
    assert set(estimate(model, lambda: F.linear(x, model[0]).square().sum())) == {("number", 0, -1)}


@pytest.mark.parametrize("spoilt", [0, 1])
def test_one_factor_that_is_not_finite_spoils_the_estimate(spoilt: int) -> None:
    """Whichever comes first."""
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    x = torch.randn(5, 3)
    inputs = [x * 1e30 if i == spoilt else x for i in range(2)]
    operator = HessianOperator(
        Objective([lambda: model[0](inputs[0]).mean() + model[1](inputs[1]).mean()]), model.parameters()
    )
    with pytest.raises(FactorsError, match="not finite"):
        KroneckerFactors(targets="given").renew(operator, generator())


@pytest.mark.parametrize("share", [0.49, 0.51])
def test_parameters_without_a_rule_count_and_unused_ones_do_not(share: float) -> None:
    """Six numbers in a layer, six in a vector, and a hundred that the loss does not know."""
    model = nn.ParameterList([torch.randn(2, 3, dtype=D), torch.randn(6, dtype=D), torch.randn(100, dtype=D)])
    x = torch.randn(5, 3, dtype=D)
    operator = HessianOperator(
        Objective([lambda: (F.linear(x, model[0]).sum(1) * model[1].sum()).square().mean()]), model.parameters()
    )
    factors = KroneckerFactors(min_coverage=share)
    if share < 0.5:
        factors.renew(operator, generator())
        assert factors.is_known
        return
    with pytest.raises(FactorsError, match=r"^Too few of the parameters belong to layers that have Kronecker factors$"):
        factors.renew(operator, generator())
    assert not factors.is_known


# ------------------------------------------------------------------------------------------------ failures


def failing(error: Exception) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        raise error

    return closure


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), NoRoomForFactors),
        (RuntimeError("cannot be watched"), FactorsError),
        (TypeError("no modes"), FactorsError),
        (KeyError("the data"), KeyError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_keeps_a_loss_from_being_watched_is_told_from_other_errors(
    error: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        estimate(nn.Linear(2, 1), failing(error))
    assert type(caught.value) is kind
    if kind is not KeyError:
        assert str(caught.value) == f"Kronecker factors cannot be estimated ({type(error).__name__}: {error})"


def _one_fails(error: Exception) -> tuple[str, str]:
    processes = Processes()
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)
    closure = failing(error) if processes.rank == 1 else lambda: model(x).square().mean()
    try:
        estimate(model, closure, reduce=ProcessMean(processes))
    except Exception as failure:
        return type(failure).__name__, str(failure)
    return "", ""


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), TypeError("no modes")], ids=["oom", "type"]
)
def test_all_ranks_do_without_factors_where_one_has_none(error: Exception) -> None:
    first, second = on_ranks(2, _one_fails, error)
    assert first == second
    assert first[0] == ("FactorsError" if isinstance(error, TypeError) else "NoRoomForFactors")


def _rows_on_one_rank() -> list[Tensor]:
    processes = Processes()
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=D)
    rows = x if processes.rank == 0 else x[:0]
    block = estimate(model, lambda: model(rows).square().sum(), reduce=ProcessMean(processes), min_rows=1.5)[
        "dense", 0, 1
    ]
    return [block.inputs, block.outputs]


def test_a_rank_without_rows_adds_nothing() -> None:
    first, second = on_ranks(2, _rows_on_one_rank)
    assert all(map(torch.equal, first, second))
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=D)
    alone = estimate(model, lambda: model(x).square().sum())["dense", 0, 1]
    torch.testing.assert_close(first[0], alone.inputs / 2)  # the mean over the ranks
    torch.testing.assert_close(first[1], alone.outputs / 2)
    assert math.isfinite(alone.magnitude)
