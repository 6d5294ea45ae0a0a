"""Model and loss cases with dense float64 reference derivatives that use nothing of the package under test."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SEED = 7  # dropout masks of the reference; tests set it before the first evaluation of an objective
DTYPES = (torch.float64, torch.float32)


class Recurrent(nn.Module):
    """The last state of a recurrent layer, read out linearly."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Encoder(nn.Module):
    """A Transformer layer with the one attention kernel that has second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.layer(x).mean(dim=1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Dropout(0.4), nn.Linear(18, 2)
    )


# Name: model, shape of one input, loss.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "mlp": (_mlp, (3,), F.mse_loss),
    "mlp_classifier": (_mlp, (3,), F.cross_entropy),
    "cnn_batchnorm_dropout": (_cnn, (1, 5, 5), F.cross_entropy),
    "rnn": (lambda: Recurrent(nn.RNN(2, 3, batch_first=True)), (4, 2), F.cross_entropy),
    "lstm": (lambda: Recurrent(nn.LSTM(2, 2, batch_first=True)), (4, 2), F.mse_loss),
    "transformer": (Encoder, (3, 4), F.cross_entropy),
}
INDEPENDENT_ROWS = ("mlp", "mlp_classifier", "rnn", "lstm")  # cases whose loss is a mean over rows
BATCH = 7


class Case(NamedTuple):
    """A model with a batch."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def closure(self) -> Tensor:
        return self.loss(self.module(self.inputs), self.targets)

    def pair(self) -> tuple[Tensor, Tensor]:
        output = self.module(self.inputs)
        return self.loss(output, self.targets), output

    def part(self, rows: slice, *, pair: bool = False) -> Callable[[], Tensor | tuple[Tensor, Tensor]]:
        def closure() -> Tensor | tuple[Tensor, Tensor]:
            output = self.module(self.inputs[rows])
            loss = self.loss(output, self.targets[rows])
            return (loss, output) if pair else loss

        return closure


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The case of that name: the same weights and data (to rounding) in every dtype."""
    build, shape, loss = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = build()
        inputs = torch.randn(BATCH, *shape)
        targets = torch.randint(2, (BATCH,)) if loss is F.cross_entropy else torch.randn(BATCH, 2)
    targets = targets if loss is F.cross_entropy else targets.to(dtype)
    return Case(module.to(dtype), inputs.to(dtype), targets, loss)


class Reference(NamedTuple):
    """Dense float64 derivatives at the case's parameters."""

    loss: float
    gradient: Tensor
    hessian: Tensor


def outputs_of(case: Case) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model output as a function of the flat parameters, with frozen random numbers; and those parameters."""
    names = [name for name, _ in case.module.named_parameters()]
    shapes = [p.shape for p in case.parameters]
    buffers = {name: b.clone() for name, b in case.module.named_buffers()}

    def outputs(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        fresh = {name: b.clone() for name, b in buffers.items()}
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return torch.func.functional_call(case.module, weights | fresh, (case.inputs,))

    return outputs, torch.cat([p.detach().reshape(-1) for p in case.parameters])


@cache
def reference(name: str) -> Reference:
    """Loss, gradient and Hessian of a case."""
    case = make(name)
    outputs, flat = outputs_of(case)

    def loss(vector: Tensor) -> Tensor:
        return case.loss(outputs(vector), case.targets)

    flat = flat.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat)
    hessian = torch.autograd.functional.hessian(loss, flat.detach())
    return Reference(float(loss(flat).detach()), gradient, hessian)


@cache
def gauss_newton_reference(name: str) -> Tensor:
    """``J' H_L J``, dense."""
    case = make(name)
    outputs, flat = outputs_of(case)
    jacobian = torch.autograd.functional.jacobian(lambda vector: outputs(vector).reshape(-1), flat)
    out = outputs(flat).detach()
    curvature = torch.autograd.functional.hessian(
        lambda vector: case.loss(vector.view_as(out), case.targets), out.reshape(-1)
    )
    return jacobian.T @ curvature @ jacobian


def frozen_probes(count: int, case: Case) -> Tensor:
    """Random vectors; afterwards the global stream stands where the reference's dropout masks begin."""
    vectors = torch.randn(count, sum(p.numel() for p in case.parameters), dtype=case.inputs.dtype)
    torch.manual_seed(SEED)
    return vectors


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the norm of the right answer."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Compares vectors or matrices by norm, in float64."""
    error = float(torch.linalg.vector_norm(actual.double() - expected.double()))
    assert error <= relative * float(torch.linalg.vector_norm(expected.double())), (error, actual, expected)


def symmetric(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """An indefinite symmetric matrix."""
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((matrix + matrix.T) / 2).to(dtype)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with the given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)
    vectors = torch.linalg.qr(square)[0]
    matrix = (vectors * values.double()) @ vectors.T
    return ((matrix + matrix.T) / 2).to(values.dtype)


def quadratic(matrix: Tensor, linear: Tensor | None = None) -> Callable[[Tensor], Callable[[], Tensor]]:
    """The closure of ``x'Ax/2 + b'x`` for a given leaf x."""
    b = torch.zeros(len(matrix), dtype=matrix.dtype) if linear is None else linear
    return lambda x: lambda: x @ matrix @ x / 2 + b @ x


def saddle(x: Tensor) -> Callable[[], Tensor]:
    """The closure of the paper's saddle ``5x^2 - y^2``."""
    return lambda: 5 * x[0] ** 2 - x[1] ** 2


def bits(parameters: list[Tensor]) -> list[bytes]:
    """The exact bit patterns of the parameters."""
    return [p.detach().contiguous().numpy().tobytes() for p in parameters]
