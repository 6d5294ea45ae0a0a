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


# ------------------------------------------------------------------------------------------------ waits


def waits(layers: int = 2, steps: int = 1, **options: Any) -> list[int]:
    """How often the host would wait for the device in each of a few steps of one trial loss each."""
    with elsewhere() as waited:
        torch.manual_seed(0)
        hidden = [layer for _ in range(layers - 1) for layer in (nn.Linear(6, 6), nn.Tanh())]
        model = move(nn.Sequential(*hidden, nn.Linear(6, 3)).double())
        inputs, targets = torch.randn(20, 6, dtype=D).to(DEVICE), torch.randn(20, 3, dtype=D).to(DEVICE)
        optimizer = SaddleFreeNewton(model.parameters(), **{"damping": 1.0, "inner_steps": 1} | options)
        counts = []
        for _ in range(steps):
            before = len(waited)
            optimizer.step(lambda: F.mse_loss(model(inputs), targets))
            counts.append(len(waited) - before)
            assert optimizer.last_step is not None
            assert optimizer.last_step.trials == 1
        return counts


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "kronecker"])
def test_a_step_waits_a_few_times_however_large_basis_and_model_are(preconditioner: str | None) -> None:
    options: dict[str, Any] = {"preconditioner": preconditioner, "previous_directions": 0}
    (small,), (large,) = waits(krylov_dim=3, **options), waits(krylov_dim=18, **options)
    (deep,) = waits(krylov_dim=3, layers=6, **options)
    assert small == large == deep <= 25


def test_a_remembered_step_is_one_wait_more() -> None:
    """Whether it joins is for the host to decide; one more wait brings what all of them add to the projection."""
    options: dict[str, Any] = {"preconditioner": None, "krylov_dim": 3, "steps": 5}
    without, remembered = waits(previous_directions=0, **options), waits(previous_directions=3, **options)
    assert [more - less for more, less in zip(remembered, without, strict=True)] == [0, 2, 3, 4, 4]


def test_the_host_learns_by_waiting() -> None:
    """The control: what the tests above count."""
    with elsewhere() as waited:
        there = torch.ones(2, device=DEVICE)
        asked = [
            float(there.sum()),
            bool(there.all()),
            there.tolist(),
            there.sum().item(),
            there.cpu(),
            there.nonzero(),
        ]
        assert len(waited) == len(asked)
        there.copy_(torch.zeros(2))
        assert (there + 1).square().device == DEVICE
        assert len(waited) == len(asked)
