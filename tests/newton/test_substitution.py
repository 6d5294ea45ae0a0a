"""What is put in place of a model's operations computes the same derivatives, of every order."""

import re
import warnings
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_sfn.newton import CurvatureError, HessianOperator, Objective, substitution
from lightning_sfn.newton.activations import sigmoid, tanh
from lightning_sfn.newton.affine import affine
from lightning_sfn.newton.convolution import Geometry, convolution, for_each_dimension
from lightning_sfn.newton.dense import dense_matrix
from lightning_sfn.newton.finite_difference import FiniteDifferenceOperator
from lightning_sfn.newton.substitution import FastSecondDerivatives

from .cases import assert_close


def graph_nodes(tensor: Tensor) -> set[str]:
    names, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(type(node).__name__)
            todo += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize(("ours", "theirs"), [(tanh, torch.tanh), (sigmoid, torch.sigmoid)])
def test_activations(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
    assert torch.autograd.gradcheck(ours, [x])
    assert torch.autograd.gradgradcheck(ours, [x])
    third = []
    for function in (ours, theirs):
        (gradient,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
        third.append(torch.autograd.grad(second.square().sum(), x)[0])
    torch.testing.assert_close(third[0], third[1])


def _third(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """A third derivative: of the second by all inputs, along itself."""
    first = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in second), inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
def test_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (5, 4), (5,))[: 2 + bias]]

    def ours(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return affine(x, w, b)

    assert torch.equal(ours(*inputs), F.linear(*inputs))
    if shape[0]:
        assert torch.autograd.gradcheck(ours, inputs)
        assert torch.autograd.gradgradcheck(ours, inputs)
    for actual, expected in zip(_third(ours, inputs), _third(F.linear, inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("outer", [torch.sin, lambda y: 3 * y], ids=["curved", "linear in the outputs"])
def test_a_linear_layer_of_which_a_part_is_data(
    wanted: tuple[bool, bool, bool], outer: Callable[[Tensor], Tensor]
) -> None:
    """The share that comes back through the layer arrives where nothing else does."""
    shapes = ((3, 4), (5, 4), (5,))
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_(w) for s, w in zip(shapes, wanted, strict=True)]
    sources = [x for x in inputs if x.requires_grad]
    hessians = []
    for layer in (affine, F.linear):
        loss = outer(layer(inputs[0].exp(), inputs[1], inputs[2].exp())).sum()
        hessians.append(dense_matrix(HessianOperator(Objective([lambda loss=loss: loss]), sources)))
    assert_close(hessians[0] + 1, hessians[1] + 1, 1e-12)


@pytest.mark.parametrize("rows", [1, 7])
def test_linear_layers_that_share_a_weight_or_compute_it(rows: int) -> None:
    """Tied weights, a weight that is computed, outputs that go nowhere, and a loss that is linear in the last layer."""
    tied, last = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    network = nn.ModuleList([tied, last]).double()
    x = torch.randn(rows, 2, 4, dtype=torch.float64).transpose(0, 1)
    parameters = list(network.parameters())

    def loss() -> Tensor:
        tied(x)
        return last(tied(tied(x).tanh()).sigmoid()).sum()

    operator = HessianOperator(Objective([loss]), parameters)
    assert "_AffineBackward" in _nodes_of(loss)
    with mock.patch.dict("lightning_sfn.newton.substitution._RULES"):
        del substitution._RULES[F.linear]
        expected = dense_matrix(HessianOperator(Objective([loss]), parameters))
    identity = torch.eye(len(expected), dtype=torch.float64)
    assert_close(torch.stack([operator.matvec(e) for e in identity]), expected, 1e-12)
    assert_close(operator.matmat(identity), expected, 1e-12)
    assert_close(torch.stack([operator.matvec(e) for e in identity]), expected, 1e-12)  # the kept graph is as it was


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"])
@pytest.mark.parametrize("autocast", [False, True])
def test_normalised_weights(dim: int | None, normalise: Callable[..., nn.Module], autocast: bool) -> None:
    """Against differences of gradients: PyTorch's own second derivative takes the norms for constants."""
    layer, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of the two is deprecated
        normalise(layer, dim=dim)
    parameters, y = list(layer.parameters()), torch.randn(5, 3, dtype=torch.float64)

    def loss() -> Tensor:
        with torch.autocast("cpu", enabled=autocast):  # leaves float64 alone
            return ((layer(x) * y).sin()).sum()

    objective = Objective([loss])
    exact, differences = HessianOperator(objective, parameters), FiniteDifferenceOperator(objective, parameters)
    vectors = torch.randn(4, exact.parameters.size, dtype=torch.float64)
    products = [exact.matvec(vector) for vector in vectors]
    exact.close()  # differences move the parameters
    for vector, product in zip(vectors, products, strict=True):
        assert_close(product, differences.matvec(vector), 1e-6)


def test_a_normalised_weight_whose_second_derivative_cannot_be_mended_is_refused() -> None:
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(5, 4)
    parameters = list(layer.parameters())
    for loss in (
        lambda: checkpoint(layer, x, use_reentrant=False).square().sum(),
        lambda weight=layer.weight: (x @ weight.t()).square().sum(),
    ):
        operator = HessianOperator(Objective([loss]), parameters)
        with pytest.raises(CurvatureError, match="weight normalisation is wrong"):
            operator.matvec(torch.ones(operator.parameters.size))


ATTENTION: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "layer": (lambda: nn.MultiheadAttention(4, 2), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "layer with weights": (lambda: nn.MultiheadAttention(4, 2), lambda m, x: m(x, x, x)[0]),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0), lambda m, x: m(x)),
    "dropout": (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3), lambda m, x: m(x)),
    "function": (lambda: nn.Linear(4, 4), lambda m, x: F.scaled_dot_product_attention(m(x), x, m(x), is_causal=True)),
    "by name": (lambda: nn.Linear(4, 4), lambda m, x: F.scaled_dot_product_attention(query=m(x), key=x, value=m(x))),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    """Against differences of gradients: the fused kernels that PyTorch takes here have no second derivative."""
    build, of = ATTENTION[name]
    model, x = build().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    objective, parameters = Objective([lambda: of(model, x).sin().square().mean()]), list(model.parameters())
    exact, differences = HessianOperator(objective, parameters), FiniteDifferenceOperator(objective, parameters)
    vector = torch.randn(exact.parameters.size, dtype=torch.float64)
    product = exact.matvec(vector)
    assert exact.loss_and_gradient()[0] == objective.value()  # as the closure rounds it
    exact.close()
    assert_close(product, differences.matvec(vector), 1e-7)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_rounds_otherwise_where_another_kernel_takes_its_place(name: str) -> None:
    build, of = ATTENTION[name]
    model, x = build(), torch.randn(3, 5, 4)
    with FastSecondDerivatives() as mode:
        of(model, x)
    assert mode.rounds_otherwise == (name != "layer with weights")
    with sdpa_kernel(SDPBackend.MATH), FastSecondDerivatives() as mode:
        of(model, x)
    assert not mode.rounds_otherwise


@pytest.mark.parametrize("name", ["layer", "function"])
def test_frozen_attention_is_left_alone(name: str) -> None:
    build, of = ATTENTION[name]
    model, x = build().requires_grad_(False), torch.randn(3, 5, 4)
    with FastSecondDerivatives() as mode:
        of(model, x)
    assert not mode.rounds_otherwise


def test_attention_under_autocast_and_in_a_chosen_kernel() -> None:
    """A choice that leaves the differentiable kernel out is the user's own, who is told what it costs."""
    x = torch.randn(1, 2, 3, 4, requires_grad=True)

    def loss() -> Tensor:
        return F.scaled_dot_product_attention(x, x, x).float().square().mean()

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
            return loss()

    def chosen() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return loss()

    vector = torch.randn(x.numel())
    exact = HessianOperator(Objective([loss]), [x]).matvec(vector)
    assert_close(HessianOperator(Objective([under_autocast]), [x]).matvec(vector), exact, 0.1)
    with pytest.raises(CurvatureError, match="flash_attention"):
        HessianOperator(Objective([chosen]), [x]).matvec(vector)


def test_masks_of_attention_on_another_device_are_left_to_its_own_kernel() -> None:
    """They would be others than those of an evaluation without a product."""
    x = torch.randn(1, 2, 3, 4, device="meta", requires_grad=True)
    with FastSecondDerivatives() as mode:
        F.scaled_dot_product_attention(x, x, x, None, 0.5)
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        assert not mode.rounds_otherwise
        F.scaled_dot_product_attention(x, x, x)
        assert mode.rounds_otherwise


def _nodes_of(loss: Callable[[], Tensor]) -> set[str]:
    with FastSecondDerivatives():
        return graph_nodes(loss())


def test_linear_layers_with_a_frozen_or_a_flat_weight_are_left_to_torch() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with FastSecondDerivatives():
        assert "_AffineBackward" in graph_nodes(F.linear(x, torch.randn(2, 4, requires_grad=True)))
        assert "_AffineBackward" not in graph_nodes(F.linear(x, torch.randn(2, 4)))
        assert "_AffineBackward" not in graph_nodes(F.linear(x, torch.randn(4, requires_grad=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((2, 3, 7), (4, 3, 3), Geometry((1,), (1,), (1,))),
        ((2, 2, 6, 5), (4, 2, 3, 2), Geometry((2, 1), (1, 0), (1, 2))),
        ((2, 4, 5, 5), (6, 2, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 2)),
        ((1, 1, 3, 4, 3), (2, 1, 2, 2, 2), Geometry((1, 1, 1), (0, 0, 0), (1, 1, 1))),
    ],
)
def test_convolutions(shape: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry, bias: bool) -> None:
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, kernel))
    b = torch.randn(kernel[0], dtype=torch.float64, requires_grad=True) if bias else None
    theirs = [F.conv1d, F.conv2d, F.conv3d][len(kernel) - 3]
    torch.testing.assert_close(convolution(x, w, b, geometry), theirs(x, w, b, *geometry))
    inputs = (x, w, b) if bias else (x, w)

    def ours(*tensors: Tensor) -> Tensor:
        return convolution(*tensors[:2], tensors[2] if bias else None, geometry)

    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize(
    ("value", "lengths"), [(2, (2, 2)), ((2,), (2, 2)), ([3], (3, 3)), ((2, 1), (2, 1)), ([0, 3], (0, 3))]
)
def test_a_length_is_given_once_or_for_each_dimension(value: object, lengths: tuple[int, ...]) -> None:
    assert for_each_dimension(value, 2) == lengths


def test_a_convolution_of_no_images_has_gradients_of_zero() -> None:
    images = torch.zeros(0, 2, 5, 5, dtype=torch.float64)
    parameters = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 3, 3), (3,))]
    output = convolution(images, *parameters, Geometry((1, 1), (0, 0), (1, 1)))
    assert output.shape == (0, 3, 3, 3)
    for parameter, gradient in zip(parameters, torch.autograd.grad(output.sum(), parameters), strict=True):
        assert torch.equal(gradient, torch.zeros_like(parameter))


def test_a_convolution_whose_input_is_data() -> None:
    """Derivatives by the image are not computed where nobody asks for them."""
    image = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    parameters = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 1, 3, 3), (3,))]
    geometry = Geometry((1, 1), (0, 0), (1, 1))
    actual = dense_matrix(
        HessianOperator(Objective([lambda: convolution(image, *parameters, geometry).sin().sum()]), parameters)
    )
    flat = torch.cat([p.detach().flatten() for p in parameters])
    expected = torch.autograd.functional.hessian(
        lambda v: F.conv2d(image, v[:27].view(3, 1, 3, 3), v[27:]).sin().sum(), flat
    )
    assert_close(actual, expected, 1e-12)


def _recurrent(**options: object) -> tuple[nn.Module, Tensor]:
    layer = nn.RNN(2, 3, **options).double()  # type: ignore[arg-type]
    return layer, torch.randn(4, 5, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
def test_recurrent_layers(options: dict[str, object]) -> None:
    """States, final states, gradients and Hessian of `torch.nn.RNN`, against the same without substitution."""
    layer, inputs = _recurrent(**options)
    parameters = list(layer.parameters())

    def loss() -> Tensor:
        states, final = layer(inputs)
        return (states**3).mean() + final.sin().sum()

    with FastSecondDerivatives():
        substituted = layer(inputs)
        assert "_StatesBackward" in graph_nodes(loss())
    torch.testing.assert_close(substituted, layer(inputs))

    def flat_loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters])
        named = {n: v.view_as(p) for (n, p), v in zip(layer.named_parameters(), pieces, strict=True)}
        states, final = torch.func.functional_call(layer, named, (inputs,))
        return (states**3).mean() + final.sin().sum()

    expected = torch.autograd.functional.hessian(flat_loss, torch.cat([p.detach().flatten() for p in parameters]))
    operator = HessianOperator(Objective([loss]), parameters)
    assert_close(dense_matrix(operator), expected, 1e-12)
    assert_close(torch.stack([operator.matvec(e) for e in torch.eye(len(expected)).double()]), expected, 1e-12)


def test_masks_between_recurrent_layers_are_left_to_torch() -> None:
    layer, inputs = _recurrent(num_layers=2, dropout=0.5)
    with FastSecondDerivatives():
        assert "_StatesBackward" not in graph_nodes(layer(inputs)[0])
        assert "_StatesBackward" in graph_nodes(layer.eval()(inputs)[0])


def test_packed_sequences_and_other_cells_are_left_to_torch() -> None:
    layer, inputs = _recurrent()
    packed = nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor([4, 3, 2, 2, 1]))
    with FastSecondDerivatives():
        assert "_StatesBackward" not in graph_nodes(layer(packed)[1])
        assert "_StatesBackward" not in graph_nodes(_recurrent(nonlinearity="relu")[0](inputs)[1])


def test_autocast_functorch_and_constants_are_left_to_torch() -> None:
    x = torch.randn(3, requires_grad=True)
    with FastSecondDerivatives():
        assert "_TanhBackward" in graph_nodes(torch.tanh(x))
        assert "_SigmoidBackward" in graph_nodes(x.sigmoid())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "_TanhBackward" not in graph_nodes(torch.tanh(x))
        torch.testing.assert_close(torch.func.grad(lambda v: v.tanh().sum())(x.detach()), 1 - x.detach().tanh() ** 2)
        assert torch.tanh(x.detach()).grad_fn is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": (1, 0), "dilation": [1, 2], "groups": 2},
        {"padding": "same", "dilation": (3, 1)},  # an odd row
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "stride": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
def test_convolutions_are_put_in_place_where_something_has_a_gradient(
    wanted: tuple[bool, bool], options: dict[str, object]
) -> None:
    image, weight = torch.randn(2, 4, 6, 7).requires_grad_(wanted[0]), torch.randn(6, 4, 2, 3).requires_grad_(wanted[1])
    weight = weight[:, :2] if "groups" in options else weight
    with FastSecondDerivatives():
        output = F.conv2d(image, weight, **options)  # type: ignore[arg-type]
    assert "_ConvolutionBackward" in graph_nodes(output)
    torch.testing.assert_close(output, F.conv2d(image, weight, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"padding": "sane"}, {"padding": "same", "stride": 2}], ids=str)
def test_wrong_paddings_are_refused_by_torch(wrong: dict[str, object]) -> None:
    image, weight = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as by_torch:
        F.conv2d(image, weight, **wrong)  # type: ignore[arg-type]
    with FastSecondDerivatives(), pytest.raises(type(by_torch.value), match=re.escape(str(by_torch.value))):
        F.conv2d(image, weight, **wrong)  # type: ignore[arg-type]


def test_convolutions_of_constants_and_of_one_image_are_left_to_torch() -> None:
    image, weight = torch.randn(2, 5, 5), torch.randn(3, 2, 2, 2)
    with FastSecondDerivatives():
        single = F.conv2d(image, weight.requires_grad_())
        with mock.patch("lightning_sfn.newton.substitution.convolution") as put:
            F.conv2d(image.unsqueeze(0), weight.detach())
    put.assert_not_called()
    assert "_ConvolutionBackward" not in graph_nodes(single)
    assert single.shape == (3, 4, 4)


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid])
def test_activations_that_are_called_in_another_way_are_left_to_torch(function: Callable[..., Tensor]) -> None:
    x, room = torch.randn(3), torch.zeros(3)
    with FastSecondDerivatives():
        assert function(x, out=room) is room
        torch.testing.assert_close(function(input=x), room)
        with pytest.raises(RuntimeError, match="out"):
            function(x.clone().requires_grad_(), out=room)
    torch.testing.assert_close(function(x), room)


def test_hooks_that_are_there_from_the_beginning_change_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), FastSecondDerivatives():
        assert "_TanhBackward" in graph_nodes(x.tanh())


def test_one_recurrent_layer_has_no_masks_whatever_their_share() -> None:
    layer, inputs = _recurrent()
    with FastSecondDerivatives():
        states, _ = torch.rnn_tanh(
            inputs, torch.zeros(1, 5, 3).double(), list(layer.parameters()), True, 1, 0.5, True, False, False
        )
    assert "_StatesBackward" in graph_nodes(states)
    torch.testing.assert_close(states, layer(inputs)[0])


@pytest.mark.parametrize("old_torch", [False, True])
def test_checkpointed_layers_see_the_same_operations_twice(old_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old_torch:
        monkeypatch.setattr("lightning_sfn.newton.saved_tensors._TOP_HOOKS", None)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, parameters = torch.randn(5, 3, dtype=torch.float64), list(model.parameters())
    plain = HessianOperator(Objective([lambda: model(x).square().sum()]), parameters)
    kept = HessianOperator(Objective([lambda: checkpoint(model, x, use_reentrant=False).square().sum()]), parameters)
    vector = torch.randn(plain.parameters.size, dtype=torch.float64)
    assert_close(kept.matvec(vector), plain.matvec(vector), 1e-12)
    with FastSecondDerivatives():
        assert "_TanhBackward" not in graph_nodes(checkpoint(model, x, use_reentrant=False))
        assert "_TanhBackward" in graph_nodes(model(x))


def test_a_penalty_on_the_gradient_has_its_hessian() -> None:
    """The loss holds a first derivative of each substituted operation, so its Hessian holds third ones."""
    network = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid()).double()
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    parameters = list(network.parameters())

    def penalised(weights: dict[str, Tensor]) -> Tensor:
        point = x.clone().requires_grad_()
        value = torch.func.functional_call(network, weights, (point,)).square().sum()
        (slope,) = torch.autograd.grad(value, point, create_graph=True)
        return value + slope.square().sum()

    def of(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters])
        return penalised({n: v.view_as(p) for (n, p), v in zip(network.named_parameters(), pieces, strict=True)})

    expected = torch.autograd.functional.hessian(of, torch.cat([p.detach().flatten() for p in parameters]))
    operator = HessianOperator(Objective([lambda: penalised(dict(network.named_parameters()))]), parameters)
    assert_close(torch.stack([operator.matvec(e) for e in torch.eye(len(expected)).double()]), expected, 1e-12)


@pytest.mark.parametrize(
    ("operation", "rounds"),
    [
        (lambda x: x.tanh(), False),
        (lambda x: torch.sigmoid(x), False),
        (lambda x: F.linear(x, x[0], x[0, :, 0]), False),
        (lambda x: F.conv1d(x, x[:2], padding=1), False),
        (lambda x: F.conv1d(x, x[:2], stride=2, bias=x[:2, 0, 0]), False),
        (lambda x: x.sin(), False),
        (nn.RNN(5, 16, batch_first=True), True),
        (nn.RNN(5, 16, nonlinearity="relu", batch_first=True), False),
    ],
    ids=["tanh", "sigmoid", "linear", "convolution", "with a stride", "left alone", "recurrence", "another recurrence"],
)
def test_what_may_round_otherwise_is_noted_and_the_rest_is_the_same_bit_for_bit(
    operation: Callable[[Tensor], Tensor], rounds: bool
) -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    with FastSecondDerivatives() as mode:
        ours = operation(x)
    assert mode.rounds_otherwise == rounds
    if not rounds:
        assert all(map(torch.equal, tree_leaves(ours), tree_leaves(operation(x))))


def test_what_rounds_otherwise_stays_noted_whatever_follows() -> None:
    with FastSecondDerivatives() as mode:
        nn.RNN(5, 3)(torch.randn(4, 2, 5, requires_grad=True))[0].tanh()
    assert mode.rounds_otherwise


def test_weights_are_normalised_by_row_unless_another_dimension_is_named() -> None:
    v, g = torch.randn(3, 4, requires_grad=True), torch.rand(3, 1)
    with FastSecondDerivatives() as mode:
        ours = torch._weight_norm(v, g)
    assert mode.rounds_otherwise
    assert "WeightNormInterfaceBackward0" not in graph_nodes(ours)
    torch.testing.assert_close(ours, torch._weight_norm(v, g))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(0.5),
    "add_": lambda y: y.add_(y.detach().clone()),
    "of a view": lambda y: (y.flatten()[:3].mul_(2.0), y)[1],
}


def _layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    linear = {
        f"linear {len(shape)}-D{' biased' * bias}": (nn.Linear(4, 4, bias=bias), shape)
        for bias in (True, False)
        for shape in ((4,), (3, 4), (2, 3, 4), (2, 1, 3, 4))
    }
    recurrent = {
        "rnn": nn.RNN(4, 3),
        "rnn batch first": nn.RNN(4, 3, batch_first=True),
        "rnn both ways": nn.RNN(4, 3, num_layers=2, bidirectional=True),
        "gru": nn.GRU(4, 3),
    }
    others = {"conv": (nn.Conv2d(2, 3, 2), (2, 2, 3, 3)), "tanh": (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), (3, 4))}
    return linear | {name: (layer, (2, 3, 4)) for name, layer in recurrent.items()} | others


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", _layers())
def test_outputs_may_be_changed_in_place(name: str, change: str) -> None:
    """As far as torch's own operations allow it: a changed tanh has lost what its derivative is made of."""
    torch.manual_seed(0)
    layer, shape = _layers()[name]
    layer = layer.double()
    inputs = torch.randn(shape, dtype=torch.float64)
    weights = list(layer.parameters())

    def loss() -> Tensor:
        output = layer(inputs)
        return CHANGES[change](output[0] if isinstance(output, tuple) else output).square().mean()

    try:
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights, create_graph=True)])
    except RuntimeError:
        with pytest.raises(CurvatureError):
            dense_matrix(HessianOperator(Objective([loss]), weights))
        return
    rows = [torch.autograd.grad(g, weights, retain_graph=True, materialize_grads=True) for g in gradient]
    expected = torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])
    torch.testing.assert_close(dense_matrix(HessianOperator(Objective([loss]), weights)), expected)
