"""Inside, everything is in the wanted precision; outside, nothing has ever happened."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_sfn import HessianSpectrum
from lightning_sfn.trainer.precision import cast, curvature_dtype, in_precision

from .modules import Fitting, make_trainer, regression_loader

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "bits", "expected"), [(F32, 32, F32), (F32, 64, F64), (BF16, 32, F32), (BF16, 64, F64), (F64, 32, F64)]
)
def test_wanted_precision_or_that_of_the_parameters_if_it_is_more(
    dtype: torch.dtype, bits: int, expected: torch.dtype
) -> None:
    assert curvature_dtype(nn.Linear(2, 2).to(dtype), bits) == expected


def test_one_wide_parameter_widens_all_unless_it_is_frozen() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    assert curvature_dtype(module, 32) == F64
    module[1].requires_grad_(False)
    assert curvature_dtype(module, 32) == F32


def test_cast_takes_nested_data_and_leaves_integers_alone() -> None:
    labels, mask = torch.arange(3), torch.tensor([True, False])
    batch = {"x": torch.tensor([0.1]), "rest": (labels, [mask, "name", None, 3])}
    array, indices = np.float32([0.1]), np.arange(3)
    converted = cast(batch, F64)
    assert converted["x"].dtype == F64
    assert converted["x"].item() == torch.tensor(0.1).double().item()
    assert converted["rest"][0] is labels
    assert converted["rest"][1][0] is mask
    assert converted["rest"][1][1:] == ["name", None, 3]
    assert batch["x"].dtype == F32
    assert cast(array, F64).dtype == np.float64
    assert cast(array, F32) is array
    assert cast([indices], F64)[0] is indices


def test_nothing_is_narrowed() -> None:
    """Seconds since 1970 do not fit into float32, and a loss that reads them is another one without them."""
    module = nn.Linear(1, 1)
    module.register_buffer("epoch", torch.tensor(1_700_000_001.0, dtype=F64))
    assert cast(torch.tensor(1_700_000_001.0, dtype=F64), F32).item() == 1_700_000_001.0
    with in_precision(module, F32):
        assert module.epoch.item() == 1_700_000_001.0


class Tied(nn.Module):
    """A weight used twice, a frozen layer, buffers of several kinds, one of them missing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.tanh(self.first(x)))) + self.frozen(x)


class Recurrent(nn.Module):
    """Recurrent layers keep their weights in a list of their own as well."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(3, 3, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(0))[0]  # one sequence


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "rnn": lambda: Recurrent(nn.RNN),
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "weight norm": lambda: weight_norm(nn.Linear(3, 3)),
    "spectral norm": lambda: spectral_norm(nn.Linear(3, 3)).eval(),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True),
}


@pytest.fixture(params=sorted(MODULES))
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def rows() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(4))


def accumulator(parameter: Tensor) -> Any:
    """The node that adds to `.grad`, on which data-parallel training hangs its hooks."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def flat_weights(module: nn.Module) -> list[int]:
    return [id(weight) for m in module.modules() if isinstance(m, nn.RNNBase) for weight in m._flat_weights]


def identity(module: nn.Module) -> list[Any]:
    """Objects, storages, bits and versions of all parameters and buffers, and of the gradients."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    seen: list[Any] = [flat_weights(module), list(module.state_dict())]
    for name, tensor in tensors:
        gradient = tensor.grad
        seen.append((name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor._version))
        seen.append(tensor.detach().numpy().tobytes())
        seen.append(None if gradient is None else (id(gradient), gradient.data_ptr(), gradient.numpy().tobytes()))
    return seen


@pytest.mark.parametrize("raises", [False, True])
def test_originals_are_untouched_also_when_the_body_raises(module: nn.Module, raises: bool) -> None:
    module(rows()).square().sum().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    nodes, before = [accumulator(p) for p in trained], identity(module)
    calls: list[int] = []
    handles = [p.register_post_accumulate_grad_hook(lambda _: calls.append(0)) for p in trained]
    try:
        with in_precision(module, F64):
            loss = module(rows().double()).square().sum()
            torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
            if raises:
                raise ArithmeticError
    except ArithmeticError:
        assert raises
    if "norm" not in dict(module.named_children()):  # batch norm counts its batches in place, an isolated step does not
        assert identity(module) == before
    assert all(accumulator(p) is node for p, node in zip(trained, nodes, strict=True))
    assert calls == []
    module(rows()).square().sum().backward()
    assert len(calls) == len(handles)


def test_inside_the_module_is_the_same_function_in_float64(module: nn.Module) -> None:
    reference = type(module)() if isinstance(module, Tied) else None
    names = [name for name, _ in module.named_parameters()]
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    single = module(rows())
    module.load_state_dict(kept)  # as batch norm found it
    with in_precision(module, F64):
        assert [name for name, _ in module.named_parameters()] == names
        assert list(module.state_dict()) == list(kept)
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == (F64 if kept[name].is_floating_point() else kept[name].dtype)
            assert torch.equal(tensor, kept[name].to(tensor.dtype))
        inside = module(rows().double())
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(inside.square().sum(), trained)
    assert inside.dtype == F64
    assert all(g.dtype == F64 for g in gradients)
    assert sum(bool(g.abs().sum() > 0) for g in gradients) == len(trained)
    torch.testing.assert_close(inside.float(), single, rtol=1e-4, atol=1e-5)
    if reference is not None:
        reference.load_state_dict(kept)
        torch.testing.assert_close(inside, reference.double()(rows().double()), rtol=1e-12, atol=1e-14)


def test_tied_weights_stay_tied_and_frozen_ones_frozen() -> None:
    module = Tied()
    count = len(list(module.parameters()))
    with in_precision(module, F64):
        assert module.first.weight is module.second.weight
        assert len(list(module.parameters())) == count
        assert [p.requires_grad for p in module.frozen.parameters()] == [False, False]
        assert module.nothing is None
        assert module.hidden.dtype == F64
        assert module.norm.num_batches_tracked.dtype == torch.int64
    assert module.first.weight is module.second.weight


def test_nothing_happens_where_the_precision_is_there_already() -> None:
    module = Tied()
    before = identity(module)
    with in_precision(module, F32):
        assert identity(module) == before
    assert identity(module) == before


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2).to(dtype)
    weight = module.weight
    with in_precision(module, F32):
        assert module.weight.dtype == F32
        assert torch.equal(module.weight, weight.float())
    assert module.weight is weight


class Carrying(Fitting):
    """Hands the hidden state of a recurrent layer from batch to batch, and keeps a scale as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.hidden: Tensor | None = None
        self.scale = torch.full((3,), 2.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0] @ torch.diag(self.scale)
        output, hidden = self.recurrent(x[:, None], self.hidden)
        self.hidden = hidden.detach()
        return F.mse_loss(self.net(output[:, 0]), batch[1])


def test_tensors_that_are_plain_attributes_are_converted_along_and_put_back() -> None:
    callback, module = HessianSpectrum(precision=64, log=False, strict=True), Carrying()
    make_trainer(2, callbacks=[callback]).fit(module, regression_loader())
    assert callback.last is not None
    assert callback.last.lambda_max > 0
    assert module.hidden is not None
    assert (module.hidden.dtype, module.scale.dtype) == (torch.float32, torch.float32)
