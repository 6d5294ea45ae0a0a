from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_sfn.newton.unrolled import unrolled


class Replacing(TorchFunctionMode):
    """Puts the written-out layers in the fused ones' place."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = None if kwargs else unrolled(func, args, F.linear)
        self.replaced += results is not None
        return func(*args, **(kwargs or {})) if results is None else results


LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}, {"batch_first": True}])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_written_out_give_what_the_fused_ones_give(name: str, options: dict[str, bool]) -> None:
    layer = LAYERS[name](3, 8, num_layers=2, **options).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)

    def everything() -> list[Tensor]:
        output, state = layer(x)
        states = list(state) if isinstance(state, tuple) else [state]
        loss = output.square().sum() + sum(s.sum() for s in states)
        return [output, *states, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    with Replacing() as mode:
        ours = everything()
    assert mode.replaced == 1
    for mine, theirs in zip(ours, everything(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dropout_between_layers_is_drawn_in_training_only() -> None:
    layer, x = nn.GRU(3, 4, num_layers=2, dropout=0.5), torch.randn(5, 6, 3)
    layer.eval()
    with Replacing():
        torch.testing.assert_close(layer(x)[0], layer(x)[0])
        layer.train()
        assert not torch.equal(layer(x)[0], layer(x)[0])


def test_dropout_lies_between_layers_alone_and_keeps_the_mean() -> None:
    layer, x = nn.GRU(3, 40, num_layers=2), torch.randn(30, 6, 3)
    weights = [w for names in layer.all_weights for w in names]

    def between(dropout: float) -> Tensor:
        seen: list[Tensor] = []

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen.append(inputs)
            return F.linear(inputs, weight, bias)

        results = unrolled(torch.gru, (x, torch.zeros(2, 6, 40), weights, True, 2, dropout, True, False, False), linear)
        assert results is not None
        assert not bool((results[0] == 0).any())
        first, second = (inputs for inputs in seen if inputs.dim() == 3)  # what each layer is given for all times
        assert first is x
        return second

    with torch.no_grad():
        whole, dropped = between(0.0), between(0.75)
    kept = dropped != 0
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[kept], 4 * whole[kept])


def test_other_functions_and_other_calls_are_left_alone() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 6, 3)
    args = (x, torch.zeros(1, 6, 4), layer.all_weights[0], True, 1, 0.0, False, False, False)
    assert unrolled(torch.gru, args, F.linear) is not None
    assert unrolled(torch.add, args, F.linear) is None
    assert unrolled(torch.gru, args[:-1], F.linear) is None
    assert unrolled(torch.gru, (*args[:2], x, *args[3:]), F.linear) is None


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # PyTorch on its own kernel
def test_packed_sequences_and_projections_are_left_to_torch() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    with Replacing() as mode:
        nn.LSTM(3, 4)(packed)
        nn.LSTM(3, 4, proj_size=2)(torch.randn(4, 2, 3))
    assert mode.replaced == 0
