from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_sfn.newton import HessianOperator, KroneckerFactors, Objective
from lightning_sfn.newton.attention import attended
from lightning_sfn.newton.weight_uses import WatchingWeights

D = torch.float64
L, S, N, E, H = 4, 5, 3, 6, 2  # length of the target, of the source, batch, width, heads


class Replacing(TorchFunctionMode):
    """Puts the written-out attention in the place of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = attended(func, args, kwargs or {}, F.linear)
        self.replaced += results is not None
        return func(*args, **(kwargs or {})) if results is None else results


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, requires_grad=True)


def myself(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    x = tensor(*shape)
    return x, x, x


def other() -> tuple[Tensor, Tensor, Tensor]:
    memory = tensor(S, N, E)
    return tensor(L, N, E), memory, memory


def query_as_value() -> tuple[Tensor, Tensor, Tensor]:
    x = tensor(L, N, E)
    return x, tensor(L, N, E), x


def padding(*shape: int) -> Tensor:
    """True, in a mask of truth values, in the last two places."""
    mask = torch.zeros(*shape, dtype=torch.bool)
    mask[..., -2:] = True
    return mask


# Name: arguments of the module; query, key and value; arguments of a call.
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[], tuple[Tensor, Tensor, Tensor]], dict[str, Any]]] = {
    "self": ({}, lambda: myself(L, N, E), {}),
    "without weights": ({}, lambda: myself(L, N, E), {"need_weights": False}),
    "weights of each head": ({}, other, {"average_attn_weights": False}),
    "batch first": ({"batch_first": True}, lambda: myself(N, L, E), {}),
    "cross": ({}, other, {"need_weights": False}),
    "three tensors": ({}, lambda: (tensor(L, N, E), tensor(S, N, E), tensor(S, N, E)), {}),
    "query as value": ({}, query_as_value, {}),
    "without biases": ({"bias": False}, other, {}),
    "separate": ({"kdim": 3, "vdim": 5}, lambda: (tensor(L, N, E), tensor(S, N, 3), tensor(S, N, 5)), {}),
    "separate without biases": (
        {"kdim": 3, "vdim": 5, "bias": False},
        lambda: (tensor(L, N, E), tensor(S, N, 3), tensor(S, N, 5)),
        {"need_weights": False},
    ),
    "batch of one": ({}, lambda: myself(L, 1, E), {}),
    "no batch": ({}, lambda: myself(L, E), {}),
    "no batch, without weights": ({}, lambda: myself(L, E), {"need_weights": False}),
    "no batch, weights of each head": ({"batch_first": True}, lambda: myself(L, E), {"average_attn_weights": False}),
    "no batch, masks": (
        {},
        lambda: myself(L, E),
        {"key_padding_mask": padding(L), "attn_mask": torch.eye(L, dtype=torch.bool).repeat(H, 1, 1)},
    ),
    "mask of numbers": ({}, other, {"attn_mask": torch.linspace(-2, 2, L * S, dtype=D).view(L, S)}),
    "mask of truth values": ({}, other, {"attn_mask": padding(L, S), "need_weights": False}),
    "mask for each head": ({}, other, {"attn_mask": torch.linspace(-2, 2, N * H * L * S, dtype=D).view(-1, L, S)}),
    "mask for each head, without weights": (
        {},
        other,
        {"attn_mask": torch.linspace(-2, 2, N * H * L * S, dtype=D).view(-1, L, S), "need_weights": False},
    ),
    "padding": ({}, other, {"key_padding_mask": padding(N, S)}),
    "padding of numbers": (
        {},
        other,
        {"key_padding_mask": torch.linspace(-2, 2, N * S, dtype=D).view(N, S), "need_weights": False},
    ),
    "both masks": ({}, other, {"key_padding_mask": padding(N, S), "attn_mask": torch.eye(L, S, dtype=torch.bool)}),
    "causal": ({}, lambda: myself(L, N, E), {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True}),
    "causal, without weights": (
        {},
        lambda: myself(L, N, E),
        {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True, "need_weights": False},
    ),
    "a false hint": ({}, other, {"attn_mask": padding(L, S), "is_causal": True}),
    "a false hint, without weights": (
        {},
        other,
        {"attn_mask": padding(L, S), "is_causal": True, "need_weights": False},
    ),
    "a false hint and padding": (
        {},
        other,
        {
            "attn_mask": torch.eye(L, S, dtype=torch.bool),
            "key_padding_mask": padding(N, S),
            "is_causal": True,
            "need_weights": False,
        },
    ),
}


def attention(**options: Any) -> nn.MultiheadAttention:
    """With biases that are not zero."""
    layer = nn.MultiheadAttention(E, H, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def everything(layer: Callable[..., Any], sources: tuple[Tensor, ...], wanted: list[Tensor], **call: Any) -> list[Any]:
    """Outputs, weights, and the gradients of something of both."""
    output, weights = layer(*sources, **call)
    loss = output.square().sum() + (0 if weights is None else weights.pow(3).sum())
    return [output, weights, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_written_out_gives_what_pytorchs_gives(name: str) -> None:
    options, sources, call = VARIANTS[name]
    layer, given = attention(**options), sources()
    wanted = [*{id(source): source for source in given}.values(), *layer.parameters()]
    with Replacing() as mode:
        ours = everything(layer, given, wanted, **call)
    assert mode.replaced == 1
    for mine, theirs in zip(ours, everything(layer, given, wanted, **call), strict=True):
        torch.testing.assert_close(mine, theirs)


def direct(layer: nn.MultiheadAttention, **call: Any) -> Callable[..., Any]:
    """PyTorch's function itself, which the module hands canonical masks and no more."""
    ours = (layer.in_proj_weight, layer.in_proj_bias, None, None, False, call.pop("dropout_p", 0.0))
    return lambda query, key, value, **more: F.multi_head_attention_forward(
        query, key, value, E, H, *ours, layer.out_proj.weight, layer.out_proj.bias, **call, **more
    )


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_truth_values_may_come_as_they_are(need_weights: bool) -> None:
    function = direct(attention(), need_weights=need_weights, attn_mask=torch.eye(L, S, dtype=torch.bool))
    sources = other()
    call = {"key_padding_mask": padding(N, S)}
    with Replacing() as mode:
        ours = everything(function, sources, [*sources[:2]], **call)
    assert mode.replaced == 1
    for mine, theirs in zip(ours, everything(function, sources, [*sources[:2]], **call), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_pytorchs_draws_and_in_training_only(need_weights: bool) -> None:
    layer, sources = attention(dropout=0.5), other()

    def run(*, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        return everything(layer, sources, [*sources[:2]], need_weights=need_weights)

    with Replacing() as mode:
        ours, again = run(seed=1), run(seed=2)
    assert mode.replaced == 2
    assert not torch.equal(ours[0], again[0])
    for mine, theirs in zip(ours, run(seed=1), strict=True):
        torch.testing.assert_close(mine, theirs)

    layer.eval()
    with Replacing():
        assert torch.equal(run(seed=1)[0], run(seed=2)[0])


def test_appended_or_given_keys_and_other_functions_are_left_to_pytorch() -> None:
    x, static = tensor(L, N, E), tensor(N * H, L, E // H)
    layer = attention()
    with Replacing() as mode:
        attention(add_bias_kv=True)(x, x, x)
        attention(add_zero_attn=True)(x, x, x)
        direct(layer, static_k=static)(x, x, x)
        direct(layer, static_v=static)(x, x, x)
        F.linear(x, layer.out_proj.weight)
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            direct(layer, is_causal=True)(x, x, x)
        assert mode.replaced == 0
        layer(x, x, x)
    assert mode.replaced == 1


# ---------------------------------------------------------------------------------------------- as factors see it


def refreshed(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> KroneckerFactors:
    factors = KroneckerFactors(model, probes=0, **options)  # kernels of attention may have no second derivative
    factors.refresh(HessianOperator(Objective([loss]), model.parameters()), torch.Generator().manual_seed(0))
    return factors


@pytest.mark.parametrize("name", ["self", "cross", "three tensors", "query as value", "separate", "no batch"])
def test_the_uses_of_a_weight_make_its_gradient(name: str) -> None:
    """The gradient of a weight is the sum over places of output gradient times input, and no use is missed."""
    options, sources, call = VARIANTS[name]
    layer, given = attention(**options), sources()
    weights = {id(p): p for p in layer.parameters() if p.dim() == 2}
    with WatchingWeights(layer.parameters(), None) as watching:
        loss = layer(*given, **call)[0].pow(3).sum()
    assert {id(use.weight) for use in watching.uses} == set(weights)
    sums = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for use, gradient in zip(watching.uses, torch.autograd.grad(loss, [u.output for u in watching.uses]), strict=True):
        sums[id(use.weight)] += use.rows(gradient).T @ use.inputs
    by_weight = torch.autograd.grad(layer(*given, **call)[0].pow(3).sum(), list(weights.values()))
    for mine, theirs in zip(sums.values(), by_weight, strict=True):
        torch.testing.assert_close(mine, theirs)


class ByHand(nn.Module):
    """Attention without masks, with a product for each of its three projections."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        pieces = zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
        self.projections = nn.ModuleList(nn.Linear(E, E) for _ in range(3))
        for projection, (weight, bias) in zip(self.projections, pieces, strict=True):
            projection.weight = nn.Parameter(weight.detach().clone())
            projection.bias = nn.Parameter(bias.detach().clone())
        self.out = layer.out_proj
        self.projected: list[Tensor] = []
        self.mixed = torch.empty(0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sources = zip(self.projections, (query, key, value), strict=True)
        self.projected = [projection(source) for projection, source in sources]
        rows = []
        for case in range(N):
            heads = []
            for head in range(H):
                own = slice(head * E // H, (head + 1) * E // H)
                q, k, v = (projected[:, case, own] for projected in self.projected)
                heads.append((q @ k.T / (E // H) ** 0.5).softmax(1) @ v)
            rows.append(torch.cat(heads, 1))
        self.mixed = torch.stack(rows, 1)
        return self.out(self.mixed)


@pytest.mark.parametrize("name", ["self", "cross", "three tensors"])
def test_a_packed_weight_has_the_factors_of_one_layer_with_three_outputs(name: str) -> None:
    """Written by hand: inputs of all places, and outer products of the gradients at each place."""
    layer, sources, target = attention(), VARIANTS[name][1](), torch.randn(L, N, E, dtype=D)
    distinct = {id(source): source.detach() for source in sources}
    query, key, value = (distinct[id(source)] for source in sources)
    factors = refreshed(layer, lambda: F.mse_loss(layer(query, key, value)[0], target), targets="given")
    assert factors.unfactored == ()
    packed, out = factors._blocks
    assert [block.signature for block in factors._blocks] == [("dense", 0, 1), ("dense", 2, 3)]

    by_hand = ByHand(layer)
    loss = F.mse_loss(by_hand(query, key, value), target)
    gradients = torch.autograd.grad(loss, by_hand.projected)
    rows = torch.cat([source.flatten(0, 1) for source in distinct.values()])
    joined = torch.cat([rows, torch.ones(len(rows), 1, dtype=D)], 1)
    torch.testing.assert_close(packed.inputs, joined.T @ joined / len(rows))
    q, k, v = (gradient.flatten(0, 1) for gradient in gradients)
    expected = torch.block_diag(q.T @ q, k.T @ k, v.T @ v)
    if key is value:
        kv = torch.cat([k, v], 1)
        expected[E:, E:] = kv.T @ kv
    if query is key:
        qkv = torch.cat([q, k, v], 1)
        expected = qkv.T @ qkv
    torch.testing.assert_close(packed.outputs, expected)

    mixed = torch.cat([by_hand.mixed.detach().flatten(0, 1), torch.ones(L * N, 1, dtype=D)], 1)
    torch.testing.assert_close(out.inputs, mixed.T @ mixed / (L * N))
    by_output = (2 / (L * N * E)) * (by_hand(query, key, value).detach() - target).flatten(0, 1)
    torch.testing.assert_close(out.outputs, by_output.T @ by_output)


def test_separate_weights_have_the_factors_of_linear_layers_and_their_joint_bias_one_number() -> None:
    layer, (query, key, value) = attention(kdim=3, vdim=5), VARIANTS["separate"][1]()
    factors = refreshed(layer, lambda: layer(query, key, value)[0].square().mean())
    assert factors.unfactored == ("in_proj_bias",)
    assert [block.signature[0] for block in factors._blocks] == ["dense", "dense", "dense", "number", "dense"]
    for block, source in zip(factors._blocks, (query, key, value), strict=False):
        rows = source.detach().flatten(0, 1)
        torch.testing.assert_close(block.inputs, rows.T @ rows / len(rows))


def encoder(**options: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.TransformerEncoderLayer(E, H, dim_feedforward=7, dropout=0.1, **options)
    x, hidden = torch.randn(L, N, E), padding(N, L)
    return model, lambda: model(x.to(model.linear1.weight), src_key_padding_mask=hidden)


def decoder(**options: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.TransformerDecoderLayer(E, H, dim_feedforward=7, dropout=0.1, **options)
    x, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    return model, lambda: model(x, memory, tgt_mask=mask, tgt_is_causal=True)


def stack() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Batch first, with padding: what the fast path of inference would take."""
    layer = nn.TransformerEncoderLayer(E, H, dim_feedforward=7, batch_first=True)
    model, x, hidden = nn.TransformerEncoder(layer, 2), torch.randn(N, L, E), padding(N, L)
    return model, lambda: model(x, src_key_padding_mask=hidden)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "build", [encoder, partial(encoder, norm_first=True, bias=False), decoder, partial(decoder, norm_first=True), stack]
)
def test_every_parameter_of_transformer_layers_has_factors(build: Callable[..., Any], training: bool) -> None:
    model, outputs = build()
    model.train(training)
    target = torch.randn_like(outputs())
    factors = refreshed(model, lambda: F.mse_loss(outputs(), target))
    assert factors.unfactored == ()
    kinds = [block.signature[0] for block in factors._blocks]
    assert "number" not in kinds
    assert all(bool(block.outputs.isfinite().all()) and block.magnitude > 0 for block in factors._blocks)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_parameters_of_other_attention_are_scaled_by_one_number_and_named(options: dict[str, bool]) -> None:
    model = nn.ModuleDict({"into": nn.Linear(E, E), "attention": attention(**options)}).double()
    x = torch.randn(L, N, E, dtype=D)

    def loss() -> Tensor:
        hidden = model["into"](x)
        return model["attention"](hidden, hidden, hidden)[0].square().mean()

    factors = refreshed(model, loss)
    assert factors.unfactored == tuple(f"attention.{name}" for name, _ in model["attention"].named_parameters())
    assert [block.signature[0] for block in factors._blocks if block.signature[1] == 0] == ["dense"]


def test_checkpointed_attention_is_left_alone() -> None:
    """It is evaluated again in the backward pass, unwatched, and must then do the same."""
    model, _ = encoder()
    x = torch.randn(L, N, E, requires_grad=True)
    factors = refreshed(model, lambda: F.mse_loss(checkpoint(model, x, use_reentrant=False), torch.zeros(L, N, E)))
    assert factors.unfactored == tuple(f"self_attn.{name}" for name, _ in model.self_attn.named_parameters())


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_factors_in_single_precision_and_under_autocast_are_about_those_in_double(
    autocast: bool, tolerance: float
) -> None:
    model, outputs = encoder()
    model.eval()
    target = torch.randn(L, N, E)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return F.mse_loss(outputs(), target.to(model.linear1.weight))

    ours = refreshed(model, loss, targets="given")
    assert ours.unfactored == ()
    autocast = False
    model.double()
    for mine, exact in zip(ours._blocks, refreshed(model, loss, targets="given")._blocks, strict=True):
        assert mine.outputs.dtype == torch.float32
        for part, theirs in ((mine.inputs, exact.inputs), (mine.outputs, exact.outputs)):
            assert float((part - theirs).norm() / theirs.norm()) < tolerance
