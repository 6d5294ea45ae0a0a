from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfn.newton import (
    AutoPreconditioner,
    DiagonalPreconditioner,
    HessianOperator,
    IdentityPreconditioner,
    KroneckerFactors,
    Objective,
    SaddleFreeNewton,
)
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.coordinates import make_preconditioner
from lightning_sfn.newton.preconditioner import Preconditioner

from .ranks import Reversing

D = torch.float64


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, IdentityPreconditioner),
        ("auto", AutoPreconditioner),
        ("diagonal", DiagonalPreconditioner),
        ("kronecker", KroneckerFactors),
    ],
)
def test_names_are_understood(name: str | None, kind: type[Preconditioner]) -> None:
    assert type(make_preconditioner(name)) is kind


def test_objects_are_taken_as_they_are_and_other_names_refused() -> None:
    own = IdentityPreconditioner()
    assert make_preconditioner(own) is own
    with pytest.raises(ValueError, match=r"^preconditioner is 'adam', but None, 'auto', 'diagonal', 'kronecker' or a"):
        make_preconditioner("adam")
    with pytest.raises(ValueError, match=r"^preconditioner is \['diagonal'\], but None, 'auto'"):
        make_preconditioner(["diagonal"])  # type: ignore[arg-type]


@pytest.mark.parametrize(("krylov_dim", "kind"), [(None, AutoPreconditioner), ("full", IdentityPreconditioner)])
def test_an_optimizer_chooses_its_coordinates_unless_it_sees_the_whole_space(
    krylov_dim: Any, kind: type[Preconditioner]
) -> None:
    optimizer = SaddleFreeNewton(nn.Linear(3, 2).parameters(), krylov_dim=krylov_dim)
    assert type(optimizer.preconditioner) is kind


class Partly(nn.Module):
    """A linear layer of four numbers after numbers that belong to no layer."""

    def __init__(self, loose: int) -> None:
        super().__init__()
        self.loose = nn.Parameter(torch.linspace(0.5, 1.5, loose, dtype=D))
        self.layer = nn.Linear(4, 1, bias=False, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x).squeeze(-1) * self.loose.prod()
        return output


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, dtype=D, generator=generator), torch.randn(20, dtype=D, generator=generator)


def operator_of(model: nn.Module, scale: float = 1.0) -> HessianOperator:
    x, y = data()
    return HessianOperator(Objective([lambda: F.mse_loss(model(x * scale), y)]), model.parameters())


def refreshed(model: nn.Module, chosen: AutoPreconditioner, times: int = 1, scale: float = 1.0) -> AutoPreconditioner:
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        chosen.refresh(operator_of(model, scale), generator)
    return chosen


@pytest.mark.parametrize(("loose", "factored"), [(4, True), (5, False)])
def test_factors_are_taken_where_half_of_the_parameters_have_a_rule(loose: int, factored: bool) -> None:
    chosen = refreshed(Partly(loose), AutoPreconditioner())
    kind = KroneckerFactors if factored else DiagonalPreconditioner
    assert type(chosen.in_use) is kind
    assert chosen.name == ("kronecker" if factored else "diagonal")
    assert chosen.unfactored == (("parameter 0",) if factored else ())
    assert [chosen.default_krylov_dim(bent) for bent in (True, False)] == ([4, 1] if factored else [16, 16])


@pytest.mark.parametrize("loose", [4, 5])
def test_the_map_is_that_of_the_chosen_coordinates(loose: int) -> None:
    model = Partly(loose)
    chosen = refreshed(model, AutoPreconditioner())
    vectors = torch.randn(3, 4 + loose, dtype=D)
    for name in ("scale", "unscale", "precondition", "shares"):
        assert torch.equal(getattr(chosen, name)(vectors), getattr(chosen.in_use, name)(vectors))
    assert not torch.equal(chosen.scale(vectors), vectors)
    torch.testing.assert_close(chosen.unscale(chosen.scale(vectors)), vectors)


@pytest.mark.parametrize(("rows", "whole"), [(4, True), (3, False)])
def test_factors_of_fewer_rows_than_they_are_wide_are_diagonal(rows: int, whole: bool) -> None:
    """The layer has four inputs."""
    model, (x, y) = nn.Linear(4, 1, bias=False, dtype=D), data()
    objective = Objective([lambda: F.mse_loss(model(x[:rows]).squeeze(-1), y[:rows])])
    chosen = AutoPreconditioner()
    chosen.refresh(HessianOperator(objective, model.parameters()), torch.Generator().manual_seed(0))
    matrix = chosen.scale(torch.eye(4, dtype=D))
    assert chosen.name == "kronecker"
    assert bool((matrix - matrix.diag().diag()).any()) is whole


def test_random_probes_come_from_the_generator_alone() -> None:
    model, unit = Partly(5), torch.eye(9, dtype=D)
    before = torch.random.get_rng_state()
    first, second = (refreshed(model, AutoPreconditioner()) for _ in range(2))
    assert first.in_use is first.diagonal
    assert torch.equal(first.scale(unit), second.scale(unit))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_shortened_step_that_was_refused_is_shortened_more_until_one_is_taken() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), data()
    objective = Objective([lambda: F.mse_loss(model(x).squeeze(-1), y)])
    chosen = AutoPreconditioner()
    chosen.refresh(HessianOperator(objective, model.parameters()), torch.Generator().manual_seed(0))
    steps, shares = torch.full((1, 19), 10.0, dtype=D), []
    for accepted in (False, True, True, True):
        shares.append(float(chosen.shares(steps).min()))
        chosen.feedback(accepted=accepted, store=BasisStore())
    assert 0 < shares[0] < 1
    assert shares == pytest.approx([shares[0], shares[0] / 4, shares[0] / 2, shares[0]])


@pytest.mark.parametrize("loose", [4, 5])
def test_the_map_acts_on_parts_of_vectors(loose: int) -> None:
    chosen, vector = refreshed(Partly(loose), AutoPreconditioner()), torch.randn(4 + loose, dtype=D)
    parts = chosen.on_parts(Reversing(), 4 + loose)
    torch.testing.assert_close(parts.scale(vector.flip(0)), chosen.scale(vector).flip(0))


def test_before_the_first_step_it_is_the_identity() -> None:
    vector = torch.randn(4)
    assert torch.equal(AutoPreconditioner().scale(vector), vector)
    assert torch.equal(AutoPreconditioner().unscale(vector), vector)


def test_the_diagonal_steps_in_as_long_as_factors_are_zero() -> None:
    """Inputs of zero give a layer no gradient: the next estimate, three steps later, finds it."""
    model, chosen = Partly(2), AutoPreconditioner()
    refreshed(model, chosen, scale=0.0)
    assert chosen.in_use is chosen.diagonal
    refreshed(model, chosen, times=2)
    assert chosen.in_use is chosen.diagonal
    assert chosen.diagonal.state_dict()["refreshes"] == 3
    refreshed(model, chosen)
    assert chosen.in_use is chosen.factors
    assert chosen.diagonal.state_dict()["refreshes"] == 3
    refreshed(model, chosen, times=3, scale=0.0)
    assert chosen.in_use is chosen.factors  # those of an earlier step


def test_a_loss_that_cannot_be_watched_gets_the_diagonal() -> None:
    model, (x, y) = Partly(2), data()
    before = F.mse_loss(model(x), y).item()
    optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=4)
    with mock.patch(
        "lightning_sfn.newton.kronecker_estimate._observe", side_effect=TypeError("no modes here")
    ) as refused:
        optimizer.step(lambda: F.mse_loss(model(x), y))
    refused.assert_called_once()
    assert isinstance(optimizer.preconditioner, AutoPreconditioner)
    assert optimizer.preconditioner.in_use is optimizer.preconditioner.diagonal
    assert F.mse_loss(model(x), y).item() < before


def test_where_there_is_no_room_for_factors_the_diagonal_stays_and_it_is_said_once() -> None:
    model, (x, y) = Partly(2), data()
    optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=4)
    shortage = torch.OutOfMemoryError("CUDA out of memory.")
    with mock.patch("lightning_sfn.newton.kronecker_estimate._observe", side_effect=shortage) as asked:
        with pytest.warns(UserWarning, match=r"CUDA out of memory\.\)\. Equilibration is used from now on\.$"):
            optimizer.step(lambda: F.mse_loss(model(x), y))
        for _ in range(4):
            optimizer.step(lambda: F.mse_loss(model(x), y))
    asked.assert_called_once()
    assert optimizer.krylov_dim == 4
    assert optimizer.last_step is not None
    assert optimizer.last_step.coordinates == "diagonal"
    assert optimizer.preconditioner.state_dict()["has_room"] is False


@pytest.mark.parametrize("preconditioner", ["auto", "kronecker", "diagonal", None])
def test_inputs_that_are_always_zero_keep_their_weights(preconditioner: str | None) -> None:
    """A random start vector must not carry them along, nor a rotation spread rounding to them."""
    torch.manual_seed(0)
    x = torch.randn(60, 8) * torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 0])
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    before = model[0].weight.detach().clone()
    optimizer = SaddleFreeNewton(model.parameters(), preconditioner=preconditioner)
    for _ in range(6):
        optimizer.step(lambda: F.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 0)))
    moved = (model[0].weight.detach() - before).abs().amax(0)
    assert (moved == 0).tolist() == [False, False, True, False, True, False, False, True]


def test_a_state_of_other_coordinates_is_refused_and_nothing_lost() -> None:
    model = Partly(2)
    saved = SaddleFreeNewton(model.parameters(), lr=0.5, preconditioner="diagonal").state_dict()
    optimizer = SaddleFreeNewton(model.parameters(), lr=0.25)
    with pytest.raises(
        ValueError, match=r"^The state was saved with a DiagonalPreconditioner, but this optimizer has a "
    ):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_other_parameters_are_looked_at_anew() -> None:
    chosen = refreshed(Partly(5), AutoPreconditioner())
    chosen.reset()
    assert chosen.diagonal.state_dict() == {}
    assert refreshed(Partly(2), chosen).in_use is chosen.factors
    chosen.reset()
    assert not chosen.factors.is_known


@pytest.mark.parametrize("loose", [2, 5])
def test_a_resumed_run_goes_on_bit_for_bit(loose: int) -> None:
    x, y = data()

    def steps(optimizer: SaddleFreeNewton, model: nn.Module, count: int) -> Tensor:
        for _ in range(count):
            optimizer.step(lambda: F.mse_loss(model(x).tanh(), y))
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    torch.manual_seed(0)
    model = Partly(loose)
    optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=3)
    steps(optimizer, model, 4)
    torch.manual_seed(1)
    twin = Partly(loose)
    twin.load_state_dict(model.state_dict())
    resumed = SaddleFreeNewton(twin.parameters(), krylov_dim=3)
    resumed.load_state_dict(optimizer.state_dict())
    assert type(resumed.preconditioner.in_use) is type(optimizer.preconditioner.in_use)  # type: ignore[attr-defined]
    assert torch.equal(steps(optimizer, model, 4), steps(resumed, twin, 4))


def test_the_size_of_a_subspace_is_at_most_that_of_the_parameters() -> None:
    x = torch.tensor([1.0, 0.5, -0.2], dtype=D, requires_grad=True)
    optimizer = SaddleFreeNewton([x])
    optimizer.step(lambda: (x**4 - x**2).sum())
    assert optimizer.last_step is not None
    assert optimizer.last_step.subspace_dim == 3


@pytest.mark.parametrize(("told", "bent"), [({}, True), ({"bent": True}, True), ({"bent": False}, False)], ids=str)
@pytest.mark.parametrize("whole", [{}, {"whole": Objective([lambda: torch.zeros(())])}], ids=["", "whole"])
def test_what_is_told_is_handed_on_to_either_map(told: dict[str, Any], whole: dict[str, Any], bent: bool) -> None:
    auto, operator, generator = AutoPreconditioner(), operator_of(Partly(1)), torch.Generator()
    with mock.patch.object(auto.factors, "renew") as renew, mock.patch.object(auto.diagonal, "refresh") as refresh:
        auto.refresh(operator, generator, **told, **whole)
    renew.assert_called_once_with(operator, generator, bent, whole.get("whole"))
    refresh.assert_called_once_with(operator, generator, bent, whole.get("whole"))


@pytest.mark.parametrize("has_room", [True, False])
def test_a_loaded_state_knows_whether_there_is_room_for_factors(has_room: bool) -> None:
    saved, loaded = AutoPreconditioner(), AutoPreconditioner()
    saved._has_room = has_room
    loaded.load_state_dict(saved.state_dict())
    loaded.refresh(operator_of(Partly(1)), torch.Generator().manual_seed(0))
    assert loaded.name == ("kronecker" if has_room else "diagonal")
    assert loaded.state_dict()["has_room"] is has_room
