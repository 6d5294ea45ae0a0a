import re

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


def test_a_scalar_is_a_parameter_and_an_empty_tensor_is_none() -> None:
    flat = FlatParameters([nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(2.0))])
    assert flat.read().tolist() == [2.0]
    assert [piece.shape for piece in flat.unflatten(torch.ones(1))] == [()]


def test_missing_gradients_are_zeros() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    second.grad = torch.tensor([3.0, 4.0])
    assert FlatParameters([first, second]).gradients().tolist() == [0, 0, 3, 4]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ([], ["No parameter requires", "parameter with requires_grad=True."]),
        ([nn.Parameter(torch.empty(0, 3))], ["empty ones do not count"]),
        (
            [nn.Parameter(torch.ones(1), requires_grad=False)],
            ["No parameter requires", "parameter with requires_grad=True."],
        ),
        ([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))], ["cpu, meta", "one device"]),
        ([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())], ["float32, torch.float64", ".double()"]),
        ([nn.Parameter(torch.ones(1, dtype=torch.complex64))], ["complex64", "float32 or float64", "view_as_complex"]),
        ([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, dtype=torch.complex64))], ["is complex"]),
        ([nn.UninitializedParameter()], ["not initialized yet", "run the model once"]),
        ([nn.Parameter(torch.ones(1, dtype=torch.float16))], ["float16", "bf16-mixed"]),
        ([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))], ["bfloat16", "bf16-mixed"]),
        ([torch.ones(2, 2).to_sparse().requires_grad_()], ["A parameter is sparse", "dense layer"]),
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


def test_groups_of_an_optimizer_are_read_in_order_and_a_tied_weight_once() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((1,), 3.0))
    flat = FlatParameters.of_groups([{"params": [second]}, {"params": [first, second]}])
    assert flat.read().tolist() == [3, 1, 1]


@pytest.mark.parametrize("weight", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("given", [True, False])
def test_weighted_tensors_add_up_to_the_sum_of_their_vectors(weight: float, given: bool) -> None:
    """Where the first of them goes is told or new; the tensors themselves are left as they are."""
    flat = FlatParameters([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))])
    tensors = [[torch.randn(2, 2), torch.randn(3)], [None, torch.randn(3)], [torch.randn(2, 2), None]]
    copies = [[None if t is None else t.clone() for t in each] for each in tensors]
    room = torch.full((7,), torch.nan) if given else None
    total = first = flat.accumulate(None, tensors[0], weight, room)
    assert not given or first is room
    for each in tensors[1:]:
        total = flat.accumulate(total, each, 3.0)
    assert total is first
    vectors = [
        torch.cat([torch.zeros(4 - i) if t is None else t.reshape(-1) for i, t in enumerate(each)]) for each in tensors
    ]
    torch.testing.assert_close(total, weight * vectors[0] + 3 * vectors[1] + 3 * vectors[2])
    for each, copy in zip(tensors, copies, strict=True):
        assert all(t is None or torch.equal(t, c) for t, c in zip(each, copy, strict=True))


def test_one_tensor_is_not_the_sum_that_begins_with_it() -> None:
    flat = FlatParameters([nn.Parameter(torch.ones(3))])
    tensor = torch.ones(3)
    flat.accumulate(flat.accumulate(None, [tensor], 1.0), [tensor], 1.0)
    assert tensor.tolist() == [1, 1, 1]


def test_the_sum_of_gradients_with_a_graph_has_none() -> None:
    parameter = nn.Parameter(torch.ones(3))
    flat, gradient = FlatParameters([parameter]), parameter * 2
    total = flat.accumulate(None, [gradient], 0.5)
    assert not flat.accumulate(total, [gradient], 0.5).requires_grad
    assert total.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(2, 3), (), (4,)], "3 trainable parameters of float32 (2x3, 1, 4)"),
        ([(1,)] * 8, "8 trainable parameters of float32 (1, 1, 1, 1, 1, 1, 1, 1)"),
    ],
)
def test_a_few_parameters_are_described_by_number_dtype_and_shapes(shapes: list[tuple[int, ...]], words: str) -> None:
    flat = FlatParameters([nn.Parameter(torch.ones(shape)) for shape in shapes])
    assert flat.description == words
    assert flat.shapes == tuple(shapes)


def test_many_parameters_are_described_by_the_first_shapes_and_a_digest_of_all() -> None:
    def described(last: int) -> str:
        shapes = [(2,)] * 8 + [(last, 3)]
        return FlatParameters([nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]).description

    pattern = r"^9 trainable parameters of float64 \(2, 2, 2, 2, 2, 2, 2, 2, \.\.\. \(digest [0-9a-f]{8}\)\)$"
    assert re.match(pattern, described(4))
    assert described(4) == described(4) != described(5)


def test_a_module_in_place_of_its_parameters_is_refused() -> None:
    message = (
        "The parameters were given as a module (Linear), but tensors are expected: pass its parameters(), as in "
        "model.parameters()."
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        FlatParameters(nn.Linear(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_random_vectors_have_the_parameters_shape_and_come_from_the_generator(dtype: torch.dtype) -> None:
    flat = FlatParameters([nn.Parameter(torch.ones(2, 3, dtype=dtype)), nn.Parameter(torch.ones(4, dtype=dtype))])
    before = torch.get_rng_state()
    drawn = flat.random(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.randn(10, dtype=dtype, generator=torch.Generator().manual_seed(3)))
