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
from lightning_sfn.newton.kronecker_estimate import FactorsError, Limits, NoRoomForFactors, Targets, estimated
from lightning_sfn.newton.processes import Processes, ProcessMean
from lightning_sfn.newton.weight_uses import Use

from .ranks import on_ranks

D = torch.float64


def estimate(
    model: nn.Module,
    *parts: Callable[[], Tensor],
    reduce: Any = None,
    weights: list[float] | None = None,
    targets: Targets = "given",
    seed: int = 0,
    **options: Any,
) -> dict[tuple[str, int, int], Block]:
    """The blocks, by signature, from the gradients of the loss as it is unless told otherwise."""
    limits = Limits(**{"max_width": 99, "max_memory": None, "min_rows": 0.0, **options})
    objective = Objective(list(parts), weights, reduce=reduce)
    blocks = estimated(objective, FlatParameters(model.parameters()), seed, targets, limits)
    return {block.signature: block for block in blocks}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------------------ what factors are


def joined(*rows: Tensor) -> Tensor:
    """Inputs with the one that the bias has."""
    together = torch.cat(rows)
    return torch.cat([together, together.new_ones(len(together), 1)], 1)


def test_factors_are_second_moments_over_all_uses_and_parts_by_their_weights() -> None:
    """Inputs in the mean over the rows of a part, output gradients of the part's loss in the sum."""
    model, x = nn.Linear(3, 2).double(), torch.randn(12, 3, dtype=D)
    target = torch.randn(5, 2, dtype=D)

    def first() -> Tensor:
        return (model(x[:5]) - target).square().sum() + 3 * model(x[5:8]).square().sum()

    def second() -> Tensor:
        return model(x[8:]).square().mean()

    block = estimate(model, first, second, weights=[3.0, 1.0])["dense", 0, 1]
    inputs = [joined(rows) for rows in (x[:8], x[8:])]
    expected = [rows.T @ rows / len(rows) for rows in inputs]
    torch.testing.assert_close(block.inputs, 0.75 * expected[0] + 0.25 * expected[1])
    outputs = model(x).detach()
    gradients = torch.cat([2 * (outputs[:5] - target), 6 * outputs[5:8]]), outputs[8:] / 4
    expected = [rows.T @ rows for rows in gradients]
    torch.testing.assert_close(block.outputs, 0.75 * expected[0] + 0.25 * expected[1])


def test_what_has_no_rule_has_the_mean_square_of_its_gradient() -> None:
    scale, x = nn.Parameter(torch.randn(3, dtype=D)), torch.randn(8, 3, dtype=D)
    parts = [lambda rows=rows: (x[rows] * scale).square().sum() for rows in (slice(6), slice(6, 8))]
    (block,) = estimate(nn.ParameterList([scale]), *parts, weights=[3.0, 1.0]).values()
    gradients = [2 * scale.detach() * x[rows].square().sum(0) for rows in (slice(6), slice(6, 8))]
    expected = 0.75 * gradients[0].square().mean() + 0.25 * gradients[1].square().mean()
    torch.testing.assert_close(block.outputs, expected.view(1, 1))


@pytest.mark.parametrize("targets", ["sampled", "given"])
def test_drawn_targets_give_the_hessian_by_the_outputs_however_far_the_data_are(targets: Targets) -> None:
    """Of squared errors summed over outputs that is twice the identity; in two parts, beside a loss that is unused."""
    model, x = nn.Linear(3, 2).double(), torch.randn(20_000, 3, dtype=D)
    away = model(x).detach() + 10.0

    def part(rows: slice) -> Tensor:
        F.mse_loss(model(x[rows]).tanh(), away[rows])
        return F.mse_loss(model(x[rows]), away[rows], reduction="sum") / 10_000

    parts = [lambda: part(slice(10_000)), lambda: part(slice(10_000, None))]
    block = estimate(model, *parts, targets=targets)["dense", 0, 1]
    far = 20.0**2 / 10_000 * torch.ones(2, 2, dtype=D)
    expected = 2 * torch.eye(2, dtype=D) if targets == "sampled" else far
    torch.testing.assert_close(block.outputs, expected, atol=0.1 if targets == "sampled" else 1e-12, rtol=0)


def test_a_loss_that_is_made_of_another_is_watched_too() -> None:
    """Its graph leads through the elements of the other, and is needed twice."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(9, 3, dtype=D), torch.randn(9, 2, dtype=D)
    errors = lambda: F.mse_loss(model(x), y, reduction="none")  # noqa: E731
    block = estimate(model, lambda: F.mse_loss(errors(), y), targets="sampled")["dense", 0, 1]
    torch.testing.assert_close(block.inputs, joined(x).T @ joined(x) / 9)
    assert 0 < block.magnitude < math.inf


def test_drawn_targets_depend_on_the_seed_alone() -> None:
    model, x, y = nn.Linear(3, 2).double(), torch.randn(9, 3, dtype=D), torch.randn(9, 2, dtype=D)
    before = torch.random.get_rng_state()
    first, again, other = (
        estimate(model, lambda: F.mse_loss(model(x), y), targets="sampled", seed=seed)["dense", 0, 1].outputs
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------ which there are


def test_blocks_come_in_the_order_of_the_weights() -> None:
    model = nn.ModuleList([nn.Embedding(4, 3), nn.Linear(3, 2), nn.Linear(3, 2, bias=False), nn.LayerNorm(2)]).double()
    words = torch.tensor([0, 3, 1])

    def loss() -> Tensor:
        x = model[0](words)
        return model[3](model[1](x) * model[2](x)).pow(3).sum()

    assert list(estimate(model, loss)) == [("embedding", 0, -1), ("dense", 1, 2), ("dense", 3, -1), ("norm", 4, 5)]


def test_a_bias_that_is_no_parameter_does_not_count() -> None:
    weight, x = nn.Parameter(torch.randn(2, 3, dtype=D)), torch.randn(5, 3, dtype=D)
    fixed = torch.ones(2, dtype=D)
    blocks = estimate(nn.ParameterList([weight]), lambda: F.linear(x, weight, fixed).square().sum())
    assert set(blocks) == {("dense", 0, -1)}
    assert blocks["dense", 0, -1].inputs.shape == (3, 3)


def test_a_weight_with_two_biases_gets_a_number_and_so_do_they() -> None:
    model, x = nn.ParameterList([torch.randn(*shape, dtype=D) for shape in ((2, 3), (2,), (2,))]), torch.randn(5, 3)
    x = x.double()
    blocks = estimate(
        model, lambda: (F.linear(x, model[0], model[1]) + F.linear(-2 * x, model[0], model[2])).square().sum()
    )
    assert set(blocks) == {("number", 0, -1), ("number", 1, -1), ("number", 2, -1)}


def test_a_weight_that_is_its_own_bias_gets_a_number() -> None:
    model, x = nn.ParameterList([torch.randn(3, dtype=D)]), torch.randn(5, 3, dtype=D)
    blocks = estimate(model, lambda: F.layer_norm(x, (3,), model[0], model[0]).square().sum())
    assert set(blocks) == {("number", 0, -1)}


@pytest.mark.parametrize(("missing", "kept"), [(0, {1, 2, 3}), (1, {2, 3}), (816, {2, 3}), (817, {3})])
def test_the_layers_that_need_most_memory_give_way(missing: int, kept: set[int]) -> None:
    """Two factors, diagonal if wider than 6, as much for their eigenvectors, and a scale of each weight."""
    sizes = [(5, 4), (4, 3), (7, 1)]
    costs = [8 * (2 * (25 + 16) + 20), 8 * (2 * (16 + 9) + 12), 8 * (2 * (7 + 1) + 7)]
    model = nn.ModuleList([nn.Embedding(2, 1), *(nn.Linear(i, o, bias=False) for i, o in sizes)]).double()
    x = torch.randn(6, 7, dtype=D)

    def loss() -> Tensor:
        return sum(model[1 + k](x[:, :i]).square().sum() for k, (i, _) in enumerate(sizes))  # type: ignore[return-value]

    limit = sum(costs) - missing
    blocks = estimate(model, loss, max_memory=limit, max_width=6)
    assert {weight for kind, weight, _ in blocks if kind == "dense"} == kept
    assert {weight for kind, weight, _ in blocks if kind == "number"} == {0, 1, 2, 3} - kept


def test_wide_factors_are_diagonal() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(9, 3, dtype=D)
    narrow, whole = (
        estimate(model, lambda: model(x).square().sum(), max_width=width)["dense", 0, 1] for width in (3, 4)
    )
    torch.testing.assert_close(narrow.inputs, whole.inputs.diagonal())
    assert torch.equal(narrow.outputs, whole.outputs)


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
    assert factors.shares(torch.full((1, 4), 1e3, dtype=D)).tolist() == [[1.0]]


@pytest.mark.parametrize("rows", [3, 4, 8])
def test_factors_of_fewer_rows_than_asked_for_each_unit_of_width_are_diagonal(rows: int) -> None:
    """The inputs are 4 wide with the bias, the outputs 2."""
    model, x = nn.Linear(3, 2).double(), torch.randn(rows, 3, dtype=D)
    narrow = estimate(model, lambda: model(x).square().sum(), min_rows=2.0)["dense", 0, 1]
    whole = estimate(model, lambda: model(x).square().sum())["dense", 0, 1]
    assert [narrow.inputs.dim(), narrow.outputs.dim()] == [1 + (rows >= 8), 1 + (rows >= 4)]
    for factor, full in ((narrow.inputs, whole.inputs), (narrow.outputs, whole.outputs)):
        torch.testing.assert_close(factor, full if factor.dim() == 2 else full.diagonal())


def test_half_a_row_for_each_unit_of_width_may_be_enough() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(1, 3, dtype=D)
    block = estimate(model, lambda: model(x).square().sum(), min_rows=0.5)["dense", 0, 1]
    assert [block.inputs.dim(), block.outputs.dim()] == [1, 2]


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


@pytest.mark.parametrize("at_first", [True, False])
def test_uses_on_no_rows_are_left_out(at_first: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3, dtype=D)
    none = x[:0]
    uses = [lambda: model[2](model[0](none)).sum(), lambda: model(x).square().sum()]
    blocks = estimate(model, lambda: sum(use() for use in (uses if at_first else uses[::-1])))
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


def _lost_data() -> tuple[str, str]:
    return _one_fails(KeyError("the data"))


def test_a_rank_whose_data_fail_is_named_on_the_others() -> None:
    first, second = on_ranks(2, _lost_data)
    assert first == ("ProcessError", "Rank 1 of 2 failed in the middle of a step: KeyError: 'the data'")
    assert second == ("KeyError", "'the data'")


def _drawn() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=D), torch.randn(6, 2, dtype=D)
    together, alone = (
        estimate(model, lambda: F.mse_loss(model(x), y), reduce=reduce, targets="sampled")["dense", 0, 1].outputs
        for reduce in (ProcessMean(Processes()), None)
    )
    return together, alone


def test_each_rank_draws_targets_of_its_own() -> None:
    (first, alone), (second, same) = on_ranks(2, _drawn)
    assert torch.equal(first, second)
    assert torch.equal(alone, same)
    assert not torch.allclose(first, alone)


def _rows_on_ranks(split: int) -> list[Tensor]:
    processes = Processes()
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=D)
    rows = x[:split] if processes.rank == 0 else x[split:]
    block = estimate(model, lambda: model(rows).square().sum(), reduce=ProcessMean(processes), min_rows=1.5)[
        "dense", 0, 1
    ]
    return [block.inputs, block.outputs]


@pytest.mark.parametrize("split", [6, 3])
def test_rows_are_counted_over_ranks_and_a_rank_without_any_adds_nothing(split: int) -> None:
    first, second = on_ranks(2, _rows_on_ranks, split)
    assert all(map(torch.equal, first, second))
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=D)
    alone = estimate(model, lambda: model(x).square().sum())["dense", 0, 1]
    torch.testing.assert_close(first[0], alone.inputs / (2 if split == 6 else 1))  # the mean over the ranks
    torch.testing.assert_close(first[1], alone.outputs / 2)
    assert math.isfinite(alone.magnitude)
