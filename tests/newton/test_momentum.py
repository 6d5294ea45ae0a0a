"""Momentum steps against closed forms, and what they do to an optimizer's bookkeeping."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sfn import SaddleFreeNewton
from lightning_sfn.newton import KroneckerFactors

D = torch.float64
CURVATURE = torch.tensor([1.0, 0.3, 0.05], dtype=D)


def bowl(x: Tensor) -> Tensor:
    return (CURVATURE * x.square()).sum() / 2


def kinds_of(optimizer: SaddleFreeNewton, closure: object, steps: int) -> list[str]:
    found = []
    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
        assert optimizer.last_step is not None
        found.append(optimizer.last_step.kind)
    return found


def test_without_momentum_every_step_has_a_subspace() -> None:
    x = torch.ones(3, dtype=D, requires_grad=True)
    assert set(kinds_of(SaddleFreeNewton([x]), lambda: bowl(x), 30)) == {"subspace"}


def test_momentum_steps_are_those_of_the_heavy_ball() -> None:
    """Identity coordinates, far inside the radius: d <- 0.9 d - 0.3 g, written out."""
    x = torch.full((3,), 1e-3, dtype=D, requires_grad=True)
    optimizer = SaddleFreeNewton([x], preconditioner=None, heavy_ball=0.9, trust_region="gradient", lr=1e-9)
    optimizer.param_groups[0]["lr"] = 1e-9  # subspace steps go nowhere, so that the start is known
    while optimizer._glide is not None and optimizer._glide.pace.kind == "subspace":
        optimizer.step(lambda: bowl(x) + 1.0)
    optimizer.param_groups[0]["lr"] = 1.0
    ours, start = [], x.detach().clone()
    for _ in range(12):
        optimizer.step(lambda: bowl(x) + 1.0)
        if optimizer.last_step is not None and optimizer.last_step.kind == "momentum":
            ours.append(x.detach().clone())
    y, d = start, -0.3 * CURVATURE * start  # the first momentum step was one of those that go nowhere
    for point in ours:
        d = 0.9 * d - 0.3 * CURVATURE * y
        y = y + d
        torch.testing.assert_close(point, y, rtol=1e-6, atol=1e-12)
    assert len(ours) >= 10


def network() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    return model, torch.randn(64, 4, dtype=D), torch.randint(3, (64,))


def optimizer_for(model: torch.nn.Module, **options: float) -> SaddleFreeNewton:
    return SaddleFreeNewton(
        model.parameters(), heavy_ball=0.95, preconditioner=KroneckerFactors(model), inner_steps=1, **options
    )


def test_both_kinds_lower_the_loss_of_a_network() -> None:
    model, x, y = network()
    before = float(F.cross_entropy(model(x), y).detach())
    optimizer = optimizer_for(model)
    assert set(kinds_of(optimizer, lambda: F.cross_entropy(model(x), y), 60)) == {"subspace", "momentum"}
    assert float(F.cross_entropy(model(x), y).detach()) < 0.5 * before


def test_a_step_stays_within_the_radius() -> None:
    """With lr = 1 and a bound, no step is longer than it."""
    model, x, y = network()
    optimizer = optimizer_for(model, max_step_norm=1e-3)
    for _ in range(30):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_step is not None
        assert optimizer.last_step.step_norm <= 1e-3 * (1 + 1e-6)


def test_a_way_that_leads_astray_is_taken_back_to_its_best_point() -> None:
    model, x, y = network()
    optimizer = optimizer_for(model)
    glide = optimizer._glide
    assert glide is not None
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    while glide.best is None:
        optimizer.step(closure)
    best_loss, best = glide.best[0], glide.best[1].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30.0)
    assert float(closure().detach()) > best_loss + 1.0
    settled: list[Tensor] = []
    original = glide.settle

    def settle(parameters: object, losses: object, carried: object) -> object:
        result = original(parameters, losses, carried)  # type: ignore[arg-type]
        settled.append(parameters.read().clone())  # type: ignore[attr-defined]
        return result

    glide.settle = settle  # type: ignore[assignment,method-assign]
    optimizer.step(closure)
    torch.testing.assert_close(settled[0], best, rtol=0, atol=0)
    assert optimizer.last_step is not None
    assert optimizer.last_step.kind == "subspace"
    assert optimizer.last_step.loss_before == pytest.approx(best_loss)
    assert glide.shrink < 1.0


def astray() -> tuple[SaddleFreeNewton, torch.nn.Module, Callable[[], Tensor]]:
    """An optimizer whose network was moved far off in the middle of a momentum turn."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    assert optimizer._glide is not None
    while optimizer._glide.best is None:
        optimizer.step(closure)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30.0)
    return optimizer, model, closure


def test_no_cycle_ends_above_the_best_point_of_its_momentum_turn() -> None:
    """Where the harvest brings nothing, here since subspace steps are kept from moving."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    glide = optimizer._glide
    assert glide is not None
    while glide.pace.kind == "subspace" or glide.pace.spent < 10:
        optimizer.step(closure)
    assert glide.best is not None
    best_loss, best = glide.best[0], glide.best[1].clone()
    with torch.no_grad():  # a little uphill: not astray
        for parameter in model.parameters():
            parameter.mul_(1 - 1e-3)
    assert best_loss < float(closure().detach()) < 1.1 * best_loss
    glide.pace.end_momentum()
    optimizer.param_groups[0]["lr"] = 1e-12
    for _ in range(2):
        optimizer.step(closure)
        assert glide.best is not None
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.loss_before == pytest.approx(best_loss, abs=1e-12)
    torch.testing.assert_close(
        torch.nn.utils.parameters_to_vector(model.parameters()).detach(), best, rtol=0, atol=1e-9
    )
    assert glide.best is None


def fail_once(optimizer: SaddleFreeNewton, error: Exception) -> list[Tensor]:
    """Lets the optimizer's next step fail after the way back; the parameters that each attempt starts from."""
    original, starts = optimizer._one_step, []

    def one_step(parameters: Any, losses: Any) -> Any:
        starts.append(parameters.read().clone())
        if len(starts) == 1:
            raise error
        return original(parameters, losses)

    optimizer._one_step = one_step  # type: ignore[method-assign]
    return starts


def test_a_retry_for_want_of_memory_starts_where_the_way_back_ended() -> None:
    optimizer, _, closure = astray()
    reference, _, reference_closure = astray()
    reference.step(reference_closure)
    assert optimizer._glide is not None
    assert optimizer._glide.best is not None
    best = optimizer._glide.best[1].clone()
    starts = fail_once(optimizer, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.warns(UserWarning, match="Memory ran out"):
        optimizer.step(closure)
    assert len(starts) == 2
    assert all(torch.equal(start, best) for start in starts)
    assert reference._glide is not None
    assert optimizer._glide.pace == reference._glide.pace


def test_an_error_gives_back_the_parameters_and_the_way_back() -> None:
    optimizer, model, closure = astray()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    assert optimizer._glide is not None
    best, state = optimizer._glide.best, copy.deepcopy(optimizer._glide.state_dict())
    fail_once(optimizer, ArithmeticError("boom"))
    with pytest.raises(ArithmeticError, match="boom"):
        optimizer.step(closure)
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), before)
    assert optimizer._glide.best is not None
    assert best is not None
    assert torch.equal(optimizer._glide.best[1], best[1])
    assert optimizer._glide.state_dict()["pace"] == state["pace"]
    assert optimizer._glide.shrink == state["shrink"]
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.loss_before == pytest.approx(best[0])


def test_factors_are_estimated_less_often_between_momentum_steps() -> None:
    """Every third subspace step, and every ninth momentum step."""
    model, x, y = network()
    optimizer = optimizer_for(model)
    factors = optimizer.preconditioner
    assert isinstance(factors, KroneckerFactors)
    asked = []
    original = factors._estimated
    factors._estimated = lambda *args: (asked.append(len(kinds)), original(*args))[1]  # type: ignore[func-returns-value,method-assign]
    kinds: list[str] = []
    while kinds.count("momentum") < 30:
        kinds += kinds_of(optimizer, lambda: F.cross_entropy(model(x), y), 1)
    between = [last - first for first, last in pairwise(asked) if kinds[first] == kinds[last - 1] == "momentum"]
    assert set(between) == {9}


@pytest.mark.parametrize("before", [1, 5, 25])
def test_a_restored_optimizer_goes_on_bit_for_bit(before: int) -> None:
    model, x, y = network()
    optimizer = optimizer_for(model)
    for _ in range(before):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    other = copy.deepcopy(model)
    restored = optimizer_for(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(25):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        restored.step(lambda: F.cross_entropy(other(x), y))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_momentum_starts_anew_where_other_parameters_train() -> None:
    model, x, y = network()
    optimizer = optimizer_for(model)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    while optimizer._glide is None or optimizer._glide.velocity is None:
        optimizer.step(closure)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.kind == "subspace"
    assert optimizer._glide is not None
    assert (optimizer._glide.momentum, optimizer._glide.velocity, optimizer._glide.best) == (0.95, None, None)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="heavy_ball is"):
        SaddleFreeNewton([torch.ones(2, requires_grad=True)], heavy_ball=momentum)
