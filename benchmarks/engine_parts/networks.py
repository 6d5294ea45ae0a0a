"""The networks that products are measured on, with random data: costs do not depend on what the data show."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.recurrent import CharacterRNN

AUTOENCODER = [784, 1000, 500, 250, 30]


@dataclass
class Case:
    """A network with its data.

    Attributes:
        name: What it is.
        model: The network.
        closures: The loss of each micro-batch.
        target: The most gradients that a product should cost.
        reference: The loss whose gradient is the unit beside the case's own, where that is another: a recurrence
            as PyTorch evaluates it.
    """

    name: str
    model: nn.Module
    closures: list[Callable[[], Tensor]]
    target: float
    reference: Callable[[], Tensor] | None = None
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Collects the parameters once."""
        self.parameters = list(self.model.parameters())

    def gradient(self) -> None:
        """One gradient of all data, as a training loop takes it: several micro-batches add up in ``.grad``."""
        if len(self.closures) == 1:
            torch.autograd.grad(self.closures[0](), self.parameters)
            return
        for closure in self.closures:
            closure().backward()  # type: ignore[no-untyped-call]
        for parameter in self.parameters:
            parameter.grad = None

    def reference_gradient(self) -> None:
        """One gradient of the reference."""
        assert self.reference is not None
        torch.autograd.grad(self.reference(), self.parameters)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All networks."""
    torch.manual_seed(0)
    many = (3, 4) if quick else (10, 100)
    return [
        autoencoder(device, quick, (1, 8 if quick else 512)),
        autoencoder(device, quick, (many[0], many[1])),
        perceptron(device, quick, (1, 8 if quick else 512)),
        perceptron(device, quick, many),
        convolutional(device, quick, (1, 8 if quick else 128)),
        convolutional(device, quick, many),
        recurrent_layer(device, quick),
        recurrent_cell(device, quick),
    ]


def autoencoder(device: torch.device, quick: bool, batches: tuple[int, int]) -> Case:
    """The paper's autoencoder on so many batches of so many images."""
    model = Autoencoder(
        [20, 12, 6] if quick else AUTOENCODER, activation="sigmoid", loss="squared_error", linear_code=True
    )
    model = model.to(device)
    width = 20 if quick else AUTOENCODER[0]
    closures = [_reconstruction(model, torch.rand(batches[1], width, device=device)) for _ in range(batches[0])]
    return Case("autoencoder, 2.8M parameters", model, closures, 1.85)


def _reconstruction(model: Autoencoder, images: Tensor) -> Callable[[], Tensor]:
    return lambda: model.reconstruction_loss(images)


def perceptron(device: torch.device, quick: bool, batches: tuple[int, int], hidden: int = 512) -> Case:
    """Two hidden layers of tanh units on images of 784 pixels."""
    sizes = (20, 16) if quick else (784, hidden)
    model = nn.Sequential(
        nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], 10)
    ).to(device)
    return Case("MLP", model, _classified(model, batches, (sizes[0],), device), 1.85)


def convolutional(device: torch.device, quick: bool, batches: tuple[int, int]) -> Case:
    """Two convolutions of 5x5 with pooling, and two linear layers, on images of 28x28 pixels."""
    widths = (2, 3, 5) if quick else (16, 32, 64)
    model = nn.Sequential(
        nn.Conv2d(1, widths[0], 5),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(widths[0], widths[1], 5),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * widths[1], widths[2]),
        nn.Tanh(),
        nn.Linear(widths[2], 10),
    ).to(device)
    return Case("CNN", model, _classified(model, batches, (1, 28, 28), device), 1.3)


def _classified(
    model: nn.Module, batches: tuple[int, int], shape: tuple[int, ...], device: torch.device
) -> list[Callable[[], Tensor]]:
    def closure(images: Tensor, classes: Tensor) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(images), classes)

    count, size = batches
    return [
        closure(torch.randn(size, *shape, device=device), torch.randint(10, (size,), device=device))
        for _ in range(count)
    ]


def recurrent_layer(device: torch.device, quick: bool, time: int = 50) -> Case:
    """`torch.nn.RNN` on one-hot characters, with a linear layer on its states."""
    batch, units, characters, time = (3, 4, 5, 6) if quick else (64, 120, 50, time)
    layer, output = nn.RNN(characters, units, batch_first=True), nn.Linear(units, characters)
    model = nn.ModuleList([layer, output]).to(device)
    windows = torch.randint(characters, (batch, time + 1), device=device)
    inputs, targets = F.one_hot(windows[:, :-1], characters).float(), windows[:, 1:].flatten()

    def loss() -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return F.cross_entropy(output(layer(inputs)[0]).flatten(0, 1), targets)

    return Case(f"recurrent, nn.RNN, T = {time}", model, [loss], 1.3, loss)


def recurrent_cell(device: torch.device, quick: bool, time: int = 50) -> Case:
    """The shipped recurrent network; its reference is the same network written out with PyTorch's operations."""
    batch, units, characters, time = (3, 4, 5, 6) if quick else (64, 120, 50, time)
    model = CharacterRNN(characters, units).to(device)
    windows = torch.randint(characters, (batch, time + 1), device=device)

    def written_out() -> Tensor:
        inputs = model.input(windows[:, :-1]) + model.bias
        state, states = torch.zeros_like(inputs[:, 0]), []
        for step in inputs.unbind(1):
            state = torch.tanh(step + state @ model.recurrent.T)
            states.append(state)
        return F.cross_entropy(model.output(torch.stack(states, 1)).flatten(0, 1), windows[:, 1:].flatten())

    return Case(f"recurrent, CharacterRNN, T = {time}", model, [lambda: model.loss(windows)], 1.3, written_out)
