import numpy as np
import pytest
import torch
from torch import nn

from lightning_sfn.newton import FlatParameters

from .cases import bits


def test_read_lays_parameters_end_to_end() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    flat = FlatParameters(module.parameters())
    expected = torch.nn.utils.parameters_to_vector(module.parameters())
    assert flat.size == 13
    assert torch.equal(flat.read(), expected)
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in flat.unflatten(expected)]), expected)


def test_write_is_bit_exact_for_every_bit_pattern() -> None:
    values = torch.tensor([-0.0, 1e-45, 3.4e38, -1.5, float("inf"), 1.1754944e-38])
    parameter = nn.Parameter(torch.ones(2, 3))
    flat = FlatParameters([parameter])
    flat.write(values)
    assert bits([parameter]) == bits([values])
    assert bits([flat.read()]) == bits([values])


def test_read_is_a_copy() -> None:
    parameter = nn.Parameter(torch.ones(3))
    flat = FlatParameters([parameter])
    flat.read().zero_()
    assert torch.equal(parameter, torch.ones(3))


def test_write_keeps_identity_storage_and_graph_state() -> None:
    parameter = nn.Parameter(torch.ones(3))
    pointer = parameter.data_ptr()
    FlatParameters([parameter]).write(torch.zeros(3))
    assert parameter.data_ptr() == pointer
    assert parameter.is_leaf
    assert parameter.requires_grad


def test_frozen_parameters_are_left_out() -> None:
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.zeros(3))
    flat = FlatParameters([frozen, free])
    flat.write(torch.full((3,), 5.0))
    assert flat.size == 3
    assert torch.equal(frozen, torch.ones(2))


def test_tied_parameters_count_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    every = [p for part in module for p in part.parameters()]
    assert len(every) == 4
    assert FlatParameters(every).size == 8


def test_non_contiguous_parameters_are_read_and_written_in_logical_order() -> None:
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    assert not parameter.is_contiguous()
    flat = FlatParameters([parameter])
    assert flat.read().tolist() == [0, 3, 1, 4, 2, 5]
    flat.write(torch.arange(6.0))
    assert parameter.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert parameter.stride() == (1, 3)


def test_scalar_and_empty_parameters() -> None:
    flat = FlatParameters([nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))])
    assert flat.read().tolist() == [2.0]
    assert [piece.shape for piece in flat.unflatten(torch.ones(1))] == [(), (0, 3)]


def test_missing_gradients_are_zeros() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    second.grad = torch.tensor([3.0, 4.0])
    assert FlatParameters([first, second]).gradients().tolist() == [0, 0, 3, 4]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ([], ["No parameter", "requires_grad=True"]),
        ([nn.Parameter(torch.ones(1), requires_grad=False)], ["No parameter", "requires_grad=True"]),
        ([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))], ["cpu, meta", "one device"]),
        ([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())], ["float32, torch.float64", ".double()"]),
        ([nn.Parameter(torch.ones(1, dtype=torch.complex64))], ["complex64", "float32 or float64"]),
        ([nn.Parameter(torch.ones(1, dtype=torch.float16))], ["float16", "bf16-mixed"]),
        ([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))], ["bfloat16", "bf16-mixed"]),
        ([torch.ones(2, 2).to_sparse().requires_grad_()], ["sparse", "dense layer"]),
    ],
)
def test_unfit_parameters_are_refused_in_one_sentence(parameters: list[torch.Tensor], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as refusal:
        FlatParameters(parameters)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    sentence = r"^A gradient is sparse, .* with sparse=False \(nn\.Embedding, nn\.EmbeddingBag\)\.$"
    with pytest.raises(ValueError, match=sentence):
        FlatParameters(embedding.parameters()).gradients()


def test_learning_rates_are_one_number_or_one_for_each_parameter() -> None:
    """A frozen parameter's rate does not count."""
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    flat = FlatParameters([weight, bias, frozen])
    same = [{"params": [weight], "lr": 0.5}, {"params": [bias], "lr": 0.5}, {"params": [frozen], "lr": 9.0}]
    assert flat.learning_rates(same) == 0.5
    own = flat.learning_rates([{"params": [weight], "lr": 0.5}, {"params": [bias], "lr": torch.tensor(2.0)}])
    assert isinstance(own, torch.Tensor)
    assert own.tolist() == [0.5, 0.5, 0.5, 0.5, 2.0]


def test_zeros_take_dtype_and_place_of_the_parameters() -> None:
    double = FlatParameters([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    assert double.gradients().dtype == torch.float64
    nowhere = FlatParameters([nn.Parameter(torch.ones(2, device="meta"))])
    assert nowhere.device.type == nowhere.gradients().device.type == "meta"


@pytest.mark.parametrize("tensors", [[torch.zeros(2)], [torch.zeros(2), torch.zeros(3), torch.zeros(1)]])
def test_as_many_tensors_as_parameters_are_laid_end_to_end(tensors: list[torch.Tensor]) -> None:
    flat = FlatParameters([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="zip"):
        flat.flatten(tensors)


@pytest.mark.parametrize(("dtype", "integers"), [(torch.float32, "int32"), (torch.float64, "int64")])
def test_the_checksum_is_the_sum_of_the_bit_patterns(dtype: torch.dtype, integers: str) -> None:
    """By numpy; the last bit of any entry shows."""
    rows = [torch.randn(3, 4, dtype=dtype).T, torch.tensor([1.5, -0.0], dtype=dtype)]
    parameters = [nn.Parameter(row) for row in rows]
    patterns = [np.ascontiguousarray(row.numpy()).view(integers).astype(object).sum() for row in rows]
    flat = FlatParameters(parameters)
    assert (flat.checksum() - sum(patterns)) % 2**64 == 0
    before = flat.checksum()
    with torch.no_grad():
        parameters[1][0] = torch.nextafter(parameters[1][0], parameters[1][0] + 1)
    assert flat.checksum() != before
