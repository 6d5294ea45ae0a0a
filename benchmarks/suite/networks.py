"""The networks of the suite.

All but `Layered` are made of `Linear`, `Conv2d`, `Embedding` and `LayerNorm` modules, and their recurrences and
attention are written out, so that every method can differentiate twice and every layer has a curvature rule.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = [
    "Layered",
    "Recurrent",
    "Transformer",
    "autoencoder",
    "convolutional",
    "deep_linear",
    "symmetric_autoencoder",
]


def autoencoder(sizes: tuple[int, ...], activation: type[nn.Module], *, output: bool = True) -> nn.Sequential:
    """An encoder through `sizes`, its mirror image, a linear code and (if `output`) a sigmoid output."""
    layers: list[nn.Module] = []
    for half in (sizes, sizes[::-1]):
        for width_in, width_out in pairwise(half):
            layers += [nn.Linear(width_in, width_out), activation()]
        layers.pop()
    return nn.Sequential(*layers, nn.Sigmoid()) if output else nn.Sequential(*layers)


def deep_linear(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers alone, near the saddle at zero: PyTorch's default weights, halved."""
    model = nn.Sequential(*(nn.Linear(width_in, width_out) for width_in, width_out in pairwise(sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def symmetric_autoencoder(sizes: tuple[int, ...], noise: float) -> nn.Sequential:
    """A tanh autoencoder whose hidden units are all alike within each layer, but for a little noise."""
    model = autoencoder(sizes, nn.Tanh)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, following in pairwise(linear):
            layer.weight.copy_(layer.weight[:1] + noise * torch.randn_like(layer.weight))
            layer.bias.copy_(layer.bias[:1].expand_as(layer.bias))
            following.weight.copy_(following.weight.mean(1, keepdim=True).expand_as(following.weight))
    return model


def convolutional(classes: int = 10) -> nn.Sequential:
    """Two convolutions and a linear layer on grey 10x10 images, given flat; logits of the classes."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 10, 10)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, classes),
    )


class Recurrent(nn.Module):
    """Predicts each next character from one recurrent layer; recurrent weights start orthogonal.

    Args:
        vocabulary: Number of characters.
        hidden: Number of units.
        cell: ``"tanh"`` or ``"gru"``.
    """

    def __init__(self, vocabulary: int, hidden: int, cell: str = "tanh") -> None:
        super().__init__()
        gates = {"tanh": 1, "gru": 3}[cell]
        self.hidden = hidden
        self.input = nn.Embedding(vocabulary, gates * hidden)
        self.recurrent = nn.Linear(hidden, gates * hidden)
        self.output = nn.Linear(hidden, vocabulary)
        nn.init.normal_(self.input.weight, std=hidden**-0.5)
        with torch.no_grad():
            for block in self.recurrent.weight.chunk(gates):
                nn.init.orthogonal_(block)
            self.recurrent.bias.zero_()
        self._advance = self._tanh if cell == "tanh" else self._gru

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of shape (batch, time, vocabulary) for characters of shape (batch, time)."""
        inputs = self.input(characters)
        state = inputs.new_zeros(len(inputs), self.hidden)
        states = []
        for step in inputs.unbind(1):
            state = self._advance(step, state)
            states.append(state)
        logits: Tensor = self.output(torch.stack(states, 1))
        return logits

    def _tanh(self, step: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(step + self.recurrent(state))

    def _gru(self, step: Tensor, state: Tensor) -> Tensor:
        new_input, reset_input, keep_input = step.chunk(3, 1)
        new_state, reset_state, keep_state = self.recurrent(state).chunk(3, 1)
        keep = torch.sigmoid(keep_input + keep_state)
        new = torch.tanh(new_input + torch.sigmoid(reset_input + reset_state) * new_state)
        return keep * state + (1 - keep) * new


class Layered(nn.Module):
    """Predicts each next token from PyTorch's own recurrent layers.

    Args:
        vocabulary: Number of tokens.
        cell: ``nn.LSTM`` or ``nn.GRU``.
        hidden: Number of units of a layer.
        layers: Number of layers.
    """

    def __init__(self, vocabulary: int, cell: type[nn.RNNBase], hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.input, self.output = nn.Embedding(vocabulary, hidden), nn.Linear(hidden, vocabulary)
        self.recurrent = cell(hidden, hidden, layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, time, vocabulary) for tokens of shape (batch, time)."""
        logits: Tensor = self.output(self.recurrent(self.input(tokens))[0])
        return logits


class Transformer(nn.Module):
    """Causal pre-norm transformer with one head: predicts each next character.

    Args:
        vocabulary: Number of characters.
        time: Longest window.
        width: Width of the residual stream.
        layers: Number of blocks.
    """

    def __init__(self, vocabulary: int, time: int, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of shape (batch, time, vocabulary) for characters of shape (batch, time)."""
        places = torch.arange(characters.shape[1], device=characters.device).expand_as(characters)
        stream = self.characters(characters) + self.positions(places)
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.output(self.norm(stream))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        query, key, value = self.read(self.before(stream)).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        stream = stream + self.mix(scores.masked_fill(later, -torch.inf).softmax(-1) @ value)
        return stream + self.narrow(torch.tanh(self.widen(self.between(stream))))
