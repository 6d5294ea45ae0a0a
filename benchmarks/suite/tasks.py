"""The tasks: a network, its data, its loss, and a start that a stated first-order phase has reached.

Half of each kind was open while settings were chosen (`tuning`); the other half is what counts (`held out`). `BESIDES`
are tasks that choices were made on too, and that do not race.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn.experiments.classified import labelled_images
from lightning_sfn.experiments.text import Vocabulary, read_text
from suite.networks import (
    Layered,
    Recurrent,
    Transformer,
    autoencoder,
    convolutional,
    deep_linear,
    symmetric_autoencoder,
)

__all__ = ["BESIDES", "EVERY", "TASKS", "Phase", "Problem", "Task"]

STARTS = Path(__file__).parents[2] / "runs" / "race"
"""Where starts are kept between runs; git ignores it."""

BATCH = 100  # cases of a first-order step on images
_TINY_CASES, _TINY_EPOCHS = 60, 2
_TOKENS = 20  # kinds of random tokens


@dataclass(frozen=True)
class Phase:
    """The first-order phase before the race, with batches of `batch` cases.

    Attributes:
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adam"``.
        lr: Learning rate at its start.
        epochs: How long it lasts.
        decay: Whether the rate falls linearly to zero.
        batch: Cases in a batch.
    """

    optimizer: str
    lr: float
    epochs: int
    decay: bool = False
    batch: int = BATCH


@dataclass
class Problem:
    """A task's network at its start, with its data.

    Attributes:
        model: The network, at the start.
        inputs: Shape (cases, ...).
        targets: Likewise; pixels, classes or characters.
        batch: Cases of a mini-batch.
        categorical: Whether the loss is the cross-entropy of logits (mean over everything predicted), or the squared
            error summed over outputs (mean over cases).
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    batch: int
    categorical: bool

    @property
    def cases(self) -> int:
        """Number of cases."""
        return len(self.inputs)

    def output(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        """What the network says of the chosen cases."""
        result: Tensor = self.model(self.inputs[chosen])
        return result

    def loss_of(self, output: Tensor, targets: Tensor) -> Tensor:
        """The scalar loss of outputs."""
        if self.categorical:
            return F.cross_entropy(output.flatten(0, -2), targets.flatten())
        return F.mse_loss(output, targets, reduction="sum") / len(output)

    def pair(self, chosen: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Loss and output of the chosen cases."""
        output = self.output(chosen)
        return self.loss_of(output, self.targets[chosen]), output

    def loss(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Loss of the chosen cases, all by default."""
        return self.pair(chosen)[0]

    def sampled(self, output: Tensor) -> Tensor:
        """Targets drawn from the distribution of which the loss is the negative logarithm (a constant apart)."""
        output = output.detach()
        if self.categorical:
            drawn = torch.multinomial(output.flatten(0, -2).softmax(-1), 1).squeeze(1)
            return drawn.view(output.shape[:-1])
        return output + torch.randn_like(output) * 0.5**0.5

    def some(self, share: float) -> Tensor:
        """Indices of a fresh share of the cases."""
        return self.shuffled()[: max(1, round(share * self.cases))]

    def shuffled(self) -> Tensor:
        """Indices of all cases in a fresh order."""
        return torch.randperm(self.cases, device=self.inputs.device)

    def to(self, device: torch.device) -> "Problem":
        """The same on a device; the network moves, the data is copied."""
        model = self.model.to(device)
        return replace(self, model=model, inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclass(frozen=True)
class Task:
    """A race course.

    Attributes:
        name: Unique name.
        kind: ``"escape"``, ``"last mile"`` or ``"recurrent"``.
        tuning: Whether settings may be chosen on it.
        what: Data and network in words.
        network: Builds the network, from the size of the vocabulary for text.
        data: ``"mnist"``, ``"mnist classes"``, ``"cifar10"``, ``"ptb"``, ``"shakespeare"`` or ``"random"`` tokens.
        cases: Images or windows.
        phase: What comes before the start.
        time: Characters in a window.
    """

    name: str
    kind: str
    tuning: bool
    what: str
    network: Callable[..., nn.Module]
    data: str
    cases: int
    phase: Phase
    time: int = 0

    def tiny(self) -> "Task":
        """The same on a few cases of the embedded samples: for tests."""
        data = {"cifar10": "mnist", "ptb": "shakespeare"}.get(self.data, self.data)
        phase = replace(self.phase, epochs=min(self.phase.epochs, _TINY_EPOCHS))
        return replace(self, data=data, cases=_TINY_CASES, phase=phase, time=min(self.time, 8))

    def start(self, seed: int, folder: Path, cache: Path = STARTS) -> Problem:
        """The network where the first-order phase left it, on the CPU; kept on disk.

        Args:
            seed: Of initialisation and batches.
            folder: Folder of the data sets that are not embedded: ``cifar10`` and ``ptb``.
            cache: Where starts are kept.

        Raises:
            FileNotFoundError: The data set is not there.
        """
        inputs, targets, vocabulary = _load(self.data, self.cases, self.time, folder)
        torch.manual_seed(seed)
        model = self.network(vocabulary) if self.time else self.network()
        categorical = targets.dtype == torch.int64
        problem = Problem(model, inputs, targets, self.phase.batch, categorical)
        text = f"{self.what} {self.data} {self.cases} {self.time} {self.phase}"
        path = cache / f"{self.name}-{seed}-{zlib.crc32(text.encode()):08x}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            _first_order(problem, self.phase)
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.new")
            torch.save(model.state_dict(), unfinished)
            unfinished.replace(path)  # never half of it, for another process too
        return problem


def _first_order(problem: Problem, phase: Phase) -> None:
    parameters = list(problem.model.parameters())
    if phase.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, phase.lr, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(parameters, phase.lr)
    for epoch in range(phase.epochs):
        if phase.decay:
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * (1 - epoch / phase.epochs)
        for chosen in problem.shuffled().split(phase.batch):
            optimizer.zero_grad()
            problem.loss(chosen).backward()
            optimizer.step()
    optimizer.zero_grad()


def _load(data: str, cases: int, time: int, folder: Path) -> tuple[Tensor, Tensor, int]:
    """Inputs, targets, and the size of the vocabulary."""
    if data in ("cifar10", "ptb") and not (folder / data).exists():
        raise FileNotFoundError(f"There is no folder {folder / data}: give the folder that holds it with --data.")
    if data == "random":
        tokens = torch.randint(_TOKENS, (cases, time + 1), generator=torch.Generator().manual_seed(cases))
        return tokens[:, :-1], tokens[:, 1:], _TOKENS
    if time:
        text = read_text("sample" if data == "shakespeare" else folder / data, "train")[: cases * time + 1]
        vocabulary = Vocabulary(text)
        numbers = vocabulary.encode(text, "training").long()
        return numbers[:-1].view(cases, time), numbers[1:].view(cases, time), len(vocabulary)
    source = str(folder / data) if data == "cifar10" else "sample"
    pixels, classes = labelled_images(data.split()[0], source, limit=cases)
    return (pixels, classes, 0) if data == "mnist classes" else (pixels, pixels, 0)


_SADDLE = Phase("sgd", 0.1, 40)
_STALL = Phase("adam", 5e-3, 400, decay=True)
_MNIST, _CIFAR = (100, 64, 32, 16, 8), (100, 48, 24, 12, 6)
_TEXT = Phase("sgd", 0.1, 60, decay=True, batch=20)

TASKS = {
    task.name: task
    for task in (
        Task(
            "mnist escape", "escape", True, "autoencoder 100-64-32-16-8, sigmoid",
            partial(autoencoder, _MNIST, nn.Sigmoid), "mnist", 5000, _SADDLE,
        ),
        Task(
            "mnist last mile", "last mile", True, "autoencoder 100-64-32-16-8, tanh",
            partial(autoencoder, _MNIST, nn.Tanh), "mnist", 5000, _STALL,
        ),
        Task(
            "ptb tanh", "recurrent", True, "120 tanh units, 50 characters",
            partial(Recurrent, hidden=120), "ptb", 400, _TEXT, 50,
        ),
        Task(
            "cifar escape", "escape", False, "autoencoder 100-48-24-12-6, sigmoid",
            partial(autoencoder, _CIFAR, nn.Sigmoid), "cifar10", 3000, _SADDLE,
        ),
        Task(
            "wide escape", "escape", False, "autoencoder 100-128-48-24-12, sigmoid",
            partial(autoencoder, (100, 128, 48, 24, 12), nn.Sigmoid), "mnist", 3000, _SADDLE,
        ),
        Task(
            "deep linear", "escape", False, "linear network 100-32-16-8-16-32-100, half of the usual weights",
            partial(deep_linear, (100, 32, 16, 8, 16, 32, 100)), "mnist", 3000, Phase("sgd", 1e-3, 20),
        ),
        Task(
            "symmetric", "escape", False, "autoencoder 100-32-16-8, tanh, units of a layer alike up to 1e-3",
            partial(symmetric_autoencoder, (100, 32, 16, 8), 1e-3), "mnist", 3000, Phase("sgd", 1e-2, 20),
        ),
        Task(
            "cifar last mile", "last mile", False, "autoencoder 100-48-24-12-6, tanh",
            partial(autoencoder, _CIFAR, nn.Tanh), "cifar10", 3000, _STALL,
        ),
        Task(
            "wide last mile", "last mile", False, "autoencoder 100-128-48-24-12, tanh",
            partial(autoencoder, (100, 128, 48, 24, 12), nn.Tanh), "mnist", 3000, _STALL,
        ),
        Task(
            "convolutional", "last mile", False, "two convolutions, ten classes",
            convolutional, "mnist classes", 2000, Phase("sgd", 0.05, 40, decay=True),
        ),
        Task(
            "transformer", "last mile", False, "transformer of two blocks, width 32, 32 characters",
            partial(Transformer, time=32), "shakespeare", 300, Phase("adam", 3e-3, 100, decay=True, batch=20), 32,
        ),
        Task(
            "shakespeare tanh", "recurrent", False, "64 tanh units, 40 characters",
            partial(Recurrent, hidden=64), "shakespeare", 300, _TEXT, 40,
        ),
        Task(
            "shakespeare gru", "recurrent", False, "80 gated units (GRU), 40 characters",
            partial(Recurrent, hidden=80, cell="gru"), "shakespeare", 300,
            Phase("sgd", 0.5, 40, decay=True, batch=20), 40,
        ),
    )
}  # fmt: skip
"""The tasks of the race by name."""

_BY_HEART = Phase("sgd", 0.0, 0)

BESIDES = {
    task.name: task
    for task in (
        Task(
            "narrow", "escape", True, "autoencoder 100-64-32-16-4, sigmoid",
            partial(autoencoder, (100, 64, 32, 16, 4), nn.Sigmoid), "mnist", 5000, _SADDLE,
        ),
        Task(
            "lstm by heart", "recurrent", True, "two layers of 32 units (nn.LSTM), 12 random tokens",
            partial(Layered, cell=nn.LSTM), "random", 16, _BY_HEART, 12,
        ),
        Task(
            "gru by heart", "recurrent", True, "two layers of 32 units (nn.GRU), 12 random tokens",
            partial(Layered, cell=nn.GRU), "random", 16, _BY_HEART, 12,
        ),
    )
}  # fmt: skip
"""Other tasks by name."""

EVERY = TASKS | BESIDES
