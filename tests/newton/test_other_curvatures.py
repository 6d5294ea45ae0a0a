"""Fisher information and gradient covariance against sums over labels and cases, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Gamma, Independent, Normal

from lightning_sfn.newton import (
    FisherOperator,
    GaussNewtonOperator,
    GradientCovarianceOperator,
    HessianOperator,
    IdentityPreconditioner,
    Objective,
    ObjectiveError,
    SaddleFreeNewton,
)
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.step import build_subspace

from .cases import assert_close, make, reference

D = torch.float64
CASES, CLASSES = 6, 3


def network(outputs: int = CLASSES) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).double()
    return model, torch.randn(CASES, 4, dtype=torch.float64), torch.randint(outputs, (CASES,))


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, model.parameters(), retain_graph=True)])


def test_fisher_is_the_expected_outer_product_over_all_labels() -> None:
    model, x, y = network()
    logs = model(x).log_softmax(dim=1)
    expected = sum(
        logs[i, c].exp().detach() * torch.outer(gradient(logs[i, c], model), gradient(logs[i, c], model))
        for i in range(CASES)
        for c in range(CLASSES)
    )
    closure = lambda: (F.cross_entropy(model(x), y), Categorical(logits=model(x)))  # noqa: E731
    matrix = dense_matrix(FisherOperator(Objective([closure]), model.parameters()))
    assert_close(matrix, expected / CASES, 1e-10)


@pytest.mark.parametrize("kind", ["bernoulli", "normal"])
def test_fisher_of_independent_outputs(kind: str) -> None:
    model, x, _ = network()
    rows = [gradient(z, model) for z in model(x).reshape(-1)]
    p = model(x).detach().sigmoid().reshape(-1)
    weights = p * (1 - p) if kind == "bernoulli" else torch.full_like(p, 1 / 0.25)
    expected = sum(w * torch.outer(r, r) for w, r in zip(weights, rows, strict=True)) / CASES

    def closure() -> tuple[Tensor, Independent]:
        output = model(x)
        base = Bernoulli(logits=output) if kind == "bernoulli" else Normal(output, 0.5 * torch.ones_like(output))
        return output.sum(), Independent(base, 1)

    assert_close(dense_matrix(FisherOperator(Objective([closure]), model.parameters())), expected, 1e-10)


def test_gradient_covariance_is_the_mean_outer_product_of_case_gradients() -> None:
    model, x, y = network()
    losses = F.cross_entropy(model(x), y, reduction="none")
    expected = sum(torch.outer(gradient(v, model), gradient(v, model)) for v in losses) / CASES

    def part(rows: slice) -> object:
        def closure() -> tuple[Tensor, Tensor]:
            values = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
            return values.mean(), values

        return closure

    parts = [part(slice(0, 2)), part(slice(2, CASES))]
    objective = Objective(parts, [2, CASES - 2])  # type: ignore[arg-type]
    operator = GradientCovarianceOperator(objective, model.parameters())
    assert_close(dense_matrix(operator), expected, 1e-10)
    assert_close(operator.loss_and_gradient()[1], gradient(losses.mean(), model), 1e-10)


@pytest.mark.parametrize("kind", ["weight norm", "attention"])
def test_gradient_covariance_of_what_torch_alone_cannot_differentiate_twice(kind: str) -> None:
    """Against single gradients, which need no second derivative."""
    if kind == "weight norm":
        model: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    else:
        model = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True).double()
    x = torch.randn(CASES, 2, 4, dtype=torch.float64)

    def losses() -> Tensor:
        return model(x).sin().square().mean((1, 2))

    expected = sum(torch.outer(gradient(v, model), gradient(v, model)) for v in losses()) / CASES
    operator = GradientCovarianceOperator(Objective([lambda: (losses().mean(), losses())]), model.parameters())
    assert_close(dense_matrix(operator), expected, 1e-10)


def test_cases_whose_losses_the_parameters_do_not_move_add_nothing() -> None:
    x, data = torch.ones(1, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 3.0], dtype=torch.float64)
    other = torch.ones(2, dtype=torch.float64, requires_grad=True)
    objective = Objective([lambda: (other.mean(), 1 * other), lambda: ((data * x).mean(), data * x)])
    operator = GradientCovarianceOperator(objective, [x])
    assert operator.matvec(torch.ones(1, dtype=torch.float64)).tolist() == [(0 + (1 + 9) / 2) / 2]


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_loss_is_the_mean_of_the_cases_losses_up_to_rounding_of_either_size(size: float) -> None:
    x = torch.ones(2, requires_grad=True)
    operator = GradientCovarianceOperator(Objective([lambda: (size * (1 + 1e-5) * x.mean(), size * x)]), [x])
    assert operator.matvec(torch.ones(2)).tolist() == pytest.approx([size**2 / 2] * 2)
    operator = GradientCovarianceOperator(Objective([lambda: (size * (1 + 1e-3) * x.mean(), size * x)]), [x])
    with pytest.raises(ObjectiveError):
        operator.matvec(torch.ones(2))


def test_fisher_weights_its_parts_as_the_objective_does() -> None:
    model, x, y = network()

    def part(rows: slice) -> object:
        return lambda: (F.cross_entropy(model(x[rows]), y[rows]), Categorical(logits=model(x[rows])))

    def matrix(objective: Objective) -> Tensor:
        return dense_matrix(FisherOperator(objective, model.parameters()))

    parts = [part(slice(0, 2)), part(slice(2, CASES))]
    whole, uneven = Objective([part(slice(None))]), Objective(parts, [2, CASES - 2])  # type: ignore[list-item,arg-type]
    assert_close(matrix(uneven), matrix(whole), 1e-10)


@pytest.mark.parametrize(("options", "evaluations"), [({"retention": "retain"}, 1), ({"retention": "recompute"}, 3)])
@pytest.mark.parametrize("kind", [FisherOperator, GradientCovarianceOperator])
def test_graphs_are_kept_as_asked_for(kind: type, options: dict[str, str], evaluations: int) -> None:
    model, x, y = network()
    count = 0

    def closure() -> tuple[Tensor, object]:
        nonlocal count
        count += 1
        losses = F.cross_entropy(model(x), y, reduction="none")
        return losses.mean(), Categorical(logits=model(x)) if kind is FisherOperator else losses

    operator = kind(Objective([closure]), model.parameters(), **options)
    for _ in range(3):
        operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))
    assert count == evaluations


@pytest.mark.parametrize("kind", [FisherOperator, GradientCovarianceOperator])
def test_the_budget_decides_by_default(kind: type) -> None:
    model, x, y = network()

    def closure() -> tuple[Tensor, object]:
        losses = F.cross_entropy(model(x), y, reduction="none")
        return losses.mean(), Categorical(logits=model(x)) if kind is FisherOperator else losses

    budget = GraphBudget(0)
    operator = kind(Objective([closure]), model.parameters(), budget=budget)
    operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))
    assert budget.bytes_per_size is not None  # it was asked, and measured a graph


@pytest.mark.parametrize(
    ("curvature", "output", "said"),
    [
        (
            "fisher",
            lambda z: z,
            r"^curvature='fisher' needs the predicted distribution: let the closure return the pair \(loss, "
            r"distribution\), for instance \(loss, torch\.distributions\.Categorical\(logits=output\)\)\.$",
        ),
        (
            "fisher",
            lambda z: Gamma(z.exp(), z.exp()),
            r"class Gamma, .* Normal or Independent of one of them is expected\.$",
        ),
        (
            "gradient_covariance",
            lambda z: z.detach(),
            r"^curvature='gradient_covariance' needs the losses of the single cases with their graph: let the closure "
            r"return the pair \(loss, losses\)\.$",
        ),
        ("gradient_covariance", lambda z: z + 1, "mean of the cases' losses, but the loss is 1 and their mean 2\\.$"),
        ("gradient_covariance", lambda z: 1e-4 * z, "the loss is 1 and their mean 0.0001\\.$"),
        ("gradient_covariance", lambda z: 1.001 * z, "the loss is 1 and their mean 1.001\\.$"),
    ],
)
def test_what_the_closure_must_return_is_said(curvature: str, output: object, said: str) -> None:
    x = torch.ones(3, requires_grad=True)
    optimizer = SaddleFreeNewton([x], krylov_dim=2, curvature=curvature)  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match=said):
        optimizer.step(lambda: (x.square().mean(), output(x.square())))  # type: ignore[operator]


@pytest.mark.parametrize("curvature", ["fisher", "gradient_covariance"])
def test_they_train(curvature: str) -> None:
    model, x, y = network()

    def closure() -> tuple[Tensor, object]:
        losses = F.cross_entropy(model(x), y, reduction="none")
        return losses.mean(), Categorical(logits=model(x)) if curvature == "fisher" else losses

    optimizer = SaddleFreeNewton(model.parameters(), curvature=curvature, trust_region="damped_newton")  # type: ignore[arg-type]
    first = [float(optimizer.step(closure)) for _ in range(15)]  # type: ignore[arg-type]
    assert first[-1] < 0.2 * first[0]


@pytest.mark.parametrize("name", ["mlp_classifier", "rnn"])
def test_several_products_at_once_are_the_dense_hessians(name: str) -> None:
    case = make(name)
    operator = HessianOperator(Objective([case.closure]), case.parameters)
    vectors = torch.randn(5, operator.parameters.size, dtype=torch.float64)
    assert operator.batch > 1
    assert_close(operator.matmat(vectors), vectors @ reference(name).hessian, 1e-10)
    assert operator.products == 5


def test_what_does_not_vectorise_is_done_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    operator = HessianOperator(Objective([case.closure]), case.parameters)

    def refuse(vectors: Tensor) -> Tensor:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(operator, "_batched", refuse)
    vectors = torch.randn(3, operator.parameters.size, dtype=torch.float64)
    assert_close(operator.matmat(vectors), vectors @ reference("mlp").hessian, 1e-10)


@pytest.mark.parametrize("secants", [False, True])
def test_gradient_differences_are_no_products_of_another_matrix(secants: bool) -> None:
    """Of a loss whose Hessian has the eigenvalues 9 and -7; that of Gauss-Newton has 0 and 2."""
    x = torch.ones(2, dtype=D, requires_grad=True)

    def closure() -> tuple[Tensor, Tensor]:
        output = x[0] * x[1]
        return (output - 10) ** 2 / 2, output

    operator = GaussNewtonOperator(Objective([closure]), [x])
    hessian = torch.tensor([[1.0, -8.0], [-8.0, 1.0]], dtype=D)
    memory, step = StepMemory(1, secants=secants), torch.tensor([1.0, 0.9], dtype=D)
    memory.record(step, torch.zeros(2, dtype=D))
    memory.complete(hessian @ step)
    space = build_subspace(
        operator,
        torch.full((2,), -9.0, dtype=D),
        krylov_dim=1,
        preconditioner=IdentityPreconditioner(),
        memory=memory,
        seed=None,
        generator=torch.Generator(),
    )
    expected = [2.0] if secants else [0.0, 2.0]  # without secants a step joins by a product
    torch.testing.assert_close(space.eigenvalues, torch.tensor(expected, dtype=D), rtol=0, atol=1e-12)
