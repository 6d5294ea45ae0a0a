"""Everything on another device than the CPU: no operation mixes the two, and the results are those of the CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sfn import SaddleFreeNewton, hessian_spectrum

from .elsewhere import DEVICE, Elsewhere, elsewhere, move

D = torch.float64


class Tokens(nn.Module):
    """An embedding, layers that map sequences to sequences, and a mean over time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layer, self.output = nn.Embedding(7, 6), layer, nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        mapped = self.layer(states, states, states) if isinstance(self.layer, nn.MultiheadAttention) else None
        logits: Tensor = self.output((mapped or self.layer(states))[0]).mean(1)
        return logits


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (20, 6)),
    "convolutional": (convolutional, (20, 1, 6, 6)),
    "rnn": (lambda: Tokens(nn.RNN(6, 6, 2, batch_first=True)), ()),
    "lstm": (lambda: Tokens(nn.LSTM(6, 6, batch_first=True)), ()),
    "gru": (lambda: Tokens(nn.GRU(6, 6, batch_first=True)), ()),
    "attention": (lambda: Tokens(nn.MultiheadAttention(6, 2, batch_first=True)), ()),
}


def problem(name: str, there: bool) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model, and the loss of a part of its data, here or elsewhere."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double()
    inputs = torch.randn(shape, dtype=D) if shape else torch.randint(7, (20, 4))
    classes = torch.randint(3, (20,))
    if there:
        move(model)
        inputs, classes = inputs.to(DEVICE), classes.to(DEVICE)
    return model, lambda part=slice(None): F.cross_entropy(model(inputs[part]), classes[part])


def losses(name: str, there: bool, parts: bool, options: dict[str, Any]) -> list[float]:
    """Losses after each of a few steps; half of them from a state that was saved and loaded."""
    with elsewhere() if there else nullcontext():
        model, loss = problem(name, there)
        optimizer = SaddleFreeNewton(model.parameters(), **options)
        closures: dict[str, Any] = {
            "curvature_closure": lambda: loss(slice(0, 8)),
            "trial_closure": lambda: loss(slice(8, 20)),
        }
        reached = []
        for step in range(4):
            optimizer.step(loss, **(closures if parts else {}))
            assert optimizer.last_step is not None
            reached.append(optimizer.last_step.loss_after)
            if step == 1:
                state = optimizer.state_dict()
                optimizer = SaddleFreeNewton(model.parameters(), **options)
                optimizer.load_state_dict(state)
        assert all(isinstance(p, Elsewhere) == there for p in model.parameters())
        return reached


@pytest.mark.parametrize(
    ("name", "parts", "options"),
    [
        ("perceptron", False, {}),
        ("perceptron", True, {"preconditioner": "kronecker", "heavy_ball": 0.9}),
        ("perceptron", False, {"preconditioner": "diagonal", "damping": "grid", "graph_bytes": 0}),
        ("perceptron", False, {"krylov_dim": "full", "trust_region": "newton"}),
        ("perceptron", False, {"hvp": "finite_difference", "preconditioner": None, "max_step_norm": 0.5}),
        ("perceptron", False, {"basis_device": "cpu", "krylov_dim": 6}),
        ("convolutional", True, {}),
        ("rnn", True, {}),
        ("lstm", False, {}),
        ("gru", True, {"heavy_ball": 0.9}),
        ("attention", True, {}),
    ],
    ids=str,
)
def test_steps_on_another_device_are_those_on_the_cpu(name: str, parts: bool, options: dict[str, Any]) -> None:
    expected = losses(name, False, parts, options)
    assert losses(name, True, parts, options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["perceptron", "rnn"])
def test_spectra_on_another_device_are_those_on_the_cpu(name: str) -> None:
    ends = []
    for there in (False, True):
        with elsewhere() if there else nullcontext():
            model, loss = problem(name, there)
            spectrum = hessian_spectrum(loss, model.parameters(), krylov_dim=8, max_products=24)
            ends.append((spectrum.lambda_min, spectrum.lambda_max))
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


def test_the_other_device_refuses_what_a_real_one_refuses() -> None:
    with elsewhere():
        there, here = torch.ones(2, device=DEVICE), torch.ones(2)
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0]
        assert there[torch.tensor([1])].device == DEVICE
        assert there.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="lie on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="another device"):
            torch.randn(2, device=DEVICE, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="another device"):
            torch.randn(2, generator=torch.Generator(DEVICE))
