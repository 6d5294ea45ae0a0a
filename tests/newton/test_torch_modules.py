"""What PyTorch offers in layers and losses: products agree with differences of its gradients, or say why not.

Differences are of first derivatives as autograd computes them, without anything of the package. So this also sees an
operation of PyTorch whose own second derivative is wrong.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_sfn.newton import CurvatureError, FlatParameters, HessianOperator, Objective
from lightning_sfn.newton.operators import make_operator

from .cases import assert_close

_STEP = 1e-5

FLAT, SEQUENCE, IMAGE = (4, 6), (3, 4, 6), (2, 4, 6, 6)


def after(layer: Callable[[int], nn.Module], outputs: int = 4) -> Callable[[], nn.Module]:
    """A layer that gets its inputs from a linear one, so that derivatives by them are seen too."""
    return lambda: nn.Sequential(nn.Linear(6, outputs), layer(outputs))


def filtered(layer: Callable[[int], nn.Module], outputs: int = 4) -> Callable[[], nn.Module]:
    """The same behind a convolution."""
    return lambda: nn.Sequential(nn.Conv2d(4, outputs, 3), layer(outputs))


class First(nn.Module):
    """The first of several outputs."""

    def __init__(self, module: nn.Module, *, inputs: int = 1, **options: Any) -> None:
        super().__init__()
        self.module, self.inputs, self.options = module, inputs, options

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*[x] * self.inputs, **self.options)[0]


def _activations() -> dict[str, Callable[[], nn.Module]]:
    kinds = (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish),
        *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.GLU),
    )
    return {kind.__name__: after(lambda _, kind=kind: kind()) for kind in kinds}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (build, FLAT) for name, build in _activations().items()},
    "GELU, tanh": (after(lambda _: nn.GELU(approximate="tanh")), FLAT),
    "Softmax": (after(lambda _: nn.Softmax(-1)), FLAT),
    "LogSoftmax": (after(lambda _: nn.LogSoftmax(-1)), FLAT),
    "LayerNorm": (after(nn.LayerNorm), FLAT),
    "RMSNorm": (after(nn.RMSNorm), FLAT),
    "BatchNorm1d": (after(nn.BatchNorm1d), FLAT),
    "GroupNorm": (after(lambda n: nn.GroupNorm(2, n)), FLAT),
    "InstanceNorm2d": (filtered(lambda n: nn.InstanceNorm2d(n, affine=True)), IMAGE),
    "LocalResponseNorm": (filtered(lambda _: nn.LocalResponseNorm(2)), IMAGE),
    "ConvTranspose2d": (filtered(lambda n: nn.ConvTranspose2d(n, 3, 3, stride=2)), IMAGE),
    "Conv2d, same": (filtered(lambda n: nn.Conv2d(n, 3, 3, padding="same")), IMAGE),
    "Conv2d, reflect": (filtered(lambda n: nn.Conv2d(n, 3, 3, padding=1, padding_mode="reflect")), IMAGE),
    "Conv2d, groups": (filtered(lambda n: nn.Conv2d(n, 2, 3, groups=2)), IMAGE),
    "MaxPool2d": (filtered(lambda _: nn.MaxPool2d(2)), IMAGE),
    "AvgPool2d": (filtered(lambda _: nn.AvgPool2d(2)), IMAGE),
    "AdaptiveMaxPool2d": (filtered(lambda _: nn.AdaptiveMaxPool2d(2)), IMAGE),
    "AdaptiveAvgPool2d": (filtered(lambda _: nn.AdaptiveAvgPool2d(2)), IMAGE),
    "LPPool2d": (filtered(lambda _: nn.Sequential(nn.Softplus(), nn.LPPool2d(2, 2))), IMAGE),
    "Upsample, bilinear": (filtered(lambda _: nn.Upsample(scale_factor=2, mode="bilinear")), IMAGE),
    "Upsample, bicubic": (filtered(lambda _: nn.Upsample(scale_factor=2, mode="bicubic")), IMAGE),
    "PixelShuffle": (filtered(lambda _: nn.PixelShuffle(2)), IMAGE),
    "Unfold": (filtered(lambda _: nn.Unfold(2)), IMAGE),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 3)), FLAT),
    "weight_norm of a convolution": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 3, 3)), IMAGE),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 3)).eval(), FLAT),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"), FLAT),
    "RNN": (lambda: First(nn.RNN(6, 3, batch_first=True)), SEQUENCE),
    "RNN, relu": (lambda: First(nn.RNN(6, 3, nonlinearity="relu")), SEQUENCE),
    "GRU": (lambda: First(nn.GRU(6, 3, bidirectional=True)), SEQUENCE),
    "LSTM": (lambda: First(nn.LSTM(6, 3, num_layers=2)), SEQUENCE),
    "LSTM with projections": (lambda: First(nn.LSTM(6, 4, proj_size=2)), SEQUENCE),
    "GRUCell": (lambda: nn.GRUCell(6, 3), FLAT),
    "LSTMCell": (lambda: First(nn.LSTMCell(6, 3)), FLAT),
    "Bilinear": (lambda: Twice(nn.Bilinear(6, 6, 3)), FLAT),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), inputs=3), SEQUENCE),
}


class Twice(nn.Module):
    """A module of two inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x.flip(0))


CLASSES, NUMBERS = torch.tensor([0, 2, 1, 2]), torch.linspace(-1, 1.5, 12, dtype=torch.float64).view(4, 3)
SHARES = NUMBERS.softmax(1)
SIGNS = torch.tensor([1, -1, 1, -1])

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda y: F.cross_entropy(y, CLASSES),
    "cross_entropy, smoothed": lambda y: F.cross_entropy(y, CLASSES, label_smoothing=0.1, weight=SHARES[0]),
    "cross_entropy, shares": lambda y: F.cross_entropy(y, SHARES),
    "nll_loss": lambda y: F.nll_loss(y.log_softmax(1), CLASSES, ignore_index=1),
    "binary_cross_entropy": lambda y: F.binary_cross_entropy(y.sigmoid(), SHARES),
    "binary_cross_entropy_with_logits": lambda y: F.binary_cross_entropy_with_logits(y, SHARES, pos_weight=SHARES[0]),
    "kl_div": lambda y: F.kl_div(y.log_softmax(1), SHARES, reduction="batchmean"),
    "mse_loss": lambda y: F.mse_loss(y, NUMBERS),
    "huber_loss": lambda y: F.huber_loss(y, NUMBERS, delta=0.4),
    "smooth_l1_loss": lambda y: F.smooth_l1_loss(y, NUMBERS, beta=0.3),
    "l1_loss": lambda y: F.l1_loss(y, NUMBERS) + y.square().mean(),
    "poisson_nll_loss": lambda y: F.poisson_nll_loss(y, SHARES),
    "gaussian_nll_loss": lambda y: F.gaussian_nll_loss(y, NUMBERS, y.exp()),
    "cosine_embedding_loss": lambda y: F.cosine_embedding_loss(y, NUMBERS, SIGNS),
    "triplet_margin_loss": lambda y: F.triplet_margin_loss(y, NUMBERS, NUMBERS.flip(0)),
    "soft_margin_loss": lambda y: F.soft_margin_loss(y, NUMBERS.sign()),
    "multilabel_soft_margin_loss": lambda y: F.multilabel_soft_margin_loss(y, SHARES.round()),
    "pairwise_distance": lambda y: F.pairwise_distance(y, NUMBERS).sum(),
    "normalize": lambda y: F.normalize(y).sin().sum(),
    "logcumsumexp": lambda y: y.logcumsumexp(1).square().sum(),
    "cumprod": lambda y: y.cumprod(1).square().sum(),
    "slogdet": lambda y: torch.slogdet(y[:3] + 3 * torch.eye(3, dtype=y.dtype))[1],
    "solve": lambda y: torch.linalg.solve(y[:3] + 3 * torch.eye(3, dtype=y.dtype), NUMBERS[0]).square().sum(),
    "eigvalsh": lambda y: torch.linalg.eigvalsh(y.T @ y).sin().sum(),
    "std": lambda y: y.std(1).square().sum(),
    "topk": lambda y: y.topk(2)[0].sin().sum(),
    "rfft": lambda y: torch.fft.rfft(y).abs().sum(),
    "scatter_add": lambda y: torch.zeros_like(y).scatter_add(1, CLASSES[:, None].expand_as(y), y).sin().sum(),
}


def flat_gradient(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Tensor:
    """The gradient as plain autograd gives it."""
    pieces = torch.autograd.grad(loss(), parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([piece.reshape(-1) for piece in pieces])


def difference(loss: Callable[[], Tensor], parameters: list[Tensor], vector: Tensor) -> Tensor:
    """A central difference of gradients along a vector."""
    gradients = []
    for step in (_STEP, -2 * _STEP, _STEP):
        with torch.no_grad():
            for p, piece in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
                p.add_(piece.view_as(p), alpha=step)
        gradients.append(flat_gradient(loss, parameters))
    return (gradients[0] - gradients[1]) / (2 * _STEP)


def check(module: nn.Module, loss: Callable[[], Tensor]) -> None:
    parameters = list(module.parameters())
    operator = HessianOperator(Objective([loss]), parameters)
    vector = torch.randn(operator.parameters.size, dtype=torch.float64)
    product = operator.matvec(vector)
    operator.close()
    expected = difference(loss, parameters, vector)
    assert float(expected.norm()) > 1e-3
    assert_close(product, expected, 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    build, shape = LAYERS[name]
    module, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    weights = torch.randn_like(module(inputs))
    check(module, lambda: (module(inputs) * weights).sum() + 0.3 * module(inputs).square().sum())


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    module, inputs = nn.Linear(6, 3).double(), torch.randn(FLAT, dtype=torch.float64)
    check(module, lambda: LOSSES[name](module(inputs)))


@pytest.mark.parametrize("odd_first", [False, True])
@pytest.mark.parametrize("odd_size", [False, True])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "gradient_covariance"])
def test_parameters_that_are_viewed_as_complex_numbers(odd_first: bool, odd_size: bool, curvature: Any) -> None:
    """Their directions are views too, which have to begin at an even place, wherever the vector lies in a basis."""
    inputs = torch.randn(8, 3, dtype=torch.cdouble)
    weight, other = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(4 - odd_size, dtype=torch.float64)
    parameters = [other, weight] if odd_first else [weight, other]
    for parameter in parameters:
        parameter.requires_grad_()

    def pair() -> tuple[Tensor, Tensor]:
        output = (inputs @ torch.view_as_complex(weight)).abs() * other.exp().sum()
        losses = (output - 1).square().mean(1)
        return losses.mean(), losses if curvature == "gradient_covariance" else output

    objective = Objective([pair])
    operator = make_operator(objective, FlatParameters(parameters), curvature, "auto")
    size = operator.parameters.size
    rows = torch.randn(size, size, dtype=torch.float64)
    basis = torch.linalg.qr(rows)[0].contiguous()
    products = torch.stack([operator.matvec(row) for row in basis])
    assert_close(products, torch.stack([operator.matvec(row.clone()) for row in basis]), 1e-14)
    assert_close(products @ basis.T, (products @ basis.T).T, 1e-10)
    assert_close(operator.matmat(basis), products, 1e-10)
    operator.close()
    if curvature == "hessian":
        expected = difference(lambda: pair()[0], parameters, basis[1])
        assert_close(products[1], expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "build", "loss"),
    [
        ("hardsigmoid_backward", lambda: nn.Linear(6, 3), lambda y: F.hardsigmoid(y).sum()),
        ("multi_margin_loss_backward", lambda: nn.Linear(6, 3), lambda y: F.multi_margin_loss(y, CLASSES)),
        (
            "_ctc_loss_backward",
            lambda: nn.Linear(6, 3),
            lambda y: F.ctc_loss(y.log_softmax(1)[:, None], torch.tensor([[1, 2]]), (4,), (2,)),
        ),
        (
            "_embedding_bag_backward",
            lambda: nn.Sequential(nn.Hardtanh(0, 5), Rounded(), nn.EmbeddingBag(6, 3)),
            lambda y: y.square().sum(),
        ),
    ],
)
def test_what_has_no_second_derivative_is_named(
    name: str, build: Callable[[], nn.Module], loss: Callable[[Tensor], Tensor]
) -> None:
    module, inputs = build().double(), torch.randn(FLAT, dtype=torch.float64)
    operator = HessianOperator(Objective([lambda: loss(module(inputs))]), module.parameters())
    with pytest.raises(
        CurvatureError, match=f"^The operation .*{name}.* has no second derivative: .*finite_difference"
    ):
        operator.matvec(torch.ones(operator.parameters.size, dtype=torch.float64))


class Rounded(nn.Module):
    """Numbers to indices."""

    def forward(self, x: Tensor) -> Tensor:
        return x.long()
