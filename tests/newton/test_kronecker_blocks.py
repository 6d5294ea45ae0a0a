"""Blocks against dense matrices in float64: what they observe, and the roots that act on parameters."""

from collections.abc import Callable

import pytest
import torch
from scipy.linalg import fractional_matrix_power
from torch import Tensor

from lightning_sfn.newton.kronecker_blocks import Block, BlockRoot, Signature

D = torch.float64
LIKE = torch.empty(0, dtype=D)
# The bias stands before the weight, so that its index is 0 and not merely positive.
SHAPES = [torch.Size([2]), torch.Size([2, 3]), torch.Size([4, 3]), torch.Size([2]), torch.Size([5])]
DENSE: Signature = ("dense", 1, 0)
BARE: Signature = ("dense", 1, -1)
EMBEDDING: Signature = ("embedding", 2, -1)
NORM: Signature = ("norm", 3, 0)
NUMBER: Signature = ("number", 4, -1)


def power(matrix: Tensor, exponent: float) -> Tensor:
    return torch.tensor(fractional_matrix_power(matrix.numpy(), exponent), dtype=D)


def definite(size: int, seed: int, scale: float = 1.0) -> Tensor:
    root = torch.randn(size, size, dtype=D, generator=torch.Generator().manual_seed(seed))
    return scale * (root @ root.T + 0.1 * torch.eye(size, dtype=D))


def applied(roots: BlockRoot, indices: list[int], *, inverse: bool = False) -> Tensor:
    """The map on the parameters of those indices, end to end, as a matrix; the others must stay as they are."""
    sizes = [SHAPES[i].numel() for i in indices]
    unit = torch.eye(sum(sizes), dtype=D)
    pieces = [torch.full((len(unit), *shape), 7.0, dtype=D) for shape in SHAPES]
    for index, columns in zip(indices, unit.split(sizes, 1), strict=True):
        pieces[index] = columns.reshape(-1, *SHAPES[index])
    roots.apply(pieces, -1 if inverse else 1)
    for index, shape in enumerate(SHAPES):
        assert pieces[index].shape == (len(unit), *shape)
        assert index in indices or bool((pieces[index] == 7.0).all())
    return torch.cat([pieces[i].flatten(1) for i in indices], 1)


# ------------------------------------------------------------------------------------------------ what is observed


@pytest.mark.parametrize(
    ("signature", "inputs", "outputs"),
    [
        (DENSE, (4, 4), (2, 2)),
        (BARE, (3, 3), (2, 2)),
        (EMBEDDING, (4,), (3, 3)),
        (NORM, (1,), (2, 2)),
        (("norm", 3, -1), (1,), (1, 2)),
        (NUMBER, (1,), (1, 1)),
    ],
)
def test_a_block_begins_at_zero_and_costs_its_factors_twice_and_a_scale_for_each_parameter(
    signature: Signature, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    block = Block.zeros(signature, SHAPES, LIKE)
    assert (block.inputs.shape, block.outputs.shape) == (inputs, outputs)
    assert block.inputs.dtype == block.outputs.dtype == D
    assert not block.outputs.any()
    assert bool(block.inputs.any()) == (signature[0] in ("norm", "number"))
    entries = torch.Size(inputs).numel() + torch.Size(outputs).numel()
    scales = 1 if signature == NUMBER else sum(SHAPES[i].numel() for i in signature[1:] if i >= 0)
    assert Block.cost(signature, SHAPES, itemsize=8) == 8 * (2 * entries + scales)


def test_the_cost_of_a_large_layer_is_known_without_making_its_factors() -> None:
    huge = [torch.Size([10**6, 10**6])]
    assert Block.cost(("dense", 0, -1), huge, itemsize=4) == 4 * 5 * 10**12


@pytest.mark.parametrize("signature", [DENSE, BARE])
def test_a_layer_sums_second_moments_over_its_uses(signature: Signature) -> None:
    block = Block.zeros(signature, SHAPES, LIKE)
    first, second = torch.randn(6, 3, dtype=D), torch.randn(2, 3, dtype=D)
    gradients = [torch.randn(6, 2, dtype=D), torch.randn(2, 2, dtype=D)]
    block.observe(first, gradients[0], 0.25)
    block.observe(second, gradients[1], 0.75)
    if signature == DENSE:
        first, second = (torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1) for x in (first, second))
    torch.testing.assert_close(block.inputs, 0.25 * first.T @ first / 6 + 0.75 * second.T @ second / 2)
    torch.testing.assert_close(block.outputs, sum(g.T @ g for g in gradients))


def test_a_table_counts_how_often_its_rows_are_used() -> None:
    block = Block.zeros(EMBEDDING, SHAPES, LIKE)
    first, second = torch.randn(4, 3, dtype=D), torch.randn(2, 3, dtype=D)
    block.observe(torch.tensor([0, 1, 1, 1]), first, 0.5)
    block.observe(torch.tensor([2, 2]), second, 0.5)
    assert block.inputs.tolist() == [0.125, 0.375, 0.5, 0.0]
    assert block.inputs.dtype == D
    torch.testing.assert_close(block.outputs, first.T @ first + second.T @ second)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("signature", [DENSE, BARE])
def test_a_shift_is_the_quadratic_mean_of_the_change_of_a_layers_outputs(signature: Signature, size: float) -> None:
    block, inputs = Block.zeros(signature, SHAPES, LIKE), torch.randn(6, 3, dtype=D)
    block.observe(inputs, torch.randn(6, 2, dtype=D), 1.0)
    steps = [size * torch.randn(4, *shape, dtype=D) for shape in SHAPES]
    changes = inputs @ steps[1].transpose(1, 2)
    if signature == DENSE:
        changes = changes + steps[0].unsqueeze(1)
    torch.testing.assert_close(block.shift(steps), changes.square().mean((1, 2)).sqrt())


def test_a_shift_of_a_table_is_that_of_the_rows_in_use() -> None:
    block, indices = Block.zeros(EMBEDDING, SHAPES, LIKE), torch.tensor([0, 1, 1, 1])
    block.observe(indices, torch.randn(4, 3, dtype=D), 1.0)
    steps = [torch.randn(2, *shape, dtype=D) for shape in SHAPES]
    torch.testing.assert_close(block.shift(steps), steps[2][:, indices].square().mean((1, 2)).sqrt())


@pytest.mark.parametrize("bias", [0, -1])
def test_what_acts_element_by_element_sums_squared_gradients(bias: int) -> None:
    block = Block.zeros(("norm", 3, bias), SHAPES, LIKE)
    uses = [(torch.randn(3, 2, dtype=D), torch.randn(3, 2, dtype=D)) for _ in range(2)]
    for inputs, gradients in uses:
        block.observe(inputs, gradients, 1.0)
    expected = [sum((x * g).square().sum(0) for x, g in uses), sum(g.square().sum(0) for _, g in uses)]
    torch.testing.assert_close(block.outputs, torch.stack(expected[: 2 if bias >= 0 else 1]))  # type: ignore[arg-type]


def test_the_magnitude_is_the_mean_of_the_diagonal_of_the_kronecker_product() -> None:
    block = Block(DENSE, definite(4, 1), definite(2, 2))
    assert block.magnitude == pytest.approx(float(torch.kron(block.outputs, block.inputs).diagonal().mean()))
    table = Block(EMBEDDING, torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=D), definite(3, 3))
    assert table.magnitude == pytest.approx(3.0 * float(table.outputs.diagonal().mean()))
    norm = Block(NORM, torch.ones(1, dtype=D), torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=D))
    assert norm.magnitude == pytest.approx(3.0)


# ------------------------------------------------------------------------------------------------ wide factors

WIDE = [  # signature, the most that a factor may be wide, shapes of the factors: a weight of 2 x 3 (4 with its bias)
    (DENSE, 3, (4,), (2, 2)),
    (DENSE, 1, (4,), (2,)),
    (BARE, 3, (3, 3), (2, 2)),
    (BARE, 2, (3,), (2, 2)),
    (EMBEDDING, 2, (4,), (3,)),
    (NORM, 0, (1,), (2, 2)),
]


@pytest.mark.parametrize(("signature", "max_width", "inputs", "outputs"), WIDE)
def test_factors_over_the_width_keep_their_diagonals_and_cost_no_more_than_these(
    signature: Signature, max_width: int, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    block, whole = Block.zeros(signature, SHAPES, LIKE, max_width), Block.zeros(signature, SHAPES, LIKE)
    assert (block.inputs.shape, block.outputs.shape) == (inputs, outputs)
    saved = sum(f.numel() - g.numel() for f, g in [(whole.inputs, block.inputs), (whole.outputs, block.outputs)])
    costs = [Block.cost(signature, SHAPES, 4, *width) for width in [(), (max_width,)]]
    assert costs[0] - costs[1] == 4 * 2 * saved


@pytest.mark.parametrize("max_width", [3, 1])
def test_a_wide_layer_observes_the_diagonals_of_its_second_moments(max_width: int) -> None:
    wide, whole = (Block.zeros(DENSE, SHAPES, LIKE, width) for width in (max_width, 9))
    for weight in (0.25, 0.75):
        inputs, gradients = torch.randn(6, 3, dtype=D), torch.randn(6, 2, dtype=D)
        wide.observe(inputs, gradients, weight)
        whole.observe(inputs, gradients, weight)
    torch.testing.assert_close(wide.inputs, whole.inputs.diagonal())
    torch.testing.assert_close(wide.outputs, whole.outputs if max_width == 3 else whole.outputs.diagonal())
    assert wide.magnitude == pytest.approx(whole.magnitude)


def test_a_wide_layers_shift_takes_its_inputs_as_uncorrelated() -> None:
    wide, whole = (Block.zeros(BARE, SHAPES, LIKE, width) for width in (2, 9))
    signs = torch.tensor([[1, 1, 1], [1, 1, -1], [1, -1, 1], [1, -1, -1]], dtype=D)  # orthogonal columns
    for block in (wide, whole):
        block.observe(signs * torch.tensor([1.0, 2.0, 3.0], dtype=D), torch.randn(4, 2, dtype=D), 1.0)
    steps = [torch.randn(4, *shape, dtype=D) for shape in SHAPES]
    torch.testing.assert_close(wide.shift(steps), whole.shift(steps))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("diagonal", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("signature", [BARE, EMBEDDING])
def test_roots_of_diagonal_factors_are_those_of_the_kronecker_product(
    signature: Signature, diagonal: str, inverse: bool
) -> None:
    rows, columns = SHAPES[signature[1]]
    a, s = (definite(columns, 1), definite(rows, 2)) if signature == BARE else (definite(rows, 1), definite(columns, 2))
    a = a.diagonal() if diagonal != "outputs" or signature == EMBEDDING else a
    s = s.diagonal() if diagonal != "inputs" else s
    whole = [factor if factor.dim() == 2 else torch.diag(factor) for factor in (a, s)]
    product = torch.kron(*(whole if signature == EMBEDDING else whole[::-1]))
    expected = power(product + 0.3 * torch.eye(rows * columns, dtype=D), 0.5 if inverse else -0.5)
    roots = Block(signature, a, s).root(0.3)
    torch.testing.assert_close(applied(roots, [signature[1]], inverse=inverse), expected)


# ------------------------------------------------------------------------------------------------ roots


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_roots_of_a_layer_are_those_of_the_damped_kronecker_product(inverse: bool, scale: float) -> None:
    """Weight row by row, then bias: the joined matrix has the bias as its last column."""
    a, s, damping, sign = definite(4, 1, scale), definite(2, 2), 0.3, 0.5 if inverse else -0.5
    order = [0, 1, 2, 4, 5, 6, 3, 7]
    expected = power(torch.kron(s, a) + damping * torch.eye(8, dtype=D), sign)[order][:, order]
    torch.testing.assert_close(applied(Block(DENSE, a, s).root(damping), [1, 0], inverse=inverse), expected)
    bare = Block(BARE, a[:3, :3], s).root(damping)
    assert applied(bare, [1], inverse=inverse).shape == (6, 6)
    product = applied(bare, [1]) @ applied(bare, [1], inverse=True)
    torch.testing.assert_close(product, torch.eye(6, dtype=D))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_roots_of_a_table_scale_its_rows_and_map_its_columns(inverse: bool) -> None:
    counts, s = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=D), definite(3, 3)
    matrix = applied(Block(EMBEDDING, counts, s).root(0.3), [2], inverse=inverse)
    damped = torch.kron(torch.diag(counts), s) + 0.3 * torch.eye(12, dtype=D)
    torch.testing.assert_close(matrix, power(damped, 0.5 if inverse else -0.5))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_roots_of_a_norm_scale_each_entry_by_its_own(inverse: bool) -> None:
    """A is one, so all of the damping belongs to S."""
    s, damping = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=D), 0.3
    roots = Block(NORM, torch.ones(1, dtype=D), s).root(damping)
    expected = (s.flatten() + damping) ** (0.5 if inverse else -0.5)
    torch.testing.assert_close(applied(roots, [3, 0], inverse=inverse), torch.diag(expected))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_root_of_a_number_scales_the_whole_tensor(inverse: bool) -> None:
    roots = Block(NUMBER, torch.ones(1, dtype=D), torch.full((1, 1), 0.7, dtype=D)).root(0.3)
    torch.testing.assert_close(applied(roots, [4], inverse=inverse), torch.eye(5, dtype=D))


@pytest.mark.parametrize("signature", [DENSE, BARE, EMBEDDING, NORM, NUMBER])
def test_the_square_is_the_root_applied_twice(signature: Signature) -> None:
    block = Block.zeros(signature, SHAPES, LIKE)
    for factor in (block.inputs, block.outputs):
        square = factor.dim() == 2 and factor.shape[0] == factor.shape[1] and signature in (DENSE, BARE, EMBEDDING)
        factor.copy_(definite(len(factor), 5) if square else torch.rand(factor.shape, dtype=D) + 0.5)
    pieces = [torch.randn(3, *shape, dtype=D) for shape in SHAPES]
    once = [piece.clone() for piece in pieces]
    block.root(0.2).apply(pieces, 2)
    for _ in range(2):
        block.root(0.2).apply(once, 1)
    for piece, other in zip(pieces, once, strict=True):
        torch.testing.assert_close(piece, other)


@pytest.mark.parametrize("signature", [DENSE, EMBEDDING])
def test_roots_have_the_dtype_of_the_factors(signature: Signature) -> None:
    block = Block.zeros(signature, SHAPES, LIKE.float())
    pieces = [torch.ones(1, *shape) for shape in SHAPES]
    block.root(0.25).apply(pieces, 1)
    torch.testing.assert_close(pieces[signature[1]], torch.full((1, *SHAPES[signature[1]]), 2.0))


@pytest.mark.parametrize("empty", [lambda a, s: (0 * a, s), lambda a, s: (a, 0 * s), lambda a, s: (0 * a, 0 * s)])
def test_a_factor_of_zeros_leaves_the_damping_alone(empty: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    a, s = empty(definite(3, 1), definite(2, 2))
    matrix = applied(Block(BARE, a, s).root(0.09), [1])
    torch.testing.assert_close(matrix, torch.eye(6, dtype=D) / 0.3)


def test_eigenvalues_that_rounding_made_negative_count_as_zero() -> None:
    """In float32 as in float64: the damping alone keeps the root finite."""
    root = Block(BARE, torch.diag(torch.tensor([1.0, -1e-9, 2.0])), torch.eye(2)).root(1e-18)
    assert root.scale.dtype == torch.float32
    assert float(root.scale.max()) == pytest.approx(1e9, rel=1e-3)
    table = Block(EMBEDDING, torch.tensor([1.0, -1e-9, 2.0, 1.0]), torch.eye(3)).root(1e-18)
    assert table.scale.dtype == torch.float32
    assert float(table.scale[1].max()) == pytest.approx(1e9, rel=1e-3)
    assert float(table.scale[0].max()) == pytest.approx(1.0)


@pytest.mark.parametrize(("width", "inputs", "outputs"), [(4, 2, 2), (3, 1, 2), (2, 1, 2), (1, 1, 1)])
def test_a_narrowed_block_keeps_the_diagonals_of_wider_factors(width: int, inputs: int, outputs: int) -> None:
    block = Block(DENSE, definite(4, 1), definite(2, 2), hidden=False)
    narrowed = block.narrowed(width)
    assert (narrowed.signature, narrowed.hidden) == (DENSE, False)
    for kept, dims, factor in ((narrowed.inputs, inputs, block.inputs), (narrowed.outputs, outputs, block.outputs)):
        assert torch.equal(kept, factor if dims == 2 else factor.diagonal())
    again = narrowed.narrowed(1)
    assert torch.equal(again.inputs, block.inputs.diagonal())
    assert torch.equal(again.outputs, block.outputs.diagonal())


def test_what_acts_element_by_element_is_as_narrow_as_it_gets() -> None:
    block = Block.zeros(NORM, SHAPES, LIKE)
    assert block.narrowed(0) is block


def test_a_lessened_root_is_that_of_so_many_times_the_curvature_along_each_eigenvector() -> None:
    root = Block(DENSE, definite(4, 1), definite(2, 2)).root(0.1)
    excess = torch.tensor([[1.0, 4.0, 9.0, 16.0], [25.0, 1.0, 4.0, 1.0]], dtype=D)
    lessened = root.lessened(excess)
    torch.testing.assert_close(lessened.scale**-2, root.scale**-2 * excess)
    assert lessened.signature == root.signature
    assert lessened.left is root.left
    assert lessened.right is root.right
