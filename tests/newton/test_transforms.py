"""Losses that differentiate inside, in every way that torch has, against plain double backward."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_sfn.newton import HessianOperator, Objective, SaddleFreeNewton
from lightning_sfn.newton.affine import affine
from lightning_sfn.newton.graphs import GraphBudget, Retention

from .cases import assert_close
from .test_substitution import graph_nodes


class States(nn.Module):
    """What a recurrent layer returns first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Tied(nn.Module):
    """A weight that is used twice: one use's share of its gradient comes back through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).sin())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 3)), (4, 2), "_Affine"),
    "a weight twice": (Tied, (4, 3), "_Affine"),
    "tanh": (lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 2), "_Tanh"),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(2, 5), nn.Sigmoid(), nn.Linear(5, 3)), (4, 2), "_Sigmoid"),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Softplus(), nn.Conv1d(3, 2, 2)), (2, 2, 6), "_Conv"),
    "recurrence": (States, (4, 2, 2), "_States"),
}


def _directions(output: Tensor) -> Tensor:
    """One for each number of a case's last dimension."""
    width = output.shape[-1]
    units = torch.eye(width, dtype=output.dtype).view(width, *[1] * (output.dim() - 1), width)
    return units.expand(width, *output.shape)


def batched(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    (slopes,) = torch.autograd.grad(output, x, _directions(output), is_grads_batched=True, create_graph=True)
    return slopes.square().mean() + (output - 1).square().mean()


def mapped(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)

    def slope(direction: Tensor) -> Tensor:
        return torch.autograd.grad(output, x, direction, create_graph=True)[0]

    return torch.func.vmap(slope)(_directions(output)).square().mean() + (output - 1).square().mean()


def vectorised(model: nn.Module, x: Tensor) -> Tensor:
    slopes = torch.autograd.functional.jacobian(model, x.detach(), create_graph=True, vectorize=True)
    return slopes.square().mean() + (model(x) - 1).square().mean()


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    output, moved = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))
    return moved.square().mean() + (output - 1).square().mean()


def dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        output, moved = forward_ad.unpack_dual(model(forward_ad.make_dual(x.detach(), torch.ones_like(x))))
        return moved.square().mean() + (output - 1).square().mean()


def dual_weights(model: nn.Module, x: Tensor) -> Tensor:
    """Along the parameters: no layer's input carries a tangent at first."""
    with forward_ad.dual_level():
        weights = {n: forward_ad.make_dual(p, torch.ones_like(p)) for n, p in model.named_parameters()}
        output, moved = forward_ad.unpack_dual(torch.func.functional_call(model, weights, (x.detach(),)))
        return moved.square().mean() + (output - 1).square().mean()


def dual_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Forward over a gradient whose graph was made outside."""
    output = model(x)
    with forward_ad.dual_level():
        along = forward_ad.make_dual(torch.ones_like(output), output.detach())
        (slopes,) = torch.autograd.grad(output, x, along, create_graph=True)
        slopes, moved = forward_ad.unpack_dual(slopes)
        return slopes.square().mean() + moved.square().mean() + (output - 1).square().mean()


def per_case(model: nn.Module, x: Tensor) -> Tensor:
    slopes = torch.func.vmap(torch.func.grad(lambda case: model(case).sum()))(x)
    return slopes.square().mean() + (model(x) - 1).square().mean()


def _hessian(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian by plain double backward."""

    def flat(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    gradient = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
    rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)) for g in gradient]
    return gradient.detach(), torch.stack(rows)


def _case(name: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    build, shape, _ = MODELS[name]
    model = build().double()
    return model, torch.randn(shape, dtype=torch.float64, requires_grad=True), list(model.parameters())


def _require_derivatives_of(loss: Callable[[], Tensor], parameters: list[Tensor], retention: Retention) -> None:
    gradient, hessian = _hessian(loss, parameters)
    operator = HessianOperator(Objective([loss]), parameters, retention=retention)
    units = torch.eye(len(hessian), dtype=torch.float64)
    assert_close(operator.loss_and_gradient()[1], gradient, 1e-12)
    assert_close(torch.stack([operator.matvec(unit) for unit in units]), hessian, 1e-12)
    assert_close(operator.matmat(units), hessian, 1e-12)


@pytest.mark.parametrize("form", [batched, mapped, vectorised, tangent, dual, dual_weights, dual_gradients])
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_that_differentiates_inside(name: str, form: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """A custom function's graph would be lost where the gradient that reaches it is batched."""
    model, x, parameters = _case(name)
    _require_derivatives_of(lambda: form(model, x), parameters, "retain")


@pytest.mark.parametrize("name", MODELS)
def test_the_models_have_what_is_put_in_place(name: str) -> None:
    model, x, parameters = _case(name)
    seen = []

    def loss() -> Tensor:
        seen.append(model(x))
        return seen[-1].square().sum()

    HessianOperator(Objective([loss]), parameters).loss_and_gradient()
    assert any(node.startswith(MODELS[name][2]) for node in graph_nodes(seen[0]))


def test_a_weights_share_of_a_batched_gradient_is_added_out_of_place() -> None:
    """What comes back to a weight through its layer may belong to somebody else, who goes on with it."""
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    slopes = []
    for layer in (affine, torch.nn.functional.linear):
        (slope,) = torch.autograd.grad(layer(x, weight, None).sin().sum(), x, create_graph=True)
        units = torch.eye(12, dtype=torch.float64).view(12, 4, 3)
        (second,) = torch.autograd.grad(slope, weight, units, is_grads_batched=True, create_graph=True)
        slopes.append(torch.autograd.grad(second.sin().sum(), weight)[0])
    assert_close(slopes[0], slopes[1], 1e-12)


@pytest.mark.parametrize("form", [batched, mapped, tangent, dual, per_case])
def test_graphs_under_transforms_are_measured_or_built_again(form: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Some transforms refuse the hooks that count what a graph saves."""
    model, x, parameters = _case("tanh")
    _require_derivatives_of(lambda: form(model, x), parameters, "auto")


def test_a_graph_that_cannot_be_measured_is_not_tried_again_in_every_step() -> None:
    model, x, parameters = _case("tanh")
    optimizer = SaddleFreeNewton(parameters, preconditioner=None, krylov_dim=4)
    with mock.patch.object(GraphBudget, "measure", autospec=True, side_effect=GraphBudget.measure) as measure:
        losses = [float(optimizer.step(lambda: per_case(model, x))) for _ in range(4)]
    assert measure.call_count == 1
    assert losses[-1] < 0.5 * losses[0]
