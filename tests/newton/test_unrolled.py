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
    layer = LAYERS[name](3, 4, num_layers=2, **options).double()
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


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # PyTorch on its own kernel
def test_packed_sequences_and_projections_are_left_to_torch() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    with Replacing() as mode:
        nn.LSTM(3, 4)(packed)
        nn.LSTM(3, 4, proj_size=2)(torch.randn(4, 2, 3))
    assert mode.replaced == 0
