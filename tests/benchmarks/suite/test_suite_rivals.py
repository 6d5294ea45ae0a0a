"""The rivals against dense matrices, and all methods on a small task."""

import math
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from suite.hessian_free import HessianFree, conjugate_gradients
from suite.kfac import KFAC
from suite.methods import METHODS, SEARCHED
from suite.networks import Transformer
from suite.tasks import TASKS, Problem
from torch import Tensor, nn
from torch.nn import functional as F

from ...newton.elsewhere import DEVICE, elsewhere, move


def regression(cases: int = 40, width: int = 4, outputs: int = 3) -> Problem:
    inputs, targets = torch.randn(cases, width).double(), torch.randn(cases, outputs).double()
    return Problem(nn.Linear(width, outputs).double(), inputs, targets, 10, categorical=False)


def test_conjugate_gradients_solve() -> None:
    root = torch.randn(8, 8).double()
    matrix, right = root @ root.T + torch.eye(8), torch.randn(8).double()
    x, model = conjugate_gradients(lambda v: matrix @ v, right, torch.zeros_like(right), 30)
    expected = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
    assert model == pytest.approx(float(-0.5 * right @ expected), rel=1e-6)


def test_a_hessian_free_step_is_the_damped_gauss_newton_step() -> None:
    problem = regression()
    weights = torch.cat([problem.model.weight, problem.model.bias[:, None]], 1).detach().clone()
    optimizer = HessianFree(problem, damping=0.5)
    optimizer.step()
    joined = torch.cat([problem.inputs, torch.ones(40, 1).double()], 1)
    normal = 2 * joined.T @ joined / 40
    gradient = 2 * (joined @ weights.T - problem.targets).T @ joined / 40
    expected = weights - torch.linalg.solve(normal + 0.5 * torch.eye(5), gradient.T).T
    reached = torch.cat([problem.model.weight, problem.model.bias[:, None]], 1)
    torch.testing.assert_close(reached, expected, rtol=1e-5, atol=1e-7)
    assert optimizer.damping == pytest.approx(0.5 * 2 / 3)  # the model is exact here


def test_trust_krylov_finds_a_minimum_and_gives_its_errors_back() -> None:
    problem = regression()
    joined = torch.cat([problem.inputs, torch.ones(40, 1).double()], 1)
    best = torch.linalg.lstsq(joined, problem.targets).solution.T
    stepping = METHODS["trust_krylov"](problem, radius=100.0)
    for _ in zip(range(20), stepping, strict=False):
        pass
    reached = torch.cat([problem.model.weight, problem.model.bias[:, None]], 1)
    torch.testing.assert_close(reached, best, rtol=1e-4, atol=1e-6)
    stepping.close()
    before = {thread.name for thread in threading.enumerate()}
    problem.targets[0] = torch.nan
    stepping = METHODS["trust_krylov"](problem, radius=1.0)
    with pytest.raises(FloatingPointError):
        next(stepping)
    assert {thread.name for thread in threading.enumerate()} == before


def fisher_of_linear(model: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    return joined.T @ joined / len(inputs), 2 * torch.eye(model.out_features, dtype=inputs.dtype)


def test_kfac_is_the_natural_gradient_where_that_is_a_kronecker_product() -> None:
    problem = regression()
    model = problem.model
    weights = torch.cat([model.weight, model.bias[:, None]], 1).detach().clone()
    optimizer = KFAC(model, lr=0.3, damping=1e-2, kl_clip=math.inf)
    output = problem.output()
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double().repeat(10, 1)
    drawn = output.detach() + signs * 0.5**0.5  # a sample whose second moment is exactly that of the distribution
    optimizer.step(problem.loss(), lambda: (problem.loss_of(problem.output(), drawn) * 40, 40))
    a, s = fisher_of_linear(model, problem.inputs)
    torch.testing.assert_close(optimizer.factors[0][0], a)
    torch.testing.assert_close(optimizer.factors[0][1], s)
    damping = 1e-2 * float(a.diagonal().mean() * s.diagonal().mean())
    pi = float(a.diagonal().mean() / s.diagonal().mean()) ** 0.5
    damped = torch.kron(s + damping**0.5 / pi * torch.eye(3).double(), a + damping**0.5 * pi * torch.eye(5).double())
    joined = torch.cat([problem.inputs, torch.ones(40, 1).double()], 1)
    gradient = 2 * (joined @ weights.T - problem.targets).T @ joined / 40
    expected = weights - 0.3 * torch.linalg.solve(damped, gradient.flatten()).view_as(weights)
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1), expected)


def test_kfac_factors_of_a_convolution_are_those_of_its_patches() -> None:
    model = nn.Conv2d(2, 3, 2, stride=1).double()
    inputs, weights = torch.randn(5, 2, 4, 4).double(), torch.randn(5, 3, 3, 3).double()
    optimizer = KFAC(model, lr=1.0, damping=1e-2)
    optimizer.observe(lambda: ((model(inputs) * weights).sum(), 5))
    places = [(n, i, j) for n in range(5) for i in range(3) for j in range(3)]
    patches = torch.stack(
        [torch.cat([inputs[n, :, i : i + 2, j : j + 2].flatten(), torch.ones(1)]) for n, i, j in places]
    )
    deltas = torch.stack([weights[n, :, i, j] for n, i, j in places])
    torch.testing.assert_close(optimizer.factors[0][0], patches.T @ patches / 45)
    torch.testing.assert_close(optimizer.factors[0][1], deltas.T @ deltas / 5)


def test_kfac_is_exact_for_an_embedding_and_a_layer_norm() -> None:
    table, norm = nn.Embedding(4, 3).double(), nn.LayerNorm(3).double()
    model = nn.Sequential(table, norm)
    characters, weights = torch.tensor([0, 1, 1, 3]), torch.randn(4, 3).double()
    optimizer = KFAC(model, lr=1.0, damping=1e-2)
    optimizer.observe(lambda: ((model(characters) * weights).sum(), 4))
    torch.testing.assert_close(optimizer.factors[0][0], torch.tensor([0.25, 0.5, 0.0, 0.25]).double())
    normal = F.layer_norm(table(characters), (3,)).detach()
    expected = torch.stack([(weights * normal).square().mean(0), weights.square().mean(0)])
    torch.testing.assert_close(optimizer.factors[1][1], expected)


def test_kfac_shortens_a_step_to_its_bound_and_refuses_unknown_parameters() -> None:
    steps = []
    for bound in (math.inf, 1e-4):
        torch.manual_seed(1)
        problem = regression()
        before = problem.model.weight.detach().clone()
        optimizer = KFAC(problem.model, lr=0.5, damping=1e-2, kl_clip=bound)
        optimizer.step(problem.loss(), lambda p=problem: (p.loss_of(p.output(), p.sampled(p.output())) * 40, 40))
        steps.append(problem.model.weight.detach() - before)
    shrunk = steps[1].norm() / steps[0].norm()
    assert 0 < shrunk < 0.1
    torch.testing.assert_close(steps[1], shrunk * steps[0])
    odd = nn.Linear(2, 2)
    odd.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    model = nn.Sequential(odd)
    model.register_parameter("other", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="rules"):
        KFAC(model, lr=1.0, damping=1e-2)


def test_kfac_knows_every_layer_of_the_suite() -> None:
    for task in TASKS.values():
        KFAC(task.network(9) if task.time else task.network(), lr=1.0, damping=1e-2)
    assert len(KFAC(Transformer(5, 4, 8, 1), lr=1.0, damping=1e-2).layers) == 10


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_a_convex_loss(method: str) -> None:
    problem = regression()
    problem.model.float()
    problem.inputs, problem.targets = problem.inputs.float(), problem.targets.float()
    candidates = SEARCHED.get(method, [{}])
    settings = candidates[len(candidates) // 2] | ({"share": 1.0} if method == "kfac" else {})
    before = float(problem.loss().detach())
    joined = torch.cat([problem.inputs, torch.ones(40, 1)], 1)
    best = torch.linalg.lstsq(joined, problem.targets).solution
    least = float((joined @ best - problem.targets).square().sum() / 40)
    stepping = METHODS[method](problem, **settings)
    for _ in zip(range(20), stepping, strict=False):
        pass
    reached = float(problem.loss().detach())
    assert least <= reached * (1 + 1e-5)
    assert reached < before - 0.02 * (before - least)


@pytest.mark.parametrize("name", ["convolutional", "transformer"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "trust_krylov"])  # which no simulated device follows
def test_every_method_works_on_another_device(name: str, method: str, tmp_path: Path) -> None:
    """Nothing of a method stays behind on the CPU, and its losses are the same, where no random numbers decide."""
    reached = []
    for there in (False, True):
        problem = TASKS[name].tiny().start(0, tmp_path, tmp_path)
        with elsewhere() if there else nullcontext():
            if there:
                move(problem.model)
                problem.inputs, problem.targets = problem.inputs.to(DEVICE), problem.targets.to(DEVICE)
            torch.manual_seed(0)
            stepping = METHODS[method](problem, **SEARCHED.get(method, [{}])[0])
            for _ in range(2):
                next(stepping)
            reached.append(float(problem.loss().detach()))
    assert math.isfinite(reached[0])
    assert reached[1] == pytest.approx(reached[0], rel=1e-4)
