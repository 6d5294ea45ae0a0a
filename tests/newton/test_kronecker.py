import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy.linalg import fractional_matrix_power
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_sfn import SaddleFreeNewton
from lightning_sfn.newton import AutoPreconditioner, HessianOperator, KroneckerFactors, Objective
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.kronecker_blocks import Block
from lightning_sfn.newton.kronecker_estimate import FactorsError, Limits
from lightning_sfn.newton.processes import Processes, ProcessMean
from lightning_sfn.newton.weight_uses import WatchingWeights

from .cases import make
from .ranks import on_ranks

D = torch.float64


def refreshed(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> KroneckerFactors:
    factors = KroneckerFactors(model, probes=0, **options)
    factors.refresh(HessianOperator(Objective([loss]), model.parameters()), torch.Generator().manual_seed(0))
    return factors


def dense(factors: KroneckerFactors, size: int, *, inverse: bool = False) -> Tensor:
    unit = torch.eye(size, dtype=D)
    return factors.unscale(unit) if inverse else factors.scale(unit)


def only_block(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> Block:
    (block,) = refreshed(model, loss, **options)._blocks
    return block


def fitting(*layers: nn.Module, inputs: Tensor, outputs: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(*layers).double()
    target = torch.randn(len(inputs), outputs, dtype=D)
    return model, lambda: F.mse_loss(model(inputs), target, reduction="sum") / len(inputs)


def test_the_map_is_the_inverse_square_root_of_the_damped_kronecker_product() -> None:
    x = torch.randn(50, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    factors = refreshed(model, loss, damping=0.01)
    (block,) = factors._blocks
    joined = torch.cat([x, torch.ones(50, 1, dtype=D)], 1)
    torch.testing.assert_close(block.inputs, joined.T @ joined / 50)

    a, s = block.inputs, block.outputs
    damping = 0.01 * a.diagonal().mean() * s.diagonal().mean()
    damped = torch.kron(s, a) + damping * torch.eye(8, dtype=D)
    in_rows = torch.tensor(fractional_matrix_power(damped, -0.5))  # of the joined matrix [W b], row by row
    order = [0, 1, 2, 4, 5, 6, 3, 7]  # the flat parameters have W first, then b
    torch.testing.assert_close(dense(factors, 8), in_rows[order][:, order])
    torch.testing.assert_close(dense(factors, 8) @ dense(factors, 8, inverse=True), torch.eye(8, dtype=D))
    torch.testing.assert_close(dense(factors, 8), dense(factors, 8).T)


def test_one_vector_is_mapped_like_a_row_of_many() -> None:
    x = torch.randn(50, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False), inputs=x, outputs=2)
    factors, vectors = refreshed(model, loss), torch.randn(5, 24, dtype=D)
    torch.testing.assert_close(factors.scale(vectors)[2], factors.scale(vectors[2]))
    torch.testing.assert_close(factors.unscale(factors.scale(vectors)), vectors)
    torch.testing.assert_close(factors.precondition(vectors), factors.scale(factors.scale(vectors)))


def test_a_linear_model_has_the_hessian_for_its_factors() -> None:
    """Squared error: the Hessian is E[x x'] times twice the identity, and drawn targets give that on average."""
    x = torch.randn(100_000, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2, bias=False), inputs=x, outputs=2)
    block = only_block(model, loss)
    torch.testing.assert_close(block.outputs, 2 * torch.eye(2, dtype=D), atol=0.03, rtol=0)
    flat = torch.randn(6, dtype=D)
    product = HessianOperator(Objective([loss]), model.parameters()).matvec(flat)
    torch.testing.assert_close(torch.kron(block.outputs, block.inputs) @ flat, product, atol=0.1, rtol=0)


def test_curvature_in_these_coordinates_is_about_the_identity() -> None:
    x = torch.randn(20_000, 3, dtype=D) * torch.tensor([10.0, 1.0, 0.1], dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    factors = refreshed(model, loss, damping=1e-9)
    operator = HessianOperator(Objective([loss]), model.parameters())
    flat = factors.scale(operator.matmat(dense(factors, 8)))
    torch.testing.assert_close(flat, torch.eye(8, dtype=D), atol=0.1, rtol=0)


def test_a_convolution_over_the_whole_image_has_the_factors_of_a_linear_layer() -> None:
    x = torch.randn(40, 2, 3, 3, dtype=D)
    convolution, loss = fitting(nn.Conv2d(2, 4, 3), nn.Flatten(), inputs=x, outputs=4)
    linear, same = fitting(nn.Flatten(), nn.Linear(18, 4), inputs=x, outputs=4)
    with torch.no_grad():
        linear[1].weight.copy_(convolution[0].weight.flatten(1))
        linear[1].bias.copy_(convolution[0].bias)
    ours, theirs = only_block(convolution, loss), only_block(linear, same)
    torch.testing.assert_close(ours.inputs, theirs.inputs)
    torch.testing.assert_close(ours.outputs, theirs.outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "stride": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions_gather_their_patches(kind: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    """The gradient of the weight is the sum over places of output gradient times patch."""
    layer = kind(2, 3, **options).double()
    x = torch.randn(4, 2, *([9] if kind is nn.Conv1d else [9, 7]), dtype=D)
    model = nn.Sequential(layer)
    target = torch.randn_like(model(x))
    with WatchingWeights(model.parameters(), None) as watching:
        loss = F.mse_loss(model(x), target)
    (use,) = watching.uses
    by_output, by_weight = torch.autograd.grad(loss, [use.output, layer.weight])
    torch.testing.assert_close(use.rows(by_output).T @ use.inputs, by_weight.flatten(1))


def test_an_embedding_has_the_factors_of_a_linear_layer_on_one_hot_rows() -> None:
    words = torch.randint(5, (30,))
    embedding, linear = nn.Embedding(5, 3).double(), nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(embedding.weight.T)
    target, rows = torch.randn(30, 3, dtype=D), F.one_hot(words, 5).double()
    ours = only_block(embedding, lambda: F.mse_loss(embedding(words), target), targets="given")
    theirs = only_block(linear, lambda: F.mse_loss(linear(rows), target), targets="given")
    torch.testing.assert_close(ours.inputs.diag(), theirs.inputs)
    torch.testing.assert_close(ours.outputs, theirs.outputs)


def test_a_layer_norm_has_the_diagonal_of_the_squared_gradients_of_single_cases() -> None:
    norm, x, y = nn.LayerNorm(4).double(), torch.randn(6, 4, dtype=D), torch.randn(6, 4, dtype=D)
    block = only_block(norm, lambda: F.mse_loss(norm(x), y, reduction="sum"), targets="given")
    squares = torch.zeros(2, 4, dtype=D)
    for row, target in zip(x, y, strict=True):
        gradients = torch.autograd.grad((norm(row) - target).square().sum(), [norm.weight, norm.bias])
        squares += torch.stack(gradients).square()
    torch.testing.assert_close(block.outputs, squares)


def evaluating(norm: nn.Module) -> nn.Module:
    """With running statistics that are not those of the batch."""
    norm.running_mean.copy_(torch.linspace(-1, 1, 4))  # type: ignore[operator,union-attr]
    norm.running_var.copy_(torch.linspace(0.5, 2, 4))  # type: ignore[operator,union-attr]
    return norm.eval()


@pytest.mark.parametrize(
    ("norm", "shape", "channels"),
    [
        (nn.LayerNorm(4), (6, 3, 4), -1),
        (nn.RMSNorm(4), (6, 3, 4), -1),
        (nn.RMSNorm(4, eps=0.1), (6, 4), -1),
        (nn.BatchNorm1d(4), (6, 4), 1),
        (nn.BatchNorm2d(4, eps=0.1), (3, 4, 2, 2), 1),
        (evaluating(nn.BatchNorm2d(4)), (3, 4, 2, 2), 1),
        (nn.GroupNorm(2, 4, eps=0.1), (3, 4, 5), 1),
    ],
    ids=lambda value: str(value).split("(")[0] if isinstance(value, nn.Module) else "",
)
def test_norms_have_the_diagonal_of_the_squared_gradients_of_single_places(
    norm: nn.Module, shape: tuple[int, ...], channels: int
) -> None:
    """The output is weight times normalized input plus bias, so a place's gradients are products with its residual."""
    norm = copy.deepcopy(norm).double()
    x, y = torch.randn(shape, dtype=D), torch.randn(shape, dtype=D)
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    expected = norm(x).detach()
    norm.load_state_dict(buffers, strict=False)
    block = only_block(norm, lambda: F.mse_loss(norm(x), y, reduction="sum"), targets="given")
    residuals, normalized = (t.movedim(channels, -1).reshape(-1, 4) for t in (2 * (expected - y), expected))
    rows = [residuals * normalized, residuals][: len(list(norm.parameters()))]
    torch.testing.assert_close(block.outputs, torch.stack([row.square().sum(0) for row in rows]))
    assert block.signature[0] == "norm"


def test_a_batch_norm_counts_its_batch_once_for_each_evaluation() -> None:
    norm, x = nn.BatchNorm1d(3).double(), torch.randn(8, 3, dtype=D)
    twin, evaluations = copy.deepcopy(norm), []
    norm.register_forward_hook(lambda *_: evaluations.append(twin(x)))
    only_block(norm, lambda: F.mse_loss(norm(x), x), targets="given")
    assert evaluations
    for name, buffer in twin.named_buffers():
        assert torch.equal(norm.get_buffer(name), buffer)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_have_two_factors_for_each_matrix(layer: Callable[..., nn.RNNBase]) -> None:
    model, x = layer(3, 4, batch_first=True).double(), torch.randn(6, 5, 3, dtype=D)
    target = torch.randn(6, 5, 4, dtype=D)
    factors = refreshed(model, lambda: F.mse_loss(model(x)[0], target))
    assert [block.signature for block in factors._blocks] == [("dense", 0, 2), ("dense", 1, 3)]
    inputs = torch.cat([x.flatten(0, 1), torch.ones(30, 1, dtype=D)], 1)
    torch.testing.assert_close(factors._blocks[0].inputs, inputs.T @ inputs / 30)
    states = torch.cat([torch.zeros(6, 1, 4, dtype=D), model(x)[0][:, :-1]], 1).flatten(0, 1).detach()
    torch.testing.assert_close(factors._blocks[1].inputs[:4, :4], states.T @ states / 30)
    assert factors.unfactored == ()


def test_factors_follow_the_scale_of_the_loss_whatever_its_reduction() -> None:
    x, y = torch.randn(20, 3, dtype=D), torch.randn(20, 2, dtype=D)
    model = nn.Linear(3, 2).double()
    one = only_block(model, lambda: F.mse_loss(model(x), y))
    for loss, factor in (
        (lambda: 5 * F.mse_loss(model(x), y), 5.0),
        (lambda: F.mse_loss(model(x), y, reduction="sum"), 40.0),
        (lambda: F.mse_loss(model(x), y, reduction="none").sum(1).mean(), 2.0),
    ):
        torch.testing.assert_close(only_block(model, loss).outputs, factor * one.outputs)


def test_parts_are_averaged_by_their_weights() -> None:
    x, y = torch.randn(32, 3, dtype=D), torch.randn(32, 2, dtype=D)
    model = nn.Linear(3, 2).double()
    parts = [lambda rows=rows: F.mse_loss(model(x[rows]), y[rows]) for rows in (slice(24), slice(24, 32))]
    factors = KroneckerFactors()
    factors.refresh(HessianOperator(Objective(parts, [24, 8]), model.parameters()), torch.Generator().manual_seed(0))
    whole = only_block(model, lambda: F.mse_loss(model(x), y))
    torch.testing.assert_close(factors._blocks[0].inputs, whole.inputs)
    torch.testing.assert_close(factors._blocks[0].outputs, whole.outputs)


class Mixed(nn.Module):
    """A loose parameter, tied weights, attention to learned keys too, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.scale = nn.Embedding(5, 4), nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head, self.unused = nn.Linear(4, 5, bias=False), nn.Linear(2, 2)
        self.hidden = nn.Linear(4, 4)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) * self.scale
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.hidden(x).tanh())


def test_what_has_no_rule_is_scaled_by_one_number_and_named() -> None:
    model, words = Mixed(), torch.randint(5, (6, 3))

    def loss() -> Tensor:
        return F.cross_entropy(model(words).flatten(0, 1), words.flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=4, preconditioner=KroneckerFactors(model))
        losses = [float(optimizer.step(loss)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert optimizer.last_step is not None
    assert optimizer.last_step.unfactored == (
        "scale",
        "words.weight",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.bias_k",
        "attention.bias_v",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        "unused.weight",
        "unused.bias",
    )


def test_layers_over_the_memory_limit_give_way() -> None:
    x = torch.randn(50, 30, dtype=D)
    model, loss = fitting(nn.Linear(30, 2), nn.Linear(2, 2), inputs=x, outputs=2)
    everything = refreshed(model, loss)
    assert everything.memory == 8 * (2 * (31**2 + 2**2 + 3**2 + 2**2) + 62 + 6)
    limited = refreshed(model, loss, max_memory=1000)
    assert limited.unfactored == ("0.weight", "0.bias")
    assert limited.memory <= 1000


def test_factors_are_estimated_every_few_steps() -> None:
    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    factors, generator = KroneckerFactors(refresh_every=3), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(6):
        factors.refresh(HessianOperator(Objective([loss]), model.parameters()), generator)
        seen.append(factors._blocks[0])
    assert seen[0] is seen[1] is seen[2] is not seen[3]
    assert seen[3] is seen[5]


@pytest.mark.parametrize("refresh_every", [1, 2, 3])
def test_a_loaded_state_is_renewed_when_its_own_would_have_been(refresh_every: int) -> None:
    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    operator = HessianOperator(Objective([loss]), model.parameters())
    factors = KroneckerFactors(refresh_every=refresh_every)
    for step in range(7):
        twin = KroneckerFactors(refresh_every=refresh_every)
        twin.load_state_dict(factors.state_dict())
        for each in (twin, factors):
            before = list(map(id, each._blocks))
            each.refresh(operator, torch.Generator().manual_seed(0))
            assert (list(map(id, each._blocks)) != before) == (step % refresh_every == 0)


def test_estimates_are_averaged_with_those_before() -> None:
    x = torch.randn(2, 20, 3, dtype=D)
    model = nn.Linear(3, 2).double()

    def of(batch: int) -> HessianOperator:
        return HessianOperator(Objective([lambda: model(x[batch]).square().mean()]), model.parameters())

    options: dict[str, Any] = {"refresh_every": 1, "targets": "given"}
    factors, single = KroneckerFactors(average=0.25, **options), []
    for batch in (0, 1):
        alone = KroneckerFactors(**options)
        for each in (factors, alone):
            each.refresh(of(batch), torch.Generator().manual_seed(0))
        single.append(alone._blocks[0])
    (block,) = factors._blocks
    torch.testing.assert_close(block.inputs, 0.25 * single[0].inputs + 0.75 * single[1].inputs)
    torch.testing.assert_close(block.outputs, 0.25 * single[0].outputs + 0.75 * single[1].outputs)


def test_a_first_estimate_sees_all_data_and_later_ones_what_products_see() -> None:
    x = torch.randn(40, 3, dtype=D)
    model = nn.Linear(3, 2, bias=False).double()
    operator = HessianOperator(Objective([lambda: model(x[:10]).square().mean()]), model.parameters())
    whole = Objective([lambda: model(x[:25]).square().mean(), lambda: model(x[25:]).square().mean()], [25, 15])
    factors = KroneckerFactors(refresh_every=1, targets="given", probes=0, average=0.75)
    factors.refresh(operator, torch.Generator(), False, whole)
    all_of_them, some = x.T @ x / 40, x[:10].T @ x[:10] / 10
    torch.testing.assert_close(factors._blocks[0].inputs, all_of_them)
    factors.refresh(operator, torch.Generator(), False, whole)
    torch.testing.assert_close(factors._blocks[0].inputs, 0.75 * all_of_them + 0.25 * some)

    again = KroneckerFactors(refresh_every=1, targets="given", probes=0, average=0.75)
    again.load_state_dict(factors.state_dict())
    for each in (again, factors):
        each.refresh(operator, torch.Generator(), False, whole)
    assert torch.equal(dense(again, 6), dense(factors, 6))
    factors.reset()
    factors.refresh(operator, torch.Generator(), False, whole)
    torch.testing.assert_close(factors._blocks[0].inputs, all_of_them)


def test_a_part_must_do_where_all_data_do_not_fit() -> None:
    x = torch.randn(10, 3, dtype=D)
    model = nn.Linear(3, 2, bias=False).double()

    def full() -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    operator = HessianOperator(Objective([lambda: model(x).square().mean()]), model.parameters())
    factors = AutoPreconditioner(KroneckerFactors(targets="given", probes=0))
    factors.refresh(operator, torch.Generator(), False, Objective([full]))
    assert factors.in_use is factors.factors
    torch.testing.assert_close(factors.factors._blocks[0].inputs, x.T @ x / 10)


def test_data_that_products_see_whole_are_looked_at_once() -> None:
    x, seen = torch.randn(10, 3, dtype=D), []
    model = nn.Linear(3, 2).double()

    def loss() -> Tensor:
        seen.append(len(x))
        return model(x).square().mean()

    objective = Objective([loss])
    operator = HessianOperator(objective, model.parameters())
    for whole in (None, objective):
        seen.clear()
        KroneckerFactors(targets="given", probes=0).refresh(operator, torch.Generator(), False, whole)
        assert seen == [10]


@pytest.mark.parametrize("limits", [Limits(3, None, 0.0), Limits(1, None, 0.0)], ids=["inputs", "both"])
def test_estimates_of_another_layout_are_not_averaged(limits: Limits) -> None:
    x = torch.randn(20, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    operator = HessianOperator(Objective([loss]), model.parameters())
    factors, alone = (KroneckerFactors(refresh_every=1, targets="given") for _ in range(2))
    factors.refresh(operator, torch.Generator())
    for each in (factors, alone):
        each.limits = limits
        each.refresh(operator, torch.Generator())
    assert torch.equal(factors._blocks[0].inputs, alone._blocks[0].inputs)
    assert torch.equal(factors._blocks[0].outputs, alone._blocks[0].outputs)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_factors_that_are_zero_or_not_finite_are_no_factors(factor: float) -> None:
    x = torch.randn(20, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    operator = HessianOperator(Objective([lambda: factor * loss()]), model.parameters())
    with pytest.raises(FactorsError, match=r"^Kronecker factors are zero or not finite at the present parameters$"):
        KroneckerFactors().renew(operator, torch.Generator())
    said = (
        "^Kronecker factors are zero or not finite at the present parameters: those of an earlier step, if any, stay "
        "in use.$"
    )
    with pytest.warns(UserWarning, match=said):
        KroneckerFactors().refresh(operator, torch.Generator())


class Loose(nn.Module):
    """A layer, a parameter without a rule, and one that the loss does not see: 8, 4 and 100 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.loose = nn.Linear(3, 2), nn.Parameter(torch.full((2, 2), 0.5))
        self.unseen = nn.Parameter(torch.ones(100))

    def loss(self) -> Tensor:
        x = torch.randn(20, 3, dtype=D, generator=torch.Generator().manual_seed(0))
        return (self.layer(x) @ self.loose).square().mean()


@pytest.mark.parametrize(("coverage", "enough"), [(8 / 12 - 1e-9, True), (8 / 12 + 1e-9, False), (1.0, False)])
def test_enough_of_the_parameters_that_are_used_must_have_factors(coverage: float, enough: bool) -> None:
    model = Loose().double()
    operator = HessianOperator(Objective([model.loss]), model.parameters())
    factors = KroneckerFactors(min_coverage=coverage)
    if enough:
        factors.renew(operator, torch.Generator())
        assert factors.unfactored == ("parameter 0", "parameter 1")
    else:
        words = "^Too few of the parameters belong to layers that have Kronecker factors$"
        with pytest.raises(FactorsError, match=words):
            factors.renew(operator, torch.Generator())
        assert not factors.is_known


@pytest.mark.parametrize("width", [1, 3])
def test_a_layer_without_bias_covers_its_weight(width: int) -> None:
    x = torch.randn(20, width, dtype=D)
    model, loss = fitting(nn.Linear(width, 1, bias=False), inputs=x, outputs=1)
    assert refreshed(model, loss, min_coverage=1.0).is_known


def test_a_saved_state_is_complete() -> None:
    model = Loose().double()
    factors = KroneckerFactors(model, refresh_every=5)
    operator = HessianOperator(Objective([model.loss]), model.parameters())
    factors.refresh(operator, torch.Generator().manual_seed(0))
    factors._caution, factors._shortens = 0.5, True
    twin = KroneckerFactors()
    twin.load_state_dict(copy.deepcopy(factors.state_dict()))
    assert str(twin.state_dict()) == str(factors.state_dict())
    assert twin.unfactored == factors.unfactored == ("loose", "unseen")
    assert (twin._allowed, twin._caution, twin._shortens, twin._age) == (factors._allowed, 0.5, True, 1)
    unit = torch.eye(112, dtype=D)
    assert torch.equal(twin.scale(unit), factors.scale(unit))
    twin.reset()
    assert str(twin.state_dict()) == str(KroneckerFactors().state_dict()) == "{'age': 0}"
    assert (twin._caution, twin._allowed, twin._excess, twin.unfactored) == (1.0, [], [], ())
    twin.load_state_dict({})  # of an optimizer that has taken no step
    assert twin._age == 0


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def two_layers(enlarged: int, size: float) -> tuple[Tensor, nn.Module, KroneckerFactors]:
    """Inputs, a model of which one layer's weight is so many times larger, and its factors."""
    torch.manual_seed(0)
    x = torch.randn(30, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), inputs=x, outputs=2)
    with torch.no_grad():
        model[enlarged].weight.mul_(size)
    return x, model, refreshed(model, loss)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_step_is_shortened_so_that_no_hidden_layers_outputs_change_much(size: float) -> None:
    """By 1 at most, or by a tenth of what they are; measured at the layers. The last one goes the whole way."""
    torch.manual_seed(0)
    x = torch.randn(30, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2), inputs=x, outputs=2)
    with torch.no_grad():
        model[2].weight.mul_(size)
    factors = refreshed(model, loss)
    seen = [x, torch.tanh(model[0](x).detach())]
    layers = [model[0], model[2]]
    limits = [max(1.0, 0.1 * rms(layer(into).detach())) for layer, into in zip(layers, seen, strict=True)]
    assert (limits[1] > 1.0) == (size > 1.0)
    steps = torch.randn(7, 32, dtype=D) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 5.0, 5.0], dtype=D).unsqueeze(1)
    steps[5, :16] = steps[6, 16:26] = 0.0  # where one layer alone moves
    expected = torch.ones(7, 32, dtype=D)
    for step, row in zip(steps, expected, strict=True):
        weight, bias, next_weight, next_bias, _ = step.split([12, 4, 8, 2, 6])
        changes = [seen[0] @ weight.view(4, 3).T + bias, seen[1] @ next_weight.view(2, 4).T + next_bias]
        row[:26] = 1 / max(1.0, *(rms(change) / limit for limit, change in zip(limits, changes, strict=True)))
    shares = factors.shares(steps)
    torch.testing.assert_close(shares, expected)
    assert float(shares[0, 0]) == 1.0 > float(shares[4:, 0].max())
    torch.testing.assert_close(factors.shares(steps, straight=True), expected[:, :1])
    assert factors.shares(steps[:1]).tolist() == [[1.0]]
    restored = KroneckerFactors(model)
    restored.load_state_dict(copy.deepcopy(factors.state_dict()))
    assert torch.equal(restored.shares(steps), shares)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_large_hidden_layer_may_change_by_a_tenth_and_the_last_one_by_anything(size: float) -> None:
    x, model, factors = two_layers(0, size)
    first, last = 50 * torch.randn(2, 26, dtype=D)
    first[16:] = last[:16] = 0.0
    change = x @ first[:12].view(4, 3).T + first[12:16]
    limit = max(1.0, 0.1 * rms(model[0](x).detach()))
    assert (limit > 1.0) == (size > 1.0)
    expected = torch.ones(2, 26, dtype=D)
    expected[0, :16] = limit / rms(change)
    torch.testing.assert_close(factors.shares(torch.stack([first, last])), expected, rtol=1e-12, atol=0)


def test_without_factors_a_step_is_taken_whole() -> None:
    factors = KroneckerFactors()
    factors.feedback(accepted=False, store=BasisStore())  # of a step that factors have not shortened
    assert factors._caution == 1.0
    assert factors.memory == 0
    assert factors.shares(torch.full((2, 3), 1e6)).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("heavy_ball", [0.0, 0.95])
def test_no_step_of_an_optimizer_changes_a_layers_outputs_by_more(heavy_ball: float) -> None:
    """From a start of almost equal units, where unlimited steps are long; factors from all data, not averaged."""
    torch.manual_seed(0)
    x = torch.rand(60, 6, dtype=D)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(1e-2)
    factors = KroneckerFactors(model, refresh_every=1, average=0.0, probes=0)
    optimizer = SaddleFreeNewton(
        model.parameters(), inner_steps=1, preconditioner=factors, heavy_ball=heavy_ball, damping=1e-6
    )
    loss = lambda: F.mse_loss(model(x), x, reduction="sum") / len(x)  # noqa: E731
    largest = 0.0  # share of what is allowed
    for _ in range(60):
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        here = float(loss().detach())
        if float(optimizer.step(loss)) != pytest.approx(here):  # a way was taken back
            continue
        step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        shifts = torch.stack(factors._shifts(step.unsqueeze(0)))[:, 0]
        largest = max(largest, float((shifts / torch.tensor(factors._allowed, dtype=D)).max()))
    assert largest == pytest.approx(1.0)  # no step exceeded the bound, and one needed it


def test_targets_of_another_size_than_the_outputs_are_reached() -> None:
    """Were last layers held back with the others, hidden units would saturate on the way there."""
    torch.manual_seed(1)
    x = torch.randn(200, 4, dtype=D)
    y = 50 * (x[:, :1] * x[:, 1:2] + x[:, 2:3].sin())
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = SaddleFreeNewton(model.parameters())
    for _ in range(60):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    assert float(F.mse_loss(model(x), y).detach()) <= 1e-3 * 50**2


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def run(network: nn.Module, state: dict[str, Any] | None, steps: int) -> SaddleFreeNewton:
        optimizer = SaddleFreeNewton(network.parameters(), krylov_dim=3, preconditioner="kronecker")
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.step(lambda: F.mse_loss(network(x), y))
        return optimizer

    first = run(model, None, 4)
    other, state = copy.deepcopy(model), copy.deepcopy(first.state_dict())
    for _ in range(4):
        first.step(lambda: F.mse_loss(model(x), y))
    run(other, state, 4)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_failed_estimate_keeps_what_there_was() -> None:
    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    factors, generator = KroneckerFactors(refresh_every=1), torch.Generator().manual_seed(0)

    def refresh(objective: Callable[[], Tensor]) -> None:
        factors.refresh(HessianOperator(Objective([objective]), model.parameters()), generator)

    refresh(loss)
    kept = factors._blocks[0]
    with pytest.warns(UserWarning, match="not finite"):
        refresh(lambda: loss() * float("nan"))

    def unknown() -> Tensor:
        raise RuntimeError("no such layer")

    with pytest.warns(UserWarning, match="no such layer"):
        refresh(unknown)
    assert factors._blocks[0] is kept


class Scaled(nn.Module):
    """A linear layer times a number that is a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.linear(x))


def test_a_parameter_without_dimensions_is_scaled_by_one_number() -> None:
    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(Scaled(), inputs=x, outputs=2)
    factors = refreshed(model, loss)
    assert factors.unfactored == ("0.scale",)
    size = sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(dense(factors, size) @ dense(factors, size, inverse=True), torch.eye(size, dtype=D))
    optimizer = SaddleFreeNewton(model.parameters())
    optimizer.step(loss)
    assert optimizer.last_step is not None
    assert optimizer.last_step.coordinates == "kronecker"
    assert optimizer.last_step.accepted


def test_an_empty_parameter_changes_nothing() -> None:
    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    empty = nn.Parameter(torch.zeros(0, 4, dtype=D))
    optimizer = SaddleFreeNewton([empty, *model.parameters()])
    optimizer.step(lambda: loss() + empty.sum())
    assert optimizer.last_step is not None
    assert optimizer.last_step.coordinates == "kronecker"


def test_copies_of_model_and_factors_know_the_names() -> None:
    x = torch.randn(10, 3, dtype=D)
    model, _ = fitting(Scaled(), inputs=x, outputs=2)
    copied, factors = copy.deepcopy((model, KroneckerFactors(model, probes=0)))
    objective = Objective([lambda: copied(x).square().mean()])
    factors.refresh(HessianOperator(objective, copied.parameters()), torch.Generator().manual_seed(0))
    assert factors.unfactored == ("0.scale",)


def test_a_failed_estimate_keeps_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ran out is needed by what comes next; the cyclic collector would free it too late."""
    kept: list[weakref.ref[Tensor]] = []

    def short_of_memory(self: Any, uses: Any, outputs: Any, gradients: list[Tensor | None], weight: float) -> None:
        kept.extend(weakref.ref(g) for g in gradients if g is not None)
        raise torch.OutOfMemoryError("out of memory")

    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    refreshed(model, loss)  # the first estimate of a process imports what a later one has
    monkeypatch.setattr("lightning_sfn.newton.kronecker_estimate._Sums.add", short_of_memory)
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="cannot be estimated"):
            refreshed(model, loss)
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_compiled_models_are_watched_as_written() -> None:
    x = torch.randn(10, 3)
    model = nn.Sequential(nn.Linear(3, 2))
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    factors = refreshed(model, lambda: F.mse_loss(compiled(x), torch.zeros(10, 2)))
    assert factors.unfactored == ()
    torch._dynamo.reset()


@pytest.mark.parametrize("old_torch", [False, True])
def test_checkpointed_recurrent_layers_are_left_alone(old_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are evaluated again in the backward pass, unwatched, and must then do the same."""
    if old_torch:
        monkeypatch.setattr("lightning_sfn.newton.saved_tensors._TOP_HOOKS", None)
    layers, x = nn.ModuleDict({"first": nn.GRU(3, 4), "last": nn.GRU(4, 2)}), torch.randn(5, 6, 3)

    def loss() -> Tensor:
        states = checkpoint(layers["first"], x, use_reentrant=False)[0]
        return F.mse_loss(layers["last"](states)[0], torch.zeros(5, 6, 2))

    factors = refreshed(layers, loss)
    assert factors.unfactored == tuple(f"first.{name}" for name, _ in layers["first"].named_parameters())


def test_global_random_numbers_and_modules_are_left_alone() -> None:
    x = torch.randn(10, 3, dtype=D)
    model, loss = fitting(nn.Linear(3, 2), inputs=x, outputs=2)
    before = torch.get_rng_state()
    refreshed(model, loss)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def _shared(size: int) -> tuple[list[Tensor], int]:
    rank = dist.get_rank() if size > 1 else 0
    torch.manual_seed(0)
    x, y, model = torch.randn(8, 3, dtype=D), torch.randn(8, 2, dtype=D), nn.Linear(3, 2).double()
    rows = slice(None) if size == 1 else slice(4 * rank, 4 * rank + 4)
    mean = None if size == 1 else ProcessMean(Processes())
    objective = Objective([lambda: F.mse_loss(model(x[rows]), y[rows])], reduce=mean)
    factors, generator = KroneckerFactors(targets="given"), torch.Generator().manual_seed(0)
    factors.refresh(HessianOperator(objective, model.parameters()), generator)
    (block,) = factors._blocks
    return [block.inputs, block.outputs], int(generator.get_state().sum())


def _uneven(seen: tuple[int, int]) -> Tensor:
    """The first factor where ranks have four rows each, of which products see so many."""
    rank, mean = dist.get_rank(), ProcessMean(Processes())
    torch.manual_seed(0)
    x, model = torch.randn(8, 3, dtype=D), nn.Linear(3, 2, bias=False).double()
    own = x[4 * rank : 4 * rank + 4]
    whole, part = (Objective([lambda n=n: model(own[:n]).square().mean()], reduce=mean) for n in (4, seen[rank]))
    operator = HessianOperator(whole if seen[rank] == 4 else part, model.parameters())
    factors = KroneckerFactors(targets="given", probes=0)
    factors.refresh(operator, torch.Generator().manual_seed(0), False, whole)
    torch.testing.assert_close(factors._blocks[0].inputs, x.T @ x / 8)
    return factors._blocks[0].inputs


@pytest.mark.parametrize("seen", [(4, 2), (2, 4), (2, 2), (4, 4)], ids=str)
def test_a_first_estimate_needs_all_ranks_where_one_sees_a_part(seen: tuple[int, int]) -> None:
    first, second = on_ranks(2, _uneven, seen)
    assert torch.equal(first, second)


def test_ranks_share_one_estimate() -> None:
    (first, state), (second, same) = on_ranks(2, _shared, 2)
    alone, _ = _shared(1)
    assert state == same
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(first[0], alone[0])
    torch.testing.assert_close(first[1], 2 * alone[1])  # gradients of each half's mean are twice as large


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "true"}, "targets is 'true'"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"max_memory": -1}, "max_memory is -1"),
        ({"max_memory": "1GB"}, "max_memory is '1GB', but a number of at least 0 is expected"),
        ({"max_width": -1}, "max_width is -1"),
        ({"max_width": "wide"}, "max_width is 'wide', but a number of at least 0 is expected"),
        ({"min_rows": -1.0}, "min_rows is -1.0"),
        ({"min_rows": None}, "min_rows is None, but a number of at least 0 is expected"),
        ({"min_coverage": 1.1}, "min_coverage is 1.1, but a number from 0 to 1 is expected"),
        ({"min_coverage": "all"}, "min_coverage is 'all', but a number of at least 0 is expected"),
        ({"average": 1.0}, "average is 1.0, but a number from 0 to less than 1 is expected"),
        ({"average": -0.1}, "average is -0.1, but a number of at least 0"),
        ({"damping": -1.0}, "damping is -1.0, but a number of at least 0"),
        ({"damping": 0}, "damping is 0, but a positive number is expected"),
        ({"max_width": 1.5}, "max_width is 1.5"),
        ({"refresh_every": 1.5}, "refresh_every is 1.5, but a whole number of at least 1"),
        ({"min_coverage": -0.1}, "min_coverage is -0.1, but a number of at least 0"),
        ({"probes": -1}, "probes is -1, but a number of at least 0"),
        ({"probes": 0.5}, "probes is 0.5, but a whole number of at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        KroneckerFactors(**options)


def test_options_left_out_and_at_their_bounds() -> None:
    factors = KroneckerFactors()
    assert (factors.targets, factors.refresh_every, factors.average, factors.damping) == ("sampled", 3, 0.8, 1e-4)
    assert (factors.limits, factors.min_coverage, factors.probes) == (Limits(1536, None, 0.0), 0.0, 1)
    least: dict[str, Any] = {"refresh_every": 1, "average": 0, "max_width": 0, "max_memory": 0, "min_rows": 0}
    factors = KroneckerFactors(**least, probes=0, min_coverage=1.0, damping=5.0)
    assert (factors.refresh_every, factors.average, factors.damping) == (1, 0, 5.0)
    assert (factors.limits, factors.min_coverage) == (Limits(0, 0, 0), 1.0)
    assert KroneckerFactors(min_coverage=0, damping=1e-300).damping == 1e-300


def test_more_vectors_pay_where_there_is_negative_curvature() -> None:
    assert [KroneckerFactors().default_krylov_dim(bent) for bent in (True, False)] == [4, 1]


def test_four_lanczos_vectors_are_enough_by_default_and_one_without_negative_curvature() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(30, 2), torch.randn(50, 30)
    optimizer = SaddleFreeNewton(model.parameters(), previous_directions=0)
    for expected in (4, 1, 1):  # the loss is convex; before the first subspace nobody knows
        optimizer.step(lambda: F.mse_loss(model(x), x[:, :2].square()))
        assert optimizer.last_step is not None
        assert optimizer.last_step.subspace_dim == expected


def test_a_shortened_step_that_was_too_long_is_shortened_more_until_one_is_taken() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(20, 3, dtype=D)
    factors = refreshed(model, lambda: model(x).square().mean())
    long, short = (torch.full((1, 21), size, dtype=D) for size in (50.0, 1e-6))
    first, store = float(factors.shares(long).min()), BasisStore()
    allowed = []
    for step, accepted in ((long, False), (long, False), (short, False), (long, True), (long, True), (long, True)):
        factors.shares(step)
        factors.feedback(accepted=accepted, store=store)
        allowed.append(float(factors.shares(long).min()) / first)
    assert allowed == pytest.approx([1 / 4, 1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
    twin = KroneckerFactors()
    twin.load_state_dict(factors.state_dict())
    assert torch.equal(twin.shares(long), factors.shares(long))


@pytest.mark.parametrize("seed", range(6))
def test_no_start_is_too_far_for_gauss_newton_steps(seed: int) -> None:
    """On seven cases, factors of a few drawn targets point far away now and then."""
    case = make("mlp_classifier")
    optimizer = SaddleFreeNewton(case.parameters, curvature="gauss_newton", seed=seed)
    first = float(case.closure().detach())
    for _ in range(12):
        optimizer.step(case.pair)
    assert optimizer.last_step is not None
    assert optimizer.last_step.loss_after < 0.6 * first


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4)], ids=["rows", "sequences"])
def test_activations_in_place_change_no_factors(shape: tuple[int, ...]) -> None:
    """The output of a biased linear layer on sequences is a view, to which a change in place gives another node."""
    ends = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.ReLU(inplace), nn.Linear(5, 2)]
        model, inputs = nn.Sequential(*layers).double(), torch.randn(shape, dtype=torch.float64)
        optimizer = SaddleFreeNewton(model.parameters(), preconditioner=KroneckerFactors(model))
        optimizer.step(lambda model=model, inputs=inputs: F.mse_loss(model(inputs), inputs[..., :2]))
        assert optimizer.preconditioner.unfactored == ()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
