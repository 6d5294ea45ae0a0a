"""What is seen of the uses of weights: inputs and output gradients that make up the weights' own gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_sfn.newton.sampled_targets import ElementwiseLosses
from lightning_sfn.newton.weight_uses import Use, WatchingWeights

D = torch.float64


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, requires_grad=True)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def watched(function: Callable[..., Tensor], parameters: list[Tensor]) -> tuple[Tensor, list[Use]]:
    with WatchingWeights(parameters, None) as watching:
        output = function()
    return output, watching.uses


def assert_make_up_the_gradients(output: Tensor, use: Use) -> None:
    """Of a loss that has another slope at each place."""
    wanted = [use.output, use.weight] if use.bias is None else [use.output, use.weight, use.bias]
    by_output, by_weight, *by_bias = torch.autograd.grad(output.pow(3).sum(), wanted)
    rows, inputs = use.rows(by_output), use.inputs
    assert rows.dtype == use.weight.dtype
    if use.kind == "embedding":
        inputs = F.one_hot(inputs, len(use.weight)).to(rows)
    assert inputs.dtype == use.weight.dtype
    found = (rows * inputs).sum(0) if use.kind == "norm" else rows.T @ inputs
    expected = by_weight.T if use.kind == "embedding" else by_weight.reshape(found.shape)
    torch.testing.assert_close(found, expected)
    if use.bias is not None:
        torch.testing.assert_close(rows.sum(0), by_bias[0])


# Name: function of input, weight and bias; shapes of input and weight; kind. Each is tried with a bias and without.
DENSE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (5, 3), (2, 3)),
    "linear, one vector": (F.linear, (3,), (2, 3)),
    "linear, sequences": (F.linear, (4, 5, 3), (2, 3)),
    "conv1d": (F.conv1d, (2, 3, 9), (4, 3, 2)),
    "conv1d, all lengths": (partial(F.conv1d, stride=2, padding=(1,), dilation=[3]), (2, 3, 9), (4, 3, 2)),
    "conv2d": (F.conv2d, (2, 3, 5, 6), (4, 3, 2, 3)),
    "conv2d, one length": (partial(F.conv2d, stride=2, padding=1, dilation=2), (2, 3, 9, 8), (4, 3, 2, 3)),
    "conv2d, two lengths": (
        partial(F.conv2d, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        (2, 3, 5, 6),
        (4, 3, 2, 3),
    ),
    "conv2d, by place": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 1), (2, 1, 5, 6), (4, 1, 3, 3)),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", DENSE)
def test_inputs_and_output_gradients_make_up_the_gradient_of_a_matrix(name: str, biased: bool) -> None:
    function, shape, size = DENSE[name]
    x, weight, bias = data(*shape), leaf(*size), leaf(size[0]) if biased else None
    output, (use,) = watched(lambda: function(x, weight, bias), [weight])
    torch.testing.assert_close(output, function(x, weight, bias))
    assert use.kind == "dense"
    assert use.weight is weight
    assert use.bias is bias
    assert_make_up_the_gradients(output, use)


def test_rows_of_a_table_are_told_by_their_indices() -> None:
    table, words = leaf(4, 3), torch.tensor([[0, 3, 3], [1, 0, 3]])
    output, (use,) = watched(lambda: F.embedding(words, table, scale_grad_by_freq=False), [table])
    assert (use.kind, use.bias) == ("embedding", None)
    assert use.inputs.tolist() == [0, 3, 3, 1, 0, 3]
    assert_make_up_the_gradients(output, use)


def running() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 4, dtype=D), torch.linspace(0.5, 2, 4, dtype=D)


# Name: function of input, weight and bias; shape of the input, of which one dimension is 4.
NORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "layer": (lambda x, w, b: F.layer_norm(x, (4,), w, b), (6, 3, 4)),
    "layer, other eps": (lambda x, w, b: F.layer_norm(x, (4,), w, b, 0.5), (6, 4)),
    "root mean square": (lambda x, w, b: F.rms_norm(x, (4,), w), (6, 3, 4)),
    "root mean square, other eps": (lambda x, w, b: F.rms_norm(x, (4,), w, 0.5), (6, 4)),
    "batch": (lambda x, w, b: F.batch_norm(x, *running(), w, b, True), (6, 4, 2)),
    "batch, other eps": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.5, 0.3), (6, 4)),
    "batch, known": (lambda x, w, b: F.batch_norm(x, *running(), w, b), (6, 4, 2)),
    "group": (lambda x, w, b: F.group_norm(x, 2, w, b), (6, 4, 5)),
    "group, other eps": (lambda x, w, b: F.group_norm(x, 2, w, b, 0.5), (6, 4, 5)),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_normalized_inputs_and_output_gradients_make_up_the_gradient_of_a_norm(name: str, biased: bool) -> None:
    function, shape = NORMS[name]
    x, weight, bias = 3 * data(*shape) + 1, leaf(4), leaf(4) if biased else None
    output, (use,) = watched(lambda: function(x, weight, bias), [weight])
    assert use.kind == "norm"
    assert use.bias is (None if name.startswith("root") else bias)
    assert_make_up_the_gradients(output, use)


def test_watching_a_batch_norm_counts_its_batch_once() -> None:
    weight, x, (mean, var) = leaf(4), data(6, 4), running()
    twins = running()
    _, (use,) = watched(lambda: F.batch_norm(x, mean, var, weight, None, True), [weight])
    assert use.inputs.shape == (6, 4)
    F.batch_norm(x, *twins, weight, None, True)
    assert torch.equal(mean, twins[0])
    assert torch.equal(var, twins[1])


UNSEEN: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "a vector": ((3,), lambda w: F.linear(data(5, 3), w)),
    "groups": ((4, 1, 2, 2), lambda w: F.conv2d(data(2, 2, 4, 4), w, groups=2)),
    "three dimensions": ((4, 1, 2, 2, 2), lambda w: F.conv3d(data(2, 1, 4, 4, 4), w)),
    "one image": ((4, 2, 3, 3), lambda w: F.conv2d(data(2, 4, 4), w)),
    "one signal": ((4, 2, 3), lambda w: F.conv1d(data(2, 4), w)),
    "a norm over two dimensions": ((3, 4), lambda w: F.layer_norm(data(5, 3, 4), (3, 4), w)),
    "another function": ((3, 4), lambda w: data(5, 3) @ w),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_uses_without_a_rule_are_computed_and_not_noted(name: str) -> None:
    shape, function = UNSEEN[name]
    weight = leaf(*shape)
    torch.manual_seed(0)
    expected = function(weight)
    torch.manual_seed(0)
    output, uses = watched(lambda: function(weight), [weight])
    assert torch.equal(output, expected)
    assert uses == []


def test_only_parameters_count_and_only_where_a_gradient_reaches_them() -> None:
    weight, other, x = leaf(2, 3), leaf(2, 3), data(5, 3)
    assert watched(lambda: F.linear(x, other), [weight])[1] == []
    assert watched(lambda: F.linear(x, weight.detach()), [weight])[1] == []
    assert watched(lambda: F.layer_norm(x, (3,)), [weight])[1] == []
    with torch.no_grad():
        assert watched(lambda: F.linear(x, weight), [weight])[1] == []
    _, uses = watched(lambda: F.linear(x, weight) + F.linear(x, other) + F.linear(-x, weight), [weight])
    assert [use.weight is weight for use in uses] == [True, True]
    assert torch.equal(uses[1].inputs, -x)


def test_what_autocast_computes_comes_in_the_dtype_of_the_weight() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(layer(x) @ torch.ones(2, 3))

    output, uses = watched(under_autocast, list(layer.parameters()))
    assert output.dtype == torch.bfloat16
    by_output = torch.autograd.grad(output.float().sum(), [use.output for use in uses])
    for use, gradient in zip(uses, by_output, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert use.rows(gradient).dtype == use.inputs.dtype == torch.float32


def recurrent() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = data(6, 5, 3)
    return nn.RNN(3, 4).double(), lambda layer: layer(x)[0]


def attention() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = data(6, 5, 4)
    return nn.MultiheadAttention(4, 2).double(), lambda layer: layer(x, x, x)[0]


@pytest.mark.parametrize("make", [recurrent, attention])
def test_hidden_products_are_written_out_and_seen(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    """Each parameter's gradient is the sum over its uses."""
    layer, function = make()
    parameters = list(layer.parameters())
    output, uses = watched(lambda: function(layer), parameters)
    torch.testing.assert_close(output, function(layer))
    loss = output.pow(3).sum()
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    by_output = torch.autograd.grad(loss, [use.output for use in uses])
    sums = {id(p): torch.zeros_like(p) for p in parameters}
    for use, gradient in zip(uses, by_output, strict=True):
        rows = use.rows(gradient)
        sums[id(use.weight)] += rows.T @ use.inputs
        assert use.bias is not None
        sums[id(use.bias)] += rows.sum(0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(sums[id(parameter)], gradient)


@pytest.mark.parametrize("make", [recurrent, attention])
def test_under_checkpointing_hidden_products_are_left_alone(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    layer, function = make()
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(function(layer).pow(3).sum(), parameters)
    output, uses = watched(lambda: checkpoint(function, layer, use_reentrant=False), parameters)
    found = torch.autograd.grad(output.pow(3).sum(), parameters)
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact)
    assert all(use.weight.dim() == 2 for use in uses)
    assert len(uses) == 0


def test_hooks_that_are_there_from_the_beginning_do_not_keep_products_hidden() -> None:
    layer, function = recurrent()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        _, uses = watched(lambda: function(layer), list(layer.parameters()))
    assert len(uses) > 0


def packed() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    sequences = nn.utils.rnn.pack_padded_sequence(data(5, 3, 2), torch.tensor([5, 3, 2]))
    return nn.RNN(2, 4).double(), lambda layer: layer(sequences)[1]


def appended() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = data(6, 5, 4)
    return nn.MultiheadAttention(4, 2, add_zero_attn=True).double(), lambda layer: layer(x, x, x)[0]


def by_name() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Sequences come first in the batch: a name that must not be lost."""
    x, start = data(3, 5, 2), data(1, 3, 4)
    options = {"num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False, "batch_first": True}
    return nn.RNN(2, 4).double(), lambda layer: torch.rnn_tanh(x, start, list(layer.parameters()), True, **options)[0]


@pytest.mark.parametrize("make", [packed, appended, by_name])
def test_hidden_products_that_cannot_be_written_out_are_left_to_torch(
    make: Callable[[], tuple[nn.Module, Any]],
) -> None:
    layer, function = make()
    output, uses = watched(lambda: function(layer), list(layer.parameters()))
    assert torch.equal(output, function(layer))
    assert uses == []


def test_known_losses_are_answered_where_targets_are_to_be_drawn() -> None:
    weight, x, y = leaf(2, 3), data(5, 3), data(5, 2)
    losses = ElementwiseLosses(torch.Generator().manual_seed(0))
    with WatchingWeights([weight], losses) as watching:
        drawn = F.mse_loss(F.linear(x, weight), y)
        other = F.l1_loss(F.linear(x, weight), y)
    assert len(watching.uses) == 2
    assert [element.shape for element in losses.elements] == [(5, 2)]
    torch.testing.assert_close(drawn, F.mse_loss(F.linear(x, weight), y))  # the value is that of the data
    torch.testing.assert_close(other, F.l1_loss(F.linear(x, weight), y))
